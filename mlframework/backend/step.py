"""The upper door of the backend: a step that is planned, compiled and timed.

Training, runs, command lines and `mlframework.testing` import it; layers and algorithms import the lower door,
`mlframework.backend.forward`.
"""

from __future__ import annotations

from mlframework.backend.algorithm import Gradients, StepSummary
from mlframework.backend.capture import Capture
from mlframework.backend.engine import choose_engine
from mlframework.backend.machine import tune
from mlframework.backend.optimizer_step import optimizer_step
from mlframework.backend.plan import Planner
from mlframework.backend.private import import_compiler, version_of

__all__ = [
    "Capture",
    "Gradients",
    "Planner",
    "StepSummary",
    "choose_engine",
    "import_compiler",
    "optimizer_step",
    "tune",
    "version_of",
]
