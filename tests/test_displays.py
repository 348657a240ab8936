"""Displays of how an algorithm adapts: learned numbers, inner steps, confusion, influence of support examples."""

from functools import partial

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from torch.func import functional_call

from mlframework.base_layers import MLP, Conv4
from mlframework.episode import Episode, Examples
from mlframework.evaluation.displays.by_inner_step import by_step_figure
from mlframework.evaluation.displays.confusion import confusion, confusion_figure
from mlframework.evaluation.displays.contact_sheet import contact_sheet
from mlframework.evaluation.displays.fits import fits
from mlframework.evaluation.displays.inner_steps import InnerSteps, inner_steps, inner_steps_figure
from mlframework.evaluation.displays.learned import Learned, learned_numbers
from mlframework.evaluation.displays.predictions import predicted_against_true
from mlframework.evaluation.displays.support_influence import SupportInfluence, influence_figure, support_influence
from mlframework.evaluation.interval import Interval
from mlframework.evaluation.part import Validated
from mlframework.inner_loop import SGD, LayerStepRates, LearnedRates, MetaCurvature, Proximal
from mlframework.meta_layers import MAML, Exact, LinearKernel, PerStepNorm, Prototypes, RBFKernel, Ridge
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.tasks import ArrayTasks, ClassIndexed, Digits, Sinusoid


def maml(base_layer, task, **settings):
    settings = {"update": partial(SGD, lr=0.05), **settings}
    return MAML(base_layer, task, meta_gradient=Exact(), inner_steps=3, **settings)


def drawn(task, tasks):
    return task.sample(tasks, "validation", torch.Generator().manual_seed(0))


@pytest.fixture
def digits():
    task = Digits(n_way=2, k_shot=3, k_query=4)
    return maml(MLP(task.spec, hidden=[16], norm="none"), task), drawn(task, 2)


@pytest.fixture
def waves():
    task = Sinusoid(k_shot=7, k_query=9)
    return maml(MLP(task.spec, hidden=[16], norm="none"), task), drawn(task, 3)


class Written:
    """A log that keeps what displays write."""

    def __init__(self):
        self.tags = {}

    def figure(self, tag, figure, step):
        self.tags[tag] = figure

    def text(self, tag, text, step=None):
        self.tags[tag] = text

    def scalars(self, values, step):
        self.tags |= values

    def histograms(self, values, step):
        self.tags |= values


def shown(display, meta_layer, episode):
    written = Written()
    display.show(Validated(meta_layer, episode, {}, 1), written)
    return written.tags


LEARNED = {
    "none": ({}, []),
    "a rate for each entry": ({"update": partial(LearnedRates, lr=0.1)}, ["update/{}"]),
    "a rate for each step": ({"update": partial(LayerStepRates, lr=0.1, steps=2)}, ["update/{}"]),
    "a pull, too": ({"update": partial(Proximal, rule=partial(LearnedRates, lr=0.1), strength=1.0)}, ["update/{}"]),
}


@pytest.mark.parametrize("name", LEARNED)
def test_learned_rates_have_the_names_of_the_parameters_that_they_move(name):
    settings, tags = LEARNED[name]
    task = Sinusoid()
    layer = maml(MLP(task.spec, hidden=[4], norm="none"), task, **settings)
    numbers = learned_numbers(layer)
    assert list(numbers) == [tag.format(name) for tag in tags for name in layer.adapted_names]
    assert all((value == torch.tensor(0.1)).all() for value in numbers.values())


def test_learned_numbers_are_those_of_the_moment():
    task = Sinusoid()
    layer = maml(MLP(task.spec, hidden=[4], norm="none"), task, update=partial(LayerStepRates, lr=0.1, steps=2))
    with torch.no_grad():
        layer.update.rates[1, 0] = 7.0
    changed = shown(Learned(), layer, drawn(task, 1))[f"learned/update/{layer.adapted_names[1]}"]
    torch.testing.assert_close(changed, torch.tensor([7.0, 0.1]))


def test_matrices_norms_and_kernels_have_names():
    task = Digits(n_way=2, k_shot=3, k_query=4)
    net = MLP(task.spec, hidden=[4], norm="batch")
    layer = maml(net, task, update=partial(MetaCurvature, lr=0.1), norm=partial(PerStepNorm, steps=2), adapts="^head")
    assert {"update/head.weight/axis_0", "update/head.weight/axis_1", "update/head.bias/axis_0"} < set(
        learned_numbers(layer)
    )
    assert [value.shape for name, value in learned_numbers(layer).items() if name.startswith("norm/")] == [(2, 4)] * 2
    assert not learned_numbers(Prototypes(MLP(task.spec, hidden=[4], norm="none"), task))
    cosine = Prototypes(MLP(task.spec, hidden=[4], norm="none"), task, distance="cosine", scale=3.0)
    assert shown(Learned(), cosine, drawn(task, 1)) == {"learned/scale": 3.0}


def test_inner_steps_are_those_of_one_task_at_a_time(waves):
    meta_layer, episode = waves
    found = inner_steps(meta_layer, episode.support, 3)
    assert len(found) == 4
    for task in range(3):
        params = {name: p.detach().clone() for name, p in meta_layer.base_layer.named_parameters()}
        for step in found:
            own = {name: p.requires_grad_() for name, p in params.items()}
            predicted = functional_call(meta_layer.base_layer, own, (episode.support.x[task],))
            loss = (predicted - episode.support.y[task]).square().mean()
            grads = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
            torch.testing.assert_close(step.losses[task], loss.detach())
            for name, grad in grads.items():
                torch.testing.assert_close(step.grad_norms[name][task], grad.norm(), rtol=1e-4, atol=1e-6)
                if step.lengths:
                    torch.testing.assert_close(step.lengths[name][task], 0.05 * grad.norm(), rtol=1e-3, atol=1e-6)
            params = {name: (p - 0.05 * grads[name]).detach() for name, p in own.items()}
    assert not found[-1].lengths


def test_inner_steps_are_written_by_step_and_layer(waves):
    meta_layer, episode = waves
    tags = shown(InnerSteps(tasks=6), meta_layer, episode)
    names = meta_layer.adapted_names
    norms = {f"inner_loop/grad_norm/{name}/step_{step}" for name in names for step in range(4)}
    losses = {f"inner_loop/support_loss/step_{step}" for step in range(4)}
    assert norms | losses <= set(tags)
    assert all(len(tags[tag]) == 6 for tag in norms | losses)


def test_an_algorithm_without_an_inner_loop_writes_none():
    task = Digits(n_way=2, k_shot=3, k_query=4)
    assert not shown(InnerSteps(), Prototypes(MLP(task.spec, hidden=[4], norm="none"), task), drawn(task, 1))


def test_drawing_inner_steps_leaves_gradients_and_parameters_alone(waves):
    meta_layer, episode = waves
    before = {name: p.clone() for name, p in meta_layer.state_dict().items()}
    shown(InnerSteps(tasks=2), meta_layer, episode)
    torch.testing.assert_close(meta_layer.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in meta_layer.base_layer.parameters())


def test_the_diagonal_of_the_confusion_is_the_accuracy(digits):
    meta_layer, episode = digits
    first = episode.tasks(slice(1))
    with torch.no_grad():
        *_, adapted = meta_layer.trajectory(first.support, 3)
        accuracy = meta_layer.query_metrics(adapted, first)["query_accuracy"][0]
    after = confusion_figure(meta_layer, first).axes[1]
    cells = {tuple(map(int, text.get_position())): int(text.get_text()) for text in after.texts}
    assert sum(cells.values()) == 8
    assert sum(cells[i, i] for i in range(2)) / 8 == pytest.approx(float(accuracy))
    assert f"{cells[0, 0] + cells[1, 1]} of 8 right" in after.get_title()


def test_columns_of_the_confusion_are_the_true_classes():
    y, mask = torch.tensor([[0, 0, 1, 0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    query = Examples(torch.zeros(1, 4, 1), y, mask)
    logits = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])  # the last example does not count
    assert confusion(logits, Episode(query, query)).tolist() == [[0, 0], [2, 1]]


class Mean(MetaLayer):
    """Predicts the mean of the support set's targets."""

    def adapt(self, support):
        return (support.y * support.mask.unsqueeze(-1)).sum(1) / support.mask.sum(1, keepdim=True)

    def predict(self, adapted, x, mask=None):
        return adapted[:, None].expand(-1, x.shape[1], -1)


def test_the_influence_on_a_mean_is_the_distance_from_it_over_one_less():
    task = Sinusoid(k_shot=6, k_query=4)
    episode = drawn(task, 1)
    found = support_influence(Mean(MLP(task.spec, hidden=[4]), task), episode)
    y = episode.support.y[0, :, 0]
    torch.testing.assert_close(found, ((y - y.mean()).abs() / 5)[:, None].expand(6, 4))


@pytest.mark.parametrize("algorithm", ["maml", "prototypes", "ridge", "kernel"])
def test_the_influence_is_that_of_adapting_without_the_example(digits, algorithm):
    meta_layer, episode = digits
    task, net = meta_layer.task, MLP(meta_layer.task.spec, hidden=[8], norm="none")
    layers = {
        "maml": lambda: meta_layer,
        "prototypes": lambda: Prototypes(net, task),
        "ridge": lambda: Ridge(net, task, kernel=LinearKernel()),
        "kernel": lambda: Ridge(net, task, kernel=RBFKernel()),
    }
    layer = layers[algorithm]().eval()
    first = episode.tasks(slice(1))
    found = support_influence(layer, first, most=4)
    assert found.shape == (4, 8)

    def probabilities(rows):
        support = type(first.support)(*(leaf[:, rows] for leaf in first.support))
        with torch.no_grad():
            *_, adapted = layer.trajectory(support, layer.test_inner_steps)
            return layer.predict(adapted, first.query.x)[0].softmax(-1)

    for left_out in range(4):
        rows = [row for row in range(6) if row != left_out]
        wanted = (probabilities(rows) - probabilities(list(range(6)))).abs().sum(-1) / 2
        torch.testing.assert_close(found[left_out], wanted, rtol=1e-3, atol=1e-5)
    assert found.max() > 0


def test_examples_that_do_not_count_have_no_influence(digits):
    meta_layer, episode = digits
    first = episode.tasks(slice(1))
    mask = first.support.mask.clone()
    mask[0, 1] = 0
    masked = first._replace(support=first.support._replace(mask=mask))
    meta_layer.task.spec = meta_layer.task.spec._replace(ragged=True)
    rows = [row for row in range(6) if row != 1]
    fewer = first._replace(support=type(first.support)(*(leaf[:, rows] for leaf in first.support)))
    torch.testing.assert_close(support_influence(meta_layer, masked), support_influence(meta_layer, fewer))


def test_a_single_support_example_cannot_be_left_out():
    task = Sinusoid(k_shot=1, k_query=4)
    assert not shown(SupportInfluence(), Mean(MLP(task.spec, hidden=[4]), task), drawn(task, 1))


def figures():
    """A figure of every display that draws, of tasks that fill it."""
    waves, digits = Sinusoid(k_shot=7, k_query=9), Digits(n_way=2, k_shot=5, k_query=15)
    x, y = torch.rand(20 * 20, 1, 16, 16), torch.arange(20).repeat(20)
    images = ArrayTasks({"validation": ClassIndexed.from_labels(x, y)}, n_way=5, k_shot=2, k_query=5)
    on_waves = maml(MLP(waves.spec, hidden=[8, 8], norm="none"), waves)
    on_digits = maml(MLP(digits.spec, hidden=[8], norm="none"), digits)
    on_images = maml(Conv4(images.spec, filters=4, downsample="stride", norm="batch"), images)
    steps = [Interval(3.0, 0.5, 40), Interval(1.0, 0.25, 40)]
    one = drawn(images, 1)
    return {
        "fits": fits(on_waves, drawn(waves, 4)),
        "by_inner_step": by_step_figure(dict.fromkeys(("query_loss", "query_mae", "query_rmse", "query_ndcg"), steps)),
        "contact_sheet": contact_sheet(on_images, one),
        "predictions": predicted_against_true(on_digits, drawn(digits, 2)),
        "confusion": confusion_figure(on_images, one),
        "inner_steps": inner_steps_figure(inner_steps(on_images, one.support, 3)),
        "support_influence": influence_figure(support_influence(on_images, one, 25), one),
    }


#: TensorBoard's thumbnail of a figure in pixels, as its cards are in a window of 1600, and the least size of a letter.
THUMBNAIL, LEGIBLE = (475, 215), 7.5


def test_figures_are_legible_as_thumbnails():
    for name, figure in figures().items():
        FigureCanvasAgg(figure).draw()
        size = figure.get_size_inches() * figure.dpi
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
        smallest = min(text.get_fontsize() for text in texts) * figure.dpi / 72
        scale = min(1, *(most / own for most, own in zip(THUMBNAIL, size, strict=True)))
        assert smallest * scale >= LEGIBLE, (name, smallest * scale)
