"""The public checks, over every preset of every algorithm and task, and over parts that break one rule each."""

import os
import random
import sys
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from PIL import Image
from reference import Recurrent
from tables import good_rows, write
from torch import nn

from mlframework.base_layers import MLP, BaseLayer, Stack
from mlframework.episode import Episode, Examples
from mlframework.errors import EXAMPLES, IncompatibleTask
from mlframework.evaluation.task_set import judge_by_step
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact, FirstOrder
from mlframework.runs import build
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid
from mlframework.testing import check_meta_layer, check_task_distribution
from mlframework.training.meta_gradient import meta_gradient

REPOSITORY = Path(__file__).parent.parent
DATA = Path(os.environ.get("MLFRAMEWORK_DATA") or REPOSITORY.parent / "shared" / "data")

#: What makes a preset small enough to check in a second, wherever it has such a key.
SMALL = {
    "task": {"n_way": 2, "k_query": 2, "drawings": 6, "length": 7, "categorical": 0.0},
    "base_layer": {"filters": 4, "hidden": [8, 8], "width": 8, "depth": 1, "heads": 2},
    "algorithm": {"hidden": [8, 8], "inner_steps": 2, "width": 8, "depth": 2, "heads": 2},
}

#: Every algorithm meets one task of each kind in every test run, and the others in .ci/run.
FAST = ("sinusoid", "digits", "text_folder")
#: To an algorithm these are what glyphs or lists of texts are: for them, that it takes a step has to do.
ALIKE = ("image_folder", "omniglot", "pose", "text_languages")
#: To an algorithm there is no difference at all: the spec is that of another task.
SAME_SPEC = ("text_roles", "omniglot_fixed_labels", "gaussian_process", "steps", "cubics", "damped_oscillator")
#: Training classes keep their labels by design.
FIXED_LABELS = ("omniglot_fixed_labels",)
#: Tasks in which two examples may have one input, as two films of one genre do, or two rows of a table.
REPEATS = ("ratings", "sklearn_tables", "table")
#: What of the data folder a task reads, if it is there.
READS = {
    "omniglot": "omniglot/images_background.zip",
    "omniglot_fixed_labels": "omniglot/images_background.zip",
    "text_roles": "text/shakespeare_roles.json.gz",
    "text_languages": "text/udhr_languages.json.gz",
}


def presets(group):
    return sorted(path.stem for path in (REPOSITORY / "conf" / group).glob("*.yaml"))


def slow_but(fast, names):
    """The names as parameters, of which all but the fast ones are marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def folder_of_images(tmp_path_factory):
    """30 classes of 4 to 6 images of noise."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(30):
        (root / f"class{i}").mkdir()
        for j in range(4 + i % 3):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / f"class{i}" / f"{j}.png")
    return root


@pytest.fixture(scope="module")
def folder_of_texts(tmp_path_factory):
    """Five files of running text."""
    root = tmp_path_factory.mktemp("texts")
    for name in "abcde":
        (root / f"{name}.txt").write_text("\n".join(f"{name} says {number} things" for number in range(40)))
    return root


@pytest.fixture(scope="module")
def table_of_schools(tmp_path_factory):
    """A CSV of twelve schools."""
    return write(tmp_path_factory.mktemp("tables") / "schools.csv", good_rows())


@pytest.fixture
def needs(request):
    """The overrides without which a task's preset cannot be built, or a reason to skip it."""

    def overrides(task):
        if task == "image_folder":
            return [f"task.path={request.getfixturevalue('folder_of_images')}", "task.image_size=16"]
        if task == "text_folder":
            return [f"task.path={request.getfixturevalue('folder_of_texts')}"]
        if task == "table":
            path = request.getfixturevalue("table_of_schools")
            columns = ["task.task_column=school", "task.target=score", "task.ignore=[]"]
            return [f"task.path={path}", "task.k_shot=3", *columns]
        if task in READS:
            if not (DATA / READS[task]).is_file():
                pytest.skip(f"{READS[task]} is not in {DATA} (set MLFRAMEWORK_DATA)")
            return [f"task.data_dir={DATA}", *(["task.download=false"] if "omniglot" in task else [])]
        return []

    return overrides


def small(*overrides, hydra=False):
    """A config as the command line composes it, and made small; with Hydra's own part or without."""
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", list(overrides), return_hydra_config=hydra)
    for group, settings in SMALL.items():
        for key in settings.keys() & config[group].keys():
            OmegaConf.update(config, f"{group}.{key}", settings[key])
    return config


@cache
def built(task):
    """A task distribution of a config as yaml: the same for all algorithms, so that data is read once."""
    return instantiate(OmegaConf.create(task))


@pytest.mark.parametrize("task", presets("task"))
def test_every_preset_of_a_task_keeps_the_contract(task, needs):
    made = build.build_task(small(f"task={task}", *needs(task)))
    check_task_distribution(made, inputs_repeat=task in REPEATS, labels_repeat=task in FIXED_LABELS)


def maker(config, base_layer=None):
    """Makes meta layers of a config: Hydra reads it once, which takes longer than all else in a check.

    A base layer may be handed over: it is built from a spec.
    """
    algorithm = instantiate(config.algorithm, _partial_=True)
    base_layer = base_layer or instantiate(config.base_layer, _partial_=True)
    return lambda task: deepcopy(algorithm)(base_layer(task.spec), task)


def check_step(make_meta_layer, task, *, num_tasks):
    """One outer step: every meta-parameter gets a finite gradient."""
    layer = make_meta_layer(task)
    meta_gradient(layer, task.sample(num_tasks, "train", torch.Generator().manual_seed(0)))
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("task", slow_but(FAST, [task for task in presets("task") if task not in SAME_SPEC]))
@pytest.mark.parametrize("algorithm", presets("algorithm"))
def test_every_preset_of_an_algorithm_keeps_the_contract_on_every_task(algorithm, task, needs):
    config = small(f"algorithm={algorithm}", f"task={task}", *needs(task))
    made = built(OmegaConf.to_yaml(config.task, resolve=True))
    if made.spec.kind in get_class(config.algorithm._target_).kinds:
        check = check_step if task in ALIKE else check_meta_layer
        check(maker(config), made, num_tasks=2)
    else:
        with pytest.raises(IncompatibleTask, match=f"takes .* {type(made).__name__} is a {made.spec.kind}: use task="):
            build.build_meta_layer(config, made)


#: Presets that report a training loss of other examples than the queries.
REPORTED_OTHERWISE = ("joint", "reptile")


@pytest.mark.parametrize("algorithm", [name for name in presets("algorithm") if name not in REPORTED_OTHERWISE])
def test_the_query_loss_while_training_is_that_of_an_evaluation_after_the_trained_inner_steps(algorithm):
    kinds = get_class(small(f"algorithm={algorithm}").algorithm._target_).kinds
    config = small(f"algorithm={algorithm}", EXAMPLES[kinds[0]])
    if "test_inner_steps" in config.algorithm:
        OmegaConf.update(config, "algorithm.test_inner_steps", 4)
    made = built(OmegaConf.to_yaml(config.task, resolve=True))
    layer = build.build_meta_layer(config, made)
    episode = made.sample(2, "train", torch.Generator().manual_seed(0))
    _, metrics = layer.train().meta_loss(episode)
    rows = judge_by_step(layer, episode, layer.test_inner_steps)["query_loss"]
    torch.testing.assert_close(metrics["query_loss"].detach(), rows[layer.trained_inner_steps])
    others = [row for step, row in enumerate(rows) if step != layer.trained_inner_steps]
    assert not any(torch.equal(rows[layer.trained_inner_steps], row) for row in others)


# Masks.


MASKS = (torch.bool, torch.int64, torch.uint8, torch.float64)


def with_masks(episode, dtype):
    """The same episode with masks of another type."""
    return Episode(*(part._replace(mask=part.mask.to(dtype)) for part in episode))


def without_last_rows(episode):
    """The same episode, where the last row of each support and query set does not count."""
    parts = [part._replace(mask=part.mask.clone()) for part in episode]
    for part in parts:
        part.mask[:, -1] = 0
    return Episode(*parts)


def outcome(config, task, episode):
    """The meta-loss, all metrics and the gradient of a freshly made meta layer."""
    torch.manual_seed(0)
    layer = build.build_meta_layer(config, task)
    losses, metrics = meta_gradient(layer, episode)
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    return [losses, *metrics.values(), *grads]


@pytest.mark.parametrize("task", slow_but(("digits",), FAST))
@pytest.mark.parametrize("algorithm", presets("algorithm"))
def test_the_dtype_of_a_mask_changes_no_result(algorithm, task, needs):
    config = small(f"algorithm={algorithm}", f"task={task}", *needs(task))
    made = build.build_task(config)
    if made.spec.kind not in get_class(config.algorithm._target_).kinds:
        pytest.skip(f"takes no {made.spec.kind}")
    made.spec = made.spec._replace(ragged=True)
    episode = without_last_rows(made.sample(2, "train", torch.Generator().manual_seed(0)))
    expected = outcome(config, made, episode)
    for dtype in MASKS:
        for found, wanted in zip(outcome(config, made, with_masks(episode, dtype)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("experiment", presets("experiment"))
def test_every_experiment_can_be_built(experiment, needs):
    config = small(f"experiment={experiment}", hydra=True)
    task = config.hydra.runtime.choices.task
    config = small(f"experiment={experiment}", *needs(task))
    config.init = None  # other runs' weights
    made = built(OmegaConf.to_yaml(config.task, resolve=True))
    layer = build.build_meta_layer(config, made)
    build.build_outer_loop(config, layer)
    build.build_evaluation(config).check(made)
    instantiate(config.trainer)


def test_the_presets_are_found():
    assert {"maml", "reptile", "maml_plus_plus", "imaml", "prototypes", "svm", "ridge"} <= set(presets("algorithm"))
    assert {"sinusoid", "omniglot", "glyphs", "digits", "image_folder"} <= set(presets("task"))


# Tasks that break one rule each.


def classes(seed):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
    return ClassIndexed.from_labels(x, torch.arange(40) % 4)


class Blobs(ArrayTasks):
    """A good classification, to spoil: 2-way 2-shot."""

    def __init__(self):
        splits = {split: classes(seed) for seed, split in enumerate(("train", "validation", "test"))}
        super().__init__(splits, n_way=2, k_shot=2, k_query=3)


class Spoilt(Blobs):
    """Blobs whose episodes are spoilt by `spoil(episode)`."""

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def sample(self, num_tasks, split, generator):
        return self.spoil(super().sample(num_tasks, split, generator))


class GlobalTorch(Blobs):
    def sample(self, num_tasks, split, generator):
        return super().sample(num_tasks, split, generator.manual_seed(int(torch.randint(1 << 30, ()))))


class GlobalNumpy(Blobs):
    def sample(self, num_tasks, split, generator):
        return super().sample(num_tasks, split, generator.manual_seed(np.random.randint(1 << 30)))


class Constant(Blobs):
    def sample(self, num_tasks, split, generator):
        return super().sample(num_tasks, split, torch.Generator().manual_seed(0))


class Counting(Blobs):
    calls = 0

    def sample(self, num_tasks, split, generator):
        self.calls += 1
        return super().sample(num_tasks, split, torch.Generator().manual_seed(self.calls))


class OneTooMany(Blobs):
    def sample(self, num_tasks, split, generator):
        return super().sample(num_tasks + 1, split, generator)


class SameClasses(Blobs):
    def load(self, split):
        return classes(0)


class FixedLabels(Blobs):
    """The sign of an example's first number is its label, in every task."""

    def sample(self, num_tasks, split, generator):
        return Episode(
            *(part._replace(y=(part.x[..., 0] > 0).long()) for part in super().sample(num_tasks, split, generator))
        )


class MeanLoss(Blobs):
    def loss(self, prediction, y):
        return super().loss(prediction, y).mean()


class LogOfNegative(Blobs):
    def loss(self, prediction, y):
        return prediction.log().sum(-1)


class MeanMetric(Blobs):
    def metrics(self, prediction, y):
        return {"accuracy": super().metrics(prediction, y)["accuracy"].mean(-1)}


class ScoresOfExamples(Blobs):
    def scores(self, prediction, y, mask):
        return {"loss": self.loss(prediction, y)}


class ScoresWithoutLoss(Blobs):
    def scores(self, prediction, y, mask):
        return {"accuracy": self.metrics(prediction, y)["accuracy"].mean(-1)}


class MetricCalledLoss(Blobs):
    def metrics(self, prediction, y):
        return {"loss": self.loss(prediction, y)}


def both(change):
    """Changes support and query alike."""
    return Spoilt(lambda episode: Episode(*(change(part) for part in episode)))


def with_holes(part):
    mask = part.mask.clone()
    mask[:, 1] = 0
    return part._replace(mask=mask)


BROKEN_TASKS = [
    (GlobalTorch, "draws from the global generator of torch"),
    (GlobalNumpy, "draws from the global generator of numpy"),
    (Constant, "two draws in a row are the same episode"),
    (Counting, "the same state of the generator gives another episode"),
    (OneTooMany, "8 tasks wanted, 9 drawn"),
    (SameClasses, "validation shares examples with train"),
    (FixedLabels, "classes keep their number from task to task"),
    (MeanLoss, r"loss is \(\), the mask \(8, 4\)"),
    (LogOfNegative, "loss is not finite"),
    (MeanMetric, r"accuracy is \(8,\), the mask \(8, 4\)"),
    (MetricCalledLoss, "no metric may be called loss"),
    (ScoresOfExamples, r"the score loss is \(8, 4\), not one per task"),
    (ScoresWithoutLoss, "the loss is not among the scores"),
    (lambda: both(lambda part: part._replace(x=part.x[..., :2])), r"x is \(8, 4, 2\), spec.x_shape is \(3,\)"),
    (lambda: both(lambda part: part._replace(x=part.x.byte())), "x is torch.uint8"),
    (lambda: both(lambda part: part._replace(x=part.x.log())), "x is not finite"),
    (lambda: both(lambda part: part._replace(y=part.y + 0.5)), "y is torch.float32, and must be torch.int64"),
    (lambda: both(lambda part: part._replace(y=part.y + 1)), r"class ids are not all in 0\.\.\.1"),
    (lambda: both(lambda part: part._replace(y=part.y.unsqueeze(-1))), r"y is \(8, 4, 1\), and must be \(8, 4\)"),
    (lambda: both(lambda part: part._replace(y=part.y[:, :1])), r"y is \(8, 1\) beside an x of \(8, 4, 3\)"),
    (lambda: both(lambda part: part._replace(mask=part.mask * 2)), "the mask holds something other than 0 and 1"),
    (lambda: both(lambda part: part._replace(mask=part.mask * 0)), "nothing counts in one of the tasks"),
    (lambda: both(lambda part: part._replace(mask=part.mask[:, :1])), r"the mask is \(8, 1\), and must be \(8, 4\)"),
    (lambda: both(with_holes), "spec.ragged is False, and the mask holds zeros"),
    (lambda: Spoilt(lambda episode: Episode(episode.support, episode.support)), "an input in both support and query"),
]


@pytest.mark.parametrize(("make", "line"), BROKEN_TASKS, ids=[line for _, line in BROKEN_TASKS])
def test_a_task_that_breaks_a_rule_is_told_which(make, line):
    with pytest.raises(AssertionError, match=line) as raised:
        check_task_distribution(make())
    assert "\n" not in str(raised.value)


def test_a_good_task_passes():
    check_task_distribution(Blobs())


@pytest.mark.parametrize("draws_itself", [False, True])
def test_a_task_may_import_a_library_that_draws_random_numbers_but_draws_none_itself(
    tmp_path, monkeypatch, draws_itself
):
    (tmp_path / "drawing_library.py").write_text("import random\nnumber = random.random()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "drawing_library", raising=False)

    class Importing(Blobs):
        def sample(self, num_tasks, split, generator):
            import drawing_library  # noqa: F401

            if draws_itself:
                random.random()
            return super().sample(num_tasks, split, generator)

    if draws_itself:
        with pytest.raises(AssertionError, match="train: draws from the global generator of random"):
            check_task_distribution(Importing())
    else:
        check_task_distribution(Importing())


def test_inputs_may_repeat_where_that_is_their_nature():
    class Grid(Sinusoid):
        """All waves are seen at the same few places."""

        def sample(self, num_tasks, split, generator):
            return Episode(*(part._replace(x=part.x.round()) for part in super().sample(num_tasks, split, generator)))

    with pytest.raises(AssertionError, match=r"support and query \(inputs_repeat=True if that is natural\)"):
        check_task_distribution(Grid())
    check_task_distribution(Grid(), inputs_repeat=True)


# Meta layers that break one rule each.


class Good(MAML):
    """MAML with little to it, to spoil."""

    def __init__(self, task, **settings):
        settings = {"update": partial(SGD, lr=0.05), "meta_gradient": Exact(), "inner_steps": 2, **settings}
        super().__init__(MLP(task.spec, hidden=[6]), task, **settings)


class SeesOtherTasks(Good):
    def predict(self, adapted, x, mask=None):
        prediction = super().predict(adapted, x, mask)
        return prediction + prediction.mean(0, keepdim=True)


class OtherInALoop(Good):
    def predict(self, adapted, x, mask=None):
        return super().predict(adapted, x, mask) * (2 if self.engine == "loop" else 1)


class FirstCountsMore(Good):
    def adapt(self, support):
        return super().adapt(Examples(*(leaf[:, [0, *range(leaf.shape[1])]] for leaf in support)))


class CountsPadding(Good):
    def adapt(self, support):
        return super().adapt(support._replace(mask=torch.ones_like(support.mask)))


class OnlyClaimsToBeExact(Good):
    exact = True

    def __init__(self, task):
        super().__init__(task, meta_gradient=FirstOrder())


class MovesItself(Good):
    def adapt(self, support):
        self.base_layer.head.bias.data += 0.1
        return super().adapt(support)


class LeavesGradients(Good):
    def adapt(self, support):
        adapted = super().adapt(support)
        with torch.enable_grad():
            self.base_layer.head.bias.square().sum().backward()
        return adapted


class SwitchesMode(Good):
    def adapt(self, support):
        return super().adapt(support) if self.training else super(Good, self.train()).adapt(support)


class OtherEveryTime(Good):
    made = 0

    def __init__(self, task):
        OtherEveryTime.made += 1
        super().__init__(task, update=partial(SGD, lr=0.01 * OtherEveryTime.made))


class OutsideOfItsState(Good):
    def __init__(self, task):
        super().__init__(task)
        self.scale = torch.rand(())

    def predict(self, adapted, x, mask=None):
        return super().predict(adapted, x, mask) * self.scale


class ForgetsAParameter(Good):
    def __init__(self, task):
        super().__init__(task)
        self.spare = nn.Parameter(torch.zeros(2))


class RootOfZero(Good):
    def __init__(self, task):
        super().__init__(task)
        self.root = nn.Parameter(torch.zeros(()))

    def predict(self, adapted, x, mask=None):
        return super().predict(adapted, x, mask) + self.root.square().sqrt()


BROKEN_META_LAYERS = {
    SeesOtherTasks: "a task alone gives another result than in company",
    OtherInALoop: "vectorised and loop give different results",
    FirstCountsMore: "the order of the support matters",
    CountsPadding: "padding matters",
    OnlyClaimsToBeExact: "exact is claimed, and the meta-gradient is off by",
    MovesItself: r"adapting changes base_layer\.head\.bias",
    LeavesGradients: r"adapting leaves a gradient in base_layer\.head\.bias",
    SwitchesMode: "adapting switches between training and evaluation mode",
    OtherEveryTime: "the same seed makes another step",
    OutsideOfItsState: "a state that is saved and loaded gives another result",
    ForgetsAParameter: "no gradient reaches spare",
    RootOfZero: "the meta-gradient of root is not finite",
}


@pytest.mark.parametrize("make", BROKEN_META_LAYERS)
def test_a_meta_layer_that_breaks_a_rule_is_told_which(make):
    with pytest.raises(AssertionError, match=BROKEN_META_LAYERS[make]) as raised:
        check_meta_layer(make, Blobs())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("task", [Blobs(), Sinusoid()], ids=["classification", "regression"])
def test_a_good_meta_layer_passes_and_nothing_global_is_changed(task):
    state = torch.get_rng_state()
    check_meta_layer(Good, task)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


class NativeBatchNorm(MAML):
    """Takes no mask, so that it is only for tasks of equal size."""

    def __init__(self, task):
        features = Stack(nn.Linear(3, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU())
        base_layer = BaseLayer(features, nn.Linear(6, task.spec.out_features))
        super().__init__(base_layer, task, update=partial(SGD, lr=0.05), meta_gradient=Exact(), inner_steps=2)


def test_a_layer_that_takes_no_mask_passes_but_for_padding():
    with pytest.raises(AssertionError, match="padding matters"):
        check_meta_layer(NativeBatchNorm, Blobs())
    check_meta_layer(NativeBatchNorm, Blobs(), padding=False)


def test_a_layer_that_only_the_loop_takes_passes():
    def make(task):
        base_layer = BaseLayer(Recurrent(), nn.Linear(4, task.spec.out_features))
        return MAML(base_layer, task, update=partial(SGD, lr=0.05), meta_gradient=Exact(), inner_steps=2)

    check_meta_layer(make, Blobs())
