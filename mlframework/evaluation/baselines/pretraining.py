"""Conventional learning from the training tasks: one network for all of them, which does not adapt while it learns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mlframework.backend.forward import call_per_task, fork_rng
from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Episode
from mlframework.errors import InvalidValue
from mlframework.evaluation.choices import Trial
from mlframework.evaluation.part import Baseline
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.feature_meta_layer import require_features
from mlframework.tasks.few_shot import FewShotClassification
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Pretrained", "PretrainedNetwork", "Pretraining", "labelled_by_class"]


class PretrainedNetwork(NamedTuple):
    """A network after conventional training, and the cost of it."""

    base_layer: BaseLayer  # with a head for the classes of one task, or with its own where tasks share their targets
    rate: float
    seconds: float  # of the clock


#: The networks by the function that draws them, then by settings: baselines of one comparison share them.
TRAINED: WeakKeyDictionary[Callable[[], BaseLayer], dict[tuple[float, ...], PretrainedNetwork]] = WeakKeyDictionary()


class Pretraining:
    """Trains one network on the pooled training tasks, by Adam along a cosine schedule, once for each rate.

    Few-shot classifications number their classes anew in each task. Their network learns to tell all training classes
    apart, by a head with an output for each (the Baseline of Chen et al. 2019, arXiv:1904.04232). A head of zeros for
    the classes of one task then replaces that head. In other tasks equal targets mean the same: one network predicts
    them all.

    The network sees the tasks that meta-training would see, support and query alike, normalised under the same policy.

    Args:
        steps, meta_batch: steps of the optimizer, and tasks in each.
        rates: of Adam; validation tasks choose among the networks.
    """

    def __init__(self, *, steps: int, meta_batch: int, rates: Sequence[float]) -> None:
        self.steps, self.meta_batch = at_least("steps", steps, 1), at_least("meta_batch", meta_batch, 1)
        if not rates or not all(rate > 0 for rate in rates):
            raise InvalidValue("rates", list(rates), "must hold rates above 0")
        self.rates = list(rates)

    def networks(self, trial: Trial) -> Iterator[PretrainedNetwork]:
        """The network of each rate, trained when it is first asked for with this `trial.make_base_layer`."""
        known = TRAINED.setdefault(trial.make_base_layer, {})
        for rate in self.rates:
            key = (self.steps, self.meta_batch, rate)
            if key not in known:
                known[key] = self.train(trial, rate)
            yield known[key]

    def train(self, trial: Trial, rate: float) -> PretrainedNetwork:
        began, task = time.perf_counter(), trial.task
        with fork_rng(trial.device):
            torch.manual_seed(0)
            network = trial.make_base_layer().requires_grad_()
            pool = class_pool(task)
            trained = network if pool is None else with_head(network, len(pool.classes("train").sizes), task)
        trained = trained.to(trial.device).train()
        optimizer = torch.optim.Adam(trained.parameters(), rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.steps):
            episode = labelled_by_class(task, self.meta_batch, generator).to(trial.device)
            optimizer.zero_grad()
            pooled_losses(trained, episode, trial).mean().backward()
            optimizer.step()
            schedule.step()
        adapted = network if pool is None else with_head(network, task.spec.out_features, task)
        return PretrainedNetwork(adapted.to(trial.device).eval(), rate, time.perf_counter() - began)


class Pretrained(Baseline):
    """A baseline that starts from a network of a `Pretraining`."""

    def __init__(self, pretraining: Pretraining) -> None:
        self.pretraining = pretraining

    def training_seconds(self, trial: Trial) -> float:
        """The time that the training of one network took, on average."""
        seconds = [network.seconds for network in self.pretraining.networks(trial)]
        return sum(seconds) / len(seconds)


def class_pool(task: TaskDistribution) -> FewShotClassification | None:
    """The task, if its labels number the classes that it drew; None where equal labels mean the same in all tasks."""
    if isinstance(task, FewShotClassification) and type(task).sample is FewShotClassification.sample:
        return task
    return None


def labelled_by_class(task: TaskDistribution, meta_batch: int, generator: torch.Generator) -> Episode:
    """Training tasks whose labels number all training classes, if these are pooled; else with their own targets."""
    pool = class_pool(task)
    if pool is None:
        return task.sample(meta_batch, "train", generator)
    before = generator.get_state()
    classes = pool.drawn_classes(meta_batch, "train", generator)  # [tasks, n_way]
    episode = pool.sample(meta_batch, "train", generator.set_state(before))
    return Episode(*(part._replace(y=classes.gather(1, part.y)) for part in episode))


def with_head(base_layer: BaseLayer, outputs: int, task: TaskDistribution) -> BaseLayer:
    """The same features with a linear head of zeros."""
    require_features(base_layer, "conventional training on classes")
    device = next(base_layer.parameters()).device
    with torch.no_grad():
        size = base_layer.features(task.spec.zeros(2, device)).shape[-1]
    head = nn.Linear(size, outputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return BaseLayer(base_layer.features, head)


def pooled_losses(network: BaseLayer, episode: Episode, trial: Trial) -> Tensor:
    """The loss of each task over all its examples, `[tasks]`; examples of a task are normalised together."""
    layer, both = trial.meta_layer, episode.joined()
    mask = layer.mask_or_none(both.mask)
    if network.mixes_examples and layer.batch_norm == "support":
        mask = torch.cat([episode.support.mask, torch.zeros_like(episode.query.mask)], dim=1)
    prediction = call_per_task(network, {}, both.x, mask, engine=layer.engine)
    return trial.task.scores(prediction, both.y, both.mask)["loss"]
