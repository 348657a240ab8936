"""docs/coming-from.md: our half runs as it stands, and computes what the loops of the others do."""

import pytest
import torch
import torch.nn.functional as F
from reference import maml
from test_docs import DOCS, FENCE, run_as_written
from torch.func import functional_call

from mlframework.base_layers import MLP
from mlframework.tasks import Sinusoid


def text_of(name):
    """A block of the page."""
    return {name: text for _, name, text in FENCE.findall((DOCS / "coming-from.md").read_text(encoding="utf-8"))}[name]


@pytest.mark.slow
def test_our_half_of_the_page_runs(tmp_path):
    learn2learn, _, torchmeta = run_as_written("coming-from.md", tmp_path)
    printed = [float(line.split()[1]) for line in learn2learn.stdout.splitlines()[:30]]
    assert sum(printed[-5:]) < sum(printed[:5])
    assert 0.5 < float(torchmeta.stdout) <= 1


def test_the_half_for_learn2learn_is_the_loop_of_clones(capsys):
    """The losses that it prints are those of a plain loop over tasks with the same seeds."""
    torch.manual_seed(0)
    exec(text_of("from_learn2learn.py"), {})
    printed = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    torch.manual_seed(0)
    task, generator = Sinusoid(k_shot=10, k_query=10), torch.Generator().manual_seed(0)
    network = MLP(task.spec)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    for loss in printed[:3]:
        losses, gradients = maml(network, task, task.sample(25, "train", generator), lr=0.01, steps=5)
        assert losses.mean().item() == pytest.approx(loss, rel=1e-4)
        for name, p in network.named_parameters():
            p.grad = gradients[name]
        optimizer.step()


def test_the_half_for_higher_is_an_optimizer_with_momentum_on_each_task():
    """Each task's parameters are those of a plain loop, and so is the gradient of the initialisation."""
    before_the_step, last, _ = text_of("from_higher.py").rpartition("meta_opt.step()")
    made = {}
    exec(before_the_step, made)
    assert last
    initial, total = dict(made["net"].named_parameters()), 0
    for i in range(made["task_num"]):
        params, velocity = dict(initial), dict.fromkeys(initial, 0)
        for _ in range(5):
            loss = F.cross_entropy(functional_call(made["net"], params, (made["x_spt"][i],)), made["y_spt"][i])
            gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            velocity = {name: 0.9 * velocity[name] + g for name, g in zip(params, gradients, strict=True)}
            params = {name: p - 0.1 * velocity[name] for name, p in params.items()}
        for name, p in params.items():
            torch.testing.assert_close(made["adapted"][name][i], p, rtol=1e-4, atol=1e-6)
        total += F.cross_entropy(functional_call(made["net"], params, (made["x_qry"][i],)), made["y_qry"][i])
    for p, gradient in zip(initial.values(), torch.autograd.grad(total, list(initial.values())), strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)
