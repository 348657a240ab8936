"""What a run leaves for TensorBoard, read back from its event files."""

import io
import math
import time

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status

from mlframework.base_layers import MLP
from mlframework.evaluation.displays.by_inner_step import ByInnerStep
from mlframework.evaluation.displays.fits import Fits
from mlframework.evaluation.interval import Interval
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.runs.run_folder import RunFolder
from mlframework.tasks import Sinusoid
from mlframework.training.checkpoint import Progress, Training
from mlframework.training.logger import hyperparameters
from mlframework.training.outer_loop import OuterLoop
from mlframework.training.tensorboard_logger import TensorBoardLogger
from mlframework.training.trainer import Trainer

CONFIG = OmegaConf.create(
    {
        "task": {"_target_": "some.Task", "k_shot": 10},
        "algorithm": {
            "_target_": "some.Algorithm",
            "update": {"_partial_": True, "lr": "${suggested.inner_lr}"},
            "frozen": None,
            "first_order": False,
        },
        "base_layer": {"hidden": [40, 40]},
        "trainer": {"steps": 50, "monitor": "query_loss"},
        "logger": {"folder": "x"},
        "suggested": {"inner_lr": 0.01},
        "run_dir": "somewhere",
        "resume": False,
        "seed": 3,
    }
)
CHOICES = {
    "algorithm": "maml",
    "algorithm/update": "sgd",
    "task": "sinusoid",
    "trainer": "default",
    "logger": "tensorboard",
}


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return accumulator.Reload()


def points(folder, tag):
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def hparams_of(folder):
    """The HParams entry: the experiment, the session's start and its end."""
    found = events(folder).summary_metadata
    content = {tag: found[tag].plugin_data.content for tag in found if tag.startswith("_hparams_/")}
    return (
        metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG]),
        metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG]),
        metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG]),
    )


def described(folder, start=0, overrides=()):
    logger = TensorBoardLogger(folder, start=start)
    logger.config(CONFIG, CHOICES, overrides)
    logger.close(finished=True)


def test_hyperparameters_are_choices_and_leaves_as_numbers_or_as_typed():
    assert hyperparameters(CONFIG, CHOICES) == {
        "algorithm": "maml",
        "algorithm/update": "sgd",
        "task": "sinusoid",
        "task.k_shot": 10,
        "algorithm.update.lr": 0.01,
        "algorithm.frozen": "null",
        "algorithm.first_order": "false",
        "base_layer.hidden": "[40, 40]",
        "trainer.steps": 50,
        "trainer.monitor": "query_loss",
        "seed": 3,
    }


def test_a_setting_named_almost_like_hydras_keywords_is_a_hyperparameter():
    config = OmegaConf.create({"task": {"_target_": "a.B", "n_target_": 3}})
    assert hyperparameters(config, {}) == {"task.n_target_": 3}


def test_the_hparams_entry_lies_in_the_runs_own_folder(tmp_path):
    described(tmp_path)
    assert [path.is_file() for path in tmp_path.iterdir()] == [True], "a file more, or a run within the run"
    experiment, start, _ = hparams_of(tmp_path)
    values = {name: value.string_value or value.number_value for name, value in start.hparams.items()}
    assert values == hyperparameters(CONFIG, CHOICES)
    assert {info.name for info in experiment.hparam_infos} == set(values)
    main = {f"{split}/{name}" for split in ("test", "best", "validation") for name in ("query_loss", "query_accuracy")}
    assert {info.name.tag for info in experiment.metric_infos} == {*main, "best/step", "run/finished"}


def test_what_was_typed_is_among_the_columns_shown_first(tmp_path):
    described(tmp_path, overrides=["algorithm=maml", "+algorithm.update.lr=0.01", "trainer.steps=50"])
    first = {info.name for info in hparams_of(tmp_path)[0].hparam_infos if info.differs}
    assert first == {"algorithm", "task", "algorithm.update.lr", "trainer.steps"}


def test_the_config_text_is_the_resolved_config(tmp_path):
    described(tmp_path)
    (text,) = events(tmp_path).Tensors("config/text_summary")
    yaml = text.tensor_proto.string_val[0].decode().removeprefix("```yaml\n").removesuffix("```")
    assert OmegaConf.create(yaml) == OmegaConf.to_container(CONFIG, resolve=True)


def test_a_failed_run_says_so_until_it_is_resumed_and_finishes(tmp_path):
    logger = TensorBoardLogger(tmp_path, start=0)
    logger.config(CONFIG, CHOICES)
    logger.scalars({"train/query_loss": 1.0}, 6)
    logger.close("step 6: the meta-loss is not finite")
    assert hparams_of(tmp_path)[2].status == Status.Value("STATUS_FAILURE")
    assert points(tmp_path, "run/finished") == [(6, 0.0)]
    (text,) = events(tmp_path).Tensors("error/text_summary")
    assert text.tensor_proto.string_val[0] == b"step 6: the meta-loss is not finite"
    resumed = TensorBoardLogger(tmp_path, start=4)
    resumed.config(CONFIG, CHOICES)
    resumed.scalars({"train/query_loss": 1.0}, 9)
    resumed.close(finished=True)
    assert hparams_of(tmp_path)[2].status == Status.Value("STATUS_SUCCESS")
    assert points(tmp_path, "run/finished") == [(9, 1.0)]
    assert "error/text_summary" not in events(tmp_path).Tags()["tensors"]


def test_an_interrupted_run_is_neither_finished_nor_failed(tmp_path):
    logger = TensorBoardLogger(tmp_path, start=0)
    logger.config(CONFIG, CHOICES)
    logger.close()
    assert "run/finished" not in events(tmp_path).Tags()["scalars"]
    assert "_hparams_/session_end_info" not in events(tmp_path).summary_metadata


def test_a_histogram_leaves_out_what_is_not_finite(tmp_path):
    logger = TensorBoardLogger(tmp_path, start=0)
    numbers = torch.tensor([[1.0, math.nan], [3.0, math.inf]])
    logger.histograms({"learned/rates": numbers, "learned/none": torch.tensor([math.nan])}, 5)
    logger.close()
    (found,) = events(tmp_path).Histograms("learned/rates")
    value = found.histogram_value
    assert (found.step, value.min, value.max, value.num, value.sum) == (5, 1.0, 3.0, 2, 4.0)
    assert events(tmp_path).Tags()["histograms"] == ["learned/rates"]


def test_a_resumed_run_is_described_once(tmp_path):
    described(tmp_path)
    described(tmp_path, start=7)
    assert len(events(tmp_path).Tensors("config/text_summary")) == 1
    assert len(events(tmp_path).Tensors("custom_scalars__config__")) == 1


@pytest.mark.parametrize("checkpoint", [0, 6])
def test_points_beyond_the_checkpoint_are_dropped_when_a_run_is_resumed(tmp_path, checkpoint):
    killed = TensorBoardLogger(tmp_path, start=0)
    for step in range(1, 11):
        killed.scalars({"train/query_loss": 1.0, "validation/only_before": 1.0}, step)
    killed.close()
    time.sleep(1.1)  # TensorBoard reads a folder's files in the order of their names, which hold the second
    resumed = TensorBoardLogger(tmp_path, start=checkpoint)
    for step in range(checkpoint + 1, checkpoint + 4):
        resumed.scalars({"train/query_loss": 2.0}, step)
    resumed.close()
    kept = [(step, 1.0) for step in range(1, checkpoint + 1)]
    assert points(tmp_path, "train/query_loss") == kept + [(checkpoint + i, 2.0) for i in (1, 2, 3)]
    assert points(tmp_path, "validation/only_before") == kept


def test_a_metric_has_a_curve_with_its_interval_and_one_for_each_inner_step(tmp_path):
    logger = TensorBoardLogger(tmp_path, start=0)
    steps = [Interval(4.0, 0.5, 10), Interval(2.0, 0.5, 10), Interval(1.0, 0.25, 10)]
    logger.intervals("validation", {"query_loss": steps[2]}, 30)
    logger.by_step("validation", {"query_loss": steps}, 30)
    logger.close()
    last = {"": 1.0, "_interval/lower": 0.75, "_interval/upper": 1.25}
    wanted = {**last, "_by_step/0": 4.0, "_by_step/1": 2.0, "_by_step/2": 1.0}
    tags = events(tmp_path).Tags()["scalars"]
    assert {tag: points(tmp_path, tag) for tag in tags} == {
        f"validation/query_loss{end}": [(30, value)] for end, value in wanted.items()
    }


def test_a_single_task_has_no_interval(tmp_path):
    logger = TensorBoardLogger(tmp_path, start=0)
    logger.intervals("validation", {"query_loss": Interval.of(torch.tensor([2.0]))}, 1)
    logger.close()
    assert events(tmp_path).Tags()["scalars"] == ["validation/query_loss"]


def test_a_figure_arrives_as_it_was_drawn(tmp_path):
    figure = Figure(figsize=(3, 2), dpi=50, facecolor="#ff8000")
    logger = TensorBoardLogger(tmp_path, start=0)
    logger.figure("validation/tasks", figure, 4)
    logger.close()
    (image,) = events(tmp_path).Images("validation/tasks")
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert image.step == 4
    assert pixels.shape == (100, 150, 3)
    assert (pixels == (255, 128, 0)).all()


def train(folder, steps, start=0):
    """A real training of some steps on sinusoids, with a validation at every second."""
    task = Sinusoid(k_shot=4, k_query=4)
    update = lambda params: SGD(params, lr=0.01)  # noqa: E731
    layer = MAML(MLP(task.spec, hidden=[8], norm="none"), task, update=update, meta_gradient=Exact(), inner_steps=2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    outer = OuterLoop(layer, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0))
    run = RunFolder(folder)
    run.last.parent.mkdir(parents=True, exist_ok=True)
    displays = {"fits": Fits(), "by_inner_step": ByInnerStep()}
    generator, device = torch.Generator().manual_seed(0), torch.device("cpu")
    training = Training(task, layer, outer, generator, device, run.last, run.best, displays)
    often = {"validate_every": 2, "checkpoint_every": 2, "log_every": 1}
    trainer = Trainer(steps=steps, meta_batch=2, validation_tasks=3, monitor="query_loss", **often)
    logger = TensorBoardLogger(folder, start=start)
    trainer.run(training, logger, Progress(step=start))
    logger.close()


def test_a_training_leaves_points_at_its_steps_and_figures_at_1_2_4_8_validations_and_the_end(tmp_path):
    train(tmp_path, 11)
    found = events(tmp_path)
    for tag in found.Tags()["scalars"]:
        every = 1 if tag.startswith("train/") else 2
        assert [step for step, _ in points(tmp_path, tag)] == list(
            range(1, 12) if every == 1 else (2, 4, 6, 8, 10, 11)
        ), tag
    expected = {"train/query_loss", "train/lr", "train/meta_grad_norm", "validation/query_loss"}
    by_step = {f"validation/query_loss_by_step/{i}" for i in range(3)}
    assert expected | by_step <= set(found.Tags()["scalars"])
    assert points(tmp_path, "validation/query_loss") == points(tmp_path, "validation/query_loss_by_step/2")
    assert found.Tags()["images"] == ["validation/tasks", "validation/by_inner_step"]
    for tag in found.Tags()["images"]:
        assert [image.step for image in found.Images(tag)] == [2, 4, 8, 11]


def test_a_run_that_was_killed_and_resumed_has_each_step_once(tmp_path):
    train(tmp_path, 7)
    time.sleep(1.1)
    train(tmp_path, 10, start=6)
    found = events(tmp_path)
    assert [step for step, _ in points(tmp_path, "train/query_loss")] == list(range(1, 11))
    assert [step for step, _ in points(tmp_path, "validation/query_loss")] == [2, 4, 6, 8, 10]
    assert [image.step for image in found.Images("validation/tasks")] == [2, 4, 8, 10]
