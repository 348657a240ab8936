"""Figures: what they show is what the model predicted."""

import pytest
import torch
from matplotlib.colors import to_hex

from mlframework.base_layers import MLP, Conv4
from mlframework.episode import Episode, Examples, TaskSpec
from mlframework.errors import UserError
from mlframework.evaluation.displays.by_inner_step import by_step_figure
from mlframework.evaluation.displays.contact_sheet import ContactSheet, contact_sheet
from mlframework.evaluation.displays.drawing import GREEN, RED
from mlframework.evaluation.displays.fits import POINTS, Fits, fits
from mlframework.evaluation.interval import Interval
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.tasks import ArrayTasks, ClassIndexed, DampedOscillator, Digits, Sinusoid, TaskDistribution


def maml(base_layer, task, *, lr=0.05, steps=3):
    return MAML(base_layer, task, update=lambda params: SGD(params, lr=lr), meta_gradient=Exact(), inner_steps=steps)


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def waves():
    task = Sinusoid(k_shot=7, k_query=9)
    return maml(MLP(task.spec, hidden=[16], norm="none"), task), task.sample(3, "validation", seeded())


@pytest.fixture
def digits():
    task = Digits(n_way=2, k_shot=2, k_query=4)
    return maml(MLP(task.spec, hidden=[16], norm="none"), task), task.sample(2, "validation", seeded())


def adapted_after(meta_layer, episode, steps):
    with torch.no_grad():
        *_, adapted = meta_layer.trajectory(episode.support, steps)
    return adapted


def curves_of(axes):
    return {line.get_label(): torch.as_tensor(line.get_xydata()).float() for line in axes.lines}


def test_curves_are_the_predictions_after_no_one_and_all_steps(waves):
    meta_layer, episode = waves
    figure = fits(meta_layer, episode)
    assert len(figure.axes) == 3
    labels = {0: "before adaptation", 1: "after 1 inner step", 3: "after 3 inner steps"}
    for step, label in labels.items():
        adapted = adapted_after(meta_layer, episode, step)
        for i, axes in enumerate(figure.axes):
            x, y = curves_of(axes)[label].unbind(-1)
            assert len(x) == POINTS
            with torch.no_grad():
                wanted = meta_layer.predict(adapted, x.expand(3, -1)[..., None])[i, :, 0]
            torch.testing.assert_close(y, wanted)


def test_further_outputs_have_their_points_and_their_curve_after_all_steps():
    task = DampedOscillator(5, 6, outputs=3)
    meta_layer, episode = maml(MLP(task.spec, hidden=[8]), task), task.sample(2, "validation", seeded())
    adapted = adapted_after(meta_layer, episode, meta_layer.test_inner_steps)
    for i, axes in enumerate(fits(meta_layer, episode).axes):
        drawn = torch.cat([torch.as_tensor(points.get_offsets().data) for points in axes.collections]).float()
        wanted = episode.tasks(slice(i, i + 1)).joined()
        pairs = torch.cat([torch.cat([wanted.x[0], wanted.y[0, :, [output]]], 1) for output in range(3)])
        assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, pairs.tolist()))
        *_, second, third = (y for label, y in lines_of(axes) if label.startswith("_"))
        x = second[:, 0]
        with torch.no_grad():
            predicted = meta_layer.predict(adapted, x.expand(2, -1)[..., None])[i]
        torch.testing.assert_close(second[:, 1], predicted[:, 1])
        torch.testing.assert_close(third[:, 1], predicted[:, 2])


def lines_of(axes):
    return [(line.get_label(), torch.as_tensor(line.get_xydata()).float()) for line in axes.lines]


def test_every_support_and_query_point_is_drawn_and_within_the_curves(waves):
    meta_layer, episode = waves
    for i, axes in enumerate(fits(meta_layer, episode).axes):
        for points, examples in zip(axes.collections, episode, strict=True):
            wanted = torch.cat([examples.x[i], examples.y[i]], dim=-1)
            torch.testing.assert_close(torch.as_tensor(points.get_offsets().data).float(), wanted)
            x = curves_of(axes)["before adaptation"][:, 0]
            assert x.min() <= wanted[:, 0].min()
            assert x.max() >= wanted[:, 0].max()


def test_points_that_do_not_count_are_not_drawn(waves):
    meta_layer, episode = waves
    support = episode.support._replace(mask=episode.support.mask.clone())
    support.mask[1, 2:] = 0
    figure = fits(meta_layer, Episode(support, episode.query))
    assert [len(axes.collections[0].get_offsets()) for axes in figure.axes] == [7, 2, 7]


def test_titles_state_the_query_loss_before_and_after(waves):
    meta_layer, episode = waves
    with torch.no_grad():
        before, after = (
            meta_layer.query_metrics(adapted_after(meta_layer, episode, n), episode)["query_loss"] for n in (0, 3)
        )
    titles = [axes.get_title() for axes in fits(meta_layer, episode).axes]
    assert titles == [f"query loss\n{b:.3g} → {a:.3g}" for b, a in zip(before, after, strict=True)]


def frames(axes):
    return [to_hex(patch.get_edgecolor()) for patch in axes.patches]


def test_a_query_is_framed_green_where_the_prediction_is_right_and_says_what_was_predicted(digits):
    meta_layer, episode = digits
    episode = episode.tasks(slice(1))
    support, query = contact_sheet(meta_layer, episode).axes
    adapted = adapted_after(meta_layer, episode, 3)
    with torch.no_grad():
        probabilities = meta_layer.predict(adapted, episode.query.x)[0].softmax(-1)
    row_by_row = torch.argsort(episode.query.y[0], stable=True)
    right = (probabilities.argmax(-1) == episode.query.y[0])[row_by_row].tolist()
    assert 0 < sum(right) < len(right), "the test needs right and wrong predictions"
    assert frames(query) == [GREEN if each else RED for each in right]
    wanted = [f"{p.argmax()}  {p.max():.0%}" for p in probabilities[row_by_row]]
    assert [text.get_text() for text in query.texts] == wanted
    assert [text.get_text() for text in support.texts] == ["0", "1"]


def test_a_contact_sheet_holds_each_image_once_in_the_row_of_its_class(digits):
    meta_layer, episode = digits
    sheet = contact_sheet(meta_layer, episode.tasks(slice(1)))
    for axes, examples in zip(sheet.axes, episode, strict=True):
        assert len(axes.images) == examples.x.shape[1]
        # Digits fill the scale from 0 to 1, so brightness is drawn as it is.
        drawn = sorted((int(image.get_extent()[3]), image.get_array().tolist()) for image in axes.images)
        wanted = sorted((int(y), x[0].tolist()) for x, y in zip(examples.x[0], examples.y[0], strict=True))
        assert [row for row, _ in drawn] == [row for row, _ in wanted]
        torch.testing.assert_close(torch.tensor([x for _, x in drawn]), torch.tensor([x for _, x in wanted]))


def test_the_title_states_the_accuracy_over_queries_that_count(digits):
    meta_layer, episode = digits
    meta_layer.task.spec = meta_layer.task.spec._replace(ragged=True)
    episode = episode.tasks(slice(1))
    query = episode.query._replace(mask=episode.query.mask.clone())
    query.mask[:, 5:] = 0
    episode = Episode(episode.support, query)
    figure = contact_sheet(meta_layer, episode)
    with torch.no_grad():
        metrics = [
            meta_layer.query_metrics(adapted_after(meta_layer, episode, n), episode)["query_accuracy"][0]
            for n in (3, 0)
        ]
    after, before = (f"{value:.2f}" for value in metrics)
    assert figure.get_suptitle() == f"2-way 2-shot: query accuracy {after}\nafter 3 inner steps, {before} before"
    assert len(figure.axes[1].images) == 5


def test_a_large_task_is_cut_to_what_fits_on_a_sheet():
    x, y = torch.rand(15 * 20, 1, 4, 4), torch.arange(15).repeat(20)
    task = ArrayTasks({"validation": ClassIndexed.from_labels(x, y)}, n_way=15, k_shot=6, k_query=10)
    meta_layer = maml(MLP(task.spec, hidden=[8], norm="none"), task)
    figure = contact_sheet(meta_layer, task.sample(1, "validation", seeded()))
    assert [len(axes.images) for axes in figure.axes] == [10 * 3, 10 * 5]


def test_colour_images_of_a_net_that_mixes_examples_are_drawn_in_colour():
    x, y = torch.randn(6 * 10, 3, 16, 16), torch.arange(6).repeat(10)
    task = ArrayTasks({"validation": ClassIndexed.from_labels(x, y)}, n_way=3, k_shot=1, k_query=2)
    meta_layer = maml(Conv4(task.spec, filters=4, downsample="stride", norm="batch"), task)
    ContactSheet().check(task)
    figure = contact_sheet(meta_layer, task.sample(1, "validation", seeded()))
    assert all(image.get_array().shape == (16, 16, 3) for axes in figure.axes for image in axes.images)


class Constant(MetaLayer):
    """An algorithm without inner steps: it predicts the mean of the support set."""

    def adapt(self, support):
        return support.y.mean(1)

    def predict(self, adapted, x, mask=None):
        return adapted[:, None].expand(-1, x.shape[1], -1)


def test_an_algorithm_without_inner_steps_has_one_curve(waves):
    meta_layer, episode = waves
    figure = fits(Constant(meta_layer.base_layer, meta_layer.task), episode)
    assert [line.get_label() for line in figure.axes[0].lines] == ["prediction"]
    assert "→" not in figure.axes[0].get_title()


class Plain(TaskDistribution):
    """Random examples of any spec."""

    def __init__(self, spec):
        self.spec = spec

    def sample(self, num_tasks, split, generator):
        def examples():
            y = torch.zeros(num_tasks, 2, self.spec.out_features)
            return Examples(torch.randn(num_tasks, 2, *self.spec.x_shape), y, torch.ones(num_tasks, 2))

        return Episode(examples(), examples())


@pytest.mark.parametrize(
    "spec",
    [
        TaskSpec("regression", (2,), 1),
        TaskSpec("classification", (5,), 3),
        TaskSpec("classification", (2, 4, 4), 3),
        TaskSpec("sequence", (7,), 3),
    ],
)
def test_tasks_of_other_kinds_are_refused_before_anything_is_drawn(spec):
    for display in Fits(), ContactSheet():
        with pytest.raises(UserError, match=r"draws .*, and Plain is "):
            display.check(Plain(spec))


def test_the_band_by_inner_step_is_the_interval():
    intervals = {
        "query_loss": [Interval(3.0, 0.5, 40), Interval(1.0, 0.25, 40)],
        "query_accuracy": [Interval(0.2, 0.01, 40), Interval(0.8, 0.02, 40)],
    }
    figure = by_step_figure(intervals)
    assert [axes.get_ylabel() for axes in figure.axes] == ["query loss", "query accuracy"]
    for axes, steps in zip(figure.axes, intervals.values(), strict=True):
        assert axes.lines[0].get_xydata().tolist() == [[i, each.mean] for i, each in enumerate(steps)]
        corners = {tuple(corner) for corner in axes.collections[0].get_paths()[0].vertices.tolist()}
        assert corners == {(i, each.mean + s * each.half_width) for i, each in enumerate(steps) for s in (-1, 1)}


def test_drawing_leaves_the_model_and_the_random_numbers_alone(waves):
    meta_layer, episode = waves
    before = {name: value.clone() for name, value in meta_layer.state_dict().items()}
    random = torch.get_rng_state()
    fits(meta_layer, episode)
    torch.testing.assert_close(meta_layer.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
