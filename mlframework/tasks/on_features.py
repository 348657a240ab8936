"""The tasks of a frozen network: each example's features are computed once, kept on disk, and drawn in its place."""

from __future__ import annotations

import copy
import hashlib
import logging
from contextlib import nullcontext
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import Stack
from mlframework.base_layers.pretrained import PretrainedFeatures
from mlframework.episode import Split
from mlframework.screen import stage
from mlframework.tasks.data_folder import Arrays, cached
from mlframework.tasks.few_shot import ClassIndexed, FewShotClassification
from mlframework.tasks.fixed_train_tasks import FixedTrainTasks, fix_train_tasks
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["on_features"]

log = logging.getLogger(__name__)

#: Examples that go through the network at a time, and those of which kept features are compared with new ones.
BATCH, COMPARED = 64, 4

#: The tasks of each network, as they were asked for, with their own; new weights make them anew.
KNOWN: WeakKeyDictionary[nn.Module, list[tuple[TaskDistribution, TaskDistribution]]] = WeakKeyDictionary()


def on_features(task: TaskDistribution, base_layer: nn.Module) -> TaskDistribution:
    """The tasks as a base layer with a frozen network sees them: the same draws, with features as inputs.

    The network lets features pass as they are, so predictions stay the same but for rounding, and no step goes through
    the network again. Any other base layer gets the task itself.
    """
    network = getattr(base_layer, "features", None)
    while isinstance(network, Stack):  # an algorithm may have put a module of its own behind
        network = network[0]
    if not isinstance(network, PretrainedFeatures) or not network.caches:
        return task
    if network not in KNOWN:
        KNOWN[network] = []
        network.register_load_state_dict_post_hook(lambda module, keys: KNOWN.get(module, []).clear())
    known = KNOWN[network]
    found = next((own for asked, own in known if asked is task), None)
    if found is None:
        found = made(task, base_layer, network)
        known.append((task, found))
    return found


def made(task: TaskDistribution, base_layer: nn.Module, network: PretrainedFeatures) -> TaskDistribution:
    sample = vars(task).get("sample")
    if isinstance(sample, FixedTrainTasks):
        return fix_train_tasks(on_features(sample.task, base_layer), sample.count, seed=sample.seed)
    if not isinstance(task, FewShotClassification) or type(task).sample is not FewShotClassification.sample:
        why = f"{type(task).__name__} draws its inputs anew, so their features are computed in every step"
        log.info("base_layer.cache: %s", why)
        return task
    if any(p.requires_grad for p in network.parameters()):  # an algorithm learns changes of it, as LoRA does
        return task
    same = copy.copy(task)  # its class, by which baselines and displays know a task, stays what it is
    vars(same)["classes"] = FeatureClasses(task, network)
    same.spec = task.spec._replace(x_shape=(network.size,))
    return same


class FeatureClasses:
    """`classes` of a few-shot classification whose examples are features; those of a split are computed when asked."""

    def __init__(self, task: FewShotClassification, network: PretrainedFeatures) -> None:
        self.task, self.network = task, network
        self.found: dict[Split, ClassIndexed] = {}

    def __call__(self, split: Split) -> ClassIndexed:
        if split not in self.found:
            data = self.task.classes(split)
            self.found[split] = data._replace(x=features_of(data, self.network, split))
        return self.found[split]


def features_of(data: ClassIndexed, network: PretrainedFeatures, split: Split) -> Tensor:
    """The features `[examples, size]` of the examples of classes, from the cache if they were computed before.

    They are known by the bytes of the inputs and of the weights, by the architecture and the preparation. Those of the
    first inputs are computed in any case: if they are others, the code of the network has changed.
    """
    x = data.x.contiguous()
    settings = (network.fingerprint(), hashlib.sha256(x.numpy().tobytes()).hexdigest(), tuple(x.shape))
    first = computed(data, range(min(COMPARED, len(x))), network)

    def compute() -> Arrays:
        log.info("%d features of %s examples: computed once, then read from the cache", len(x), split)
        return {"features": computed(data, range(len(x)), network, f"features of {split} examples").numpy()}

    def agrees(arrays: Arrays) -> bool:
        found = arrays["features"][: len(first)]
        return bool(np.allclose(found, first.numpy(), rtol=1e-3, atol=1e-3 * float(first.abs().max())))

    return torch.from_numpy(cached("features", settings, compute, source=__file__, accept=agrees)["features"])


def computed(data: ClassIndexed, rows: range, network: PretrainedFeatures, told: str | None = None) -> Tensor:
    """Features of rows on the CPU, batch by batch; under a name, the screen tells how far they are."""
    device, parts = next(network.parameters(), torch.empty(0)).device, []
    with torch.no_grad(), nullcontext() if told is None else stage(told, len(rows)) as at:
        for start in rows[::BATCH]:
            batch = torch.arange(start, min(start + BATCH, len(rows)))
            parts.append(network(data.inputs(batch).to(device)).cpu())
            if at is not None:
                at.done += len(batch)
    return torch.cat(parts)
