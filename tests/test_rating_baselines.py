"""Baselines for ratings, against hand-computed cases, slow obvious versions, and an independent library."""

import math

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

from mlframework.base_layers import AttributeEmbedding
from mlframework.evaluation import (
    Evaluation,
    MatrixFactorisation,
    OnAllUsers,
    OnEachUser,
    Popularity,
    RatingMeans,
    TaskSet,
)
from mlframework.evaluation.baselines.matrix_factorisation import fold_in
from mlframework.evaluation.baselines.rating_baseline import UserRatings, drawn, offset, scores
from mlframework.evaluation.baselines.rating_means import attribute_offsets, predicted
from mlframework.meta_layers import LinearKernel, SharedHeadRidge
from mlframework.tasks import LatentFactors, Ratings, RatingSource, RatingTasks, Sinusoid

TASK = RatingTasks(source=LatentFactors(users=150, items=60, seed=1))


class Listed(RatingSource):
    def __init__(self, triples, items):
        self.triples, self.items = triples, items

    def read(self):
        return Ratings(self.triples, {}, self.items)


def by_hand():
    """Six users rate three films alike, but for the one to test, whose ratings are by hand."""
    items = {"a": {"genre": ("fun",)}, "b": {"genre": ("fun", "noir")}, "c": {"genre": ("noir",)}}
    ratings = [4.0, 2.0, 3.0]
    triples = [(f"u{u}", item, r) for u in range(8) for item, r in zip("abc", ratings, strict=True)]
    return RatingTasks(source=Listed(triples, items), ratings=(2, None), k_query=1, shares=(6, 1, 1))


def test_means_level_by_level():
    task = by_hand()
    pool = task.pools("test")[0]
    rows = {task.table.items.names[task.table.item[row]]: row for row in pool.support}
    user = UserRatings(np.array([rows["a"], rows["c"]]), np.array([rows["b"]]))
    deviation = task.statistics.deviation  # of 4, 2, 3: sqrt(2/3)
    assert (task.statistics.mean, deviation) == (3.0, pytest.approx(math.sqrt(2 / 3)))
    a, b, c = 1 / deviation, -1 / deviation, 0.0  # standardised
    assert predicted(task, user) == [0.0]
    item = 6 * b / (6 + 2)  # six training users, shrinkage 2
    assert predicted(task, user, 2) == pytest.approx([item])
    residuals = [a - 6 * a / 8, c]
    shift = sum(residuals) / (2 + 1)
    assert predicted(task, user, 2, 1) == pytest.approx([item + shift])
    fun, noir = ((r - shift) / (1 + 4) for r in residuals)  # one rating each, shrinkage 4
    assert predicted(task, user, 2, 1, 4) == pytest.approx([item + shift + (fun + noir) / 2])


def test_an_offset_is_a_shrunken_mean():
    assert offset(np.array([1.0, 3.0]), 2) == 1.0
    assert offset(np.array([]), 0) == 0.0


def test_a_predictor_that_knows_the_answer_has_no_error():
    users = drawn(TaskSet(TASK, "test", tasks=8, seed=0))
    found = scores(TASK, users, lambda user: TASK.y[user.query])
    for name in ("query_loss", "query_mae", "query_rmse", "query_mae_rounded"):
        torch.testing.assert_close(found[name], torch.zeros(1, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["query_ndcg"], torch.ones(1, 8))


def test_baselines_see_the_tasks_that_the_algorithm_sees():
    tasks = TaskSet(TASK, "test", tasks=5, seed=3, chunk=2)
    queries = torch.cat([episode.query.y for episode in tasks])
    for user, y in zip(drawn(tasks), queries, strict=True):
        np.testing.assert_allclose(TASK.y[user.query], y[: len(user.query), 0], rtol=1e-6)


def test_folding_in_is_scikit_learns_ridge():
    rng = np.random.default_rng(0)
    factors, residuals = rng.normal(size=(12, 4)), rng.normal(size=12)
    expected = Ridge(alpha=3.0, fit_intercept=False).fit(factors, residuals).coef_
    np.testing.assert_allclose(fold_in(factors, residuals, 3.0), expected, rtol=1e-9)


def test_factorisation_lowers_its_own_objective():
    """Each round of alternating least squares is at a lower penalised squared error than the one before."""
    found = []
    for rounds in (1, 2, 8):
        method = MatrixFactorisation(factors=[3], penalties=[2.0], rounds=rounds, seed=0)
        items = method.factorised(TASK, 3, 2.0)
        rows = np.flatnonzero(TASK.statistics.counted)
        own = TASK.statistics.item_mean(TASK.table.item[rows], TASK.shrinkage, without=TASK.y[rows])
        residuals, total = TASK.y[rows] - own, 2.0 * (items[:, 1:] ** 2).sum()
        for user in np.unique(TASK.table.user[rows]):
            mine = TASK.table.user[rows] == user
            known = items[TASK.table.item[rows[mine]]]
            p = fold_in(known, residuals[mine], 2.0)
            total += ((residuals[mine] - known @ p) ** 2).sum() + 2.0 * (p**2).sum()
        found.append(total)
    assert found[0] > found[1] > found[2]


def baselines():
    grid = {"alpha": [3, 10], "gamma": [0.1], "max_leaf_nodes": [7]}
    boosting = HistGradientBoostingRegressor(max_iter=20, random_state=0)
    return {
        "means": RatingMeans(item=[2, 5], user=[2, 5], attributes=[5]),
        "popularity": Popularity(),
        "each": OnEachUser(grid=grid, ridge=Ridge(fit_intercept=False), kernel_ridge=KernelRidge(kernel="rbf")),
        "all": OnAllUsers(grid=grid, draws=2, shrinkage=5, seed=0, ridge=Ridge(), boosting=boosting),
        "factors": MatrixFactorisation(factors=[2], penalties=[5], rounds=3, seed=0),
    }


def test_an_evaluation_has_a_row_for_each_method():
    """Every level of means is better than the one before, and every method but popularity beats the global mean."""
    layer = SharedHeadRidge(AttributeEmbedding(TASK.spec, width=4, hidden=[8]), TASK, kernel=LinearKernel(1.0))
    evaluation = Evaluation(tasks=60, seed=0, validation_tasks=40, baseline=baselines())
    report = evaluation.run("ridge", layer, lambda: layer.base_layer, torch.device("cpu"), monitor="query_mae")
    means = {row.method: row.interval("query_mae").mean for row in report.rows}
    settings = {row.method: row.setting for row in report.rows}
    levels = ["global mean", "item mean", "item and user means", "item and user means, attribute offsets"]
    assert sorted((means[name] for name in levels), reverse=True) == [means[name] for name in levels]
    others = set(means) - {"ridge", "popularity", "global mean"}
    assert len(others) == 8
    assert all(means[name] < means["global mean"] for name in others)
    assert settings["matrix factorisation, user folded in"] == "factors=2, penalty=5"
    assert report.rows[1].difference is not None


def test_no_baseline_reads_the_ratings_that_it_predicts():
    """Other ratings of the queries: the same predictions."""
    task = RatingTasks(source=LatentFactors(users=150, items=60, seed=1))
    users = drawn(TaskSet(task, "test", tasks=6, seed=0))
    predictors = [
        setting.predict
        for baseline in baselines().values()
        for _, settings in baseline.methods(task)
        for setting in list(settings)[:1]
    ]
    for predict in predictors:
        for user in users:
            before = np.asarray(predict(user))
            kept, task.y[user.query] = task.y[user.query].copy(), 9.0
            after = np.asarray(predict(user))
            task.y[user.query] = kept
            np.testing.assert_array_equal(before, after)


def test_attribute_offsets_of_a_category_nobody_rated_are_zero():
    task = by_hand()
    pool = task.pools("test")[0]
    rows = {task.table.items.names[task.table.item[row]]: row for row in pool.support}
    user = UserRatings(np.array([rows["a"]]), np.array([rows["c"]]))
    assert attribute_offsets(task, user, np.array([2.0]), 1.0) == [0.0]


def test_another_task_is_refused_in_one_line():
    with pytest.raises(Exception, match=r"is for ratings \(task=ratings\), and Sinusoid has none"):
        Popularity().check(Sinusoid())


def test_the_shared_head_predicts_without_a_support_set_and_ridge_corrects_it():
    """Equal to scikit-learn's ridge regression of the head's errors, and to the head where nothing is known."""
    layer = SharedHeadRidge(AttributeEmbedding(TASK.spec, width=4, hidden=[8]), TASK, kernel=LinearKernel(), reg=2.0)
    layer = layer.double()
    support, query = (
        type(part)(*(leaf.double() for leaf in part))
        for part in TASK.sample(2, "test", torch.Generator().manual_seed(0))
    )
    found = layer.predict(layer.adapt(support), query.x)
    for row in range(2):
        known = support.mask[row] > 0
        features = [layer.features_of(part.x)[row].detach() for part in (support, query)]
        heads = [layer.head(f).detach() for f in features]
        ridge = Ridge(alpha=2.0, fit_intercept=False).fit(
            features[0][known].numpy(), (support.y[row] - heads[0])[known].numpy()
        )
        expected = heads[1].numpy().ravel() + ridge.predict(features[1].numpy()).ravel()
        np.testing.assert_allclose(found[row].detach().numpy().ravel(), expected, rtol=1e-8)
    nothing = support._replace(mask=torch.zeros_like(support.mask))
    head = layer.head(layer.features_of(query.x))
    torch.testing.assert_close(layer.predict(layer.adapt(nothing), query.x), head)
