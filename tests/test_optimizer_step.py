"""A step of the optimizer by its kernel is the optimizer's own step; what is not plain is left to it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mlframework.backend import optimizer_step as module
from mlframework.backend.optimizer_step import may_be_called_directly, optimizer_step

SETTINGS = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    (torch.optim.Adam, {"maximize": True}),
    (torch.optim.AdamW, {"weight_decay": 0.3}),
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def with_gradients(learned: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in learned.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def taken(kind, settings, step, *, steps=4):
    """A network and its optimizer after steps, with a rate that changes; a parameter and a whole group rest once."""
    learned = network()
    groups = [{"params": learned[0].parameters()}, {"params": learned[1].parameters(), "lr": 0.2}]
    optimizer = kind(groups, lr=0.1, fused=True, **settings)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    for seed in range(steps):
        with_gradients(learned, seed)
        if seed == 2:
            learned[0].bias.grad = None
            learned[1].weight.grad = learned[1].bias.grad = None
        step(optimizer)
        scheduler.step()
    return list(learned.parameters()), optimizer


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_it_gives_bit_for_bit_what_the_optimizer_gives(kind, settings):
    found, ours = taken(kind, settings, optimizer_step)
    expected, theirs = taken(kind, settings, lambda optimizer: optimizer.step())
    assert may_be_called_directly(ours)
    assert all(map(torch.equal, found, expected))
    for mine, other in zip(ours.state_dict()["state"].values(), theirs.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in other)


def test_it_goes_on_from_a_state_that_was_loaded():
    _, optimizer = taken(torch.optim.Adam, {}, optimizer_step)
    state = copy.deepcopy(optimizer.state_dict())
    learned = network()
    resumed = torch.optim.Adam([{"params": m.parameters()} for m in learned], lr=1.0, fused=True)
    resumed.load_state_dict(state)
    with_gradients(learned, 9)
    optimizer_step(resumed)
    assert {int(of["step"]) for of in resumed.state.values()} == {4, 5}, "some have rested once"


def prepared(**settings):
    learned = network()
    optimizer = torch.optim.Adam(learned.parameters(), **{"fused": True, **settings})
    with_gradients(learned, 0)
    optimizer.step()
    return optimizer, learned


@pytest.mark.parametrize("settings", [{"fused": False}, {"amsgrad": True}, {"lr": torch.tensor(0.1)}])
def test_variants_are_left_to_the_optimizer(settings):
    assert not may_be_called_directly(prepared(**settings)[0])


def test_what_is_hooked_or_patched_or_new_is_left_to_the_optimizer():
    assert may_be_called_directly(prepared()[0])
    seen = []
    hooked, learned = prepared()
    hooked.register_step_post_hook(lambda *_: seen.append("hook"))
    optimizer_step(hooked)
    patched, _ = prepared()
    patched.step = lambda: seen.append("patch")
    optimizer_step(patched)
    scheduled, _ = prepared()
    own = type("Own", (), {"step": lambda self: seen.append("patch under a scheduler")})()
    scheduled.step = own.step
    torch.optim.lr_scheduler.ConstantLR(scheduled, factor=1.0)
    optimizer_step(scheduled)
    assert seen == ["hook", "patch", "patch under a scheduler"]
    learned[0].weight.grad = torch.zeros(4, 3)
    assert not may_be_called_directly(torch.optim.Adam(learned.parameters(), fused=True)), "it has no state yet"

    class Mine(torch.optim.Adam):
        pass

    mine = Mine(learned.parameters(), fused=True)
    mine.step()
    assert not may_be_called_directly(mine)


def test_a_hook_for_all_optimizers_is_heeded():
    optimizer, _ = prepared()
    handle = register_optimizer_step_post_hook(lambda *_: None)
    try:
        assert not module.may_be_called_directly(optimizer)
    finally:
        handle.remove()
    assert module.may_be_called_directly(optimizer)
