"""The trained network as it is, with the support set in front of each query."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from mlframework.errors import InvalidValue
from mlframework.evaluation.choices import Candidate, Trial, steps_by_rule
from mlframework.evaluation.part import Baseline
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import TaskSet, task_values
from mlframework.meta_layers.meta_layer import Metrics
from mlframework.meta_layers.neural_network.in_context import InContext

__all__ = ["SameWeightsInContext"]

log = logging.getLogger(__name__)


class SameWeightsInContext(Baseline):
    """The same weights, read on from the support set; only where the base layer alone predicts, before it adapts."""

    kinds = ("sequence",)

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        if not steps_by_rule(trial.meta_layer):
            return
        reader = InContext(trial.meta_layer.base_layer, trial.task)
        reader.engine = trial.meta_layer.engine

        def read(tasks: TaskSet) -> Metrics:
            return task_values(reader, replace(tasks, chunk=max(1, tasks.chunk // 5)), 0, device=trial.device)

        try:
            choice = trial.choose([Candidate(read, (0,))])
            yield trial.row("in context (same weights)", "none", choice)
        except InvalidValue as error:  # learned positions know no sequence as long as that
            log.warning("in context: left out, base_layer.%s", error)
