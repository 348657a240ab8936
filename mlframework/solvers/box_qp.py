"""Many small quadratic programs with bounds at once, exactly, and differentiable to any order.

    min_A  1/2 <A, A K> - <E, A>    A [k, n]    s.t.  lower <= A <= upper  and, if coupled, each column of A sums to 0

`K` is positive definite. Dual support vector machines are of this form. The optimum is a linear function of `E` once it
is known which entries stand at a bound, so that finding these is combinatorial, and differentiating is not.

Everything here is batched over tasks, `[tasks, k, n]` with classes first, and in float64.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlframework.solvers.free_inverse import FreeInverse, centred, free_inverse, inverse, rebuilt
from mlframework.solvers.linear import factor_each, with_mapped_axis

__all__ = ["Problem", "solve"]

#: Penalty, of a kernel with a diagonal of 1, and over-relaxation of the alternating direction method.
RHO, RELAXATION = 0.3, 1.6
MAX_CHANGES = 8  # of the active set, before it starts again
MORE_STEPS = (300, 3000, 20_000)  # of that method, after which it starts again
#: Residuals:
EXACT = 1e-13  # at which an active set counts as right, even if rounding suggests changes
RETRY = 1e-5  # above which it starts again
PRECISE = 1e-12  # above which the right active set is solved for again, with more care
TOLERANCE = 1e-9  # up to which a solution counts as converged


class Problem(NamedTuple):
    """The data of every task. A masked example has 0 for both bounds, and a row of the identity in the kernel."""

    kernel: Tensor  # positive definite, [tasks, n, n]
    linear: Tensor  # E, [tasks, k, n]
    lower: Tensor  # [tasks, k, n], possibly infinite
    upper: Tensor  # the same
    coupled: bool  # whether the classes of an example sum to 0

    def rows(self, index: Tensor) -> Problem:
        return Problem._make((*(leaf[index] for leaf in self[:4]), self.coupled))


def solve(problem: Problem) -> tuple[Tensor, Tensor]:
    """The optimum `A` `[tasks, k, n]`, differentiable, and its residual `[tasks]`, detached."""
    kernel, linear, lower, upper, coupled = problem
    # In units in which the kernel's mean diagonal is 1.
    scale = kernel.detach().diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    leaves = kernel / scale, linear, lower * scale, upper * scale
    state, share, optimum, residual, *parts = ActiveSet.apply(*(leaf.detach() for leaf in leaves), coupled)
    return Optimum.apply(*leaves[:2], at_bounds(state, *leaves[2:]), optimum, share, *parts) / scale, residual


def at_bounds(state: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The bounds of active entries, 0 for free ones, `[tasks, k, n]`."""
    return torch.where(state > 0, upper, torch.where(state < 0, lower, 0.0))


def shares(state: Tensor, coupled: bool) -> Tensor:
    """The share of each free entry in its example's sum over classes, `[tasks, k, n]`: 0 if not coupled."""
    if not coupled:
        return torch.zeros_like(state)
    free = (state == 0).to(state.dtype)
    return free / free.sum(-2, keepdim=True).clamp(min=1)


def anchored(bounds: Tensor, share: Tensor) -> Tensor:
    """A point with active entries at their bounds, which sums to 0 over coupled classes."""
    return bounds - share * bounds.sum(-2, keepdim=True)


def pushing(force: Tensor, share: Tensor) -> Tensor:
    """The force minus the shared force of coupled classes: 0 in the free entries of an optimum."""
    return force - (share * force).sum(-2, keepdim=True)


class Optimum(torch.autograd.Function):
    """The optimum that was found, as a function of the kernel, of `E` and of active entries' bounds.

    With active entries held fixed it is `A = S + R (E - S K)` for any `S` that satisfies the constraints and `R` the
    `FreeInverse`, whose parts come last. Without bounds and an optimum it is `R E`, of which its derivatives are made:
    `dA = dS + R (dE - dS K - A dK)`, with `R` symmetric.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        kernel: Tensor, linear: Tensor, bounds: Tensor | None, optimum: Tensor | None, share: Tensor, *parts: Tensor
    ) -> Tensor:
        return rebuilt(*parts)(linear) if optimum is None else optimum.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        kernel, _, _, _, *constant = inputs
        ctx.save_for_backward(kernel, output, *constant)
        ctx.save_for_forward(kernel, output, *constant)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernel, optimum, *constant = ctx.saved_tensors
        by_linear = Optimum.apply(kernel, gradient, None, None, *constant)
        by_bounds = pushing(gradient - by_linear @ kernel, constant[0]) if ctx.needs_input_grad[2] else None
        outer = torch.bmm(by_linear.mT, optimum)
        return (outer + outer.mT) * -0.5, by_linear, by_bounds, None, *(None for _ in constant)

    @staticmethod
    def jvp(ctx: Any, d_kernel: Any, d_linear: Any, d_bounds: Any, *_: Any) -> Tensor:
        kernel, optimum, *constant = ctx.saved_tensors
        change = torch.zeros_like(optimum) if d_linear is None else d_linear
        if d_kernel is not None:
            change = change - optimum @ (d_kernel + d_kernel.mT) / 2
        if d_bounds is None:
            return Optimum.apply(kernel, change, None, None, *constant)
        start = anchored(d_bounds, constant[0])
        return start + Optimum.apply(kernel, change - start @ kernel, None, None, *constant)


class ActiveSet(torch.autograd.Function):
    """Which entries stand at the optimum at their upper bound (1), their lower bound (-1), or are free (0).

    With that come the optimum, its residual, and the parts of the `FreeInverse`. Nothing of it is differentiable.
    """

    @staticmethod
    def forward(kernel: Tensor, linear: Tensor, lower: Tensor, upper: Tensor, coupled: bool) -> tuple[Tensor, ...]:
        found, inverted = search(Problem(kernel, linear, lower, upper, coupled))
        return found.state, found.share, found.optimum, found.residual, *inverted

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        found = ActiveSet.apply(*with_mapped_axis(info, in_dims[:4], args[:4]), args[4])
        return tuple(leaf.unflatten(0, (info.batch_size, -1)) for leaf in found), (0,) * len(found)


for function in (Optimum, ActiveSet):
    # torch works it out at every call, which takes a tenth of the time of a small problem.
    vars(function.forward)["__signature__"] = inspect.signature(function.forward)


class Found(NamedTuple):
    state: Tensor  # 1 at the upper bound, -1 at the lower, 0 free, [tasks, k, n]
    share: Tensor  # see `shares`, [tasks, k, n]
    optimum: Tensor  # among the points with these active entries, [tasks, k, n]
    force: Tensor  # the negative gradient, 0 in free entries up to rounding, [tasks, k, n]
    residual: Tensor  # the largest violation of the optimality conditions, in units of the kernel's diagonal, [tasks]

    def improved(self, tasks: Tensor, other: Found) -> Found:
        """With the tasks whose residual is smaller in `other`, replaced."""
        better = other.residual < self.residual[tasks]
        pairs = zip(self, other, strict=True)
        return Found._make(whole.index_copy(0, tasks[better], part[better]) for whole, part in pairs)


def search(problem: Problem) -> tuple[Found, FreeInverse]:
    """The active set of scaled problems, by changes from a warm start, and the optimum, refined where rounding shows.

    If the changes go round in circles, they start again after more steps, with the penalty that suits each kernel. Of
    2,880 random machines with up to 75 examples, 179 needed that. Nearly singular kernels may stay unsolved: then the
    point with the smallest residual is taken.

    Reference: Ghadimi et al., Optimal Parameter Selection for the Alternating Direction Method of Multipliers:
        Quadratic Problems, 2015, arXiv:1306.2454, theorem 4: the root of the extreme eigenvalues' product.
    """
    # The larger the kernel, the dearer is a change of the active set beside a step, and the more of these pay.
    start, _ = warm_start(problem, RHO, steps=1 + problem.kernel.shape[-1] * 3 // 8)
    inverted = free_inverse(problem.kernel, start, problem.coupled)
    found = optimum_of(problem, start, inverted)
    if float(found.residual.max()) <= EXACT:
        return found, inverted
    found = change(problem, found)
    for steps in MORE_STEPS:
        failed = torch.nonzero(found.residual > RETRY).flatten()
        if not len(failed):
            break
        hard = problem.rows(failed)
        eigenvalues = torch.linalg.eigvalsh(hard.kernel)
        rho = (eigenvalues[:, 0] * eigenvalues[:, -1]).clamp(min=1e-12).sqrt()
        state, near = warm_start(hard, rho[:, None, None], steps)
        # If no active set turns out to be right, the method's own point is at least within the bounds.
        found = found.improved(failed, judged(hard, near, state, shares(state, hard.coupled)))
        begun = optimum_of(hard, state, free_inverse(hard.kernel, state, hard.coupled))
        found = found.improved(failed, change(hard, begun))
    if not torch.equal(found.state, start):
        inverted = free_inverse(problem.kernel, found.state, problem.coupled)
    if float(found.residual.max()) > EXACT:
        refined = optimum_of(problem, found.state, inverted, found.optimum)
        found = found.improved(torch.arange(len(start), device=start.device), refined)
    rough = torch.nonzero((found.residual > PRECISE) & (found.residual < RETRY)).flatten()
    if len(rough):
        found = found.improved(rough, polished(problem.rows(rough), found.state[rough]))
    return found, inverted


def warm_start(problem: Problem, rho: Tensor | float, steps: int) -> tuple[Tensor, Tensor]:
    """Guesses of the active set and the optimum: steps of the alternating direction method, over-relaxed."""
    kernel, linear, lower, upper, coupled = problem
    inverted = inverse(kernel + rho * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device))
    # Subtracting the mean over classes commutes with the kernel.
    constant = RELAXATION * torch.bmm(centred(linear) if coupled else linear, inverted)
    inverted = RELAXATION * rho * inverted
    reached = torch.zeros_like(linear)
    bounded = reached.clamp(lower, upper)
    for _ in range(steps):
        # The scaled multipliers are `reached - bounded`; this is `bounded` minus them.
        mirrored = torch.lerp(reached, bounded, 2.0)
        rest = torch.sub(reached, bounded, alpha=RELAXATION).add_(constant)
        reached = torch.baddbmm(rest, centred(mirrored) if coupled else mirrored, inverted)
        bounded = reached.clamp(lower, upper)
    return leave_one_free(problem, (reached - bounded).sign()), bounded


def change(problem: Problem, found: Found) -> Found:
    """Changes the active set until it is the right one, or too often: a primal-dual active set method.

    A free entry beyond a bound becomes active; an active entry that its bound does not hold back becomes free. The best
    that was met is returned.

    Reference: Hintermueller, Ito, Kunisch, The primal-dual active set strategy as a semismooth Newton method, 2002,
        doi:10.1137/S1052623401383558, section 2.
    """
    best, tasks = found, torch.arange(len(found.state), device=found.state.device)
    for _ in range(MAX_CHANGES - 1):
        state = next_state(problem, found)
        going_on = torch.nonzero((found.residual > EXACT) & (state != found.state).flatten(1).any(1)).flatten()
        if not len(going_on):
            break
        tasks, problem, state = tasks[going_on], problem.rows(going_on), state[going_on]
        found = optimum_of(problem, state, free_inverse(problem.kernel, state, problem.coupled))
        best = best.improved(tasks, found)
    return best


def optimum_of(problem: Problem, state: Tensor, inverted: FreeInverse, start: Tensor | None = None) -> Found:
    """The optimum among the points with these active entries; with less rounding if it is solved from one, `start`."""
    kernel, linear, lower, upper, coupled = problem
    share = shares(state, coupled)
    if start is None:
        start = anchored(at_bounds(state, lower, upper), share)
    optimum = start + inverted(torch.baddbmm(linear, start, kernel, alpha=-1))
    return judged(problem, optimum, state, share)


def judged(problem: Problem, optimum: Tensor, state: Tensor, share: Tensor) -> Found:
    force = pushing(torch.baddbmm(problem.linear, optimum, problem.kernel, alpha=-1), share)
    residual = (optimum - (optimum + force).clamp(problem.lower, problem.upper)).abs().amax((-2, -1))
    if problem.coupled:
        residual = torch.maximum(residual, optimum.sum(-2).abs().amax(-1))
    return Found(state, share, optimum, force, residual)


def next_state(problem: Problem, found: Found) -> Tensor:
    state, _, optimum, force, _ = found
    above = torch.where(state > 0, force > 0, optimum > problem.upper)
    below = torch.where(state < 0, force < 0, optimum < problem.lower)
    return leave_one_free(problem, above.to(state.dtype) - below.to(state.dtype))


def leave_one_free(problem: Problem, state: Tensor) -> Tensor:
    """Makes masked examples active; of coupled classes that are all active, frees the one with the highest bound."""
    takes_part = problem.upper > problem.lower
    state = torch.where(takes_part, state, 1.0)
    if not problem.coupled:
        return state
    stuck = (state != 0).all(-2, keepdim=True) & takes_part
    return torch.where(stuck & (problem.upper == problem.upper.amax(-2, keepdim=True)), 0.0, state)


def polished(problem: Problem, state: Tensor) -> Found:
    """The optimum by one dense factorisation of all optimality conditions, with the least rounding.

    For ill-conditioned kernels, for which the sums over classes of a `FreeInverse` are mostly rounding.
    """
    kernel, linear, lower, upper, coupled = problem
    tasks, k, n = linear.shape
    free = (state == 0).to(linear.dtype)
    # Unknowns: the entries, class after class, then a multiplier per example.
    matrix = linear.new_zeros(tasks, (k + 1) * n, (k + 1) * n)
    grid = matrix.view(tasks, k + 1, n, k + 1, n)
    some = free.amax(1) if coupled else torch.zeros_like(free[:, 0])
    for m in range(k):
        grid[:, m, :, m] = free[:, m].unsqueeze(-1) * kernel + torch.diag_embed(1 - free[:, m])
        grid[:, m, :, k] = torch.diag_embed(some * free[:, m])
        grid[:, k, :, m] = torch.diag_embed(some)
    grid[:, k, :, k] = torch.diag_embed(1 - some)
    right = torch.where(state == 0, linear, at_bounds(state, lower, upper))
    right = torch.cat([right, linear.new_zeros(tasks, 1, n)], dim=1).view(tasks, -1, 1)
    factor = factor_each(matrix)
    solution = torch.linalg.lu_solve(*factor, right)
    solution = solution + torch.linalg.lu_solve(*factor, right - matrix @ solution)
    return judged(problem, solution.view(tasks, k + 1, n)[:, :k], state, shares(state, coupled))
