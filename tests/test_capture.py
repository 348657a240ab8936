"""The outer step as one compiled graph gives what the eager step gives; what cannot be one says so and goes on."""

import logging
import os
from functools import partial
from types import SimpleNamespace

import pytest
import sympy
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from mlframework.backend import capture as capture_module
from mlframework.backend.algorithm import eager_gradients
from mlframework.backend.capture import Capture
from mlframework.backend.inductor import keep_compiled_files
from mlframework.backend.private import remember_indices
from mlframework.backend.verify import Undecided, verify_against_eager
from mlframework.base_layers import MLP, BaseLayer, Conv4, Stack
from mlframework.errors import InvalidValue
from mlframework.inner_loop import SGD, LayerStepRates
from mlframework.keys import sign
from mlframework.meta_layers import MAML, AnnealedOrder, Exact, FirstOrder, Prototypes
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid
from mlframework.training.meta_gradient import meta_gradient


def maml(gradient):
    task = Sinusoid(k_shot=3, k_query=3)
    return MAML(MLP(task.spec, hidden=[8]), task, update=partial(SGD, lr=0.1), meta_gradient=gradient, inner_steps=1)


def episode_of(layer, seed=0):
    return layer.task.sample(4, "train", torch.Generator().manual_seed(seed))


def test_captured_and_eager_agree_as_the_parameters_move():
    layer = maml(Exact())
    capture = Capture(layer, "true")
    for seed in range(5):
        episode = episode_of(layer, seed)
        losses, _ = meta_gradient(layer, episode, chunk=2, gradients_of=capture)
        found = {name: p.grad for name, p in layer.named_parameters()}
        expected, _ = meta_gradient(layer, episode)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(found, {name: p.grad for name, p in layer.named_parameters()})
        with torch.no_grad():
            for p in layer.parameters():
                p -= 0.1 * p.grad
    assert [*capture.decided.values()] == [True]


class Weighted(Sinusoid):
    """A task whose score looks up a table of its own, as bits per character do."""

    table = torch.tensor([1.0, 2.0, 4.0])

    def scores(self, prediction, y, mask):
        scores = super().scores(prediction, y, mask)
        return {**scores, "weighted": scores["loss"] * self.table.to(y)[mask.long().sum(1) - 1]}


def blocks_of_conv4(spec, count):
    """As many blocks as are asked of, for each takes the compiler seconds."""
    whole = Conv4(spec, filters=4)
    return BaseLayer(Stack(*whole.features[:count], whole.features[-1]), whole.head)


def few_images():
    images = ClassIndexed.from_labels(torch.rand(12, 1, 8, 8), torch.arange(12) // 4)
    task = ArrayTasks({"train": images}, n_way=2, k_shot=2, k_query=2)
    return Prototypes(blocks_of_conv4(task.spec, 2), task, batch_norm="support")


def weighted_by_a_table():
    task = Weighted(k_shot=3, k_query=3)
    return MAML(MLP(task.spec, hidden=[8]), task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=1)


@pytest.mark.parametrize("make", [pytest.param(few_images, marks=pytest.mark.slow), weighted_by_a_table])
def test_masked_batch_norm_and_a_tasks_own_tensors_are_compiled(make, caplog, float64):
    layer = make()
    episode = episode_of(layer)
    layer.to(episode.support.x.dtype)
    with caplog.at_level(logging.WARNING):
        found = Capture(layer, "true")(episode)
    assert not caplog.records
    expected = eager_gradients(layer, episode)
    torch.testing.assert_close(found.by_name, expected.by_name)
    torch.testing.assert_close(found.metrics, expected.metrics)


class Moving(MAML):
    """Scales its predictions by a tensor that is no buffer."""

    def predict(self, adapted, x, mask=None):
        return super().predict(adapted, x, mask) * self.scale_now


def test_a_tensor_that_a_step_does_not_read_hinders_nothing(caplog):
    layer = weighted_by_a_table()
    layer.base_layer.last = [p.detach().clone() for p in layer.parameters()]
    with caplog.at_level(logging.WARNING):
        Capture(layer, "true")(episode_of(layer))
    assert not caplog.records


class MovingElsewhere(Moving):
    """The tensor belongs to an object of its own."""

    scale_now = property(lambda self: self.holder.scale)


@pytest.mark.parametrize("kind", [Moving, MovingElsewhere])
def test_state_that_is_no_buffer_is_refused_in_one_line(kind, caplog):
    task = Sinusoid(k_shot=3, k_query=3)
    layer = kind(MLP(task.spec, hidden=[8]), task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=1)
    layer.holder = SimpleNamespace(scale=torch.ones(1))
    if kind is Moving:
        layer.scale_now = torch.ones(1)
    with caplog.at_level(logging.WARNING):
        Capture(layer, "true")(episode_of(layer))
    (record,) = caplog.records
    assert f"{kind.__name__} reads a tensor (1,) that is neither parameter nor buffer" in record.getMessage()


def test_inductor_remembers_every_index_that_it_has_simplified():
    from torch._inductor import sizevars

    remember_indices()
    first = sizevars.simplify_index_in_vec_range
    remember_indices()
    assert sizevars.simplify_index_in_vec_range is first
    x = sympy.Symbol("x0", integer=True, nonnegative=True)
    misses = []
    for _ in range(2):
        assert [first(x + offset, x, 16) for offset in range(300)] == [x + offset for offset in range(300)]
        misses.append(first.cache_info().misses)
    assert misses[0] == misses[1] >= 300


def test_what_changes_with_the_outer_step_is_refused_in_one_line_and_goes_on(caplog):
    layer = maml(AnnealedOrder(5))
    capture, episode = Capture(layer, "true"), episode_of(layer)
    with caplog.at_level(logging.WARNING):
        found = [capture(episode) for _ in range(2)]
    assert [record.getMessage() for record in caplog.records] == [
        "capture: eager steps instead: MAML changes with the number of the outer step"
    ]
    for gradients in found:
        torch.testing.assert_close(gradients.by_name, eager_gradients(layer, episode).by_name)


class Weighed(MAML):
    """Predicts by the number of the outer step, which torch reads without asking it."""

    def predict(self, adapted, x, mask=None):
        return super().predict(adapted, x, mask) * self.outer_step


@pytest.mark.parametrize("way", ["whole", "regions"])
def test_what_changes_with_an_outer_step_that_nobody_asks_is_refused(way, monkeypatch, caplog):
    if way == "regions":
        monkeypatch.setattr(capture_module, "MOST_OPERATIONS", 0)
    task = Sinusoid(k_shot=3, k_query=3)
    layer = Weighed(MLP(task.spec, hidden=[8]), task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=1)
    layer.outer_step = 1
    capture, episode = Capture(layer, "true"), episode_of(layer)
    with caplog.at_level(logging.WARNING):
        for layer.outer_step in (1, 100):
            torch.testing.assert_close(capture(episode).losses, eager_gradients(layer, episode).losses)
    assert "changes with the number of the outer step" in caplog.text


def test_auto_stays_eager_where_the_run_is_too_short_to_gain():
    layer = maml(Exact())
    capture, episode = Capture(layer, "auto"), episode_of(layer)
    capture.steps_left = 10
    for _ in range(10):
        capture(episode)
    assert not capture.steps


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_auto_goes_on_as_an_earlier_process_decided(compiled):
    layer = maml(Exact())
    capture, episode = Capture(layer, "auto"), episode_of(layer)
    capture.steps_left = 10**9
    capture.decided = {str((False, *capture_module.layout_of(episode))): compiled}
    capture(episode)
    assert [*capture.decided.values()] == [compiled]
    assert capture.decided == {str((False, *capture_module.layout_of(episode))): compiled}


def test_another_word_names_the_right_ones():
    with pytest.raises(InvalidValue, match="must be one of auto, true, false"):
        Capture(maml(Exact()), "yes")


def test_what_is_compiled_is_kept_in_the_cache_folder_unless_the_user_names_another(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path))
    ours = str(tmp_path / f"inductor-{sign('inductor').hex()[:16]}")
    for named, kept in [(None, ours), (default_cache_dir(), ours), ("/elsewhere", "/elsewhere")]:
        if named is None:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        else:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", named)
        keep_compiled_files()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [
        Prototypes,
        partial(MAML, update=partial(SGD, lr=0.1), inner_steps=1, meta_gradient=FirstOrder()),
        partial(MAML, update=partial(SGD, lr=0.1), inner_steps=1, meta_gradient=Exact()),
    ],
)
def test_gradients_lie_in_memory_as_their_parameters_do_as_fused_optimizers_take_for_granted(algorithm):
    torch.manual_seed(0)
    data = ClassIndexed.from_labels(torch.rand(20, 1, 4, 4), torch.arange(2).repeat(10))
    task = ArrayTasks({"train": data}, n_way=2, k_shot=2, k_query=2)
    layer = algorithm(blocks_of_conv4(task.spec, 3), task)  # the last one has images of a single pixel
    episode = task.sample(2, "train", torch.Generator().manual_seed(0))
    for gradients in (eager_gradients(layer, episode), Capture(layer, "true")(episode)):
        strides = {name: strides_of(grad) for name, grad in gradients.by_name.items()}
        assert strides == {name: strides_of(p) for name, p in layer.named_parameters() if name in strides} != {}


def strides_of(x):
    """Of the axes along which there is anything to go."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.fixture
def only_regions(monkeypatch):
    """No step is short enough to become one graph."""
    monkeypatch.setattr(capture_module, "MOST_OPERATIONS", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("update", "steps"),
    [(partial(SGD, lr=0.1), 3), (partial(LayerStepRates, lr=0.1, steps=2), 2)],  # the steps of the latter differ
)
def test_regions_give_the_eager_meta_gradient_whether_or_not_a_step_knows_its_number(
    only_regions, update, steps, caplog
):
    task = Sinusoid(k_shot=3, k_query=3)
    layer = MAML(MLP(task.spec, hidden=[6]), task, update=update, meta_gradient=Exact(), inner_steps=steps)
    capture = Capture(layer, "true")
    with caplog.at_level(logging.WARNING):
        for seed in range(2):
            episode = episode_of(layer, seed)
            found, expected = capture(episode), eager_gradients(layer, episode)
            torch.testing.assert_close(found.by_name, expected.by_name)
            torch.testing.assert_close(found.losses, expected.losses)
    assert not caplog.records


@pytest.mark.slow
def test_steps_that_are_constants_are_compiled_beside_those_that_are_not(only_regions, caplog):
    layer = maml(AnnealedOrder(1))
    capture, episode = Capture(layer, "true"), episode_of(layer)
    with caplog.at_level(logging.WARNING):
        for layer.outer_step in (0, 1, 0):
            expected = eager_gradients(layer, episode).by_name
            torch.testing.assert_close(capture(episode).by_name, expected)
    assert not caplog.records


@pytest.mark.slow
def test_checkpointed_steps_can_be_regions(only_regions, caplog):
    task = Sinusoid(k_shot=3, k_query=3)
    layer = MAML(
        MLP(task.spec, hidden=[6]),
        task,
        update=partial(SGD, lr=0.1),
        meta_gradient=Exact(),
        inner_steps=2,
        checkpoint_steps=True,
    )
    with caplog.at_level(logging.WARNING):
        found = Capture(layer, "true")(episode_of(layer))
    assert not caplog.records
    torch.testing.assert_close(found.by_name, eager_gradients(layer, episode_of(layer)).by_name)


@pytest.fixture
def nothing_kept(monkeypatch, tmp_path):
    """What other tests have compiled is not found."""
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path))


def test_a_graph_that_differs_is_refused(nothing_kept, monkeypatch, caplog):
    layer = maml(Exact())
    monkeypatch.setattr(capture_module, "compile_step", twice_as_long)
    with caplog.at_level(logging.WARNING):
        found = Capture(layer, "true")(episode_of(layer))
    assert "off the eager one" in caplog.text
    torch.testing.assert_close(found.by_name, eager_gradients(layer, episode_of(layer)).by_name)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_where_float32_cannot_tell_the_step_compiled_in_float64_does(nothing_kept, monkeypatch, caplog, wrong):
    def undecided_in_float32(layer, way, eagerly, episode):
        if next(layer.parameters()).dtype == torch.float32:
            raise Undecided("rounding moves it too far")
        verify_against_eager(layer, way, eagerly, episode)

    layer = maml(Exact())
    monkeypatch.setattr(capture_module, "verify_against_eager", undecided_in_float32)
    if wrong:
        monkeypatch.setattr(capture_module, "compile_step", twice_as_long)
    capture = Capture(layer, "true")
    with caplog.at_level(logging.WARNING):
        found = capture(episode_of(layer))
    assert ("off the eager ones" in caplog.text) == wrong
    assert [*capture.decided.values()] == [not wrong]
    torch.testing.assert_close(found.by_name, eager_gradients(layer, episode_of(layer)).by_name)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.slow
def test_what_agreed_in_float64_is_judged_there_again_only_if_it_differs_more(nothing_kept, monkeypatch):
    judged, off = [], [1.0]

    def undecided_in_float32(layer, way, eagerly, episode):
        if next(layer.parameters()).dtype == torch.float32:
            raise Undecided("rounding moves it too far")
        judged.append(off[0])

    monkeypatch.setattr(capture_module, "verify_against_eager", undecided_in_float32)
    monkeypatch.setattr(capture_module, "differences", lambda found, eager: torch.tensor([3e-4, 3e-3]) * off[0])
    for off[0] in (1.0, 2.0, 9.0, 0.5):  # each as in a new process
        layer = maml(Exact())
        assert Capture(layer, "true")(episode_of(layer)).by_name
    assert judged == [1.0, 9.0]


def twice_as_long(layer, episode, step):
    """In place of a compiled step one whose gradients are wrong."""
    found = eager_gradients(layer, episode)
    return lambda *tensors: found._replace(by_name={name: 2 * grad for name, grad in found.by_name.items()})
