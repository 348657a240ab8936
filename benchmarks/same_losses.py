"""Compares the training losses of two checkouts: a redesign must leave them as they were.

`python benchmarks/same_losses.py ../old` trains each preset for 20 outer steps with the package in `../old` and with
the one here, eagerly and captured, and prints how far their losses are apart, relative to the largest loss of the run.
0 means equal bits. Each checkout has its own environment in `.venv`, as `.ci/run` makes it.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parents[1]

PRESETS = {
    "maml": "algorithm=maml task=sinusoid algorithm.inner_steps=3",
    "fomaml": "algorithm=fomaml task=sinusoid algorithm.inner_steps=3",
    "meta_sgd": "algorithm=meta_sgd task=sinusoid",
    "cavia_film": "algorithm=cavia_film task=sinusoid algorithm.update.lr=0.3",
    "reptile": "algorithm=reptile task=sinusoid",
    "imaml": "algorithm=imaml task=sinusoid",
    "conditional_neural_process": "algorithm=conditional_neural_process task=sinusoid",
    "maml_conv4": "algorithm=maml task=glyphs trainer.meta_batch=4 algorithm.inner_steps=2",
    "fomaml_conv4": "algorithm=fomaml task=glyphs trainer.meta_batch=4 algorithm.inner_steps=2",
    "maml_plus_plus_conv4": "algorithm=maml_plus_plus task=glyphs trainer.meta_batch=2 algorithm.inner_steps=2",
    "prototypes_conv4": "algorithm=prototypes task=glyphs trainer.meta_batch=4",
    "svm_conv4": "algorithm=svm task=glyphs trainer.meta_batch=4",
    "fomaml_transformer": "algorithm=fomaml task=text_lists trainer.meta_batch=4",
    "maml_gru": "algorithm=maml task=text_lists base_layer=gru trainer.meta_batch=4 algorithm.inner_steps=1",
    "matching_transformer": "algorithm=matching task=text_lists trainer.meta_batch=4",
}


def losses(checkout: Path, overrides: str, *, capture: bool) -> list[float]:
    """The loss of each of 20 outer steps; none where the run ended with an error, which is printed."""
    entry = next(name for name in ("cli", "commands") if (checkout / "mlframework" / name).is_dir())
    with TemporaryDirectory() as folder:
        command = [
            f"{checkout}/.venv/bin/python",
            "-m",
            f"mlframework.{entry}.train",
            *overrides.split(),
            "trainer.steps=20",
        ]
        command += ["trainer.log_every=1", "trainer.validation_tasks=1", "evaluation=none", "logger.figures=false"]
        command += [f"run_dir={folder}/run", f"outer.capture={str(capture).lower()}", "threads=1"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr.strip().splitlines()[-1])
            return []
        if "eager steps instead" in done.stderr + done.stdout:
            print("  not captured")
        events = EventAccumulator(f"{folder}/run")
        events.Reload()
        return [event.value for event in events.Scalars("train/query_loss")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="another checkout")
    parser.add_argument("--only", help="presets, separated by commas")
    asked = parser.parse_args()
    print(f"{'preset':<28} {'eager':>10} {'captured':>10}   largest relative difference over 20 steps")
    for name in asked.only.split(",") if asked.only else PRESETS:
        found = []
        for capture in (False, True):
            old, new = (losses(root, PRESETS[name], capture=capture) for root in (asked.old.resolve(), HERE))
            apart = max((abs(a - b) for a, b in zip(old, new, strict=False)), default=0)
            same = len(old) == len(new) == 20
            found.append(f"{apart / max(map(abs, old)):.1e}" if same and apart else ("0" if same else "failed"))
        print(f"{name:<28} {found[0]:>10} {found[1]:>10}", flush=True)


if __name__ == "__main__":
    main()
