"""Many small quadratic programs with bounds at once, exactly, and differentiable to any order.

    min_A  1/2 <A, A K> - <E, A>    A [k, n]    s.t.  lower <= A <= upper  and, if coupled, each column of A sums to 0

`K` is positive definite. Dual support vector machines are of this form. The optimum is a linear function of `E` once it
is known which entries stand at a bound, so that finding these is combinatorial, and differentiating is not.

Everything here is batched over tasks, `[tasks, k, n]` with classes first, and in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlframework.solvers.interior_point import interior_point

__all__ = ["Problem", "solve"]

#: Steps of the alternating direction method from which the active set starts.
WARM_STEPS = 6
#: Changes of the active set before the interior point method is asked.
MAX_CHANGES = 8
#: A residual at which an active set is taken for the right one, whatever rounding says of entries on the edge.
EXACT = 1e-13
#: A residual above which the interior point method is asked.
RETRY = 1e-5
#: A residual above which the right active set is solved for again, with more care.
PRECISE = 1e-12
#: A residual up to which a solution counts as converged.
TOLERANCE = 1e-9


class Problem(NamedTuple):
    """The data of every task.

    Attributes:
        kernel: positive definite, `[tasks, n, n]`.
        linear: `E`, `[tasks, k, n]`.
        lower, upper: the bounds `[tasks, k, n]`, possibly infinite. An example that takes no part has 0 for both, and
            a row of the identity in the kernel.
        coupled: whether the classes of an example sum to 0.
    """

    kernel: Tensor
    linear: Tensor
    lower: Tensor
    upper: Tensor
    coupled: bool

    def rows(self, index: Tensor) -> Problem:
        """The problems of some tasks."""
        return Problem._make((*(leaf[index] for leaf in self[:4]), self.coupled))

    def scaled(self) -> tuple[Problem, Tensor]:
        """The same problems in units in which the kernel's mean diagonal is 1, and that mean `[tasks, 1, 1]`."""
        scale = self.kernel.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        return self._replace(kernel=self.kernel / scale, lower=self.lower * scale, upper=self.upper * scale), scale


class FreeInverse(NamedTuple):
    """The inverse of the kernel on the free entries, which knows of the coupling.

    Attributes:
        blocks: the inverse on each class's free entries, 0 elsewhere, `[tasks, k, n, n]`.
        coupling: the inverse of their sum over classes, or 0 where classes are not coupled, `[tasks, n, n]`.
    """

    blocks: Tensor
    coupling: Tensor

    @classmethod
    def of(cls, kernel: Tensor, free: Tensor, coupled: bool) -> FreeInverse:
        """That of a set of free entries `[tasks, k, n]`."""
        both = free.unsqueeze(-1) & free.unsqueeze(-2)
        identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        blocks = torch.where(both, inverse(torch.where(both, kernel.unsqueeze(1), identity)), 0.0)
        if not coupled:
            return cls(blocks, torch.zeros_like(kernel))
        nowhere_free = (~free.any(1)).to(kernel.dtype)
        return cls(blocks, inverse(blocks.sum(1) + torch.diag_embed(nowhere_free)))

    def __call__(self, g: Tensor) -> Tensor:
        """`V` with `V K = g` plus a constant per example on the free entries, 0 elsewhere; coupled, it sums to 0."""
        v = times(self.blocks, g)
        shared = (self.coupling @ v.sum(-2).unsqueeze(-1)).squeeze(-1)
        return v - times(self.blocks, shared.unsqueeze(-2).expand_as(g))


def inverse(matrix: Tensor) -> Tensor:
    """Of positive definite matrices; of matrices that rounding has left indefinite as well."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_inverse(factor) if not failed.any() else torch.linalg.pinv(matrix, hermitian=True)


def times(blocks: Tensor, g: Tensor) -> Tensor:
    """A matrix per class `[..., k, n, n]` times a vector per class `[..., k, n]`."""
    return (blocks @ g.unsqueeze(-1)).squeeze(-1)


def solve(problem: Problem) -> tuple[Tensor, Tensor]:
    """The optimum `A` `[tasks, k, n]`, differentiable, and its residual `[tasks]`, detached."""
    kernel, linear, lower, upper, coupled = problem
    fixed = [leaf.detach() for leaf in problem[:4]]
    state, exact, *parts = ActiveSet.apply(*fixed, coupled)
    start = anchor(state, lower, upper, coupled)
    optimum = start + FreeSolve.apply(kernel, linear - start @ kernel, *parts)
    # The two differ by rounding, which the search has taken care of.
    return optimum + (exact - optimum.detach()), residual(Problem._make((*fixed, coupled)), exact, state)


def anchor(state: Tensor, lower: Tensor, upper: Tensor, coupled: bool) -> Tensor:
    """Any point with the bounds where they are active, which sums to 0 over the classes if they are coupled."""
    zero = torch.zeros_like(state)
    bounds = torch.where(state > 0, upper, torch.where(state < 0, lower, zero))
    if not coupled:
        return bounds
    free = (state == 0).to(state.dtype)
    return bounds - free * bounds.sum(-2, keepdim=True) / free.sum(-2, keepdim=True).clamp(min=1)


def multipliers(problem: Problem, optimum: Tensor, state: Tensor) -> Tensor:
    """What pushes against the bounds, `[tasks, k, n]`: 0 in free entries up to rounding; above 0 at an upper bound."""
    force = problem.linear - optimum @ problem.kernel
    if not problem.coupled:
        return force
    free = (state == 0).to(force.dtype)
    return force - (free * force).sum(-2, keepdim=True) / free.sum(-2, keepdim=True).clamp(min=1)


def residual(problem: Problem, optimum: Tensor, state: Tensor) -> Tensor:
    """The largest violation of the optimality conditions `[tasks]`, in units in which the kernel's diagonal is 1."""
    scale = problem.kernel.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    force = multipliers(problem, optimum, state)
    takes_part = problem.upper > problem.lower
    step = optimum - (optimum + force / scale).clamp(problem.lower, problem.upper)
    worst = torch.where(takes_part, step.abs() * scale, 0.0).amax((-2, -1))
    return torch.maximum(worst, (optimum.sum(-2).abs() * scale.squeeze(-1)).amax(-1)) if problem.coupled else worst


class FreeSolve(torch.autograd.Function):
    """`FreeInverse.__call__` as a function of the kernel and of `g`, with the free entries held fixed.

    Its derivatives are made of itself: `dV = R(dg - V dK)` with `R` symmetric.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(kernel: Tensor, g: Tensor, blocks: Tensor, coupling: Tensor) -> Tensor:
        return FreeInverse(blocks, coupling)(g)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        kernel, _, blocks, coupling = inputs
        ctx.save_for_backward(kernel, output, blocks, coupling)
        ctx.save_for_forward(kernel, output, blocks, coupling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernel, v, blocks, coupling = ctx.saved_tensors
        w = FreeSolve.apply(kernel, gradient, blocks, coupling)
        outer = w.mT @ v
        return -(outer + outer.mT) / 2, w, None, None

    @staticmethod
    def jvp(ctx: Any, d_kernel: Tensor | None, d_g: Tensor | None, *constant: None) -> Tensor:
        kernel, v, blocks, coupling = ctx.saved_tensors
        change = torch.zeros_like(v) if d_g is None else d_g
        if d_kernel is not None:
            change = change - v @ (d_kernel + d_kernel.mT) / 2
        return FreeSolve.apply(kernel, change, blocks, coupling)


class ActiveSet(torch.autograd.Function):
    """Which entries stand at the optimum at their upper bound (1), their lower bound (-1), or are free (0).

    With that come the optimum and the two parts of the `FreeInverse`. Nothing of it is differentiable.
    """

    @staticmethod
    def forward(kernel: Tensor, linear: Tensor, lower: Tensor, upper: Tensor, coupled: bool) -> tuple[Tensor, ...]:
        problem, scale = Problem(kernel, linear, lower, upper, coupled).scaled()
        found = search(problem)
        blocks, coupling = found.inverse
        return found.state, found.optimum / scale, blocks / scale.unsqueeze(1), coupling * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, ...]:
        return (None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The mapped axis joins that of the tasks."""
        stacked = [
            leaf.expand(info.batch_size, *leaf.shape) if axis is None else leaf.movedim(axis, 0)
            for leaf, axis in zip(args[:4], in_dims[:4], strict=True)
        ]
        found = ActiveSet.apply(*(leaf.flatten(0, 1) for leaf in stacked), args[4])
        return tuple(leaf.unflatten(0, (info.batch_size, -1)) for leaf in found), (0, 0, 0, 0)


class Found(NamedTuple):
    """An active set and what follows from it: `FreeInverse`, optimum, residual `[tasks]`."""

    state: Tensor
    inverse: FreeInverse
    optimum: Tensor
    left: Tensor

    def put(self, tasks: Tensor, other: Found, better: Tensor) -> None:
        """Overwrites some tasks by those of another, found for them, where that is better."""
        for whole, part in zip(self.leaves(), other.leaves(), strict=True):
            whole[tasks[better]] = part[better]

    def leaves(self) -> tuple[Tensor, ...]:
        return self.state, *self.inverse, self.optimum, self.left


def search(problem: Problem) -> Found:
    """The active set of scaled problems: by changes from a warm start; where these go round in circles, by changes from
    what an interior point method finds.
    """
    found = change(problem, warm_start(problem))
    failed = torch.nonzero(found.left > RETRY).flatten()
    if len(failed):
        hard = problem.rows(failed)
        again = change(hard, interior_point(*hard))
        found.put(failed, again, again.left < found.left[failed])
    rough = torch.nonzero((found.left > PRECISE) & (found.left < RETRY)).flatten()
    if len(rough) and problem.coupled:
        hard, state = problem.rows(rough), found.state[rough]
        optimum = polished(hard, state)
        left = residual(hard, optimum, state)
        better = left < found.left[rough]
        found.optimum[rough[better]], found.left[rough[better]] = optimum[better], left[better]
    return found


def warm_start(problem: Problem) -> Tensor:
    """A guess of the active set: some steps of the alternating direction method of multipliers, over-relaxed."""
    kernel, linear, lower, upper, coupled = problem
    identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    rho, relaxation = 0.3, 1.6
    inverted = inverse(kernel + rho * identity)
    bounded = torch.zeros_like(linear).clamp(lower, upper)
    push = torch.zeros_like(linear)
    for _ in range(WARM_STEPS if linear.shape[1] <= 5 else 2 * WARM_STEPS):
        wanted = linear + rho * (bounded - push)
        # Subtracting the mean over classes commutes with the kernel.
        wanted = wanted - wanted.mean(-2, keepdim=True) if coupled else wanted
        unbounded = relaxation * (wanted @ inverted) + (1 - relaxation) * bounded + push
        bounded = unbounded.clamp(lower, upper)
        push = unbounded - bounded
    return push.sign()


def change(problem: Problem, state: Tensor) -> Found:
    """Changes the active set until it is the right one, or too often: a primal-dual active set method.

    A free entry beyond a bound becomes active; an active entry that its bound does not hold back becomes free. The best
    that was met is returned.

    Reference: Hintermueller, Ito, Kunisch, The primal-dual active set strategy as a semismooth Newton method, 2002,
        doi:10.1137/S1052623401383558, section 2.
    """
    tasks = torch.arange(len(state), device=state.device)
    best: Found | None = None
    for _ in range(MAX_CHANGES):
        part = problem.rows(tasks)
        found = optimum_of(part, leave_one_free(part, state))
        if best is None:
            best = Found(found.state, found.inverse, found.optimum, found.left.clone())
        else:
            best.put(tasks, found, found.left < best.left[tasks])
        changed = next_state(part, found.optimum, found.state)
        going_on = (found.left > EXACT) & (changed != found.state).flatten(1).any(1)
        if not going_on.any():
            break
        tasks, state = tasks[going_on], changed[going_on]
    assert best is not None
    return best


def optimum_of(problem: Problem, state: Tensor) -> Found:
    """The optimum among the points with these active entries, refined once."""
    kernel, linear, lower, upper, coupled = problem
    inverted = FreeInverse.of(kernel, state == 0, coupled)
    optimum = anchor(state, lower, upper, coupled)
    for _ in range(2):
        optimum = optimum + inverted(linear - optimum @ kernel)
    return Found(state, inverted, optimum, residual(problem, optimum, state))


def polished(problem: Problem, state: Tensor) -> Tensor:
    """The optimum by one dense factorisation of all the optimality conditions, which rounding hurts least.

    For kernels so ill-conditioned that the sums over classes drown in the rounding of `FreeInverse`.
    """
    kernel, linear, lower, upper, _ = problem
    tasks, k, n = linear.shape
    free = (state == 0).to(linear.dtype)
    # Unknowns: the entries, class after class, then a multiplier per example.
    matrix = linear.new_zeros(tasks, (k + 1) * n, (k + 1) * n)
    grid = matrix.view(tasks, k + 1, n, k + 1, n)
    for m in range(k):
        grid[:, m, :, m] = free[:, m].unsqueeze(-1) * kernel + torch.diag_embed(1 - free[:, m])
        grid[:, m, :, k] = torch.diag_embed(free[:, m])
        grid[:, k, :, m] = torch.diag_embed(free.amax(1))
    grid[:, k, :, k] = torch.diag_embed(1 - free.amax(1))
    bounds = torch.where(state > 0, upper, torch.where(state < 0, lower, torch.zeros_like(state)))
    right = torch.cat([torch.where(state == 0, linear, bounds), linear.new_zeros(tasks, 1, n)], dim=1).flatten(1)
    factor = torch.linalg.lu_factor(matrix)
    solution = torch.linalg.lu_solve(*factor, right.unsqueeze(-1))
    solution = solution + torch.linalg.lu_solve(*factor, right.unsqueeze(-1) - matrix @ solution)
    return solution.view(tasks, k + 1, n)[:, :k]


def next_state(problem: Problem, optimum: Tensor, state: Tensor) -> Tensor:
    """Which entries are active after a change."""
    force = multipliers(problem, optimum, state)
    above = torch.where(state > 0, force > 0, optimum > problem.upper)
    below = torch.where(state < 0, force < 0, optimum < problem.lower)
    stays_out = (problem.upper <= problem.lower).to(state.dtype)
    return torch.where(stays_out > 0, stays_out, above.to(state.dtype) - below.to(state.dtype))


def leave_one_free(problem: Problem, state: Tensor) -> Tensor:
    """Coupled classes cannot all stand at a bound: the one with the highest upper bound is let go."""
    takes_part = problem.upper > problem.lower
    state = torch.where(takes_part, state, 1.0)
    if not problem.coupled:
        return state
    stuck = (state != 0).all(-2, keepdim=True) & takes_part.any(-2, keepdim=True)
    highest = problem.upper == problem.upper.amax(-2, keepdim=True)
    return torch.where(stuck & highest & takes_part, 0.0, state)
