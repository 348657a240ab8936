"""The lower door of the backend: regions, and a module called for each task."""

import threading

import pytest
import torch
from torch import nn

from mlframework.backend.forward import call_per_task, compiled_by, region, runs_per_task


def double(x):
    return 2 * x


def test_a_region_is_the_function_itself_unless_a_compiler_is_active():
    assert region(double) is double
    seen = []

    def compiler(function, *args, recompute):
        seen.append((function, recompute))
        with compiled_by(None):
            return region(function)(*args)

    with compiled_by(compiler):
        bound = region(double, recompute=False)
        assert bound(3) == 6
    assert seen == [(double, False)]
    assert region(double) is double
    # A checkpoint calls again from a thread of its own.
    thread = threading.Thread(target=bound, args=(3,))
    thread.start()
    thread.join()
    assert len(seen) == 2


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))

    def forward(self, x):
        return x * self.weight


class Tied(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("engine", ["vectorised", "loop"])
@pytest.mark.parametrize("make", [Scale, Tied, lambda: nn.Sequential(Scale(), nn.Linear(3, 2))])
def test_every_task_has_its_own_parameters(make, engine, registered, monkeypatch):
    from mlframework.backend import stacked

    monkeypatch.setattr(stacked, "RULES", dict(stacked.RULES))
    if registered:
        runs_per_task(Scale, lambda module, params, x, mask: x * stacked.per_task(params["weight"], x))
    module, x = make(), torch.randn(4, 5, 3)
    params = {name: torch.randn(4, *p.shape) for name, p in module.named_parameters()}
    found = call_per_task(module, params, x, engine=engine)
    for task in range(4):
        own = {name: p[task] for name, p in params.items()}
        torch.testing.assert_close(found[task], torch.func.functional_call(module, own, (x[task],)))
