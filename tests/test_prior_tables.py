"""Synthetic tables: generators against slow versions, the prior's tasks, the exact posterior against scikit-learn."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, Matern

from mlframework.episode import Examples
from mlframework.errors import InvalidValue, UserError
from mlframework.evaluation.baselines.exact_posterior import ExactPosterior, scores
from mlframework.tasks import (
    ClusterTables,
    GaussianProcessTables,
    LinearTables,
    NetworkTables,
    Sinusoid,
    TableGenerator,
    TablePrior,
    TableShape,
    TreeTables,
)
from mlframework.tasks.prior.columns import as_classes, padded, scaled, seen_classes, with_categories
from mlframework.tasks.prior.gaussian_process_tables import covariance
from mlframework.tasks.prior.tree_tables import leaves_reached
from mlframework.testing import check_task_distribution

GENERATORS = {
    "network": NetworkTables,
    "trees": TreeTables,
    "linear": LinearTables,
    "gaussian_process": GaussianProcessTables,
    "clusters": ClusterTables,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


SHAPE = TableShape(6, 200, 3, 2)


def drawn(name, shape=SHAPE, seed=0, **settings):
    return GENERATORS[name](**settings).draw(shape, seeded(seed))


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("shape", [TableShape(1, 4, 1, 1), TableShape(3, 20, 7, 5)])
def test_a_generator_draws_finite_tables_of_the_shape_that_is_asked_for(name, shape):
    for seed in range(20):
        x, y = drawn(name, shape, seed)
        assert x.shape == shape.inputs and y.shape == shape.outputs
        assert torch.isfinite(x).all() and torch.isfinite(y).all()


@pytest.mark.parametrize("name", GENERATORS)
def test_tables_of_one_draw_have_laws_of_their_own(name):
    _, y = drawn(name)
    assert len({float(column.std()) for column in y[..., 0]}) == len(y)


@pytest.mark.parametrize("name", ["linear", "trees", "gaussian_process", "clusters"])
def test_columns_tell_something_about_targets(name):
    """A random forest explains more of the targets than their mean does, on most tables."""
    from sklearn.ensemble import RandomForestRegressor

    x, y = (values.numpy() for values in drawn(name))
    scores = [
        RandomForestRegressor(20, random_state=0).fit(a[:150], b[:150, 0]).score(a[150:], b[150:, 0])
        for a, b in zip(x, y, strict=True)
    ]
    assert np.median(scores) > 0.2


def test_a_linear_law_is_found_by_least_squares():
    x, y = drawn("linear")
    weights = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(x @ weights, y)


def test_a_row_reaches_the_leaf_to_which_one_walks():
    generator = seeded()
    x, depth, trees = torch.randn(2, 30, 4, generator=generator), 3, 5
    column = torch.randint(4, (2, trees, 2**depth - 1), generator=generator)
    threshold = torch.randn(2, trees, 2**depth - 1, generator=generator)
    found = leaves_reached(x, column, threshold, depth)
    for table, tree, row in np.ndindex(2, trees, 30):
        node = 0
        while node < 2**depth - 1:
            above = x[table, row, column[table, tree, node]] > threshold[table, tree, node]
            node = 2 * node + (2 if above else 1)
        assert found[table, tree, row] == node - (2**depth - 1)


def test_clusters_without_trend_have_one_target_each():
    _, y = drawn("clusters", clusters=3, trend=0.0)
    assert all(len(column.unique()) <= 3 for column in y[..., 0])


# Gaussian processes.


KERNELS = {"rbf": RBF(0.7)} | {f"matern{2 * nu:.0f}2": Matern(0.7, nu=nu) for nu in (0.5, 1.5, 2.5)}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_covariance_is_that_of_scikit_learn(kernel):
    a, b = torch.randn(2, 6, 3, generator=seeded(), dtype=torch.float64).split([4, 2], dim=1)
    found = covariance(kernel, a / 0.7, b / 0.7)
    for table in range(2):
        np.testing.assert_allclose(found[table], KERNELS[kernel](a[table].numpy(), b[table].numpy()), rtol=1e-10)


def gaussian_process_prior(kernel="rbf", **settings):
    only = GaussianProcessTables(kernel=kernel, length=0.7, noise=0.1, inputs="uniform")
    plain = {"noise": 0, "categorical": 0, "prepared": False, "columns": [1, 3], "k_shot": [2, 9], "k_query": 5}
    return TablePrior(kind="regression", generator={"gaussian_process": only}, **(plain | settings))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_posterior_is_that_of_scikit_learn(kernel):
    prior = gaussian_process_prior(kernel)
    support, query = prior.sample(4, "train", seeded())
    mean, variance = prior.posterior(support, query.x)
    for table in range(4):
        kept = support.mask[table] > 0
        process = GaussianProcessRegressor(KERNELS[kernel], alpha=0.1**2 + 1e-9, optimizer=None)
        process.fit(support.x[table][kept].double().numpy(), support.y[table][kept].double().numpy())
        wanted, deviation = process.predict(query.x[table].double().numpy(), return_std=True)
        np.testing.assert_allclose(mean[table].flatten(), wanted.flatten(), atol=1e-8)
        np.testing.assert_allclose(variance[table], deviation.flatten() ** 2 + 0.1**2 + 1e-9, atol=1e-8)


def test_targets_are_as_far_from_the_posterior_mean_as_its_variance_says():
    """Standardised by the exact posterior, targets of the prior are standard normal."""
    prior = gaussian_process_prior(k_query=1)
    support, query = prior.sample(2000, "train", seeded())
    mean, variance = prior.posterior(support, query.x)
    z = (query.y - mean)[:, 0, 0] / variance[:, 0].sqrt()
    assert kstest(z.numpy(), norm.cdf).pvalue > 0.01


def test_the_baselines_likelihood_is_that_of_scipy():
    prior = gaussian_process_prior()
    episode = prior.sample(3, "train", seeded())
    mean, variance = prior.posterior(episode.support, episode.query.x)
    wanted = -norm.logpdf(episode.query.y[..., 0], mean[..., 0], variance.sqrt()).mean(1)
    np.testing.assert_allclose(scores(prior, episode)["query_nll"], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (lambda: Sinusoid(), "has no posterior"),
        (lambda: gaussian_process_prior(noise=0.1), "that nothing changes: task.kind=regression"),
        (lambda: TablePrior(kind="regression", generator={"linear": LinearTables()}), "of one generator alone"),
        (
            lambda: TablePrior(
                kind="regression", generator={"g": GaussianProcessTables()}, noise=0, categorical=0, prepared=False
            ),
            "length and noise must be one number",
        ),
    ],
)
def test_where_no_posterior_is_known_the_baseline_says_why(task, line):
    with pytest.raises(UserError, match=line):
        ExactPosterior().check(task())


# The prior.


def prior(kind="classification", **settings):
    return TablePrior(kind=kind, generator={name: kind() for name, kind in GENERATORS.items()}, **settings)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_prior_keeps_the_contract(kind):
    check_task_distribution(prior(kind, columns=[2, 6], categorical=0.0))
    check_task_distribution(prior(kind, categorical=0.5), inputs_repeat=True)


def test_the_splits_are_other_draws_from_one_seed():
    hashes = {split: prior().sample(3, split, seeded()).hash() for split in ("train", "validation", "test")}
    assert len(set(hashes.values())) == 3


def test_sizes_are_drawn_between_their_bounds():
    episode = prior(k_shot=[3, 12], columns=[2, 4], classes=[2, 3], categorical=0).sample(400, "train", seeded())
    support = episode.support
    assert set(support.mask.sum(1).tolist()) == set(range(3, 13))
    used = (support.x != 0).any(1).sum(1)
    assert set(used.tolist()) == {2, 3, 4}
    assert support.x.shape[2] == 4
    assert {2, 3} == {len(y.unique()) for y in episode.joined().y}


def test_columns_and_targets_are_standardised_by_the_support_rows_that_count():
    support, _ = prior("regression", k_shot=[20, 40], columns=5, categorical=0).sample(8, "train", seeded())
    for x, y, mask in zip(*support, strict=True):
        kept = mask > 0
        np.testing.assert_allclose(x[kept].mean(0), 0, atol=0.3)  # bounded at 5 deviations
        np.testing.assert_allclose(x[kept].std(0, correction=0), 1, atol=0.3)
        np.testing.assert_allclose(y[kept].std(0, correction=0), 1, atol=0.3)


def test_scaling_is_that_of_the_seen_rows():
    x = torch.randn(2, 6, 3, generator=seeded(), dtype=torch.float64)
    x[:, :, 2] = 7.0
    seen = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
    found = scaled(x, seen)
    for table in range(2):
        rows = x[table][seen[table]]
        wanted = (x[table] - rows.mean(0)) / rows.std(0, correction=0)
        np.testing.assert_allclose(found[table, :, :2], wanted[:, :2].clamp(-5, 5))
    assert (found[:, :, 2] == 0).all()


def test_padding_keeps_the_sum_of_squares_of_an_average_row():
    x = torch.ones(2, 4)
    assert padded(x, 16, rescale=True).square().sum(1).tolist() == [16.0, 16.0]
    assert padded(x, 16, rescale=False).sum(1).tolist() == [4.0, 4.0]


def test_categories_have_as_many_levels_as_were_asked_for_and_follow_the_column():
    x = torch.randn(50, 400, 4, generator=seeded(), dtype=torch.float64)
    found = with_categories(x, 1.0, (3, 5), seeded())
    counts = {len(column.unique()) for table in found for column in table.T}
    assert counts <= {1, 2, 3, 4, 5} and 5 in counts
    for table, column in np.ndindex(50, 4):  # a level is an interval of the column
        order = found[table, x[table, :, column].argsort(), column]
        assert int((order.diff() != 0).sum()) == len(order.unique()) - 1
    torch.testing.assert_close(with_categories(x, 0.0, (3, 5), seeded()), x)


def test_classes_have_between_the_fewest_and_the_most_and_every_number_is_as_likely():
    y = torch.randn(600, 100, 5, generator=seeded(), dtype=torch.float64)
    labels = as_classes(y, (2, 5), seeded())
    counts = torch.tensor([len(table.unique()) for table in labels])
    assert set(counts.tolist()) == {2, 3, 4, 5}
    y[..., 0] += 100  # always the largest
    assert min(len(table.unique()) for table in as_classes(y, (2, 5), seeded())) == 2
    two = labels[counts == 2].double().mean(1)  # the second class is as often the rarer one as the first
    assert abs(float(two.mean()) - 0.5) < 0.05
    assert float(two.std()) > 0.05


def test_queries_count_only_if_their_class_was_seen():
    labels = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 1, 2, 0], [0, 0, 0, 1, 1]])
    seen = torch.tensor([[True, True, False, False, False]] * 3)
    counts = [[1, 1, 0, 1, 0], [1, 1, 1, 0, 1], [1, 1, 1, 0, 0]]
    assert seen_classes(labels, seen).int().tolist() == counts
    alone = seen_classes(torch.tensor([[0, 1, 2]]), torch.tensor([[True, False, False]]))
    assert alone.all()  # nothing else would count


def test_generators_are_drawn_by_their_weights():
    class Constant(TableGenerator):
        def __init__(self, value):
            self.value = value

        def draw(self, shape, generator):
            return torch.full(shape.inputs, self.value), torch.zeros(shape.outputs)

    both = {"one": Constant(1.0), "two": Constant(2.0)}
    plain = {"kind": "regression", "noise": 0, "categorical": 0, "prepared": False, "columns": 1}
    of_both = TablePrior(generator=both, weights={"two": 3.0}, **plain)
    drawn = torch.cat([of_both.sample(1, "train", seeded(seed)).support.x[:, 0, 0] for seed in range(400)])
    assert abs(float((drawn == 2).double().mean()) - 0.75) < 0.06
    only = TablePrior(generator=both, weights={"one": 0.0}, **plain)
    assert (only.sample(16, "train", seeded()).support.x == 2).all()


class WrongShape(TableGenerator):
    def draw(self, shape, generator):
        return torch.zeros(shape.inputs), torch.zeros(shape.inputs)


class NotFinite(TableGenerator):
    def draw(self, shape, generator):
        return torch.zeros(shape.inputs).log(), torch.zeros(shape.outputs)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"kind": "sequence"}, "kind=sequence: must be classification or regression"),
        ({"generator": {}}, "generator={}: must hold a generator"),
        ({"generator": {"mine": 3}}, "generator.mine=3: must be a TableGenerator"),
        ({"weights": {"forest": 1.0}}, "weights.forest=1.0: there is no such generator, but network, trees"),
        ({"weights": {"trees": -1.0}}, "weights.trees=-1.0: must be at least 0"),
        ({"weights": dict.fromkeys(GENERATORS, 0.0)}, "must leave a generator with a weight above 0"),
        ({"columns": [3, 2]}, r"columns=\[3, 2\]: must be a number of at least 1, or \[low, high\]"),
        ({"columns": 1.5}, "columns=1.5: must be a number of at least 1"),
        ({"k_shot": 0}, "k_shot=0: must be a number of at least 1"),
        ({"classes": [1, 3]}, "classes"),
        ({"categorical": 1.5}, "categorical=1.5: must be a share of columns"),
        ({"k_query": 0}, "k_query=0"),
        ({"noise": -1.0}, "noise=-1.0"),
    ],
)
def test_a_wrong_setting_is_one_line(settings, line):
    given = {"kind": "classification", "generator": {name: kind() for name, kind in GENERATORS.items()}} | settings
    with pytest.raises(InvalidValue, match=line) as raised:
        TablePrior(**given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("generator", "line"),
    [
        (WrongShape(), r"task.generator.mine: draws y of shape .*, not \(2, 96, 5\)"),
        (NotFinite(), "task.generator.mine: draws x that is not finite"),
    ],
)
def test_a_generator_that_draws_something_else_is_named(generator, line):
    with pytest.raises(UserError, match=line):
        TablePrior(kind="classification", generator={"mine": generator}, columns=3).sample(2, "train", seeded())


def test_masked_support_rows_are_no_part_of_the_posterior():
    own = gaussian_process_prior()
    support, query = own.sample(2, "train", seeded())
    garbage = Examples(
        torch.cat([support.x, support.x + 1], 1),
        torch.cat([support.y, support.y - 9], 1),
        torch.cat([support.mask, torch.zeros_like(support.mask)], 1),
    )
    for found, wanted in zip(own.posterior(garbage, query.x), own.posterior(support, query.x), strict=True):
        torch.testing.assert_close(found, wanted)
