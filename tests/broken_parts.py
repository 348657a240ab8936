"""Base layers and tasks that each break one rule, for `_target_=broken_parts.Name`."""

from __future__ import annotations

import torch
from torch import nn

from mlframework.base_layers import BaseLayer, BatchStatistics
from mlframework.tasks import Digits, Sinusoid

# Base layers: each is given the spec of a task.


def around(part, spec, *, width=8):
    """A network of one hidden layer with a part behind it."""
    inputs = 1
    for size in spec.x_shape:
        inputs *= size
    features = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), part, nn.Tanh())
    return BaseLayer(features, nn.Linear(width, spec.out_features))


class Detach(nn.Module):
    def forward(self, x):
        return x.detach()


def detached(spec):
    layer = around(nn.Identity(), spec)
    return BaseLayer(layer.features, nn.Sequential(layer.head, Detach()))


def too_wide(spec):
    layer = around(nn.Identity(), spec)
    return BaseLayer(layer.features, nn.Linear(8, spec.out_features + 1))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def two_outputs(spec):
    return BaseLayer(around(nn.Identity(), spec).features, nn.Sequential(nn.Linear(8, spec.out_features), Pair()))


class Noise(nn.Module):
    """Forgets to stop in evaluation mode."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Remembers(nn.Module):
    """Adds the mean of the inputs of its last call."""

    last = 0.0

    def forward(self, x):
        y, self.last = x + self.last, x.detach().mean() + 1
        return y


class Fixed(nn.Module):
    """Scales by numbers that are neither parameters nor buffers."""

    def __init__(self):
        super().__init__()
        self.scale = torch.rand(8)

    def forward(self, x):
        return x * self.scale


class TrainsOnly(nn.Module):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("no statistics yet")
        return x


class RefusesPairs(nn.Module):
    """Fails on as many rows as a support set and its queries have, and not on two."""

    def forward(self, x):
        return x.view(2, 8)


class DropsMask(nn.Module):
    """A block that takes no mask, with a part that needs one."""

    def __init__(self):
        super().__init__()
        self.norm = BatchStatistics(8)

    def forward(self, x):
        return self.norm(x).relu()


class Centre(nn.Module):
    """Mixes examples unannounced."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class Plain(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.linear = nn.Linear(spec.x_shape[0], spec.out_features)

    def forward(self, x):
        return self.linear(x)


class Extra(nn.Module):
    """Saves what a checkpoint cannot hold."""

    def get_extra_state(self):
        return self

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        return x


def with_noise(spec):
    return around(Noise(), spec)


def with_memory(spec):
    return around(Remembers(), spec)


def with_fixed(spec):
    return around(Fixed(), spec)


def trains_only(spec):
    return around(TrainsOnly(), spec)


def refuses_rows(spec):
    return around(RefusesPairs(), spec)


def drops_mask(spec):
    return around(DropsMask(), spec)


def centred(spec):
    return around(Centre(), spec)


def with_extra(spec):
    return around(Extra(), spec)


class MakesItself(nn.Module):
    """Makes its layer in its first call; works."""

    def __init__(self):
        super().__init__()
        self.inner = None

    def forward(self, x):
        if self.inner is None:
            self.inner = nn.Linear(x.shape[-1], x.shape[-1])
        return self.inner(x)


def late(spec):
    return around(MakesItself(), spec)


def tied(spec):
    layer = around(nn.Linear(8, 8), spec)
    layer.features.append(layer.features[2])
    return layer


# Tasks.


class Edited(Digits):
    """Digits whose episodes are changed after they are drawn."""

    def __init__(self):
        super().__init__(n_way=2, k_shot=2, k_query=3, validation_digits=[6, 7], test_digits=[8, 9])

    def sample(self, num_tasks, split, generator):
        return self.edited(super().sample(num_tasks, split, generator), split)

    def edited(self, episode, split):
        return episode


class LabelsFromOne(Edited):
    def edited(self, episode, split):
        return episode._replace(query=episode.query._replace(y=episode.query.y + 1))


class FloatLabels(Edited):
    def edited(self, episode, split):
        return episode._replace(support=episode.support._replace(y=episode.support.y + 0.5))


class Images(Edited):
    """Draws images of another shape than its spec promises."""

    def edited(self, episode, split):
        return episode._replace(support=episode.support._replace(x=episode.support.x.repeat(1, 1, 1, 2, 1)))


class NotANumber(Edited):
    def edited(self, episode, split):
        episode.query.x[0, 0] = float("nan")
        return episode


class EmptySupport(Edited):
    def edited(self, episode, split):
        return episode._replace(support=episode.support._replace(mask=torch.zeros_like(episode.support.mask)))


class NoValidation(Edited):
    def edited(self, episode, split):
        return {"train": episode, "test": episode}[split]


class OwnDice(Edited):
    def sample(self, num_tasks, split, generator):
        return super().sample(num_tasks, split, torch.Generator().manual_seed(int(torch.randint(1 << 30, ()))))


class AlwaysTwo(Edited):
    def sample(self, num_tasks, split, generator):
        return super().sample(2, split, generator)


class Dictionary(Edited):
    def edited(self, episode, split):
        return episode.support._asdict()


class NarrowTargets(Sinusoid):
    """A regression whose targets lack their last axis."""

    def sample(self, num_tasks, split, generator):
        episode = super().sample(num_tasks, split, generator)
        return episode._replace(query=episode.query._replace(y=episode.query.y.squeeze(-1)))


class RaggedSinusoid(Sinusoid):
    """Says that its tasks may be padded."""

    def __init__(self):
        super().__init__()
        self.spec = self.spec._replace(ragged=True)
