"""Ratings: sources, encoding, partitions without leakage, the scores by hand."""

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score

from mlframework.base_layers import AttributeEmbedding
from mlframework.episode import TaskSpec
from mlframework.errors import InvalidValue, UserError
from mlframework.tasks import LatentFactors, MovieLens, Ratings, RatingSource, RatingTable, RatingTasks, RecBole
from mlframework.tasks.ratings.encoded import encode, encoded
from mlframework.tasks.ratings.leakage import check_leakage
from mlframework.tasks.ratings.ndcg import ndcg
from mlframework.tasks.ratings.partition import Partition
from mlframework.testing import check_task_distribution

SMALL = LatentFactors(users=80, items=60, seed=1)
PARTITIONS = [
    {},
    {"per": "item", "ratings": (13, None)},
    *(
        {"users": users, "items": items, "held_out_items": 0.2, "held_out_ratings": 0.2}
        for users in ("new", "existing")
        for items in ("any", "existing", "new")
    ),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Listed(RatingSource):
    """Ratings at hand."""

    def __init__(self, *triples, users=None, items=None):
        self.found = Ratings(list(triples), users or {}, items or {})

    def read(self):
        return self.found


# nDCG.


def test_ndcg_by_hand():
    # Ratings 1, 3, 2 have gains 1, 7, 3; the scores put them in the order 3, 1, 2.
    gains, scores, mask = torch.tensor([[1.0, 7.0, 3.0]]), torch.tensor([[0.5, 0.9, 0.1]]), torch.ones(1, 3)
    found = 7 + 1 / math.log2(3)
    best = 7 + 3 / math.log2(3)
    torch.testing.assert_close(ndcg(scores, gains, mask, 2), torch.tensor([found / best]))
    whole = (found + 3 / 2) / (best + 1 / 2)
    torch.testing.assert_close(ndcg(scores, gains, mask, 5), torch.tensor([whole]))


def test_tied_scores_share_their_places():
    gains, mask = torch.tensor([[1.0, 7.0, 3.0]]), torch.ones(1, 3)
    places = 1 + 1 / math.log2(3)
    best = 7 + 3 / math.log2(3)
    tied = ndcg(torch.zeros(1, 3), gains, mask, 2)
    torch.testing.assert_close(tied, torch.tensor([(11 / 3) * places / best]))


def test_ndcg_of_one_query_is_one_and_padding_has_no_place():
    gains, scores = torch.tensor([[7.0, 31.0]]), torch.tensor([[0.1, 9.0]])
    torch.testing.assert_close(ndcg(scores, gains, torch.tensor([[1.0, 0.0]]), 5), torch.ones(1))
    torch.testing.assert_close(ndcg(scores, torch.zeros(1, 2), torch.ones(1, 2), 5), torch.ones(1))


def test_ndcg_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    gains, scores = 2.0 ** rng.integers(1, 6, (20, 10)) - 1, rng.integers(0, 6, (20, 10)).astype(float)
    for k in (1, 5, 10):
        expected = [ndcg_score(g[None], s[None], k=k) for g, s in zip(gains, scores, strict=True)]
        found = ndcg(torch.tensor(scores), torch.tensor(gains), torch.ones(20, 10), k)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


# Scores of the task.


def test_the_scores_of_a_task_by_hand():
    task = RatingTasks(source=SMALL)
    statistics = task.statistics
    ratings, predicted = torch.tensor([[5.0, 3.0, 1.0]]), torch.tensor([[4.4, 3.4, 2.9]])
    y, prediction = (((v - statistics.mean) / statistics.deviation)[..., None] for v in (ratings, predicted))
    found = task.scores(prediction.float(), y.float(), torch.tensor([[1.0, 1.0, 0.0]]))
    expected = {"mae": 0.5, "mae_rounded": 0.5, "rmse": math.sqrt((0.36 + 0.16) / 2), "ndcg": 1.0}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, abs=1e-5), name
    assert found["loss"].item() == pytest.approx((0.36 + 0.16) / 2 / statistics.deviation**2, rel=1e-5)


@pytest.mark.parametrize(("loss", "value"), [("squared", 4.0), ("absolute", 2.0), ("huber", 1.5)])
def test_the_losses_of_an_error_of_two(loss, value):
    task = RatingTasks(source=SMALL, loss=loss)
    assert task.loss(torch.full((1, 1, 1), 2.0), torch.zeros(1, 1, 1)).item() == pytest.approx(value)


# Contract and leakage.


@pytest.mark.parametrize("settings", PARTITIONS, ids=str)
def test_every_partition_keeps_the_contract_without_leakage(settings):
    check_task_distribution(RatingTasks(source=SMALL, **settings), inputs_repeat=True)
    check_leakage(partial(make, RatingTasks, settings), SMALL)


def make(kind, settings, source):
    return kind(source=source, **settings)


class SharesUsers(RatingTasks):
    """Trains on the ratings of all users."""

    @property
    def partition(self):
        partition = super().partition
        partition.__dict__["trained"] = np.ones(len(self.table.rating), dtype=bool)
        return partition


class AsksWhatItKnows(RatingTasks):
    """Puts the queries into the support set, too."""

    def draw_task(self, pool, generator):
        support, query = super().draw_task(pool, generator)
        return torch.cat([support[:-1], query[:1]]), query


class MeansOfAll(RatingTasks):
    """Takes the item means over all ratings."""

    @property
    def statistics(self):
        item, y = self.table.item, self.table.rating - 3
        return super().statistics._replace(item_sum=np.bincount(item, y), item_count=np.bincount(item))


class StandardisedByAll(RatingTasks):
    """Standardises the targets by the ratings of all users."""

    @property
    def statistics(self):
        return super().statistics._replace(mean=float(self.table.rating.mean()))


class MeanOfUser(RatingTasks):
    """Lets the input hold the mean of all the user's ratings, the queries' included."""

    def x(self, rows):
        x, user = super().x(rows), self.table.user
        mean = np.bincount(user, self.table.rating) / np.bincount(user)
        x[:, 0] = mean[user[rows]]
        return x


CHEATS = [
    (SharesUsers, {}, "validation shares a user with train: u"),
    (AsksWhatItKnows, {}, "a rating is in both support and query"),
    (MeansOfAll, {}, "the inputs of train support sets follow from ratings that are asked for"),
    (StandardisedByAll, {}, "the inputs of train support sets follow from ratings that are asked for"),
    (MeanOfUser, {}, "the inputs of validation support sets follow from"),
    (SharesUsers, {"users": "existing", "held_out_ratings": 0.2}, "no user of the validation split|asks for a rating"),
    (MeansOfAll, {"users": "existing", "held_out_ratings": 0.2}, "the inputs of train support sets follow from"),
]


@pytest.mark.parametrize(("kind", "settings", "line"), CHEATS)
def test_a_split_that_cheats_is_told_how(kind, settings, line):
    with pytest.raises((AssertionError, UserError), match=line):
        check_leakage(partial(make, kind, settings), SMALL)


def test_the_protocol_of_metarec():
    """Users with 13 to 100 ratings, split 8:1:1; ten queries each, the rest support."""
    source = LatentFactors(users=200, items=300)
    task, counts = RatingTasks(source=source), Counter(user for user, _, _ in source.read().triples)
    used = [user for user, count in counts.items() if 13 <= count <= 100]
    assert sorted(task.table.users.names) == sorted(used)
    sizes = [len(task.pools(split)) for split in ("train", "validation", "test")]
    assert sizes == [160, 20, 20]
    episode = task.sample(50, "test", seeded())
    assert (episode.query.mask.sum(1) == 10).all()
    names = task.drawn_from(50, "test", seeded())
    assert episode.support.mask.sum(1).tolist() == [counts[name] - 10 for (name,) in names]


def test_existing_users_adapt_to_what_they_were_trained_on():
    task = RatingTasks(source=SMALL, users="existing", held_out_ratings=0.3)
    trained = task.statistics.counted
    drawn = task.draw(30, "test", seeded())
    assert trained[drawn.support[drawn.support >= 0]].all()
    assert not trained[drawn.query[drawn.query >= 0]].any()
    users = [{name for (name,) in task.drawn_from(200, split, seeded())} for split in ("validation", "test")]
    assert not users[0] & users[1]


def test_item_means_leave_out_their_own_rating():
    """A training input is the item's shrunken mean over all other training ratings."""
    task = RatingTasks(source=SMALL, shrinkage=3.0)
    statistics, table = task.statistics, task.table
    row = int(np.flatnonzero(statistics.counted)[7])
    others = statistics.counted & (table.item == table.item[row])
    others[row] = False
    expected = task.y[others].sum() / (others.sum() + 3)
    assert task.x(np.array([row]))[0, 0] == pytest.approx(expected)
    test_row = task.pools("test")[0].query[0]
    same = statistics.counted & (table.item == table.item[test_row])
    assert task.x(np.array([test_row]))[0, 0] == pytest.approx(task.y[same].sum() / (same.sum() + 3))


def test_attributes_are_chosen_by_name():
    task = RatingTasks(source=SMALL, attributes=["genres"])
    assert ([name for name, _ in task.table.items.blocks], task.table.users.blocks) == (["genres"], ())
    with pytest.raises(
        InvalidValue, match=r"nothing has an attribute genre \(did you mean genres\?\); there are age_gr"
    ):
        RatingTasks(source=SMALL, attributes=["genre"]).sample(1, "train", seeded())


def test_another_split_seed_splits_users_otherwise():
    one, other = (RatingTasks(source=SMALL, split_seed=seed).partition.split_of_user for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert Counter(one.tolist()) == Counter(other.tolist())


def test_item_identity_is_a_block_that_held_out_items_leave_empty():
    task = RatingTasks(source=SMALL, item_identity=True, items="new", held_out_items=0.3)
    width = len(task.table.items.names)
    assert task.spec.blocks[-1] == width
    support, query = task.sample(10, "test", seeded())
    assert (support.x[..., -width:].sum(-1) == support.mask).all()
    assert not query.x[..., -width:].any()


def test_partition_is_found_once():
    task = RatingTasks(source=SMALL)
    assert isinstance(task.partition, Partition)
    assert task.partition is task.partition


# Sources and encoding.


def test_numbers_are_standardised_and_categories_are_shares():
    np.testing.assert_allclose(encode(["1", "3", ""], 9), [[-1], [1], [0]])
    np.testing.assert_allclose(encode([("b", "a"), ("a",), ()], 9), [[0.5, 0.5], [1, 0], [0, 0]])
    np.testing.assert_allclose(encode(["x", "y", ""], 9), [[1, 0], [0, 1], [0, 0]])
    assert encode(["x", "y", "z"], 2) is None
    misprint = [*("1990",) * 19, "V"]
    assert encode(misprint, 2).shape == (20, 1)


def test_of_two_ratings_of_one_item_the_last_counts(caplog):
    triples = [("a", "x", 1.0), ("a", "y", 2.0), ("a", "x", 5.0)]
    table = encoded(Listed(*triples).read(), counts=(2, None), per="user", most_values=9)
    assert dict(zip(table.item.tolist(), table.rating.tolist(), strict=True)) == {0: 5.0, 1: 2.0}
    assert "1 ratings are of an item that the same user rated before" in caplog.text


def test_per_item_lets_users_and_items_change_places():
    triples = [("a", "x", 1.0), ("b", "x", 2.0), ("a", "y", 3.0)]
    table = encoded(Listed(*triples).read(), counts=(2, None), per="item", most_values=9)
    assert (table.users.names, table.items.names) == (("x",), ("a", "b"))


RECBOLE = {
    "small.inter": "user_id:token\titem_id:token\trating:float\n1\t7\t4\n2\t7\t2.5\n",
    "small.user": "user_id:token\tage:token\n1\t30\n2\t\n",
    "small.item": "item_id:token\tclass:token_seq\n7\tComedy Crime\n",
}
MOVIELENS_100K = {
    "u.data": "1\t7\t4\t0\n2\t7\t2\t0\n",
    "u.genre": "Comedy|0\nCrime|1\n\n",
    "u.user": "1|30|F|writer|12345\n2|40|M|other|1\n",
    "u.item": "7|Café (1995)|01-Jan-1995||http|1|1\n",
}
MOVIELENS_1M = {
    "ratings.dat": "1::7::4::0\n2::7::2::0\n",
    "users.dat": "1::F::30::10::12345\n2::M::40::0::1\n",
    "movies.dat": "7::Café (1995)::Comedy|Crime\n",
}


def folder(path, files):
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8" if name.startswith("small") else "latin-1")
    return path


def test_recboles_atomic_files(tmp_path):
    ratings = RecBole(folder(tmp_path, RECBOLE)).read()
    assert ratings.triples == [("1", "7", 4.0), ("2", "7", 2.5)]
    assert ratings.users == {"1": {"age": "30"}, "2": {}}
    assert ratings.items == {"7": {"class": ("Comedy", "Crime")}}


def test_recbole_is_found_where_it_is_installed_and_not_imported(tmp_path, monkeypatch):
    data = tmp_path / "recbole" / "dataset_example" / "ml-100k"
    data.mkdir(parents=True)
    folder(data, RECBOLE)
    (tmp_path / "recbole" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert len(RecBole().read().triples) == 2


def test_movielens_in_its_original_files(tmp_path):
    for name, files in {"100k": MOVIELENS_100K, "1m": MOVIELENS_1M}.items():
        (tmp_path / name).mkdir()
        ratings = MovieLens(folder(tmp_path / name, files)).read()
        assert ratings.triples == [("1", "7", 4.0), ("2", "7", 2.0)]
        assert ratings.items == {"7": {"year": "1995", "genres": ("Comedy", "Crime")}}
        assert ratings.users["1"]["age"] == "30" and ratings.users["1"]["gender"] == "F"


def test_a_table_by_its_columns(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("who,what,stars,town,kinds\nann,x,3,Rome,a|b\nbob,y,4.5,,a\n", encoding="utf-8")
    names = {"user": "who", "item": "what", "rating": "stars"}
    ratings = RatingTable(path, **names, user_attributes=["town"], item_attributes=["kinds"]).read()
    assert ratings.triples == [("ann", "x", 3.0), ("bob", "y", 4.5)]
    assert ratings.users == {"ann": {"town": "Rome"}, "bob": {}}
    assert ratings.items == {"x": {"kinds": ("a", "b")}, "y": {"kinds": "a"}}


FAULTS = [
    ("user,thing,rating\n1,2,3\n", "task.source.item=item: is no column of .*; there are user, thing, rating"),
    ("user,item,ratings\n1,2,3\n", "task.source.rating=rating: is no column .* (did you mean ratings?)"),
    ("user,item,rating\n1,2,good\n", "line 2: the rating is 'good', and must be a number"),
    ("user,item,rating\n1,2,nan\n", "line 2: the rating is 'nan', and must be a number"),
    ("user,item,rating\n1,,3\n", "line 2: has no item"),
    ("user,item,rating\n1,2\n", "line 2: has another number of fields than the header, 3"),
    ("user,item,rating\n1,2,3\n", r"task.ratings=\[13, 100\]: no user of 1 has as many ratings"),
]


@pytest.mark.parametrize(("text", "line"), FAULTS)
def test_a_fault_of_a_table_is_told_in_one_line(tmp_path, text, line):
    path = tmp_path / "ratings.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=line.replace("(did", r"\(did").replace("?)", r"\?\)")) as raised:
        RatingTasks(source=RatingTable(path)).sample(1, "train", seeded())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"items": "new"}, "held_out_items"),
        ({"users": "existing"}, "held_out_ratings"),
        ({"users": "old"}, "users"),
        ({"loss": "cubic"}, "loss"),
        ({"shares": (8, 1)}, "shares"),
        ({"ratings": (1, 5)}, "ratings"),
        ({"k_query": 0}, "k_query"),
        ({"held_out_items": 1.0}, "held_out_items"),
        ({"per": "film"}, "per"),
        ({"gain": "square"}, "gain"),
    ],
)
def test_a_wrong_setting_is_named(settings, field):
    with pytest.raises(InvalidValue) as raised:
        RatingTasks(source=SMALL, **settings)
    assert raised.value.field == field


def test_ratings_up_to_a_hundred_ask_for_another_gain():
    triples = [(f"u{u}", f"i{i}", float(10 * i)) for u in range(6) for i in range(11)]
    with pytest.raises(InvalidValue, match="would take 2 to the power of 100"):
        RatingTasks(source=Listed(*triples), ratings=(3, None)).sample(1, "train", seeded())
    RatingTasks(source=Listed(*triples), ratings=(3, None), gain="linear", k_query=2).sample(1, "train", seeded())


# The base layer.


def test_blocks_are_embedded_each_by_its_own_matrix():
    spec = TaskSpec("regression", (5,), 1, blocks=(2, 3))
    layer = AttributeEmbedding(spec, width=4, hidden=[6])
    embeddings = layer.features[0]
    x = torch.tensor([[0.0, 1.0, 0.5, 0.5, 0.0]])
    first, second = (block.weight.T for block in embeddings.blocks)
    expected = torch.cat([first[1], (second[0] + second[1]) / 2])
    torch.testing.assert_close(embeddings(x)[0], expected)


def test_blocks_must_add_up_to_the_input():
    with pytest.raises(InvalidValue, match=r"blocks=\(2, 2\): must be widths that add up to x_shape, \(5,\)"):
        TaskSpec("regression", (5,), 1, blocks=(2, 2))
