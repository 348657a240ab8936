"""Support vector, ridge and logistic solvers against scikit-learn, optimality conditions and finite differences."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.svm import LinearSVC
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, vmap

from mlframework.solvers import box_qp, linear
from mlframework.solvers.linear import factor_each, solve_each
from mlframework.solvers.logistic import logistic
from mlframework.solvers.ridge import kernel_ridge, linear_ridge
from mlframework.solvers.support_vectors import crammer_singer, one_vs_rest

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's own forward mode says so when it is first used.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

WAYS_AND_SHOTS = [(5, 1), (5, 5), (5, 15), (20, 1), (20, 5)]
SCALES = [1, 30, 1e3, 5e4]
SOLVERS = {
    "crammer_singer": lambda kernel, y, **settings: crammer_singer(kernel, y, c=0.1, **settings),
    "one_vs_rest": lambda kernel, y, **settings: one_vs_rest(kernel, y, c=0.1, **settings),
    "logistic": lambda kernel, y, **settings: logistic(kernel, y, reg=1.0, **settings),
    "ridge": lambda kernel, y, **settings: kernel_ridge(kernel, y, reg=1.0, **settings),
}


def classes(tasks, ways, shots):
    return torch.eye(ways).repeat(shots, 1).expand(tasks, ways * shots, ways)


def features(tasks, ways, shots, size, scale):
    """As after a ReLU, around a centre for each class; the mean squared norm is `scale`."""
    centres = torch.randn(tasks, ways, size).repeat(1, shots, 1)
    x = (centres + torch.randn(tasks, ways * shots, size)).relu()
    return x * (scale / x.square().sum(-1).mean()) ** 0.5


def projected(v, upper):
    """The nearest point with rows that sum to 0 and entries up to `upper`, by bisection of the shift of each row."""
    low, high = v.min() - upper.abs().sum() - v.abs().max(), v.max() + 1
    low, high = low.expand_as(v[..., :1]), high.expand_as(v[..., :1])
    for _ in range(200):
        middle = (low + high) / 2
        too_low = torch.minimum(v - middle, upper).sum(-1, keepdim=True) > 0
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return torch.minimum(v - (low + high) / 2, upper)


def residual(kernel, y, dual, c=0.1):
    """How far a step along the gradient of the dual objective, projected onto the constraints, moves the solution."""
    rate = 1 / kernel.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None].clamp(min=1e-9)
    gradient = (kernel + torch.eye(kernel.shape[-1])) @ dual - y
    return ((dual - projected(dual - rate * gradient, c * y)) / rate).abs().max()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("ways", "shots"), WAYS_AND_SHOTS)
def test_the_optimality_conditions_hold_to_rounding(ways, shots, scale):
    y = classes(1, ways, shots)
    for size, bar in ((640, 1e-12), (16, 1e-10)):
        x = features(1, ways, shots, size, scale)
        found = crammer_singer(x @ x.mT, y, c=0.1)
        assert residual(x @ x.mT, y, found.dual) <= bar
        assert found.converged.all() and found.residual.max() <= bar


HARD = {
    "zero features": lambda: torch.zeros(2, 25, 16),
    "one point for all": lambda: 3 * torch.randn(2, 1, 16).expand(2, 25, 16),
    "collapsed classes": lambda: 10 * torch.randn(2, 5, 16).repeat(1, 5, 1),
    "half of them zero": lambda: torch.randn(2, 25, 16) * (torch.arange(25) > 10).unsqueeze(-1),
    "one dimension": lambda: 20 * torch.randn(2, 25, 1),
}


@pytest.mark.parametrize("make", HARD.values(), ids=HARD)
def test_hard_cases_are_solved_as_well(make):
    x, y = make(), classes(2, 5, 5)
    found = crammer_singer(x @ x.mT, y, c=0.1)
    assert residual(x @ x.mT, y, found.dual) <= 1e-10
    assert found.converged.all()
    assert one_vs_rest(x @ x.mT, y, c=0.1).residual.max() <= 1e-10


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("ways", "shots"), [(5, 1), (5, 5), (20, 1)])
@pytest.mark.filterwarnings("ignore")
def test_weights_are_those_of_scikit_learns_crammer_singer(ways, shots, scale):
    # The same points, turned so that all but n of their 640 coordinates are 0: liblinear's time goes by their number.
    x, y = torch.linalg.qr(features(1, ways, shots, 640, scale).mT).R.mT, classes(1, ways, shots)
    dual = crammer_singer(x @ x.mT, y, c=0.1).dual[0]
    augmented = np.concatenate([x[0].numpy(), np.eye(ways * shots)], 1)
    settings = {"C": 0.1, "fit_intercept": False, "tol": 1e-12, "max_iter": 1_000_000}
    reference = LinearSVC(multi_class="crammer_singer", **settings).fit(augmented, y[0].argmax(-1).numpy())
    assert np.abs(dual.numpy().T @ augmented - reference.coef_).max() <= 1e-8


@pytest.mark.filterwarnings("ignore")
def test_one_vs_rest_is_scikit_learns_linear_svc():
    x, y = features(1, 5, 5, 64, 30), classes(1, 5, 5)
    dual = one_vs_rest(x @ x.mT, y, c=0.1).dual[0]
    augmented = np.concatenate([x[0].numpy(), np.eye(25)], 1)
    settings = {"C": 0.1, "fit_intercept": False, "tol": 1e-12, "max_iter": 1_000_000}
    reference = LinearSVC(loss="hinge", **settings).fit(augmented, y[0].argmax(-1).numpy())
    assert np.abs(dual.numpy().T @ augmented - reference.coef_).max() <= 1e-8


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.filterwarnings("ignore")  # the reference warns that its line search ends at rounding level
def test_logistic_is_scikit_learns(scale):
    x, y = features(1, 5, 5, 64, scale), classes(1, 5, 5)
    found = logistic(x @ x.mT, y, reg=2.0)
    reference = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-10, max_iter=10_000, solver="newton-cg")
    reference.fit(x[0].numpy(), y[0].argmax(-1).numpy())
    assert np.abs(found.dual[0].numpy().T @ x[0].numpy() - reference.coef_).max() <= 1e-6
    assert found.residual.max() <= 1e-12


@pytest.mark.parametrize("size", [7, 64])
def test_ridge_is_scikit_learns(size):
    x, y = features(1, 5, 5, size, 30), torch.randn(1, 25, 3)
    reference = Ridge(alpha=2.0, fit_intercept=False).fit(x[0].numpy(), y[0].numpy()).coef_
    assert np.abs((x.mT @ kernel_ridge(x @ x.mT, y, reg=2.0).dual)[0].numpy().T - reference).max() <= 1e-10


def test_ridge_by_features_is_ridge_by_their_kernel_with_its_derivatives():
    x, y, reg = (
        features(2, 3, 4, 5, 10).requires_grad_(),
        torch.randn(2, 12, 3),
        torch.tensor([0.3, 2.0]).requires_grad_(),
    )
    mask = torch.ones(2, 12)
    mask[0, 9:] = 0

    def by_features(x, reg):
        return linear_ridge(x, y, reg=reg, mask=mask).dual

    def by_kernel(x, reg):
        return x.mT @ kernel_ridge(x @ x.mT, y, reg=reg, mask=mask).dual

    torch.testing.assert_close(by_features(x, reg), by_kernel(x, reg))
    solution = linear_ridge(x, y, reg=reg, mask=mask)
    assert solution.converged.all() and solution.residual.max() <= 1e-12
    assert gradcheck(by_features, (x, reg), rtol=1e-6, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(by_features, (x, reg), rtol=1e-5, fast_mode=True)
    (found, wanted) = (torch.autograd.grad(way(x, reg).square().sum(), (x, reg)) for way in (by_features, by_kernel))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("scale", [3, 1e3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_are_those_of_finite_differences_to_second_order_and_in_forward_mode(solver, scale):
    y = classes(2, 3, 2)
    x = features(2, 3, 2, 7, scale).requires_grad_()

    def dual(x):
        return SOLVERS[solver](x @ x.mT, y).dual

    assert gradcheck(dual, (x,), rtol=1e-6, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(dual, (x,), rtol=1e-5, fast_mode=True)


def test_c_and_reg_can_be_learned():
    x, y = features(2, 3, 4, 4, 20), classes(2, 3, 4)
    c, reg = torch.tensor([0.05, 0.1], requires_grad=True), torch.tensor(1.5, requires_grad=True)
    for solver in (crammer_singer, one_vs_rest):
        assert gradcheck(lambda c, reg, solver=solver: solver(x @ x.mT, y, c=c, reg=reg).dual, (c, reg))
    assert gradcheck(lambda reg: logistic(x @ x.mT, y, reg=reg).dual, (reg,))
    assert gradcheck(lambda reg: kernel_ridge(x @ x.mT, y, reg=reg).dual, (reg,))


@pytest.mark.parametrize("solver", SOLVERS)
def test_vmap_of_grad_is_a_loop(solver):
    x, y = features(4, 5, 3, 9, 10), classes(4, 5, 3)

    def loss(x, y):
        kernel = (x @ x.mT).unsqueeze(0)
        return SOLVERS[solver](kernel, y.unsqueeze(0)).dual.square().sum()

    looped = torch.stack([grad(loss)(*task) for task in zip(x, y, strict=True)])
    assert torch.allclose(vmap(grad(loss))(x, y), looped, rtol=1e-10, atol=1e-14)
    second = vmap(jacrev(grad(loss)))(x, y)
    assert torch.allclose(jacrev(grad(loss))(x[1], y[1]), second[1], rtol=1e-10, atol=1e-14)
    if solver in ("crammer_singer", "one_vs_rest"):
        # torch 2.13's own torch.linalg.solve, of which the others are made, gives NaN under vmap of jacfwd.
        assert torch.allclose(vmap(jacfwd(grad(loss)))(x, y), second, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_the_mask_leaves_out_changes_nothing_and_gets_nothing(solver):
    x, y = features(3, 5, 3, 9, 10), classes(3, 5, 3)
    more, others = torch.cat([x, torch.randn(3, 2, 9)], 1), torch.cat([y, classes(3, 2, 1).new_ones(3, 2, 5)], 1)
    mask = torch.cat([torch.ones(3, 15), torch.zeros(3, 2)], 1)
    padded = SOLVERS[solver](more @ more.mT, others, mask=mask).dual
    assert torch.allclose(padded[:, :15], SOLVERS[solver](x @ x.mT, y).dual, atol=1e-12)
    assert not padded[:, 15:].any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_features_are_solved_for_in_float64(solver):
    x, y = features(2, 5, 5, 16, 1e3).float(), classes(2, 5, 5).float()
    found = SOLVERS[solver](x @ x.mT, y)
    assert found.dual.dtype == torch.float32
    kernel = (x @ x.mT).double()
    assert torch.allclose(found.dual.double(), SOLVERS[solver](kernel, y.double()).dual, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", ["crammer_singer", "one_vs_rest"])
def test_machines_whose_active_set_goes_round_in_circles_are_solved(solver, monkeypatch):
    x, y = torch.cat([features(8, 5, 5, 2, scale) for scale in (30, 1e3)]), classes(16, 5, 5)
    assert SOLVERS[solver](x @ x.mT, y).converged.all()
    monkeypatch.setattr(box_qp, "MORE_STEPS", ())
    assert not SOLVERS[solver](x @ x.mT, y).converged.all()


def test_a_kernel_that_is_nearly_singular_is_solved(float64):
    """Of features a thousand times as large as the regulariser, with more examples than features."""
    generator = torch.Generator().manual_seed(5)
    means, labels = torch.randn(16, 5, 8, generator=generator), torch.arange(25) % 5
    x = 300 * (0.5 * means[:, labels] + torch.randn(16, 25, 8, generator=generator)).relu()
    y = torch.nn.functional.one_hot(labels, 5).to(x).expand(16, 25, 5)
    found = one_vs_rest(x @ x.mT, y, c=1.0, reg=0.01)
    assert found.converged.all()


@pytest.fixture
def several_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


SLOW = ("crammer_singer", "one_vs_rest")


@pytest.mark.parametrize("solver", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SOLVERS])
def test_large_problems_are_solved_in_several_threads(solver, several_threads):
    """Some of torch's batched factorisations are wrong there."""
    shots = 40 if solver == "logistic" else 80  # systems of 160 unknowns
    x, y = features(3, 2, shots, 20, 1.0), classes(3, 2, shots)
    found = SOLVERS[solver](x @ x.mT, y)
    assert found.converged.all()
    for task in range(3):
        alone = SOLVERS[solver](x[task : task + 1] @ x[task : task + 1].mT, y[:1])
        torch.testing.assert_close(found.dual[task], alone.dual[0], rtol=1e-7, atol=1e-9)


def test_large_systems_are_solved_and_differentiated_one_by_one(several_threads, monkeypatch):
    matrix = torch.randn(3, 200, 200)
    right = torch.randn(3, 200, 2)
    torch.testing.assert_close(matrix @ solve_each(matrix, right), right, rtol=0, atol=1e-8)
    factors, pivots = factor_each(matrix)
    torch.testing.assert_close(matrix @ torch.linalg.lu_solve(factors, pivots, right), right, rtol=0, atol=1e-8)
    mapped = vmap(lambda right: solve_each(matrix[:1], right))(right.unsqueeze(1))
    torch.testing.assert_close(matrix[:1] @ mapped.squeeze(1), right, rtol=0, atol=1e-8)
    monkeypatch.setattr(linear, "LARGEST_OF_A_BATCH", 2)  # a small matrix, for finite differences
    matrix, right = (each.clone().requires_grad_() for each in (matrix[:2, :3, :3], right[:2, :3]))
    assert gradcheck(solve_each, (matrix, right), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(solve_each, (matrix, right))


def test_no_other_file_makes_a_batched_lu_factorisation():
    package = Path(linear.__file__).parents[1]
    used = re.compile(r"linalg\.(solve|inv|det|slogdet|lu\w*|matrix_inverse)\(|torch\.(inverse|det|slogdet|lu)\(")
    found = {path.name for path in package.rglob("*.py") if used.search(path.read_text())}
    assert found - {"linear.py", "matrix_factorisation.py"} == {"box_qp.py"}  # lu_solve takes factors; numpy's solve
