"""Ensembles of trained algorithms: their predictions are averaged."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.episode import Examples
from mlframework.errors import InvalidValue
from mlframework.evaluation.choices import Candidate, Trial
from mlframework.evaluation.part import Baseline
from mlframework.evaluation.predictors.predictor import DerivedPredictor, FittedPredictor, Wrapped, with_variance
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import TaskSet, task_values
from mlframework.inner_loop.inner_loop import last
from mlframework.meta_layers.meta_layer import Adapted, MetaLayer
from mlframework.meta_layers.predictive import Predictive
from mlframework.runs.run import load_run
from mlframework.runs.run_folder import RunFolder
from mlframework.training.checkpoint import load_weights

__all__ = ["Averaged", "Ensemble"]


class Ensemble(DerivedPredictor, Baseline):
    """The trained algorithm and others, whose predictions are averaged; see `Averaged`.

    As a baseline it is a row of the report, as a predictor a column of the uncertainty measure.

    Args:
        members: run folders, of which the best weights are taken, or files of weights of the same architecture, as
            `checkpoints/best.safetensors` of a run with another seed. A run folder may be of another algorithm; its
            task must have the same inputs and outputs.

    Reference: Lakshminarayanan, Pritzel, Blundell, Simple and Scalable Predictive Uncertainty Estimation using Deep
        Ensembles, 2017, arXiv:1612.01474, section 2.4. Deviation: members differ as the runs do.
    """

    def __init__(self, *, members: Sequence[str]) -> None:
        if not members:
            raise InvalidValue("members", "[]", "must hold a run folder or a file of weights")
        self.members = list(members)

    def fitted(self, meta_layer: MetaLayer, validation: TaskSet, steps: int) -> FittedPredictor:
        first = meta_layer.inner if isinstance(meta_layer, Wrapped) else meta_layer
        others = [with_variance(self.loaded(path, first), validation, steps) for path in self.members]
        return FittedPredictor(Averaged([meta_layer, *others]), f"{1 + len(others)} members")

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        layers = [trial.meta_layer, *(self.loaded(path, trial.meta_layer) for path in self.members)]
        steps = max(layer.test_inner_steps for layer in layers)
        judge = functools.partial(task_values, Averaged(layers), steps=steps, device=trial.device)
        choice = trial.choose([Candidate(judge, (steps,), f"{len(layers)} members")])
        yield trial.row(name, trial.shown(trial.meta_layer.batch_norm), choice)

    def loaded(self, path: str, like: MetaLayer) -> MetaLayer:
        """The algorithm of a run folder, or a copy of another one with a file's weights."""
        device = next(like.parameters()).device
        if Path(path).is_file():
            layer = copy.deepcopy(like)
            load_weights(Path(path), layer)
        else:
            layer = load_run(RunFolder(path, key="members"), weights="best", device=str(device)).meta_layer
        ours, theirs = like.task.spec, layer.task.spec
        if ours._replace(ragged=True) != theirs._replace(ragged=True):
            raise InvalidValue("members", path, f"has tasks of {theirs}, and they must be of {ours}")
        layer.engine = like.engine
        return layer.eval()


class Averaged(Wrapped):
    """Averages the probabilities of classes; of values the mean and the variance of the mixture of all members.

    The mixture's variance is the mean of the members' variances plus the variance of their means. Where the members
    state no variance, it has none.
    """

    def __init__(self, members: Sequence[MetaLayer]) -> None:
        super().__init__(members[0])
        self.members = nn.ModuleList(members)
        # One number of inner steps for all; each member's path to its model is its own.
        self.test_inner_steps = 0

    def adapt(self, support: Examples) -> Adapted:
        return tuple(member.adapt(support) for member in self.layers())

    def trajectory(self, support: Examples, steps: int) -> Iterator[Adapted]:
        yield tuple(last(member.trajectory(support, steps)) for member in self.layers())

    def predict_distribution(self, adapted: Adapted, x: Tensor, mask: Tensor | None = None) -> Predictive:
        found = [m.predict_distribution(each, x, mask) for m, each in zip(self.layers(), adapted, strict=True)]
        predictions = torch.stack([each.prediction for each in found])
        if self.task.spec.kind != "regression":
            return Predictive(F.log_softmax(predictions, dim=-1).logsumexp(0) - torch.tensor(len(found)).log())
        variances = [each.variance for each in found if each.variance is not None]
        if len(variances) < len(found):
            return Predictive(predictions.mean(0))
        return Predictive(predictions.mean(0), torch.stack(variances).mean(0) + predictions.var(0, correction=0))

    def layers(self) -> list[MetaLayer]:
        return [member for member in self.members if isinstance(member, MetaLayer)]
