"""Our SVM solver beside qpth and cvxpylayers, in one run: `python benchmarks/solvers.py [--quick] [--json FILE]`.

All solve the Crammer-Singer dual of MetaOptNet (Lee et al. 2019, arXiv:1904.03758) in float64 on one thread, from the
kernel to the dual and back to the kernel's gradient. They take turns, so that a drifting machine slows all alike. What
is not installed is named and left out; docs/solvers.md says how to install it.

Without `--quick` the result is written to results/benchmarks/solvers.json, and with it the table and the plot of
docs/solvers.md; `--draw` writes these two from the JSON that is there.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlframework.files import write_json, write_part
from mlframework.solvers.support_vectors import crammer_singer

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "results" / "benchmarks" / "solvers.json"
PAGE, PLOT = ROOT / "docs" / "solvers.md", ROOT / "docs" / "solvers.png"

OURS, QPTH, CVXPY = "mlframework", "qpth", "cvxpylayers"
C, REG = 0.1, 1.0
#: MetaOptNet trains with as many steps of qpth's interior point method.
QPTH_STEPS = 15
#: Of each contender and problem: how many turns at most, how many at least, and seconds after which there are no more.
MOST_TURNS, LEAST_TURNS, PATIENCE = 15, 3, 90.0
#: A turn repeats a fast solver for as long, in seconds.
TURN = 0.1
#: Before the first turn each runs for as long, in seconds: a new process is slower.
WARM_UP = 1.0
#: A contender that needs more memory or time than a reader has is left out: entries of its problem, tasks times n k.
CVXPY_LIMIT = 4000

Solver = Callable[[Tensor], Tensor]


class Problem(NamedTuple):
    """A batch of tasks; `diagonal` is the mean `K_ii`, and `bar` the ratio to qpth that is held."""

    ways: int
    shots: int
    tasks: int
    diagonal: float = 30.0
    bar: float | None = None

    @property
    def name(self) -> str:
        return f"{self.ways}-way {self.shots}-shot, {self.tasks} task{'s' * (self.tasks > 1)}"

    def kernel(self) -> Tensor:
        """Scalar products of what might come out of a ReLU, around a centre for each class: `[tasks, n, n]`."""
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(self.tasks, self.ways, 640, generator=generator, dtype=torch.float64)
        x = centres.repeat(1, self.shots, 1)
        x = (x + torch.randn(x.shape, generator=generator, dtype=torch.float64)).relu()
        x = x * (self.diagonal / x.square().sum(-1).mean()).sqrt()
        return x @ x.mT

    def y(self) -> Tensor:
        """One-hot classes `[tasks, n, k]`."""
        classes = torch.eye(self.ways, dtype=torch.float64).repeat(self.shots, 1)
        return classes.expand(self.tasks, -1, -1).contiguous()


PROBLEMS = (
    Problem(5, 1, 8, bar=8),
    Problem(5, 1, 64, bar=8),
    Problem(5, 5, 8, bar=25),
    Problem(5, 5, 64, bar=80),
    Problem(5, 15, 8, bar=75),
    Problem(20, 1, 8, bar=150),
    Problem(20, 5, 1),
)
QUICK = (PROBLEMS[0], PROBLEMS[2])


def ours(y: Tensor) -> Solver:
    return lambda kernel: crammer_singer(kernel, y, c=C, reg=REG).dual


def with_qpth(y: Tensor) -> Solver:
    """MetaOptNet's way: one quadratic program over all `n k` entries of a task, row after row."""
    from qpth.qp import QPFunction

    tasks, n, k = y.shape
    identity = torch.eye(n * k, dtype=y.dtype)
    bounds = (C * y).flatten(1)
    row_sums = torch.kron(torch.eye(n, dtype=y.dtype), torch.ones(1, k, dtype=y.dtype))  # [n, n k]
    classes = torch.eye(k, dtype=y.dtype)
    # The authors leave its check of definiteness on.
    solve = QPFunction(verbose=-1, maxIter=QPTH_STEPS)

    def dual(kernel: Tensor) -> Tensor:
        blocks = torch.einsum("tij,ab->tiajb", kernel, classes).reshape(tasks, n * k, n * k)
        found = solve(blocks + REG * identity, -y.flatten(1), identity, bounds, row_sums, y.new_zeros(n))
        return found.view(tasks, n, k)

    return dual


def with_cvxpylayers(y: Tensor) -> Solver:
    """The same program for a conic solver, given a factor of the kernel, as its rules ask for."""
    import cvxpy
    from cvxpylayers.torch import CvxpyLayer

    _, n, k = y.shape
    factor, classes = cvxpy.Parameter((n, n)), cvxpy.Parameter((n, k))
    dual = cvxpy.Variable((n, k))
    objective = cvxpy.sum_squares(factor @ dual) / 2 - cvxpy.sum(cvxpy.multiply(classes, dual))
    conditions = [dual <= C * classes, cvxpy.sum(dual, axis=1) == 0]
    layer = CvxpyLayer(cvxpy.Problem(cvxpy.Minimize(objective), conditions), [factor, classes], [dual])
    identity = torch.eye(n, dtype=y.dtype)
    return lambda kernel: layer(torch.linalg.cholesky(kernel + REG * identity).mT, y)[0]


CONTENDERS: dict[str, Callable[[Tensor], Solver]] = {OURS: ours, QPTH: with_qpth, CVXPY: with_cvxpylayers}


def takes(name: str, problem: Problem) -> bool:
    """Whether a contender is asked."""
    return name != CVXPY or problem.tasks * problem.ways**2 * problem.shots <= CVXPY_LIMIT


def there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def residual(kernel: Tensor, y: Tensor, dual: Tensor) -> float:
    """The worst violation of the optimality conditions, with `K_ii` for unit: what a projected gradient step moves."""
    scale = kernel.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    gradient = kernel @ dual + REG * dual - y
    moved = dual - project(dual - gradient / scale, C * y)
    return float((moved.abs() * scale).max())


def project(point: Tensor, upper: Tensor) -> Tensor:
    """The nearest point with rows that sum to 0 and entries up to `upper`: each row shifted, then cut, by bisection."""
    reach = point.abs().amax(-1, keepdim=True) + upper.abs().amax(-1, keepdim=True)
    low, high = -reach, reach
    for _ in range(100):
        middle = (low + high) / 2
        too_low = torch.minimum(point - middle, upper).sum(-1, keepdim=True) > 0
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return torch.minimum(point - (low + high) / 2, upper)


def seconds(solver: Solver, kernel: Tensor, cotangent: Tensor, calls: int) -> float:
    """The mean processor time of a solution and its gradient: what other processes take does not count.

    Nor does the collection of garbage, whose time goes by what all contenders have imported (as in `timeit`).
    """
    gc.collect()
    gc.disable()
    began = time.process_time()
    for _ in range(calls):
        torch.autograd.grad(solver(kernel), kernel, cotangent)
    took = time.process_time() - began
    gc.enable()
    return took / calls


def warm(solver: Solver, kernel: Tensor, cotangent: Tensor) -> float:
    """The time of one call, after some."""
    began = time.process_time()
    while True:
        took = seconds(solver, kernel, cotangent, 1)
        if time.process_time() - began > WARM_UP:
            return took


def compare(problem: Problem, names: list[str], most_turns: int) -> dict[str, Any]:
    """Median times and residuals of the contenders on one problem."""
    kernel, y = problem.kernel().requires_grad_(), problem.y()
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    solvers = {name: CONTENDERS[name](y) for name in names if takes(name, problem)}
    residuals = {name: residual(kernel.detach(), y, solver(kernel).detach()) for name, solver in solvers.items()}
    calls = {name: max(1, int(TURN / warm(solver, kernel, cotangent))) for name, solver in solvers.items()}
    times: dict[str, list[float]] = {name: [] for name in solvers}
    began = time.perf_counter()
    for turn in range(most_turns):
        if turn >= LEAST_TURNS and time.perf_counter() - began > PATIENCE:
            break
        for name, solver in solvers.items():
            times[name].append(seconds(solver, kernel, cotangent, calls[name]))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {**problem._asdict(), "name": problem.name, "turns": turn + 1, "seconds": medians, "residual": residuals}


def machine(names: list[str]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in names if name != OURS}
    return {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__, **versions}


def processor() -> str:
    """Its name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def table(result: dict[str, Any]) -> Iterator[str]:
    """Lines of markdown: milliseconds, how many times ours that is, and the residual that is left."""
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if name != "processor")
    peers = [name for name in CONTENDERS if any(name in row["seconds"] for row in result["rows"])]
    yield f"{result['machine']['processor']}; {facts}."
    yield ""
    yield "| problem | " + " | ".join(peers) + " | qpth / ours | held | " + " | ".join(f"KKT {p}" for p in peers) + " |"
    yield "|" + " --- |" * (3 + 2 * len(peers))
    for row in result["rows"]:
        yield "| " + " | ".join(cells(row, peers)) + " |"


def cells(row: dict[str, Any], peers: list[str]) -> list[str]:
    """One problem's line."""
    took, own = row["seconds"], row["seconds"][OURS]
    times = [f"{took[p] * 1e3:.1f} ms" + f" ({took[p] / own:.0f}x)" * (p != OURS) if p in took else "" for p in peers]
    ratio = f"{took[QPTH] / own:.0f}x" if QPTH in took else ""
    bar = f"{row['bar']:g}x" if row["bar"] else ""
    return [row["name"], *times, ratio, bar, *(f"{row['residual'][p]:.0e}" if p in took else "" for p in peers)]


def draw(result: dict[str, Any]) -> None:
    """Times of all contenders, a row for each problem."""
    import matplotlib.pyplot as plt

    rows = result["rows"][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    for name in CONTENDERS:
        points = [(row["seconds"][name] * 1e3, place) for place, row in enumerate(rows) if name in row["seconds"]]
        if points:
            axes.plot(*zip(*points, strict=True), "o", label=name)
    axes.set(xscale="log", xlabel="milliseconds: kernel to dual, and back to the kernel's gradient")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(PLOT, dpi=110)


def document(result: dict[str, Any]) -> None:
    """Writes the table and the plot of the docs."""
    write_part(PAGE, "benchmarks/solvers.py", "\n".join(table(result)))
    draw(result)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two problems, few turns; the docs stay as they are")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes as well")
    parser.add_argument("--draw", action="store_true", help="nothing is run; the docs are written from the JSON")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    if asked.draw:
        return document(json.loads(RESULT.read_text(encoding="utf-8")))
    torch.set_num_threads(1)
    # The contenders' own, about versions of what they stand on.
    warnings.simplefilter("ignore")
    names = [name for name in CONTENDERS if there(name)]
    for name in CONTENDERS.keys() - set(names):
        print(f"{name}: not installed, left out")
    result: dict[str, Any] = {"machine": machine(names), "rows": []}
    for problem in QUICK if asked.quick else PROBLEMS:
        row = compare(problem, names, LEAST_TURNS if asked.quick else MOST_TURNS)
        result["rows"].append(row)
        shown = ", ".join(f"{name} {took * 1e3:.1f} ms" for name, took in row["seconds"].items())
        print(f"{row['name']}: {shown}", flush=True)
    for path in [asked.json] * (asked.json is not None) + [RESULT] * (not asked.quick):
        write_json(path, result, indent=1)
    if not asked.quick:
        document(result)


if __name__ == "__main__":
    main()
