"""`outer.precision=bf16`: the base layer multiplies in bfloat16, and all else stays in float32."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from mlframework import (
    MAML,
    MLP,
    SGD,
    Conv4,
    CrammerSingerSVM,
    Digits,
    Exact,
    OuterLoop,
    Prototypes,
    RBFKernel,
    processes,
)
from mlframework.backend.forward import call_per_task, has_bf16
from mlframework.errors import InvalidValue
from mlframework.training.meta_gradient import meta_gradient

needs_bf16 = pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this CPU has no bfloat16")


MAKERS = {
    "maml": lambda task: MAML(
        MLP(task.spec, hidden=[16]), task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=2
    ),
    "prototypes": lambda task: Prototypes(MLP(task.spec, hidden=[16]), task),
    "svm": lambda task: CrammerSingerSVM(MLP(task.spec, hidden=[16]), task, kernel=RBFKernel(learn=False), learn=[]),
    "prototypes, Conv4": lambda task: Prototypes(Conv4(task.spec, filters=8), task),
}


def digits():
    return Digits(n_way=3, k_shot=2, k_query=3, validation_digits=[6, 7, 8], test_digits=[3, 4, 9])


def outer_loop(layer, **settings):
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    return OuterLoop(layer, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), **settings)


def gradient(layer, episode):
    meta_gradient(layer.train(), episode)
    return torch.cat([p.grad.flatten() for p in layer.parameters() if p.requires_grad])


@needs_bf16
@pytest.mark.parametrize("name", MAKERS)
def test_the_meta_gradient_in_bf16_is_near_that_in_float32_and_of_its_type(name):
    task = digits()
    layer = MAKERS[name](task)
    episode = task.sample(4, "train", torch.Generator().manual_seed(0))
    exact = gradient(layer, episode)
    layer.multiply_in("bf16")
    near = gradient(layer, episode)
    off = float((near - exact).norm() / exact.norm())
    assert near.dtype == torch.float32
    # bfloat16 keeps 8 bits: a rounding is at most 0.4 %, and a layer has several. Norms of few examples enlarge it.
    assert 0 < off < (0.25 if "Conv4" in name else 0.1)


@needs_bf16
@pytest.mark.parametrize("engine", ["vectorised", "loop"])
def test_what_a_kernel_sees_of_the_padding_alone_has_no_gradient(engine):
    """A stride of 2 over images of one pixel: torch leaves such elements of the gradient unwritten in bfloat16."""
    convolution = nn.Conv2d(32, 32, 3, stride=2, padding=1)
    weight = convolution.weight.detach().expand(2, -1, -1, -1, -1).clone().requires_grad_()
    x = torch.randn(2, 10, 32, 1, 1)
    for _ in range(20):
        left = [torch.full((weight.numel() // parts,), torch.nan, dtype=torch.bfloat16) for parts in (1, 2) * 5]
        del left  # memory that is taken again holds what does not count as written
        y = call_per_task(convolution, {"weight": weight}, x, engine=engine, multiply_in=torch.bfloat16)
        (of_weight,) = torch.autograd.grad(y.sum(), weight)
        middle = torch.zeros_like(of_weight)
        middle[..., 1, 1] = x.sum((1, 3, 4))[:, None]
        torch.testing.assert_close(of_weight, middle, rtol=0.05, atol=0.05)


@needs_bf16
def test_evaluation_and_the_optimizer_stay_in_float32():
    task = digits()
    layer = Prototypes(MLP(task.spec, hidden=[16]), task)
    episode = task.sample(4, "train", torch.Generator().manual_seed(0))
    outer = outer_loop(layer, precision="bf16")
    outer.step(episode)
    kept = [value for state in outer.optimizer.state.values() for value in state.values()]
    assert {value.dtype for value in (*kept, *layer.parameters())} == {torch.float32}
    before = layer.eval().predict_query(layer.adapt(episode.support), episode, "transductive")
    layer.multiply_in("float32")
    assert torch.equal(before, layer.predict_query(layer.adapt(episode.support), episode, "transductive"))


def test_a_wrong_precision_is_refused():
    task = digits()
    layer = Prototypes(MLP(task.spec, hidden=[16]), task)
    with pytest.raises(InvalidValue, match="must be float32 or bf16"):
        outer_loop(layer, precision="bf17")
    if has_bf16(torch.device("cpu")):
        with pytest.raises(InvalidValue, match="not compiled"):
            outer_loop(layer, precision="bf16", capture="true")


def test_one_process_has_all_tasks():
    assert processes.share(7) == slice(0, 7) and processes.agreed(lambda: 3) == 3 and processes.gathered(3) == [3]
