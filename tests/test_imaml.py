"""Conjugate gradients against dense solves; implicit meta-gradients against differences of the solved problem."""

from functools import partial

import pytest
import torch
from reference import loss_of
from test_meta_gradients import NETWORKS, episode_of, gradients, images
from torch import nn

from mlframework.backend import capture as capture_module
from mlframework.backend.algorithm import eager_gradients
from mlframework.backend.capture import Capture
from mlframework.base_layers import MLP, BaseLayer
from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidValue, UserError
from mlframework.inner_loop import SGD, Adam, BarzilaiBorwein, Momentum, Proximal
from mlframework.meta_layers import MAML, Exact
from mlframework.meta_layers.gradient_descent.imaml import Implicit
from mlframework.solvers.conjugate_gradient import conjugate_gradient
from mlframework.tasks import Sinusoid
from mlframework.testing import directional_errors, flat
from mlframework.training.meta_gradient import meta_gradient

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = {"weight": (3, 2), "bias": (3,)}
SIZE = 9


def vectors(tasks):
    return {name: torch.randn(tasks, *shape) for name, shape in SHAPES.items()}


def joined(vector):
    """Named vectors as one matrix `[tasks, SIZE]`."""
    return torch.cat([value.flatten(1) for value in vector.values()], dim=1)


def product_with(matrices):
    """The product with each task's matrix `[tasks, SIZE, SIZE]`, by name."""

    def multiply(vector):
        parts = (matrices @ joined(vector).unsqueeze(-1)).squeeze(-1).split([6, 3], dim=1)
        return {name: part.view(-1, *shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}

    return multiply


def positive_definite(tasks, condition):
    """Symmetric matrices with eigenvalues from 1 to `condition`."""
    basis, _ = torch.linalg.qr(torch.randn(tasks, SIZE, SIZE))
    return basis * torch.linspace(1, condition, SIZE) @ basis.mT


# Conjugate gradients.


def test_conjugate_gradients_equal_a_dense_solve():
    matrices, b = positive_definite(4, condition=50.0), vectors(4)
    solution = conjugate_gradient(product_with(matrices), b, steps=SIZE + 3)
    torch.testing.assert_close(joined(solution.x), torch.linalg.solve(matrices, joined(b)), rtol=1e-10, atol=1e-12)
    assert {name: value.shape for name, value in solution.x.items()} == {name: v.shape for name, v in b.items()}


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-13), (torch.float32, 1e-4)])
@pytest.mark.parametrize("condition", [1.0, 2.0, 50.0])
@pytest.mark.parametrize("steps", [SIZE, 5 * SIZE, 30 * SIZE])
def test_steps_beyond_the_solution_change_nothing(dtype, bar, condition, steps):
    """Squares of residuals would vanish in float32 at once, and 0 / 0 follow."""
    matrices, b = positive_definite(4, condition), vectors(4)
    rounded = {name: value.to(dtype) for name, value in b.items()}
    solution = conjugate_gradient(product_with(matrices.to(dtype)), rounded, steps)
    wanted = torch.linalg.solve(matrices, joined(b))
    assert ((joined(solution.x) - wanted).norm(dim=1) <= bar * condition * wanted.norm(dim=1)).all()
    assert (solution.residual <= bar).all()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_solution_is_as_large_as_the_right_hand_side(size):
    """Squares of such numbers are 0 or infinite in float32."""
    matrices, b = positive_definite(4, condition=9.0).float(), {n: v.float() for n, v in vectors(4).items()}
    sized = conjugate_gradient(product_with(matrices), {n: size * v for n, v in b.items()}, steps=20)
    wanted = size * torch.linalg.solve(matrices, joined(b))
    torch.testing.assert_close(joined(sized.x), wanted, rtol=1e-3, atol=1e-5 * size)


def test_what_is_not_a_number_is_not_solved():
    b = vectors(2)
    b["bias"][0, 0] = torch.nan
    solution = conjugate_gradient(product_with(positive_definite(2, condition=9.0)), b, steps=20)
    assert solution.residual[0].isnan() and joined(solution.x)[0].isnan().any()
    assert solution.residual[1] < 1e-12 and joined(solution.x)[1].isfinite().all()


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_the_reported_residual_is_that_of_the_system(steps):
    matrices, b = positive_definite(4, condition=50.0), vectors(4)
    solution = conjugate_gradient(product_with(matrices), b, steps)
    rest = joined(b) - (matrices @ joined(solution.x).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(solution.residual, rest.norm(dim=1) / joined(b).norm(dim=1), rtol=1e-9, atol=0)
    assert solution.residual.min() > 1e-6


def test_as_many_steps_as_there_are_distinct_eigenvalues_are_enough():
    basis, _ = torch.linalg.qr(torch.randn(2, SIZE, SIZE))
    matrices = basis * torch.tensor([1.0, 1, 1, 4, 4, 4, 4, 9, 9]) @ basis.mT
    assert conjugate_gradient(product_with(matrices), vectors(2), steps=2).residual.min() > 1e-4
    assert conjugate_gradient(product_with(matrices), vectors(2), steps=3).residual.max() < 1e-12


def test_tasks_do_not_see_each_other_whatever_becomes_of_them():
    """Solved in one step, ordinary, nothing to solve, concave at once: each as if it were alone, and all finite."""
    matrices = torch.cat([torch.eye(SIZE).unsqueeze(0), positive_definite(3, condition=9.0)])
    matrices[3] *= -1
    b = vectors(4)
    for value in b.values():
        value[2] = 0
    together = conjugate_gradient(product_with(matrices), b, steps=20)
    for task in range(4):
        one = slice(task, task + 1)
        alone = conjugate_gradient(product_with(matrices[one]), {n: v[one] for n, v in b.items()}, steps=20)
        torch.testing.assert_close(joined(together.x)[one], joined(alone.x), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(together.residual[one], alone.residual, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(joined(together.x)[0], joined(b)[0])
    assert not joined(together.x)[2].any() and together.residual[2] == 0
    assert torch.equal(joined(together.x)[3], joined(b)[3]) and together.residual[3] == 1


def test_a_direction_without_curvature_ends_a_task_before_it():
    matrix = torch.diag(torch.cat([torch.ones(SIZE - 1), -torch.ones(1)])).unsqueeze(0)
    b = {"weight": torch.ones(1, 3, 2), "bias": torch.ones(1, 3)}
    one = conjugate_gradient(product_with(matrix), b, steps=1)
    many = conjugate_gradient(product_with(matrix), b, steps=10)
    assert torch.equal(joined(many.x), joined(one.x)) and torch.equal(many.residual, one.residual)


def test_no_steps_at_all_are_refused():
    with pytest.raises(InvalidValue, match="steps=0: must be at least 1"):
        conjugate_gradient(lambda vector: vector, vectors(1), steps=0)


# The inner problem.


def linear(task):
    """A base layer that is one linear map, so that the inner problem of a regression is quadratic."""
    return BaseLayer(nn.Flatten(), nn.Linear(1, task.spec.out_features))


def solved_by(rule, task, *, steps, network=None, meta_gradient=None, strength=1.0, **settings):
    update = partial(Proximal, rule=rule, strength=strength)
    way = meta_gradient or Implicit(cg_steps=100)
    return MAML(network or linear(task), task, update=update, meta_gradient=way, inner_steps=steps, **settings)


RULES = {
    "sgd": (partial(SGD, lr=0.05), 300),
    "momentum": (partial(Momentum, lr=0.02, momentum=0.7), 200),
    "barzilai_borwein": (partial(BarzilaiBorwein, lr=0.01), 40),
    "barzilai_borwein_from_a_rate_that_diverges": (partial(BarzilaiBorwein, lr=1.0), 40),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_solves_the_proximal_problem(rule):
    """For a linear model it is a ridge regression towards the initialisation, whose solution is known."""
    task = Sinusoid(k_shot=6, k_query=4)
    make, steps = RULES[rule]
    meta_layer = solved_by(make, task, steps=steps)
    support = episode_of(task, num_tasks=3).support
    adapted = meta_layer.adapt(support)
    x = torch.cat([support.x, torch.ones_like(support.x)], dim=-1)
    start = flat(meta_layer.base_layer.head.parameters())
    normal = 2 / 6 * x.mT @ x + torch.eye(2)
    wanted = torch.linalg.solve(normal, 2 / 6 * x.mT @ support.y + start.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(joined(adapted), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-21])
def test_the_rate_of_barzilai_and_borwein_stays_finite_where_squares_vanish(size):
    rule = BarzilaiBorwein({}, lr=0.5)
    params = {"w": size * torch.ones(1, 2, dtype=torch.float32)}
    state = rule.init(params)
    for step in range(4):
        params, state = rule(params, {"w": 1e-3 * params["w"]}, state, step)
        assert params["w"].isfinite().all() and params["w"].abs().max() <= size


@pytest.mark.parametrize("rule", [partial(SGD, lr=0.02), partial(Adam, lr=0.02), partial(BarzilaiBorwein, lr=0.02)])
def test_the_proximal_problem_can_be_differentiated_through_its_steps(rule):
    task = Sinusoid(k_shot=6, k_query=4)
    network = smooth(MLP(task.spec, hidden=[6]))
    meta_layer = solved_by(rule, task, steps=3, network=network, meta_gradient=Exact())
    assert directional_errors(meta_layer, episode_of(task)).max() < 1e-6


# The meta-gradient.


def smooth(module):
    """The same network with softplus in place of ReLU and mean- in place of max-pooling, so that its loss is smooth."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.Softplus(beta=3))
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(2))
        else:
            smooth(child)
    return module


#: What makes the inner problem of each network strongly convex, and the steps that solve it to rounding.
STRENGTHS = {
    "mlp": (5.0, 25),
    "layer_norm": (20.0, 25),
    "conv4_batch_stride": (100.0, 60),
    "conv4_batch_pool": (20.0, 40),
    "conv4_group": (100.0, 40),
}


def implicit(network, *, adapts=".", steps=None):
    """A solved inner problem on images."""
    side, make = NETWORKS[network]
    strength, enough = STRENGTHS[network]
    task = images(side)
    meta_layer = solved_by(
        partial(BarzilaiBorwein, lr=0.01),
        task,
        steps=steps or enough,
        network=smooth(make(task.spec)),
        meta_gradient=Implicit(cg_steps=25),
        strength=strength,
        adapts=adapts,
    )
    return meta_layer, episode_of(task)


@pytest.mark.parametrize("adapts", [".", "^head", "^features"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_meta_gradient_equals_finite_differences_of_the_solved_problem(network, adapts):
    meta_layer, episode = implicit(network, adapts=adapts)
    _, metrics = meta_gradient(meta_layer, episode)
    assert metrics["inner_residual"].max() < 1e-10 and metrics["cg_residual"].max() < 1e-10
    assert directional_errors(meta_layer, episode, directions=2).max() < 1e-6


def test_it_is_the_dense_solve_wherever_the_inner_loop_ends():
    """After one step, far from the solution: `(I + H / lambda)^-1` times the query gradient, task by task."""
    task, strength = Sinusoid(k_shot=6, k_query=4), 8.0
    network = smooth(MLP(task.spec, hidden=[4]))
    meta_layer = solved_by(partial(SGD, lr=0.01), task, steps=1, network=network, strength=strength)
    episode = episode_of(task, num_tasks=3)
    losses, metrics = meta_gradient(meta_layer, episode)
    assert metrics["inner_residual"].min() > 0.1
    adapted = meta_layer.adapt(episode.support)
    wanted = 0
    for number in range(3):
        shapes = {name: p.shape for name, p in network.named_parameters()}

        def loss(vector, part, number=number, shapes=shapes):
            parts = vector.split([shape.numel() for shape in shapes.values()])
            params = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
            return loss_of(network, params, part, task, number)

        phi = torch.cat([p[number].detach().flatten() for p in adapted.values()])
        hessian = torch.autograd.functional.hessian(lambda vector, loss=loss: loss(vector, episode.support), phi)
        query = torch.func.grad(loss)(phi, episode.query)
        wanted += torch.linalg.solve(torch.eye(len(phi)) + hessian / strength, query) / 3
        torch.testing.assert_close(losses[number], loss(phi, episode.query))
    torch.testing.assert_close(flat(p.grad for p in network.parameters()), wanted, rtol=1e-8, atol=1e-10)


def test_it_equals_differentiating_through_very_many_steps():
    implicitly, episode = implicit("mlp")
    unrolled, _ = implicit("mlp")
    unrolled.load_state_dict(implicitly.state_dict())
    unrolled.meta_gradient = Exact()
    for meta_layer in (implicitly, unrolled):
        meta_gradient(meta_layer, episode)
    found, wanted = (flat(gradients(meta_layer).values()) for meta_layer in (implicitly, unrolled))
    assert (found - wanted).norm() < 1e-8 * wanted.norm()


def test_the_meta_gradient_is_finite_after_more_steps_than_the_head_has_parameters():
    """Two parameters adapt: two steps solve the linear system, and 20 are taken."""
    torch.set_default_dtype(torch.float32)
    task = Sinusoid(k_shot=10, k_query=10)
    meta_layer = solved_by(
        partial(BarzilaiBorwein, lr=0.01),
        task,
        steps=16,
        network=MLP(task.spec, hidden=[8]),
        meta_gradient=Implicit(cg_steps=20),
        strength=2.0,
        adapts="^head",
    )
    for seed in range(10):
        meta_layer.zero_grad()
        _, metrics = meta_gradient(meta_layer, task.sample(4, "train", torch.Generator().manual_seed(seed)))
        assert metrics["cg_residual"].max() < 1e-5
        assert all(p.grad.isfinite().all() for p in meta_layer.parameters())


def padded(examples, rows):
    """The same examples, and rows of nonsense that do not count."""
    leaves = [torch.cat([leaf, leaf[:, :rows]], dim=1) for leaf in examples]
    leaves[0][:, -rows:] *= -7
    leaves[2][:, -rows:] = 0
    return Examples(*leaves)


class Ragged(Sinusoid):
    """Sinusoids whose tasks may hold padding."""

    def __init__(self):
        super().__init__(k_shot=6, k_query=4)
        self.spec = self.spec._replace(ragged=True)


def test_padding_of_the_support_set_is_no_part_of_the_implicit_meta_gradient():
    found = []
    for pad in (0, 1, 5):
        torch.manual_seed(0)
        task = Ragged()
        meta_layer = solved_by(
            partial(BarzilaiBorwein, lr=0.01), task, steps=60, network=smooth(MLP(task.spec, hidden=[6]))
        )
        episode = episode_of(task)
        if pad:
            episode = Episode(padded(episode.support, pad), padded(episode.query, min(pad, 4)))
        losses, metrics = meta_gradient(meta_layer, episode)
        found.append((losses, metrics["inner_residual"], flat(p.grad for p in meta_layer.parameters())))
    for other in found[1:]:
        for value, wanted in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-9)


def test_the_inner_residual_goes_from_one_to_nothing():
    task = Sinusoid(k_shot=6, k_query=4)
    episode = episode_of(task)
    residuals = []
    for rate, steps in [(1e-9, 1), (0.01, 3), (0.01, 40)]:
        torch.manual_seed(0)
        _, metrics = meta_gradient(solved_by(partial(BarzilaiBorwein, lr=rate), task, steps=steps), episode)
        residuals.append(metrics["inner_residual"])
    start, middle, end = residuals
    torch.testing.assert_close(start, torch.ones(2), rtol=0, atol=1e-6)
    assert (middle < 0.95).all() and (middle > 1e-3).all()
    assert (end < 1e-10).all()


@pytest.mark.parametrize(("steps", "lines"), [(1, 1), (40, 0)])
def test_one_line_warns_of_an_inner_problem_that_has_not_converged(caplog, steps, lines):
    task = Sinusoid(k_shot=6, k_query=4)
    meta_layer = solved_by(partial(BarzilaiBorwein, lr=0.01), task, steps=steps)
    for _ in range(3):
        meta_gradient(meta_layer, episode_of(task))
    assert sum("the inner problem has not converged" in line for line in caplog.messages) == lines


def test_what_takes_no_part_in_the_solution_is_left_out_of_the_graph():
    """The inner steps are no part of the graph: the meta-loss of many steps has as many nodes as that of one."""
    few, episode = implicit("mlp", steps=1)
    many, _ = implicit("mlp", steps=5)
    sizes = [nodes(meta_layer.meta_loss(episode)[0].grad_fn) for meta_layer in (few, many)]
    assert sizes[0] == sizes[1]


def nodes(root):
    """How many nodes a graph has."""
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return len(seen)


def test_an_inner_problem_without_a_proximal_term_is_refused_in_one_line():
    task = Sinusoid(k_shot=6, k_query=4)
    meta_layer = MAML(linear(task), task, update=partial(SGD, lr=0.1), meta_gradient=Implicit(), inner_steps=1)
    with pytest.raises(UserError, match="use algorithm/update=proximal, not SGD"):
        meta_gradient(meta_layer, episode_of(task))


@pytest.mark.parametrize("setting", [{"inner_clip": 1.0}, {"inner_weight_decay": 0.1}])
def test_what_would_change_the_inner_problem_is_refused_in_one_line(setting):
    task = Sinusoid(k_shot=6, k_query=4)
    meta_layer = solved_by(partial(SGD, lr=0.1), task, steps=1, **setting)
    with pytest.raises(UserError, match=next(iter(setting))):
        meta_gradient(meta_layer, episode_of(task))


@pytest.mark.parametrize("setting", [{"cg_steps": 0}, {"tolerance": 0.0}])
def test_settings_that_make_no_sense_are_refused(setting):
    (field,) = setting
    with pytest.raises(InvalidValue, match=f"{field}=0"):
        Implicit(**setting)


def test_captured_steps_are_the_eager_ones_in_float64(monkeypatch, caplog):
    """In float32 rounding may drive them apart; a fault would be as large here."""
    monkeypatch.setattr(capture_module, "MOST_OPERATIONS", 0)
    task = Sinusoid(k_shot=3, k_query=3)
    layer = MAML(
        MLP(task.spec, hidden=[6]),
        task,
        update=partial(Proximal, rule=partial(BarzilaiBorwein, lr=0.01), strength=2.0),
        meta_gradient=Implicit(cg_steps=2),
        inner_steps=4,
    ).double()
    capture = Capture(layer, "true")
    for seed in range(3):
        episode = in_float64(task.sample(4, "train", torch.Generator().manual_seed(seed)))
        found, expected = capture(episode), eager_gradients(layer, episode)
        torch.testing.assert_close(found.by_name, expected.by_name, rtol=1e-7, atol=1e-9)
    assert capture.regions.regions and "eager steps" not in caplog.text


def in_float64(episode):
    parts = (Examples(*(leaf.double() if leaf.is_floating_point() else leaf for leaf in part)) for part in episode)
    return Episode(*parts)
