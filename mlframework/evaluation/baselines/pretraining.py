"""Conventional learning from the training tasks: one network for all of them, which does not adapt while it learns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.backend.forward import Engine, call_per_task, fork_rng
from mlframework.base_layers.base_layer import BaseLayer, unfrozen
from mlframework.base_layers.normalisation import with_fixed_statistics
from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidValue
from mlframework.evaluation.choices import Trial
from mlframework.evaluation.part import Baseline
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.feature_meta_layer import require_features
from mlframework.tasks.few_shot import FewShotClassification
from mlframework.tasks.on_features import on_features
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["AfterPretraining", "PretrainedNetwork", "Pretraining", "of_all_classes"]


class PretrainedNetwork(NamedTuple):
    """A network after conventional training, and the cost of it."""

    base_layer: BaseLayer  # with a head for the classes of one task, or with its own where tasks share their targets
    named: str  # how it was trained, in words
    seconds: float  # of the clock


#: The networks by the function that draws them, then by settings: baselines of one comparison share them.
TRAINED: WeakKeyDictionary[Callable[[], BaseLayer], dict[tuple[float, ...], list[PretrainedNetwork]]]
TRAINED = WeakKeyDictionary()


class Pretraining:
    """Trains one network on the pooled training tasks, by Adam along a cosine schedule, once for each rate.

    Few-shot classifications number their classes anew in each task. Their network learns to tell all training classes
    apart, by a head with an output for each (the Baseline of Chen et al. 2019, arXiv:1904.04232). It sees as many
    examples as meta-training would, drawn independently from all classes and normalised together. Examples of a few
    classes at a time, as tasks have them, teach it nothing (docs/comparison.md). A head of zeros for the classes of one
    task then replaces that head. A network with batch norm is tried in two ways: with the statistics that the policy
    gives, and with fixed ones of many training examples, as a conventional network is used.

    In other tasks equal targets mean the same: one network predicts them all. It sees the tasks that meta-training
    would see, support and query alike, normalised under the same policy.

    Args:
        steps, meta_batch: steps of the optimizer, and tasks in each, or as many examples.
        rates: of Adam; validation tasks choose among the networks.
    """

    def __init__(self, *, steps: int, meta_batch: int, rates: Sequence[float]) -> None:
        self.steps, self.meta_batch = at_least("steps", steps, 1), at_least("meta_batch", meta_batch, 1)
        if not rates or not all(rate > 0 for rate in rates):
            raise InvalidValue("rates", list(rates), "must hold rates above 0")
        self.rates = list(rates)

    def networks(self, trial: Trial) -> Iterator[PretrainedNetwork]:
        """The networks of each rate, trained when one is first asked for with this `trial.make_base_layer`."""
        known = TRAINED.setdefault(trial.make_base_layer, {})
        for rate in self.rates:
            key = (self.steps, self.meta_batch, rate)
            if key not in known:
                known[key] = self.train(trial, rate)
            yield from known[key]

    def train(self, trial: Trial, rate: float) -> list[PretrainedNetwork]:
        began, task, engine = time.perf_counter(), trial.task, trial.meta_layer.engine
        with fork_rng(trial.device):
            torch.manual_seed(0)
            network = unfrozen(trial.make_base_layer())
            pool = class_pool(task)
            trained = network if pool is None else with_head(network, len(pool.classes("train").sizes), task)
        trained, seen = trained.to(trial.device).train(), on_features(task, trained)
        optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.steps):
            optimizer.zero_grad()
            if (seen_pool := class_pool(seen)) is None:
                losses = task_losses(trained, seen.sample(self.meta_batch, "train", generator).to(trial.device), trial)
            else:
                examples = of_all_classes(seen_pool, self.meta_batch, generator).to(trial.device)
                losses = class_losses(trained, examples, engine)
            losses.mean().backward()
            optimizer.step()
            schedule.step()
        seconds, named = time.perf_counter() - began, f"trained at {rate:g}"
        if pool is None:
            return [PretrainedNetwork(network.to(trial.device).eval(), named, seconds)]
        made = [PretrainedNetwork(with_head(network, task.spec.out_features, task).eval(), named, seconds)]
        if network.mixes_examples:
            x = of_all_classes(pool, self.meta_batch, generator).to(trial.device).x[0]
            fixed = BaseLayer(with_fixed_statistics(network.features, x), made[0].base_layer.head).eval()
            made.append(PretrainedNetwork(fixed, f"{named}, fixed statistics", seconds))
        return made


class AfterPretraining(Baseline):
    """A baseline that starts from a network of a `Pretraining`."""

    def __init__(self, pretraining: Pretraining) -> None:
        self.pretraining = pretraining

    def training_seconds(self, trial: Trial) -> float:
        """The time that the training of one network took, on average."""
        seconds = [network.seconds for network in self.pretraining.networks(trial)]
        return sum(seconds) / len(seconds)


def class_pool(task: TaskDistribution) -> FewShotClassification | None:
    """The task, if its labels number the classes that it drew; None where equal labels mean the same in all tasks."""
    drawn_here = type(task).sample is FewShotClassification.sample and "sample" not in vars(task)  # see fix_train_tasks
    return task if isinstance(task, FewShotClassification) and drawn_here else None


def of_all_classes(pool: FewShotClassification, meta_batch: int, generator: torch.Generator) -> Examples:
    """As many training examples as a meta-batch has, each drawn from all, as those of one task: leaves `[1, n, ...]`.

    Labels number the training classes.
    """
    data = pool.classes("train")
    count = meta_batch * pool.n_way * (pool.shots[1] + pool.k_query)
    rows = torch.randint(len(data.x), (count,), generator=generator)
    labels = torch.arange(len(data.sizes)).repeat_interleave(data.sizes)
    return Examples(data.inputs(rows)[None], labels[rows][None], torch.ones(1, count))


def with_head(base_layer: BaseLayer, outputs: int, task: TaskDistribution) -> BaseLayer:
    """The same features with a linear head of zeros."""
    require_features(base_layer, "conventional training on classes")
    device = next(base_layer.parameters()).device
    with torch.no_grad():
        size = base_layer.features(task.spec.zeros(2, device)).shape[-1]
    head = nn.Linear(size, outputs, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return BaseLayer(base_layer.features, head)


def class_losses(network: BaseLayer, examples: Examples, engine: Engine) -> Tensor:
    """The cross-entropy of each example, which are normalised together."""
    logits = call_per_task(network, {}, examples.x, engine=engine)
    return F.cross_entropy(logits[0], examples.y[0], reduction="none")


def task_losses(network: BaseLayer, episode: Episode, trial: Trial) -> Tensor:
    """The loss of each task over all its examples, `[tasks]`; examples of a task are normalised together."""
    layer, both = trial.meta_layer, episode.joined()
    mask = layer.mask_or_none(both.mask)
    if network.mixes_examples and layer.batch_norm == "support":
        mask = torch.cat([episode.support.mask, torch.zeros_like(episode.query.mask)], dim=1)
    prediction = call_per_task(network, {}, both.x, mask, engine=layer.engine)
    return trial.task.scores(prediction, both.y, both.mask)["loss"]
