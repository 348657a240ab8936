"""Training: what stops it, what it leaves behind."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import types
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import safetensors.torch
import torch
from commands import SHORT, call
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from test_logger import points

from mlframework.cli.train import main, monitored
from mlframework.errors import FailedRun, InvalidValue, UserError
from mlframework.evaluation.part import Display
from mlframework.runs.run import evaluate_run, set_up, train_run
from mlframework.runs.run_folder import RunFolder
from mlframework.tasks import Sinusoid
from mlframework.training import checkpoint, trainer
from mlframework.training.last_checkpoints import kept
from mlframework.training.tensorboard_logger import TensorBoardLogger

SMALL = [
    "base_layer.hidden=[8]",
    "trainer.steps=6",
    "trainer.meta_batch=4",
    "trainer.validate_every=2",
    "trainer.validation_tasks=4",
    "trainer.checkpoint_every=2",
    "logger.figures=false",
]
SMALL_EVALUATION = [
    "evaluation.tasks=8",
    "evaluation.validation_tasks=4",
    "evaluation.baseline.from_scratch.tasks=2",
    "evaluation.baseline.from_scratch.steps=2",
]


def composed(*overrides: str):
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        evaluation = [] if "evaluation=none" in overrides else SMALL_EVALUATION
        return compose("train", [*SMALL, *evaluation, *overrides])


def train(folder: Path, *overrides: str):
    config = composed(*overrides, f"run_dir={folder}")
    return train_run(config, RunFolder(folder), overrides=list(overrides), choices={"algorithm": "maml"})


class Bursting(Sinusoid):
    """Sinusoids, one of which is infinite from the fifth training draw on."""

    def __init__(self, k_shot: int = 10, k_query: int = 10) -> None:
        super().__init__(k_shot, k_query)
        self.draws = 0

    def sample(self, num_tasks, split, generator):
        episode = super().sample(num_tasks, split, generator)
        if split == "train" and num_tasks == 4:
            self.draws += 1
            if self.draws >= 5:
                episode.query.y[2] = float("inf")
        return episode


class Undefined(Sinusoid):
    """Sinusoids whose query values are NaN in the first validations, for each of which four tasks are drawn."""

    def __init__(self, validations: int, k_shot: int = 10, k_query: int = 10) -> None:
        super().__init__(k_shot, k_query)
        self.left = 4 * validations

    def sample(self, num_tasks, split, generator):
        episode = super().sample(num_tasks, split, generator)
        if split == "validation" and num_tasks == 1 and self.left:
            self.left -= 1
            episode.query.y[:] = float("nan")
        return episode


class Broken(Sinusoid):
    """Sinusoids that cannot be drawn at the third step of a training, as long as a file is there."""

    def __init__(self, file: str, k_shot: int = 10, k_query: int = 10) -> None:
        super().__init__(k_shot, k_query)
        self.file, self.draws = Path(file), 0

    def sample(self, num_tasks, split, generator):
        self.draws += split == "train" and num_tasks == 4
        if self.draws == 3 and self.file.exists():
            raise OSError("the disk is gone")
        return super().sample(num_tasks, split, generator)


class Noted(Sinusoid):
    """Sinusoids that note how many tasks were drawn from which split."""

    drawn: ClassVar[list[tuple[int, str]]] = []

    def sample(self, num_tasks, split, generator):
        self.drawn.append((num_tasks, split))
        return super().sample(num_tasks, split, generator)


def test_training_sees_no_test_task(tmp_path):
    """Meta-batches are of four tasks; validation draws one at a time."""
    Noted.drawn.clear()
    train(tmp_path, f"task._target_={__name__}.Noted", "evaluation=none")
    first = next(i for i, (number, _) in enumerate(Noted.drawn) if number == 4)  # before it everything is tried once
    after = Noted.drawn[first:]
    assert [split for number, split in after if number == 4] == ["train"] * 6
    assert [split for number, split in after if number != 4] == ["validation"] * (len(after) - 6) != []


def test_tasks_per_second_counts_the_steps_since_the_clock_was_set(tmp_path, monkeypatch):
    """Of a second for each step and a minute for a validation, wherever reports, validations and breaks fall."""
    now, rates = [0.0], {}

    def taking(seconds, method):
        def timed(*args):
            now[0] += seconds
            return method(*args)

        return timed

    monkeypatch.setattr(trainer, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(trainer.Trainer, "outer_step", taking(1.0, trainer.Trainer.outer_step))
    monkeypatch.setattr(trainer.Trainer, "validate", taking(60.0, trainer.Trainer.validate))
    monkeypatch.setattr(TensorBoardLogger, "scalars", lambda self, values, step: rates.setdefault(step, values))
    often = ("trainer.log_every=2", "trainer.validate_every=3", "trainer.checkpoint_every=1")
    settings = ("evaluation=none", "schedule=constant", *often)
    train(tmp_path, *settings, "trainer.steps=3")
    train(tmp_path, *settings, "trainer.steps=8", "resume=true")
    found = {step: values["train/tasks_per_second"] for step, values in rates.items()}
    assert found == dict.fromkeys([2, 3, 4, 6, 8], 4.0)


def test_of_many_losses_that_are_not_finite_three_tasks_are_named(tmp_path):
    with pytest.raises(
        FailedRun, match=r"step 1: the meta-loss is not finite \((task \w{16}, ){3}and 2 more\); the last"
    ):
        train(tmp_path, "algorithm.update.lr=1e30", "trainer.meta_batch=5")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_task(tmp_path):
    with pytest.raises(FailedRun) as caught:
        train(tmp_path, f"task._target_={__name__}.Bursting")
    task = Bursting()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        episode = task.sample(4, "train", generator)
    assert str(caught.value) == (
        f"step 5: the meta-loss is not finite (task {episode.tasks(slice(2, 3)).hash()}); "
        f"the last good checkpoint is {tmp_path / 'checkpoints' / 'last.pt'}"
    )
    last = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    assert last["progress"]["step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in last["meta_layer"].values())
    assert not (tmp_path / "result.json").exists()


def test_a_rate_that_is_not_finite_or_below_zero_stops_the_run(tmp_path):
    for name, rate in ("nan", math.nan), ("infinite", math.inf), ("large", 1e39), ("uphill", -0.1):
        settings = ("optimizer=sgd", "schedule._target_=test_trainer.rates", "~schedule.T_max", "~schedule.eta_min")
        with pytest.raises(
            FailedRun, match=f"the outer rate is {re.escape(f'{rate:g}')} after 2 steps: see the keys of schedule"
        ):
            train(tmp_path / name, "evaluation=none", *settings, f"+schedule.then={rate}")
        assert not (tmp_path / name / "result.json").exists()


def rates(optimizer, *, then):
    """A schedule of two steps at the optimizer's rate, and then another rate; SGD's own is 1."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else then)


def test_parameters_that_are_not_finite_at_the_end_fail_the_run(tmp_path):
    settings = ("optimizer=sgd", "schedule._target_=test_trainer.rates", "~schedule.T_max", "~schedule.eta_min")
    overflow = ("optimizer.lr=1e-6", "+optimizer.weight_decay=1000", "+schedule.then=3e44", "outer.clip=null")
    with pytest.raises(FailedRun, match=r"base_layer\.\S+ is not finite after step 3; the best weights so far are "):
        train(tmp_path, *settings, *overflow, "trainer.steps=3", "evaluation=none")
    assert not (tmp_path / "result.json").exists()


def test_a_run_folder_tells_what_was_run_on_what_and_what_came_of_it(tmp_path):
    result, report = train(tmp_path, "seed=3")
    assert OmegaConf.load(tmp_path / "config.yaml").algorithm["update"].lr == 0.01  # the task suggests it
    assert list(OmegaConf.load(tmp_path / "overrides.yaml")) == ["seed=3"]
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    written = json.loads((tmp_path / "result.json").read_text())
    assert re.fullmatch("[0-9a-f]{40}", written["git"]["commit"] or "0" * 40)
    assert written == json.loads(json.dumps(result))
    assert written["evaluation"]["task_hash"] == report.task_hash
    assert written["step"] == 6
    assert written["batch_norm"] == "none"
    found = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert found == {"last.pt", "last.1.pt", "best.safetensors"}


def test_the_best_weights_are_those_of_the_best_validation(tmp_path):
    result, _ = train(tmp_path, "optimizer.lr=0.5", "evaluation=none", "trainer.steps=20")
    assert result["validation"]["query_loss"]["mean"] == pytest.approx(result["best"]["value"])


@pytest.mark.parametrize(
    ("overrides", "inner_steps"),
    [
        (["algorithm=maml", "algorithm.update.lr=0.2"], 1),
        (["algorithm=maml", "algorithm.update.lr=0.2", "trainer.monitor_step=5"], 5),
        (["algorithm=maml", "algorithm.update.lr=0.2", "trainer.monitor_step=0"], 0),
        (["algorithm=joint", "algorithm.update.lr=0.05"], 0),
        (["algorithm=maml", "algorithm.inner_steps=3", "algorithm.test_inner_steps=2"], 2),
        (["algorithm=prototypes", "task=glyphs", "task.k_query=2", "task.drawings=6", "base_layer.filters=4"], 0),
    ],
)
def test_weights_are_selected_after_the_inner_steps_that_were_trained_or_asked_for(tmp_path, overrides, inner_steps):
    small = [override for override in SMALL if "hidden" not in override or "task=glyphs" not in overrides]
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose(
            "train",
            [*small, "optimizer.lr=0.1", "evaluation=none", "trainer.steps=20", *overrides, f"run_dir={tmp_path}"],
        )
    result, _ = train_run(config, RunFolder(tmp_path))
    metric = result["monitor"]
    curve = points(tmp_path, f"validation/{metric}_by_step/{inner_steps}")
    higher = metric == "query_accuracy"
    value = (max if higher else min)(value for _, value in curve)
    step = result["best"]["step"]
    # Curves are float32: steps that are equal there may differ in the mean's last bit.
    assert dict(curve)[step] == value
    assert result["best"] == {"value": pytest.approx(value), "step": step, "inner_steps": inner_steps}
    assert points(tmp_path, f"validation/{metric}") == curve
    # Whatever else is reported or returned is that of the same weights after the same steps.
    assert monitored(result) == result["best"]["value"] == result["validation"][metric]["mean"]
    assert result["validation_by_step"][metric][inner_steps] == result["validation"][metric]


def selected(monitor: str, values: Sequence[float]) -> int | None:
    """Which of the values of several validations, one after another, is the best."""
    numbers = dict.fromkeys(("steps", "meta_batch", "validate_every", "validation_tasks", "checkpoint_every"), 1)
    choosing, best = trainer.Trainer(**numbers, log_every=1, monitor=monitor), None
    for i, value in enumerate(values):
        if choosing.better(Sinusoid(), value, None if best is None else values[best]):
            best = i
    return best


def test_the_best_is_the_first_of_the_best_finite_values():
    for values in itertools.product([math.nan, math.inf, -math.inf, 1.0, 2.0], repeat=3):
        finite = [value for value in values if math.isfinite(value)]
        assert selected("query_loss", values) == (values.index(min(finite)) if finite else None)
        assert selected("query_accuracy", values) == (values.index(max(finite)) if finite else None)


@pytest.mark.parametrize("best", [4, 6])
def test_the_best_weights_are_validated_again_only_if_the_last_step_was_not_the_best(tmp_path, best, monkeypatch):
    validations, validate = [], trainer.Trainer.validation
    monkeypatch.setattr(
        trainer.Trainer, "validation", lambda *given: validations.append(found := validate(*given)) or found
    )
    monkeypatch.setattr(trainer.Trainer, "better", lambda self, task, value, than: len(validations) == best // 2)
    result, _ = train(tmp_path / "run", "evaluation=none")
    assert result["best"]["step"] == best
    assert len(validations) == (3 if best == 6 else 4)
    of_best, by_step = validations[best // 2 - 1]
    assert result["validation"] == {name: interval._asdict() for name, interval in of_best.items()}
    assert result["validation_by_step"] == {n: [each._asdict() for each in rows] for n, rows in by_step.items()}


def test_a_validation_that_is_not_finite_is_replaced_by_the_next(tmp_path):
    result, _ = train(tmp_path, f"task._target_={__name__}.Undefined", "+task.validations=1", "evaluation=none")
    curve = dict(points(tmp_path, "validation/query_loss"))
    assert math.isnan(curve.pop(2)) and curve[4] != curve[6]
    assert result["best"]["step"] == min(curve, key=curve.get)
    assert result["validation"]["query_loss"]["mean"] == result["best"]["value"] == pytest.approx(min(curve.values()))


def test_a_run_without_a_finite_validation_fails_in_one_line_and_leaves_no_best_weights(tmp_path):
    typed = [f"task._target_={__name__}.Undefined", "+task.validations=100", "run_dir=run", "evaluation=none", *SMALL]
    for more in [], ["resume=true"]:
        said = call(main, *typed, *more, folder=tmp_path)
        assert (said.exit_code, said.err.splitlines()[-1]) == (
            1,
            "query_loss (inner steps: 1) was not finite at any validation, so no weights are the best; "
            "the last ones are in run/checkpoints/last.pt",
        )
    assert not (tmp_path / "run" / "result.json").exists()
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"last.pt", "last.1.pt"}
    progress = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["progress"]
    assert (progress["step"], progress["best"], progress["best_step"]) == (6, None, None)


def test_a_run_that_fails_before_its_first_checkpoint_is_resumed_from_the_start(tmp_path):
    (tmp_path / "broken").touch()
    typed = [f"task._target_={__name__}.Broken", f"+task.file={tmp_path / 'broken'}", "evaluation=none", "seed=4"]
    typed += ["trainer.checkpoint_every=6", "trainer.validate_every=6"]
    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path / "run", *typed)
    first = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert (first["progress"]["step"], first["progress"]["best"]) == (0, None)
    assert not (tmp_path / "run" / "checkpoints" / "best.safetensors").exists(), "no validation has selected weights"
    (tmp_path / "broken").unlink()
    resumed, _ = train(tmp_path / "run", "resume=true")
    whole, _ = train(tmp_path / "whole", *typed)
    assert resumed["best"] == whole["best"]
    one, other = (torch.load(tmp_path / run / "checkpoints" / "last.pt", weights_only=True) for run in ("run", "whole"))
    assert all(torch.equal(one["meta_layer"][name], tensor) for name, tensor in other["meta_layer"].items())
    assert not all(torch.equal(first["meta_layer"][name], tensor) for name, tensor in other["meta_layer"].items())


def test_an_evaluation_afterwards_gives_what_the_run_ended_with(tmp_path):
    _, report = train(tmp_path)
    again = evaluate_run(RunFolder(tmp_path), composed().evaluation, weights="best", device="cpu")
    assert again == report


class Failing(Display):
    """Raises whatever it is shown."""

    def show(self, validated, log):
        raise ZeroDivisionError(f"at step {validated.step}")


def test_a_display_that_fails_is_left_out_and_the_training_goes_on(tmp_path, caplog):
    with_displays = [f"+display.failing._target_={__name__}.Failing", "display=[by_inner_step]", "logger.figures=true"]
    shown, _ = train(tmp_path / "shown", *with_displays, "evaluation=none", "trainer.validate_every=6")
    plain, _ = train(tmp_path / "plain", "evaluation=none", "trainer.validate_every=6")
    assert shown["best"] == plain["best"]
    assert "display.failing is left out at step 6: ZeroDivisionError: at step 6" in caplog.text
    found = {path.name for path in (tmp_path / "shown" / "checkpoints").iterdir()}
    assert found == {"last.pt", "last.1.pt", "best.safetensors"}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("display=[contact_sheet]", "display.contact_sheet: draws classes of images"),
        ("display=[samples]", "display.samples: Sinusoid is no text task"),
        ("evaluation/baseline=[ngram]", "evaluation.baseline.ngram: Sinusoid is no text task"),
        (
            "evaluation/baseline=[in_context]",
            "evaluation.baseline.in_context: is for a sequence, and Sinusoid is a regress",
        ),
        ("evaluation/measure=[text_quality]", "evaluation.measure.text_quality: Sinusoid is no text task"),
    ],
)
def test_what_does_not_go_with_the_task_is_refused_before_anything_is_written(tmp_path, override, line):
    said = call(main, override, "run_dir=run", *SHORT, folder=tmp_path)
    assert said.exit_code == 2
    assert said.err.startswith(line) and said.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_architecture_is_refused_by_name(tmp_path):
    train(tmp_path, "evaluation=none")
    other = set_up(composed("base_layer.hidden=[9]"), RunFolder(tmp_path))
    with pytest.raises(UserError, match=r"architecture: base_layer.features.1.bias is \(8,\) there and \(9,\) here"):
        checkpoint.load_weights(RunFolder(tmp_path).best, other.meta_layer)


def test_a_truncated_checkpoint_is_refused_by_name(tmp_path):
    train(tmp_path, "evaluation=none")
    for path in kept(RunFolder(tmp_path).last):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last.pt: cannot be read as a checkpoint"):
        train(tmp_path, "resume=true")


def test_an_unknown_metric_to_monitor_is_named_before_long(tmp_path):
    with pytest.raises(InvalidValue, match=r"monitor=query_los: must be one of query_loss \(did you mean query_loss\?"):
        train(tmp_path, "trainer.monitor=query_los")
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm=maml", "optimizer.lr=0.01"],
        ["algorithm=fomaml", "optimizer.lr=0.01"],
        ["algorithm=reptile", "algorithm.update.lr=0.01", "algorithm.inner_steps=10"],
    ],
)
def test_training_brings_the_loss_after_adaptation_clearly_below_that_of_a_constant(tmp_path, overrides):
    result, _ = train(
        tmp_path, *overrides, "base_layer.hidden=[40,40]", "trainer.steps=200", "trainer.meta_batch=20",
        "trainer.validation_tasks=100", "trainer.validate_every=200", "evaluation=none",
    )  # fmt: skip
    assert result["validation"]["query_loss"]["mean"] < 2.5  # predicting zero everywhere has 4.3: E[amplitude^2] / 2


def test_a_run_may_start_from_the_base_layer_of_another(tmp_path):
    small = ["base_layer.hidden=[8]", "evaluation=none", *SHORT]
    assert call(main, "algorithm=joint", "run_dir=first", *small, folder=tmp_path).exit_code == 0
    # A rate of nothing: what was learned before is what comes out, under the names that the algorithm gives it.
    still = ["optimizer.lr=1e-30", "schedule=constant", "algorithm=lora", "algorithm.layers=head"]
    assert call(main, *still, "init=first", "run_dir=second", *small, folder=tmp_path).exit_code == 0
    one, other = (
        safetensors.torch.load_file(tmp_path / run / "checkpoints/best.safetensors") for run in ("first", "second")
    )
    torch.testing.assert_close(other["base_layer.features.1.weight"], one["base_layer.features.1.weight"])
    torch.testing.assert_close(other["base_layer.head.linear.weight"], one["base_layer.head.weight"])
    shutil.rmtree(tmp_path / "first")  # it is not needed to evaluate or to resume what started from it
    assert call(main, "run_dir=second", "resume=true", "trainer.steps=3", folder=tmp_path).exit_code == 0


@pytest.mark.parametrize(
    ("init", "line"),
    [
        ("nowhere", r"init=nowhere: nowhere.*best.safetensors: there is no such checkpoint: no run there"),
        ("other", r"init=other: weights of another architecture: features.1.weight is \(9, 1\) there and \(8"),
    ],
)
def test_a_start_that_is_not_there_or_does_not_fit_is_said_in_one_line(tmp_path, init, line):
    other = ["base_layer.hidden=[9]", "evaluation=none", "run_dir=other", *SHORT]
    assert call(main, *other, folder=tmp_path).exit_code == 0
    said = call(main, "base_layer.hidden=[8]", f"init={init}", "run_dir=mine", *SHORT, folder=tmp_path)
    assert said.exit_code == 2
    assert re.match(line, said.err) and said.err.count("\n") == 1
    assert not (tmp_path / "mine").exists()
