"""Learning in context beyond sequences: the transformer over examples against a slow version, and densities."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

from mlframework.base_layers import MLP, Conv4, LinearModel
from mlframework.episode import Episode, Examples, TaskSpec
from mlframework.errors import InvalidValue, UserError
from mlframework.meta_layers import BarDensity, GaussianDensity, InContext
from mlframework.tasks import ArrayTasks, ClassIndexed, LinearTables, Sinusoid, TablePrior
from mlframework.testing import check_meta_layer, directional_errors

SIZES = {"width": 8, "depth": 2, "heads": 2}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tables(kind="classification"):
    settings = {"columns": [2, 4], "k_shot": [3, 7], "k_query": 5, "classes": [2, 3]}
    return TablePrior(kind=kind, generator={"linear": LinearTables()}, **settings)


def made(task, density=None, **sizes):
    torch.manual_seed(0)
    return InContext(LinearModel(task.spec), task, density=density, **(SIZES | sizes))


def spread_out(layer):
    """The same layer with larger weights, so that attention is far from uniform."""
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(p.numel())) / p.shape[-1] ** 0.5)
    return layer


def normed(x, norm):
    return norm.weight * (x - x.mean()) / math.sqrt(float(x.var(correction=0)) + norm.eps) + norm.bias


def attended(block, row, memory):
    """A token after a block: attention to the members of `memory`, head by head, then the perceptron."""
    seen, size = normed(row, block.attention_norm), len(row) // block.heads
    parts = []
    for head in range(block.heads):
        part = slice(head * size, (head + 1) * size)
        query = (block.query.weight @ seen)[part]
        keys = [(block.key.weight @ normed(other, block.attention_norm))[part] for other in memory]
        values = [(block.value.weight @ normed(other, block.attention_norm))[part] for other in memory]
        weights = torch.tensor([math.exp(float(query @ key) / math.sqrt(size)) for key in keys])
        parts.append(sum(w * value for w, value in zip(weights / weights.sum(), values, strict=True)))
    row = row + block.output.weight @ torch.cat(parts)
    return row + block.contract(nn.functional.gelu(block.expand(normed(row, block.mlp_norm))))


def slow_answer(rows, support, targets, query):
    """The answer to one query, token by token, from the support rows that count."""
    memory = [rows.input(x) + rows.target(y) for x, y in zip(support, targets, strict=True)]
    token = rows.input(query)
    for block in rows.blocks:
        token, memory = attended(block, token, memory), [attended(block, other, memory) for other in memory]
    return rows.head(normed(token, rows.norm))


def test_answers_are_those_of_a_transformer_that_is_written_out_token_by_token():
    task = tables()
    layer = spread_out(made(task)).double()
    support, query = task.sample(3, "train", seeded())
    support, query = (part._replace(x=part.x.double()) for part in (support, query))
    with torch.no_grad():
        found = layer.predict(layer.adapt(support), query.x)
        for number in range(3):
            kept = support.mask[number] > 0
            targets = nn.functional.one_hot(support.y[number][kept], task.spec.out_features).double()
            for row in range(2):
                wanted = slow_answer(layer.rows.double(), support.x[number][kept], targets, query.x[number, row])
                torch.testing.assert_close(found[number, row], wanted, atol=1e-5, rtol=1e-5)


def test_no_query_sees_another():
    task = tables()
    layer, (support, query) = spread_out(made(task)), task.sample(4, "train", seeded())
    adapted = layer.adapt(support)
    together = layer.predict(adapted, query.x)
    for row in range(query.x.shape[1]):
        torch.testing.assert_close(layer.predict(adapted, query.x[:, [row]]), together[:, [row]])


@pytest.mark.parametrize("times", [2, 40])
def test_a_support_set_of_any_size_is_read_and_a_repeated_one_changes_nothing(times):
    """Attention is a mean over the support set: a set that is repeated has the same means, whatever its size."""
    task = tables("regression")
    layer, (support, query) = spread_out(made(task)).double(), task.sample(4, "train", seeded())
    support, x = Examples(support.x.double(), support.y.double(), support.mask), query.x.double()
    many = Examples(*(torch.cat([leaf] * times, dim=1) for leaf in support))
    torch.testing.assert_close(layer.predict(layer.adapt(many), x), layer.predict(layer.adapt(support), x))


def classes():
    x = torch.randn(40, 3, generator=seeded())
    return ArrayTasks({"train": ClassIndexed.from_labels(x, torch.arange(40) % 4)}, n_way=2, k_shot=2, k_query=3)


TASKS = {"waves": lambda: Sinusoid(5, 5), "classes": classes, "tables": tables, "numbers": lambda: tables("regression")}


@pytest.mark.parametrize("task", TASKS)
def test_it_keeps_the_contract(task):
    check_meta_layer(lambda task: InContext(MLP(task.spec, hidden=[6]), task, **SIZES), TASKS[task]())


@pytest.mark.parametrize("density", [lambda: BarDensity(count=7), lambda: GaussianDensity()], ids=["bars", "gaussian"])
@pytest.mark.parametrize("task", ["waves", "numbers"])
def test_with_a_density_it_keeps_the_contract(task, density):
    def make(task):
        return InContext(MLP(task.spec, hidden=[6]), task, density=density(), **SIZES)

    check_meta_layer(make, TASKS[task]())


@pytest.mark.parametrize("density", [lambda: BarDensity(count=7), lambda: GaussianDensity()], ids=["bars", "gaussian"])
def test_the_meta_gradient_with_a_density_is_that_of_the_likelihood(density):
    torch.set_default_dtype(torch.float64)
    try:
        task = Sinusoid(5, 5)
        layer, episode = made(task, density()), task.sample(3, "train", seeded())
        episode = Episode(*(Examples(*(leaf.double() for leaf in part)) for part in episode))
        errors = directional_errors(
            layer, episode, losses_of=lambda layer, e: layer.query_metrics(layer.adapt(e.support), e)["query_nll"]
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(errors.detach().median()) < 1e-6


def test_images_with_batch_norm_are_predicted_one_by_one_by_the_statistics_of_the_support_set():
    spec = TaskSpec("classification", (1, 8, 8), 3, ragged=False)
    task = type("Images", (Sinusoid,), {})(2, 2)
    task.spec = spec
    layer = InContext(Conv4(spec, filters=4), task, **SIZES)
    x, y = torch.randn(2, 6, 1, 8, 8, generator=seeded()), torch.arange(6).remainder(3).expand(2, -1)
    support = Examples(x, y, torch.ones(2, 6))
    queries = torch.randn(2, 4, 1, 8, 8, generator=seeded(1))

    def predicted(queries):
        query = Examples(queries, y[:, : queries.shape[1]], torch.ones(2, queries.shape[1]))
        return layer.predict_query(layer.adapt(support), Episode(support, query), layer.batch_norm)

    torch.testing.assert_close(predicted(queries[:, :1]), predicted(queries)[:, :1])


# Densities.


def density_at(density, outputs):
    return lambda y: math.exp(-density.nll(outputs, torch.tensor([y], dtype=torch.float64)).item())


DENSITIES = {"bars": lambda: BarDensity(count=9, spread=2.0), "gaussian": lambda: GaussianDensity(least=0.1)}


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_integrates_to_one_and_has_the_moments_that_it_says(name):
    density = DENSITIES[name]().double()
    outputs = torch.randn(density.outputs(1), generator=seeded(), dtype=torch.float64)
    edges = [-40.0, *(density.borders.tolist() if name == "bars" else [-1.0, 1.0]), 40.0]
    at, whole, mean, square = density_at(density, outputs), 0.0, 0.0, 0.0
    for low, high in pairwise(edges):
        low, high = low + 1e-12, high - 1e-12  # inside a bar
        whole += quad(at, low, high, epsabs=1e-10)[0]
        mean += quad(lambda y: y * at(y), low, high, epsabs=1e-10)[0]
        square += quad(lambda y: y * y * at(y), low, high, epsabs=1e-10)[0]
    assert whole == pytest.approx(1, abs=1e-6)
    assert mean == pytest.approx(density.mean(outputs).item(), abs=1e-5)
    assert square - mean**2 == pytest.approx(density.variance(outputs).item(), abs=1e-4)


def test_bars_of_equal_probability_are_about_a_gaussian_with_their_spread():
    density = BarDensity(count=200, spread=2.0)
    y = torch.linspace(-3, 3, 41).unsqueeze(-1)
    found = -density.nll(torch.zeros(41, 200), y)
    np.testing.assert_allclose(found, norm.logpdf(y[:, 0], scale=2.0), atol=0.03)


def test_the_likelihood_of_several_values_is_the_mean_of_scipys():
    outputs, y = torch.tensor([0.5, -1.0, 0.3, 2.0]), torch.tensor([0.2, 0.4])
    deviations = 1e-3 + np.log1p(np.exp([0.3, 2.0]))
    wanted = -norm.logpdf([0.2, 0.4], [0.5, -1.0], deviations).mean()
    assert GaussianDensity().nll(outputs, y).item() == pytest.approx(wanted, rel=1e-6)


def test_a_likelihood_is_reported_beside_the_squared_error_of_the_mean():
    task = tables("regression")
    layer, episode = made(task, BarDensity(count=9)), task.sample(3, "train", seeded())
    loss, metrics = layer.meta_loss(episode)
    assert loss is metrics["query_nll"]
    prediction = layer.predict(layer.adapt(episode.support), episode.query.x)
    wanted = (prediction - episode.query.y).square()[..., 0].mean(1)
    torch.testing.assert_close(metrics["query_loss"], wanted)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: made(tables(), BarDensity()), "density=BarDensity: is for a regression, and TablePrior is a classif"),
        (lambda: made(tables(), heads=3), "heads=3: must divide width=8"),
        (lambda: made(tables(), depth=0), "depth=0: must be at least 1"),
        (lambda: BarDensity(count=2), "count=2: must be at least 3"),
        (lambda: GaussianDensity(least=0.0), "least"),
    ],
)
def test_a_wrong_setting_is_one_line(make, line):
    with pytest.raises(InvalidValue, match=line):
        make()


def test_a_plain_module_has_no_features():
    task = Sinusoid()
    with pytest.raises(UserError, match="InContext works on features"):
        InContext(nn.Linear(1, 1), task)
