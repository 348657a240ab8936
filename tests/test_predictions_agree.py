"""One number for one query: all queries in a call, one at a time, and in a run's evaluation, under every policy."""

from __future__ import annotations

import pytest
import torch
from test_contracts import maker, presets, slow_but, small
from torch import nn

from mlframework.base_layers import BaseLayer, MixesExamples, ResNet12, Stack
from mlframework.base_layers.conv4 import Conv4
from mlframework.errors import IncompatibleTask, InvalidValue
from mlframework.evaluation.task_set import TaskSet, judge_by_step
from mlframework.runs import Trained
from mlframework.tasks import ArrayTasks, Digits, Pose
from mlframework.testing import in_float64

FAST = ("maml", "prototypes")
POLICIES = ("support", "inductive")


class ByLargest(MixesExamples):
    """A norm of one's own: every channel is divided by the largest absolute mean of an example that counts."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x, mask=None):
        means = x.mean((2, 3), keepdim=True).abs()
        if mask is not None:
            means = torch.where(mask.view(-1, 1, 1, 1) > 0, means, torch.zeros_like(means))
        return self.scale * x / (means.amax(0, keepdim=True) + 0.1)


def own_norm(spec):
    features = Stack(nn.Conv2d(1, 4, 3, padding=1), ByLargest(4), nn.Tanh(), nn.AvgPool2d(4), nn.Flatten())
    with torch.no_grad():
        width = features(torch.zeros(2, *spec.x_shape)).shape[1]
    return BaseLayer(features, nn.Linear(width, spec.out_features))


BASE_LAYERS = {
    "conv4": lambda spec: Conv4(spec, filters=4, norm="batch"),
    "resnet12": lambda spec: ResNet12(spec, widths=[2, 3, 4, 4], norm="batch"),
    "own norm": own_norm,
}


def large_digits():
    """Digits of 16x16 pixels, which a ResNet-12 needs."""
    data = Digits(n_way=2, k_shot=2, k_query=3).classes("train")
    large = data._replace(x=data.x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return ArrayTasks(dict.fromkeys(("train", "test"), large), n_way=2, k_shot=2, k_query=3)


def built(algorithm, base_layer):
    """A small algorithm, over classes if it takes them, else over poses, with initial parameters."""
    digits = large_digits() if base_layer == "resnet12" else Digits(n_way=2, k_shot=2, k_query=3)
    pose = Pose(k_shot=4, k_query=6, exclusive=True, objects=2, views=10)
    tasks = (("digits", digits), ("pose", pose))
    for name, task in tasks:
        config = small(f"algorithm={algorithm}", f"task={name}", "base_layer=mlp")
        torch.manual_seed(0)
        try:
            return maker(config, base_layer=BASE_LAYERS[base_layer])(task)
        except IncompatibleTask:
            continue
    pytest.skip("takes neither classes nor values")


@pytest.mark.parametrize("base_layer", BASE_LAYERS)
@pytest.mark.parametrize("algorithm", slow_but(FAST, presets("algorithm")))
def test_a_query_has_one_prediction(algorithm, base_layer, float64):
    layer = built(algorithm, base_layer).double()
    assert layer.base_layer.mixes_examples
    steps = min(2, layer.test_inner_steps)
    tasks = TaskSet(layer.task, "test", tasks=2, seed=0, chunk=2)
    (episode,) = tasks
    episode = in_float64(episode)
    for policy in POLICIES:
        layer.engine = "vectorised"
        try:
            judged = judge_by_step(layer, episode, steps, policy, ends_only=True)["query_loss"][-1]
        except RuntimeError:  # vmap refuses a part
            layer.engine = "loop"
            judged = judge_by_step(layer, episode, steps, policy, ends_only=True)["query_loss"][-1]
        for number in range(2):
            one = episode.tasks(slice(number, number + 1))
            model = Trained(layer).adapt(one.support, inner_steps=steps)
            together = model.predict(one.query.x[0], batch_norm=policy)
            alone = torch.cat([model.predict(x[None], batch_norm=policy) for x in one.query.x[0]])
            tolerance = 1e-9 * max(1.0, float(together.abs().max()))
            torch.testing.assert_close(alone, together, rtol=0, atol=tolerance)
            loss = layer.task.scores(together[None], one.query.y, one.query.mask)["loss"][0]
            torch.testing.assert_close(loss, judged[number], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("base_layer", BASE_LAYERS)
def test_queries_that_normalise_each_other_are_asked_for_together(base_layer):
    layer = built("maml", base_layer)
    (episode,) = TaskSet(layer.task, "test", tasks=1, seed=0)
    model = Trained(layer).adapt(episode.support)
    with pytest.raises(InvalidValue, match="batch_norm=transductive: normalises queries by one another"):
        model.predict(episode.query.x[0, :1], batch_norm="transductive")


def test_a_norm_that_takes_no_mask_is_refused_under_the_support_policy():
    layer = built("maml", "conv4")
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    plain = Stack(nn.Conv2d(1, 4, 3), norm, nn.Flatten())
    width = 4 * 6 * 6
    make = maker(
        small("algorithm=maml", "task=digits", "base_layer=mlp"),
        base_layer=lambda spec: BaseLayer(plain, nn.Linear(width, 2)),
    )
    model = Trained(make(layer.task)).adapt(0.4 * torch.rand(4, 1, 8, 8), [0, 1, 0, 1])
    with pytest.raises(InvalidValue, match=r"batch_norm=support: BatchNorm2d .* takes no mask: use BatchStatistics"):
        model.predict(0.4 * torch.rand(2, 1, 8, 8), batch_norm="support")
    with pytest.raises(InvalidValue, match="keeps running statistics, which mix tasks"):
        maker(
            small("algorithm=maml", "task=digits", "base_layer=mlp"),
            base_layer=lambda spec: BaseLayer(Stack(nn.BatchNorm2d(1), nn.Flatten()), nn.Linear(64, 2)),
        )(layer.task)
