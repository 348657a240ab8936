"""Memory, handles, threads over 10,000 outer steps and 100 jobs: `python benchmarks/long_runs.py [--part PART ...]`.

Each part is a real `mlframework-train` in a process of its own, whose logger samples the process: at every hundredth
outer step, or at the end of every job of a sweep. `overhead` is a sweep of small jobs in one worker process: how much
of its processor time, from the start of the command to its end, is meta-training with its validation. Figures,
checkpoints and all the rest are outside.

The samples go to results/long_runs.json, a part beside those that it holds already; with all of them there, the plot
and the table of docs/sweeps.md are drawn. `--draw` draws them from the file that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from mlframework.files import as_json, write_json, write_part
from mlframework.runs.git_state import git_state
from mlframework.training.checkpoint import Progress, Training
from mlframework.training.logger import Logger
from mlframework.training.tensorboard_logger import TensorBoardLogger
from mlframework.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "results" / "long_runs.json"
PAGE, PLOT = ROOT / "docs" / "sweeps.md", ROOT / "docs" / "long_runs.png"

#: Where a child process writes its samples, one JSON object a line, and at which of the two it samples.
SAMPLES, AT_ENDS = "LONG_RUNS_SAMPLES", "LONG_RUNS_AT_ENDS"

#: A part's samples before this share of it are left out of its trend: caches fill, allocators take their first memory.
WARM = 0.2

#: Jobs of the sweep of small jobs.
SWEEP = 200

SMALL = ("task=sinusoid", "threads=1", "device=cpu", "trainer.meta_batch=4", "trainer.validation_tasks=8")
LONG = (*SMALL, "trainer.steps=10000", "trainer.log_every=100", "trainer.checkpoint_every=100", "evaluation=none")
SWEPT = ("-m", *SMALL, "evaluation/baseline=[]", "evaluation.tasks=8", "evaluation.validation_tasks=8")
PARTS: Mapping[str, tuple[str, ...]] = {
    "steps": ("algorithm=maml", *LONG),
    "captured_steps": ("algorithm=maml", *LONG, "outer.capture=true", "base_layer.hidden=[8]"),
    "jobs": (  # short ones: nearly all of their time is outside training
        *SWEPT,
        "algorithm=maml,fomaml,ridge,conditional_neural_process",
        "seed=range(25)",
        "trainer.steps=2",
    ),
    "overhead": (
        *("-m", "task=sinusoid", "algorithm=maml", "device=cpu", f"seed=range({SWEEP})", "trainer.steps=500"),
        *("evaluation=none", "logger.figures=false", "trainer._target_=long_runs.CountingTrainer"),
    ),
}


class SamplingLogger(TensorBoardLogger):
    """TensorBoard's logger, which samples its process as well."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        super().scalars(values, step)
        if "train/query_loss" in values and not os.environ.get(AT_ENDS):
            add_sample(step=step)

    def close(self, error: str | None = None, *, finished: bool = False) -> None:
        super().close(error, finished=finished)
        if os.environ.get(AT_ENDS):
            add_sample(job=self.folder.name, **CountingTrainer.spent)
            CountingTrainer.spent.clear()


class CountingTrainer(Trainer):
    """The trainer, which counts the processor time of the meta-training, and of its figures and checkpoints."""

    spent: ClassVar[dict[str, float]] = {}  # seconds of the job that runs, or ran last

    def run(self, training: Training, logger: Logger, progress: Progress) -> Progress:
        with self.counted("training"):
            return super().run(training, logger, progress)

    def show(self, *validation: Any) -> None:
        with self.counted("figures", within="training"):
            super().show(*validation)

    def save(self, training: Training, progress: Progress) -> None:
        with self.counted("checkpoints", within="training"):
            super().save(training, progress)

    @contextmanager
    def counted(self, name: str, *, within: str | None = None) -> Iterator[None]:
        """Adds the time of a block to a name, and takes it off another."""
        start = time.process_time()
        yield
        seconds = time.process_time() - start
        self.spent[name] = self.spent.get(name, 0) + seconds
        if within:
            self.spent[within] = self.spent.get(within, 0) - seconds


def add_sample(**at: Any) -> None:
    """Appends what the process holds now: resident memory, open files, threads, and the processor time that it took."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = {
        "megabytes": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "system_threads": len(os.listdir("/proc/self/task")),
        "cpu_seconds": time.process_time(),
        "seconds": time.perf_counter(),
    }
    with Path(os.environ[SAMPLES]).open("a") as file:
        file.write(as_json({**at, **held}) + "\n")


def measure(part: str) -> dict[str, Any]:
    """Runs a part to its end; its samples, and the processor time of the command with the processes that it starts."""
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.jsonl"
        swept = "-m" in PARTS[part]
        place = f"hydra.sweep.dir={folder}/sweep" if swept else f"run_dir={folder}/run"
        command = [sys.executable, "-m", "mlframework.cli.train", *PARTS[part], place]
        command.append("logger._target_=long_runs.SamplingLogger")
        environment = {**os.environ, SAMPLES: str(samples), AT_ENDS: "1" if swept else "", "OMP_NUM_THREADS": "1"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=Path(__file__).parent, env=environment, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"cpu_seconds": seconds, "samples": [json.loads(line) for line in samples.read_text().splitlines()]}


def trend(samples: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """The first and the last value once warm, the most, and the growth over the last fifth of all samples."""
    values = [sample[name] for sample in samples[int(WARM * len(samples)) :]]
    growth = values[-1] - values[-(len(samples) // 5)]
    return {"first": values[0], "last": values[-1], "most": max(values), "growth": growth}


def table(found: Mapping[str, Any]) -> str:
    """A line for each part: what the process holds once warm and at the end."""
    lines = [
        "| part | points | memory, MB | growth over the last fifth | open files | threads |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for part, record in found.items():
        samples = record["samples"]
        steps = "step" in samples[0]
        memory, handles, threads = (trend(samples, name) for name in ("megabytes", "handles", "threads"))
        count = f"{samples[-1]['step']:,} steps" if steps else f"{len(samples)} jobs"
        cells = [
            f"`{part}`",
            count,
            f"{memory['first']:.0f} to {memory['last']:.0f}",
            f"{memory['growth']:.1f} MB",
        ]
        cells += [
            f"{each['first']:.0f} to {each['last']:.0f}, at most {each['most']:.0f}" for each in (handles, threads)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shares(record: Mapping[str, Any]) -> str:
    """The processor time of a sweep: outside training in the first job, which imports, and in others; the share."""
    samples, training = record["samples"], 0.0
    outside = [sample["cpu_seconds"] - (training := training + sample["training"]) for sample in samples]
    each, count = (outside[-1] - outside[0]) / (len(samples) - 1), len(samples)
    whole = record.get("cpu_seconds", samples[-1]["cpu_seconds"])  # without it the sweep was stopped
    lines = ["| jobs | training, s a job | outside, s a job | first job, outside | share outside |", "|" + " --- |" * 5]
    cells = [str(count), f"{training / count:.3f}", f"{each:.3f}", f"{outside[0]:.1f}", f"{1 - training / whole:.1%}"]
    lines.append(f"| {' | '.join(cells)} |")
    if count < SWEEP:
        rest, trained = outside[0] + (SWEEP - 1) * each, SWEEP * training / count
        lines.append(f"| {SWEEP}, from these | | | | {rest / (rest + trained):.1%} |")
    return "\n".join(lines)


def draw(found: Mapping[str, Any]) -> None:
    """The plot: a row for memory and one for files and threads, a column for each part."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(found), 4.5), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False)
    for column, (part, record) in enumerate(found.items()):
        samples = record["samples"]
        x = [sample.get("step", number) for number, sample in enumerate(samples, start=1)]
        top, bottom = axes[:, column]
        top.plot(x, [sample["megabytes"] for sample in samples])
        top.set(title=part.replace("_", " "), ylim=(0, 1.2 * top.get_ylim()[1]), ylabel="" if column else "memory, MB")
        for name, label in (("handles", "open files"), ("threads", "threads")):
            bottom.plot(x, [sample[name] for sample in samples], label=label)
        bottom.set(ylim=(0, 1.5 * bottom.get_ylim()[1]), xlabel="outer step" if "step" in samples[0] else "job")
        bottom.legend(loc="upper right")
    FigureCanvasAgg(figure)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--draw", action="store_true", help="draws from the file that is there")
    given = parser.parse_args()
    from solvers import processor  # not in the processes that are measured

    found, state = json.loads(RESULT.read_text()) if RESULT.exists() else {}, git_state()  # before results are written
    for part in () if given.draw else given.part:
        found[part] = {"command": " ".join(PARTS[part]), **state, "machine": processor(), **measure(part)}
        write_json(RESULT, found, indent=None)
    write_part(PAGE, "long runs", table(found))
    if "overhead" in found:
        write_part(PAGE, "overhead", shares(found["overhead"]))
    draw(found)


if __name__ == "__main__":
    main()
