"""What the tables of docs/priors.md share: the machine, and the run of a prior-fitted network."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from mlframework.runs.run_folder import RunFolder

__all__ = ["about_run", "machine", "told"]


def machine() -> str:
    """The processor's name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def about_run(run: str) -> dict[str, Any]:
    """The command of a run, how far its last checkpoint is, and what that took."""
    folder = RunFolder(run, key="run")
    state = torch.load(folder.last, weights_only=True)
    environment = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
    typed = [override for override in folder.overrides() if not override.startswith("run_dir=")]
    return {
        "command": " ".join(["mlframework-train", *typed]),
        "step": state["progress"]["step"],
        "steps": folder.config().trainer.steps,
        "seconds": state["progress"]["seconds"],
        "parameters": sum(value.numel() for value in state["meta_layer"].values()),
        "commit": environment["git"]["commit"][:7],
        "machine": machine(),
    }


def told(about: dict[str, Any]) -> str:
    """A sentence about a run."""
    steps = f"{about['step']} outer steps" + ("" if about["step"] == about["steps"] else f" of {about['steps']}")
    return (
        f"`{about['command']}`: {steps} in {about['seconds'] / 60:.0f} minutes on one thread of an {about['machine']} "
        f"beside other work, {about['parameters']:,} parameters, commit {about['commit']}."
    )
