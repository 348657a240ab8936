"""Writes the tables and plots of docs/performance.md from results/benchmarks/*.json: nothing there is typed by hand.

`python scripts/performance.py` after `benchmarks/outer_step.py`, `scaling.py`, `inner_loop_memory.py`, `costs.py`,
`captured.py`, `ablation.py` and `profile_step.py` have written outer_step*.json (on a GPU, gpu_outer_step*.json),
scaling*.json, inner_loop_memory.json, costs.json, captured.json, ablation.json and profile*.json there, by their
`--json`. A file that is not there is left out, with a line that says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlframework.files import write_part

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "benchmarks"
PAGE = ROOT / "docs" / "performance.md"
GROWTH_PLOT, MEMORY_PLOT = ROOT / "docs" / "performance_growth.png", ROOT / "docs" / "performance_memory.png"

PLAIN, LEARN2LEARN = "plain loop", "learn2learn"
#: The contenders of benchmarks/scaling.py.
OURS, CAPTURED = "ours", "captured"
GROWTHS = ("tasks", "inner steps", "ways and shots", "size")
#: Times the plain loop's time that ours may take.
BAR = 1.05

Record = dict[str, Any]


def results(name: str, folder: Path = RESULTS) -> list[Record]:
    """What the runs of a benchmark wrote: the files whose names start so."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{name}*.json"))]


def cells(runs: Iterable[Record]) -> list[Record]:
    """The records of all runs, each with its run's threads; of two of the same cell, the later stays."""
    found = {}
    for run in runs:
        for cell in run["cells"]:
            record = {"threads": run.get("threads", 1), "gemm": run.get("gemm"), **cell}
            found[tuple(str(record.get(key)) for key in KEYS)] = record
    return list(found.values())


#: What tells a cell from others, in any benchmark.
KEYS = (
    *("threads", "workload", "growth", "network", "n_way", "k_shot", "tasks", "inner_steps", "first_order"),
    *("contender", "algorithm", "checkpoint", "chunk"),
)


def absent(name: str) -> str:
    """Stands where a table would."""
    return f"Not measured yet: `python benchmarks/{name}.py --json results/benchmarks/{name}.json`."


def facts(runs: Sequence[Record]) -> str:
    """The machines of some runs, in a line each."""
    lines = []
    for run in runs:
        found = {**run["machine"], "threads": run.get("threads", run["machine"]["threads"])}
        device = "" if run.get("device", "cpu") == "cpu" else f"{run['device']}; "
        told = ", ".join(f"{name} {value}" for name, value in found.items() if name != "processor")
        lines.append(f"{device}{found['processor']}; {told}.")
    return "\n".join(dict.fromkeys(lines))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; numbers stand to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(record: Record | None) -> str:
    """With three digits; empty where nothing was timed."""
    return digits(record["seconds"] * 1e3) if record and "seconds" in record else ""


def digits(value: float) -> str:
    """Three of them."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(record: Record | None, to: Record | None) -> str:
    """How many times a record's time another took."""
    timed = record and to and "seconds" in record and "seconds" in to
    return f"{to['seconds'] / record['seconds']:.2f}x" if timed and record and to else ""


# An outer step beside others: a table for each workload.


def outer_step(runs: Sequence[Record]) -> str:
    if not runs:
        return absent("outer_step")
    found = cells(runs)
    workloads = dict.fromkeys((cell["workload"], cell["first_order"]) for cell in found)
    parts = [facts(runs)]
    for workload, first_order in workloads:
        here = [cell for cell in found if (cell["workload"], cell["first_order"]) == (workload, first_order)]
        parts.append(workload_table(f"{workload}, {'first' if first_order else 'second'} order", here))
        parts += filter(None, [left_out(here)])
    return "\n\n".join(parts)


def workload_table(name: str, here: list[Record]) -> str:
    """A row for each contender, the numbers of threads side by side."""
    by = {(cell["threads"], cell["contender"]): cell for cell in here}
    threads = sorted({cell["threads"] for cell in here})
    timed = dict.fromkeys(cell["contender"] for cell in here if "seconds" in cell)
    columns = ("ms", f"{LEARN2LEARN} / it", f"{PLAIN} / it", "MB", "of GEMM")
    headings = [name, *(f"{column}{also(count)}" for count in threads for column in columns)]
    rows = []
    for contender in timed:
        row = [contender]
        for count in threads:
            record = by.get((count, contender))
            row += [milliseconds(record), *(ratio(record, by.get((count, peer))) for peer in (LEARN2LEARN, PLAIN))]
            row += [f"{record['mb']:.0f}" if record and "mb" in record else ""]
            row += [f"{record['fraction']:.1%}" if record and "fraction" in record else ""]
        rows.append(row)
    return table(headings, rows)


def also(threads: int) -> str:
    return "" if threads == 1 else f", {threads} threads"


def left_out(here: list[Record]) -> str:
    """Who was not timed, and why."""
    why = {f"{cell['contender']} ({cell['left_out']})" for cell in here if "left_out" in cell}
    return "Left out: " + "; ".join(sorted(why)) + "." if why else ""


# Growth: ours beside the plain loop.


def scaling(runs: Sequence[Record]) -> str:
    if not runs:
        return absent("scaling")
    found = cells(runs)
    growths = growths_of(found)
    tables = [growth_table([cell for cell in found if cell["growth"] == growth]) for growth in growths]
    return "\n\n".join([facts(runs), worst(found), *tables])


def growths_of(found: list[Record]) -> list[str]:
    """What grows, in the order of the page, whatever the order of the runs."""
    return [growth for growth in GROWTHS if any(cell["growth"] == growth for cell in found)]


def growth_table(here: list[Record]) -> str:
    """A row for each cell; the numbers of threads side by side."""
    by = {(place(cell), cell["threads"], cell["contender"]): cell for cell in here}
    threads = sorted({cell["threads"] for cell in here})
    captured = any(cell["contender"] == CAPTURED for cell in here)
    columns = [f"{PLAIN}, ms", "ours, ms", f"{PLAIN} / ours", *["captured, ms"] * captured]
    headings = [here[0]["growth"], *(f"{column}{also(count)}" for count in threads for column in columns), "ours, MB"]
    rows = []
    for where in dict.fromkeys(map(place, here)):
        row = [where]
        for count in threads:
            plain, ours, graph = (by.get((where, count, name)) for name in (PLAIN, OURS, CAPTURED))
            row += [milliseconds(plain), milliseconds(ours), ratio(ours, plain), *[milliseconds(graph)] * captured]
        ours = by.get((where, threads[0], OURS))
        rows.append([*row, f"{ours['mb']:.1f}" if ours and "mb" in ours else ""])
    return table(headings, rows)


def place(cell: Record) -> str:
    """A cell's name."""
    kind = "" if cell["network"].startswith("MLP") else f" {cell['n_way']}-way {cell['k_shot']}-shot"
    return f"{cell['network']}{kind}, {counted(cell['tasks'], 'task')}, {counted(cell['inner_steps'], 'step')}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def worst(found: list[Record]) -> str:
    """Where ours is slowest beside the plain loop."""
    plain = {(place(cell), cell["threads"]): cell for cell in found if cell["contender"] == PLAIN}
    ratios = [
        (cell["seconds"] / plain[place(cell), cell["threads"]]["seconds"], cell)
        for cell in found
        if cell["contender"] == OURS
        and "seconds" in cell
        and "seconds" in plain.get((place(cell), cell["threads"]), {})
    ]
    if not ratios:
        return "No cell has both."
    most, cell = max(ratios, key=lambda pair: pair[0])
    above = sum(value > BAR for value, _ in ratios)
    return (
        f"Ours takes at most {most:.2f} times the plain loop's time ({place(cell)}{also(cell['threads'])});"
        f" it is above {BAR} in {above} of {len(ratios)} cells."
    )


# Memory.


def memory(runs: Sequence[Record]) -> str:
    if not runs:
        return absent("inner_loop_memory")
    found = cells(runs)
    rows = [
        [
            f"{place({'n_way': 5, 'k_shot': 1, **cell})}{saved(cell)}",
            f"{cell['mb']:.1f}",
            f"{cell['mb_process']:.0f}",
            milliseconds(cell),
        ]
        for cell in found
    ]
    bars = [
        [bar["what"], f"{bar['mb']:.1f}", f"{bar['allowed']:.1f}", "yes" if bar["mb"] <= bar["allowed"] else "no"]
        for run in runs
        for bar in run["bars"]
    ]
    headings = ["", "MB of tensors", "MB by which the process grew", "ms"]
    return "\n\n".join(
        [facts(runs), table(headings, rows), table(["", "MB of tensors", "at most", "held"], list(bars))]
    )


def saved(cell: Record) -> str:
    """How a cell saves memory."""
    return ", checkpointed" * cell["checkpoint"] + (f", chunks of {cell['chunk']}" if cell["chunk"] else "")


# The cost of every algorithm.


def costs(runs: Sequence[Record]) -> str:
    if not runs:
        return absent("costs")
    by = {(cell["algorithm"], cell["inner_steps"]): cell for cell in cells(runs)}
    rows = [
        [f"`{name}`", *slashed(by, name, "passes", "{:.0f}"), *slashed(by, name, "mb", "{:.0f}"), *timed(by, name)]
        for name in dict.fromkeys(name for name, _ in by)
    ]
    steps = " / ".join(str(count) for count in sorted({count for _, count in by if count}))
    timed_steps = " / ".join(str(count) for count in sorted({k[1] for k, r in by.items() if k[1] and "seconds" in r}))
    tasks = runs[0]["tasks"]
    headings = [
        "`algorithm=`",
        f"passes at {steps} inner steps",
        f"MB at {steps}",
        f"ms of a step of {tasks} tasks at {timed_steps}",
    ]
    return f"{facts(runs)}\n\n{table(headings, rows)}"


def power(value: float | None) -> str:
    """A small number; one that is not finite is null in JSON."""
    return "not finite" if value is None else f"{value:.0e}"


def captured(runs: Sequence[Record]) -> str:
    """A row for each algorithm: how it is captured, and how far it is from the eager step; or why it is not."""
    if not runs:
        return absent("captured")
    rows = [
        (f"`{cell['algorithm']}`", cell.get("task", "").removeprefix("task="), "no: " + cell["refused"], "", "")
        if "refused" in cell
        else (
            f"`{cell['algorithm']}`",
            cell["task"].removeprefix("task="),
            cell["way"],
            power(cell["difference"]),
            power(cell["difference_double"]) if "difference_double" in cell else "",
        )
        for run in runs
        for cell in run["cells"]
    ]
    steps = runs[0]["steps"]
    largest = f"largest relative difference in {steps} outer steps"
    return table(("`algorithm=`", "on", "captured", largest, "in float64"), rows)


def ablation(runs: Sequence[Record]) -> str:
    """A table for each mode of steps: mechanisms, their lines, and by how much a step is slower without each."""
    if not runs:
        return absent("ablation")
    tables = []
    for mode in ("eager", "first order", "captured"):
        here = [cell for cell in runs[0]["cells"] if cell["mode"] == mode]
        names = list(dict.fromkeys(cell["workload"] for cell in here))
        gains = {(cell["mechanism"], cell["workload"]): cell for cell in here}
        rows = [
            (
                mechanism,
                str(runs[0]["lines"].get(mechanism) or ""),
                *(gain_of(gains.get((mechanism, name))) for name in names),
            )
            for mechanism in dict.fromkeys(cell["mechanism"] for cell in here)
        ]
        tables.append(table((f"{mode}, without", "lines", *names), rows))
    return "\n\n".join([f"{runs[0]['machine']['processor']}; one thread, at {runs[0]['commit']}.", *tables])


def gain_of(cell: Record | None) -> str:
    """The time without a mechanism divided by the time with everything; the time itself where nothing is left out."""
    if cell is None or "gain" not in cell:
        return ""
    return f"{digits(cell['seconds'] * 1e3)} ms" if cell["mechanism"] == "everything" else f"{cell['gain']:.2f}x"


def profile(runs: Sequence[Record]) -> str:
    """A column for each profiled step: the share of each kind of work."""
    if not runs:
        return absent("profile_step")
    found = [cell for run in runs for cell in run["cells"]]
    kinds = sorted(
        dict.fromkeys(kind for cell in found for kind in cell["shares"]),
        key=lambda kind: -max(cell["shares"].get(kind, 0) for cell in found),
    )
    rows = [(kind, *(f"{cell['shares'].get(kind, 0):.0%}" for cell in found)) for kind in kinds]
    return table(("share of the time", *(f"{cell['name']}, {cell['contender']}" for cell in found)), rows)


def slashed(by: dict[tuple[str, int | None], Record], name: str, what: str, shown: str) -> list[str]:
    """One cell of the table: a figure at each number of inner steps, or the only one."""
    return [" / ".join(shown.format(cell[what]) for (algorithm, _), cell in by.items() if algorithm == name)]


def timed(by: dict[tuple[str, int | None], Record], name: str) -> list[str]:
    return [" / ".join(filter(None, (milliseconds(cell) for (algorithm, _), cell in by.items() if algorithm == name)))]


# A model of other machines.


class Work(NamedTuple):
    """An outer step, counted.

    Attributes:
        name: of the workload.
        tasks: in the meta-batch.
        flops: floating-point operations of one task.
        calls: of kernels, however many tasks they serve.
        parameters: whose gradients are summed over devices.
    """

    name: str
    tasks: int
    flops: float
    calls: float
    parameters: int


class Device(NamedTuple):
    """What computes.

    Attributes:
        name: what it is.
        rate: floating-point operations a second, in products of float32 matrices.
        fraction: of the rate that a step reaches beside its calls.
        call: seconds that calling one kernel takes.
    """

    name: str
    rate: float
    fraction: float
    call: float


class Link(NamedTuple):
    """What joins devices: bytes a second, and seconds until the first arrives."""

    bandwidth: float
    latency: float


#: Assumed, not measured: a GPU, and a network.
GPU_RATE, GPU_CALL = 20e12, 5e-6
NETWORK = Link(bandwidth=10e9, latency=20e-6)
COUNTS = (1, 4, 16)


def step_seconds(work: Work, device: Device, count: int, link: Link) -> float:
    """Seconds of an outer step on `count` devices, each with its share of the tasks.

    `calls call + ceil(tasks / count) flops / (rate fraction) + 2 (count - 1) (parameters 4 bytes / (count bandwidth) +
    latency)`: the last is a ring's all-reduce of the meta-gradient.
    """
    compute = work.calls * device.call + math.ceil(work.tasks / count) * work.flops / (device.rate * device.fraction)
    return compute + 2 * (count - 1) * (4 * work.parameters / (count * link.bandwidth) + link.latency)


def core_of(small: Record, large: Record, plain: Record) -> Device:
    """A core here, by two measured steps of ours: one of calls, one of arithmetic.

    Args:
        small: a single task of a small network.
        large: convolutions.
        plain: the plain loop's record of the latter, whose operations are counted.
    """
    call = small["seconds"] / small["calls"]
    fraction = plain["flops"] / (large["seconds"] - large["calls"] * call) / large["gemm"]
    return Device("a core here", large["gemm"], fraction, call)


#: Of the scaling benchmark: where calls are all there is, and where arithmetic is.
SMALL, LARGE = ("MLP 40-40", 1, 1), ("Conv4-64", 4, 1)
#: Workloads of the model, (network, measured with so many tasks, inner steps), and tasks that are asked for.
MODELLED = (
    (("MLP 40-40", 25, 1), (25, 4096)),
    (("MLP 40-40", 25, 5), (25, 4096)),
    (("MLP 1024-1024", 25, 1), (25, 256)),
    (("Conv4-64", 4, 1), (4, 32, 256)),
)


def model(runs: Sequence[Record]) -> str:
    """The table of the model, by what one thread did here."""
    found = {
        ((cell["network"], cell["tasks"], cell["inner_steps"]), cell["contender"]): cell
        for cell in cells(runs)
        if cell["threads"] == 1 and (cell["n_way"], cell["k_shot"]) == (5, 1) and "seconds" in cell
    }
    wanted = [SMALL, LARGE, *(measured for measured, _ in MODELLED)]
    if not all((cell, name) in found for cell in wanted for name in (PLAIN, OURS)):
        return absent("scaling")
    core = core_of(found[SMALL, OURS], found[LARGE, OURS], found[LARGE, PLAIN])
    gpu = Device("a GPU", GPU_RATE, core.fraction, GPU_CALL)
    headings = ["", f"{core.name}: measured, ms", "by the model, ms"]
    headings += [f"{counted(count, 'GPU')}, by the model, ms" for count in COUNTS]
    rows = []
    for measured, tasks_asked in MODELLED:
        for tasks in tasks_asked:
            work = work_of(found[measured, PLAIN], found[measured, OURS], tasks)
            here = found.get(((measured[0], tasks, measured[2]), OURS))
            times = [step_seconds(work, core, 1, NETWORK), *(step_seconds(work, gpu, n, NETWORK) for n in COUNTS)]
            rows.append([work.name, milliseconds(here), *(digits(seconds * 1e3) for seconds in times)])
    return f"{assumed(core, gpu)}\n\n{table(headings, rows)}"


def work_of(plain: Record, ours: Record, tasks: int) -> Work:
    """Operations of one task by the plain loop, which does no more than needed; calls as ours makes them."""
    name = place({**ours, "tasks": tasks})
    return Work(name, tasks, plain["flops"] / plain["tasks"], ours["calls"], ours["parameters"])


def assumed(core: Device, gpu: Device) -> str:
    """What stands behind the table."""
    return (
        f"{core.name[0].upper()}{core.name[1:]}, fitted to {' and '.join(map(str_of, (SMALL, LARGE)))}:"
        f" {core.rate / 1e9:.0f} GFLOP/s in products of matrices (measured), {core.fraction:.0%} of it in a step,"
        f" {core.call * 1e6:.1f} µs a call. A GPU, assumed: {gpu.rate / 1e12:.0f} TFLOP/s, the same share of it,"
        f" {gpu.call * 1e6:.0f} µs a call. Network, assumed: {NETWORK.bandwidth / 1e9:.0f} GB/s,"
        f" {NETWORK.latency * 1e6:.0f} µs."
    )


def str_of(cell: tuple[str, int, int]) -> str:
    network, tasks, steps = cell
    return f"{network} with {counted(tasks, 'task')} and {counted(steps, 'step')}"


# Plots.


def figure(width: float, height: float) -> Any:
    """One that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


NAMES = {PLAIN: "plain loop", OURS: "ours", CAPTURED: "ours, captured"}
COLOURS = {PLAIN: "C0", OURS: "C1", CAPTURED: "C2"}


def draw_growth(runs: Sequence[Record], path: Path) -> None:
    """Milliseconds on one thread: over tasks and inner steps as lines, over networks as points."""
    found = [cell for cell in cells(runs) if cell["threads"] == 1]
    growths = growths_of(found)
    page = figure(10, 3.6 * math.ceil(len(growths) / 2))
    for index, growth in enumerate(growths):
        axes = page.add_subplot(math.ceil(len(growths) / 2), 2, index + 1)
        draw_panel(axes, [cell for cell in found if cell["growth"] == growth], "seconds", 1e3)
        axes.set_ylabel("ms")
    page.legend(*legend(page.axes), loc="outside lower center", ncols=3, frameon=False)
    page.savefig(path, dpi=110)


def draw_panel(axes: Any, here: list[Record], what: str, scale: float) -> None:
    """A line for each contender, over what grows; where that is no number, points with names."""
    growth = here[0]["growth"]
    along = growth.replace(" ", "_") if growth in ("tasks", "inner steps") else None
    places = list(dict.fromkeys(map(place, here)))
    for name in NAMES:
        line = [cell for cell in here if cell["contender"] == name and what in cell]
        if not line:
            continue
        x = [cell[along] if along else places.index(place(cell)) for cell in line]
        axes.plot(
            x,
            [cell[what] * scale for cell in line],
            "o-" if along else "o",
            ms=4,
            label=NAMES[name],
            color=COLOURS[name],
        )
    axes.set(yscale="log", title=f"{here[0]['network']}, growing {growth}" if along else growth)
    axes.grid(alpha=0.3)
    plain_numbers(axes.yaxis)
    if along:
        axes.set(xscale="log", xlabel=growth)
        plain_numbers(axes.xaxis)
        axes.set_xticks(sorted({cell[along] for cell in here}))
    else:
        axes.set_xticks(range(len(places)), [short(name) for name in places], rotation=30, ha="right", fontsize=8)


def plain_numbers(axis: Any) -> None:
    """Labels a logarithmic axis with numbers rather than powers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def short(name: str) -> str:
    return name.removesuffix(", 1 step").replace("-way ", "w").replace("-shot", "s")


def legend(panels: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Each label once, as it first stands."""
    by: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            by.setdefault(label, handle)
    return list(by.values()), list(by)


def draw_memory(runs: Sequence[Record], saving: Sequence[Record], path: Path) -> None:
    """MB of live tensors over tasks and over inner steps, and what checkpoints and chunks make of them."""
    found = [cell for cell in cells(runs) if cell["threads"] == 1]
    saved_cells = [cell for cell in cells(saving) if cell["network"] == "MLP 40-40"]
    page = figure(10, 3.8)
    for index, growth in enumerate(("tasks", "inner steps")):
        axes = page.add_subplot(1, 2, index + 1)
        here = [cell for cell in found if cell["growth"] == growth]
        if here:
            draw_panel(axes, here, "mb", 1)
        name, along = ("chunk", "tasks") if growth == "tasks" else ("checkpoint", "inner_steps")
        points = [cell for cell in saved_cells if cell[name]]
        label = "ours, chunks of 64" if name == "chunk" else "ours, checkpointed"
        axes.plot([c[along] for c in points], [c["mb"] for c in points], "s", ms=5, color=f"C{3 + index}", label=label)
        axes.set_ylabel("MB of live tensors at the peak")
    page.legend(*legend(page.axes), loc="outside lower center", ncols=4, frameon=False)
    page.savefig(path, dpi=110)


def parts() -> Iterator[tuple[str, str]]:
    """The generated parts of the page, by name."""
    measured = results("scaling")
    yield "outer_step", outer_step(results("outer_step"))
    yield "scaling", scaling(measured)
    yield "memory", memory(results("inner_loop_memory"))
    yield "costs", costs(results("costs"))
    yield "captured", captured(results("captured"))
    yield "ablation", ablation(results("ablation"))
    yield "profile", profile(results("profile"))
    yield "gpu", outer_step(results("gpu_outer_step"))
    yield "model", model(measured)


def main() -> None:
    for name, text in parts():
        write_part(PAGE, f"scripts/performance.py {name}", text)
    if measured := results("scaling"):
        draw_growth(measured, GROWTH_PLOT)
        draw_memory(measured, results("inner_loop_memory"), MEMORY_PLOT)


if __name__ == "__main__":
    main()
