"""What a training waits for before its first step."""

from __future__ import annotations

import json
import subprocess
import sys

#: What takes long to import, and is needed later or by others.
LATER = ["faker", "matplotlib", "scipy", "sklearn"]

PROBE = f"""
import gc, json, sys
import mlframework.cli.train, mlframework.evaluation.evaluation, mlframework.training.logger
from mlframework.runs.run import import_compiler
import_compiler()
print(json.dumps([[name for name in {LATER} if name in sys.modules], "torch._dynamo" in sys.modules, gc.isenabled()]))
"""


def test_a_training_imports_nothing_that_its_first_step_does_not_need():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    early, compiler, collecting = json.loads(done.stdout)
    assert not early
    assert compiler and collecting


def test_help_and_completion_do_not_wait_for_torch():
    commands = ", ".join(f"mlframework.cli.{name}" for name in ("train", "evaluate", "generate", "compare"))
    probe = f"import sys, {commands}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
