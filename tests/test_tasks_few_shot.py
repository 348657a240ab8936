"""The n-way k-shot sampler, on examples that carry their own number."""

import hashlib
import pickle
import unicodedata
from collections import Counter
from itertools import permutations

import pytest
import torch
from omegaconf import OmegaConf

from mlframework.episode import TaskSpec
from mlframework.errors import InvalidValue, UserError
from mlframework.tasks import ArrayTasks, ClassIndexed
from mlframework.tasks.few_shot import distinct, hash_sorted, split_by_hash


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(*sizes):
    """Classes of these sizes whose examples are their own row numbers."""
    return ClassIndexed(torch.arange(sum(sizes)), torch.tensor(sizes), tuple(f"class{i}" for i in range(len(sizes))))


def tasks_of(*sizes, n_way=2, k_shot=2, k_query=3):
    return ArrayTasks({"train": numbered(*sizes)}, n_way=n_way, k_shot=k_shot, k_query=k_query)


def class_of(row, sizes):
    return next(i for i in range(len(sizes)) if row < sum(sizes[: i + 1]))


@pytest.mark.parametrize("sizes", [(5, 5, 5), (3, 9, 4, 30, 5), (40, 3)])
def test_support_and_query_are_different_examples_of_one_class_per_label(sizes):
    episode = tasks_of(*sizes).sample(200, "train", seeded())
    together = episode.joined()
    for x, y, mask in zip(together.x, together.y, together.mask, strict=True):
        counted = x[mask == 1].tolist()
        assert len(set(counted)) == len(counted), "an example was drawn twice"
        classes = [{class_of(row, sizes) for row in x[(y == label) & (mask == 1)].tolist()} for label in range(2)]
        assert all(len(each) == 1 for each in classes), "a label covers two classes"
        assert classes[0] != classes[1], "two labels cover one class"


def test_a_small_class_gives_what_it_has_and_masks_the_rest():
    sizes = (3, 4, 30)
    episode = tasks_of(*sizes, n_way=3).sample(100, "train", seeded())
    assert episode.support.mask.min() == 1
    for x, y, mask in zip(*episode.query, strict=True):
        for label in range(3):
            available = sizes[class_of(x[y == label][0].item(), sizes)]
            assert mask[y == label].sum() == min(3, available - 2)


def test_a_small_class_is_queried_with_all_that_support_left():
    rows = tasks_of(4, 4).sample(50, "train", seeded()).joined()
    for x, mask in zip(rows.x, rows.mask, strict=True):
        assert sorted(x[mask == 1].tolist()) == list(range(8))


@pytest.mark.parametrize(
    ("sizes", "k_shot", "ragged"),
    [((5, 9), 2, False), ((4, 9), 2, True), ((9, 9), [1, 2], True), ((9, 9), [2, 2], False)],
)
def test_the_spec_says_before_any_draw_whether_masks_may_hold_zeros(sizes, k_shot, ragged):
    tasks = tasks_of(*sizes, k_shot=k_shot)
    assert tasks.spec.ragged == ragged
    assert (tasks.sample(50, "train", seeded()).joined().mask.min() == 0) == ragged


def test_rows_stand_shot_by_shot():
    episode = tasks_of(9, 9, 9, n_way=3).sample(4, "train", seeded())
    assert torch.equal(episode.support.y, torch.tensor([0, 1, 2] * 2).expand(4, 6))
    assert torch.equal(episode.query.y, torch.tensor([0, 1, 2] * 3).expand(4, 9))


def test_the_number_of_shots_is_drawn_for_each_task():
    tasks = tasks_of(20, 20, 20, n_way=3, k_shot=[2, 4])
    support = tasks.sample(300, "train", seeded()).support
    shots = torch.stack([(support.mask * (support.y == label)).sum(1) for label in range(3)])
    assert (shots == shots[0]).all(), "classes of one task have different numbers of shots"
    assert Counter(shots[0].int().tolist()).keys() == {2, 3, 4}
    assert tasks.sample(300, "train", seeded()).query.mask.min() == 1


def test_every_order_of_classes_is_equally_likely():
    sizes, draws = (5, 5, 5, 5), 12_000
    x = tasks_of(*sizes).sample(draws, "train", seeded()).support.x[:, :2] // 5
    seen = Counter(map(tuple, x.tolist()))
    assert set(seen) == set(permutations(range(4), 2))
    # Twelve orders: chi-squared with 11 degrees of freedom exceeds 31.3 once in a thousand times.
    assert sum((count - draws / 12) ** 2 / (draws / 12) for count in seen.values()) < 31.3


def test_distinct_draws_every_sequence_equally_often_whatever_the_size():
    sizes = torch.tensor([3, 4, 5]).repeat(8_000, 1)
    drawn = distinct(sizes, 3, seeded())
    for column, size in enumerate((3, 4, 5)):
        expected = 8_000 / len(list(permutations(range(size), 3)))
        seen = Counter(map(tuple, drawn[:, column].tolist()))
        assert set(seen) == set(permutations(range(size), 3))
        # The largest of sixty counts stays within five standard deviations.
        assert max(abs(count - expected) for count in seen.values()) < 5 * expected**0.5


def test_all_randomness_comes_from_the_generator():
    tasks = tasks_of(9, 4, 30, k_shot=[1, 2])
    before = torch.get_rng_state()
    first, again, other = (tasks.sample(5, "train", seeded(seed)).hash() for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_bytes_become_floats_between_zero_and_one():
    data = ClassIndexed.from_classes("ab", torch.arange(256, dtype=torch.uint8).view(2, 128))
    x = ArrayTasks({"train": data}, n_way=2, k_shot=64, k_query=64).sample(1, "train", seeded()).joined().x
    assert x.dtype == torch.float32
    assert torch.equal(x.sort().values[0], torch.arange(256) / 255)


def test_unsorted_labels_are_sorted_into_classes():
    y = torch.tensor([7, 3, 7, 3, 3])
    data = ClassIndexed.from_labels(torch.arange(5), y)
    assert (data.x.tolist(), data.sizes.tolist(), data.names) == ([1, 3, 4, 0, 2], [3, 2], ("3", "7"))


@pytest.mark.parametrize(
    ("x", "y", "why"),
    [
        (torch.zeros(5, 2), torch.tensor([0, 1, 0]), r"shape \(3,\): must be one for each example: x is \(5, 2\)"),
        (torch.zeros(3, 2), torch.arange(5), "must be one for each example"),
        (torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.int64), "must be one for each example"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "must be one for each example"),
        (torch.zeros(3, 2), torch.tensor([0.0, torch.nan, torch.nan]), "labels of torch.float32: must be integers"),
    ],
    ids=["fewer labels", "more labels", "a column", "nothing", "missing ones"],
)
def test_labels_that_are_not_one_for_each_example_are_refused(x, y, why):
    with pytest.raises(InvalidValue, match=f"y=labels of .*{why.removeprefix('labels of ')}"):
        ClassIndexed.from_labels(x, y)


@pytest.mark.parametrize(
    "y", [torch.tensor([True, False, True]), torch.tensor([-1, 1, -1]), torch.tensor([7, 9, 7]).byte()]
)
def test_labels_may_be_any_integers(y):
    data = ClassIndexed.from_labels(torch.arange(3), y)
    assert int(data.sizes.sum()) == 3 and data.sizes.sort().values.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (ClassIndexed(torch.zeros(30, 2), torch.tensor([9, 9, 9]), ("a", "b", "c")), "sizes"),
        (ClassIndexed.from_classes("ab", torch.zeros(3, 10, 2)), "names"),
    ],
)
def test_class_indexed_arrays_that_do_not_add_up_are_refused(data, field):
    tasks = ArrayTasks({"train": data}, n_way=2, k_shot=1, k_query=2)
    with pytest.raises(InvalidValue, match=f"^{field}="):
        tasks.sample(1, "train", seeded())


ACCENTED = [
    unicodedata.normalize("NFC", f"{letter}\N{COMBINING ACUTE ACCENT}{i}") for letter in "aeiou" for i in range(9)
]


def test_splits_do_not_depend_on_the_unicode_form_of_names():
    splits, others = (split_by_hash(unicodedata.normalize(form, n) for n in ACCENTED) for form in ("NFC", "NFD"))
    for split in splits:
        assert splits[split] == [unicodedata.normalize("NFC", name) for name in others[split]]
    assert splits["train"] != others["train"]


def test_the_hash_of_a_composed_name_is_that_of_its_bytes():
    """Splits of names that are composed already, as all that are shipped are, stay as they were."""
    assert hash_sorted(ACCENTED) == sorted(ACCENTED, key=lambda name: hashlib.sha256(name.encode()).digest())


def test_two_unicode_forms_of_one_name_are_an_error():
    with pytest.raises(UserError, match=r"'\\xe9' and 'e\\u0301' are one name in two Unicode forms"):
        split_by_hash(["a", "\xe9", "e\N{COMBINING ACUTE ACCENT}"])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"kind": "clasification"}, r"kind=clasification: must be one of .* \(did you mean classification\?\)"),
        ({"kind": None}, "kind=None: must be one of regression, classification, sequence"),
        ({"x_shape": (3, 0)}, "x_shape=.*must hold whole numbers of at least 1"),
        ({"x_shape": 3}, "x_shape=3: must hold whole numbers"),
        ({"x_shape": (2.5,)}, "x_shape=.*must hold whole numbers"),
        ({"x_shape": "12"}, "x_shape=12: must hold whole numbers"),
        ({"out_features": 0}, "out_features=0: must be a whole number of at least 1"),
        ({"out_features": 5.0}, "out_features=5.0: must be a whole number"),
        ({"ragged": "no"}, "ragged=no: must be true or false"),
    ],
)
def test_a_spec_of_what_no_task_can_be_is_refused(settings, why):
    good = {"kind": "classification", "x_shape": (3,), "out_features": 5, "ragged": False}
    with pytest.raises(InvalidValue, match=why):
        TaskSpec(**{**good, **settings})
    with pytest.raises(InvalidValue, match=why):
        TaskSpec(**good)._replace(**settings)


def test_a_spec_is_a_tuple_that_can_be_pickled():
    spec = TaskSpec("sequence", [8], 257)
    assert spec == ("sequence", (8,), 257, True, None) and pickle.loads(pickle.dumps(spec)) == spec
    assert isinstance(spec._replace(ragged=False), TaskSpec)


def test_lists_from_a_config_are_lists():
    assert tasks_of(9, 9, k_shot=OmegaConf.create([1, 3])).shots == (1, 3)


def test_splitting_by_hash_does_not_depend_on_the_order_of_names():
    names = [f"class {i}" for i in range(50)]
    splits = split_by_hash(reversed(names))
    assert splits == split_by_hash(names)
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [32, 8, 10]
    assert sorted(name for split in splits.values() for name in split) == sorted(names)


def test_hash_order_is_that_of_any_machine():
    # sha256sum of "a", "b", "c" begins with ca97, 3e23, 2e7d.
    assert hash_sorted("abc") == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("field", "setting"),
    [
        ("n_way", {"n_way": 1}),
        ("n_way", {"n_way": "two"}),
        ("k_query", {"k_query": 0}),
        ("k_shot", {"k_shot": 0}),
        ("k_shot", {"k_shot": [3, 2]}),
        ("k_shot", {"k_shot": [1, 2, 3]}),
        ("k_shot", {"k_shot": "12"}),
        ("k_shot", {"k_shot": 1.5}),
        ("k_shot", {"k_shot": True}),
        ("k_shot", {"k_shot": 9}),
    ],
)
def test_a_wrong_setting_is_named_at_once(field, setting):
    with pytest.raises(InvalidValue) as caught:
        tasks_of(9, 9, **setting)
    assert caught.value.field == field


def test_too_few_classes_and_an_absent_split_are_named_at_the_first_draw():
    with pytest.raises(InvalidValue, match="n_way=3: the train split has only 2 classes"):
        tasks_of(9, 9, n_way=3).sample(1, "train", seeded())
    with pytest.raises(InvalidValue, match="there is no test split"):
        tasks_of(9, 9).sample(1, "test", seeded())


def test_episodes_are_contiguous_whatever_the_layout_of_the_array():
    x, y = torch.rand(12, 4, 5, 3).movedim(-1, 1), torch.arange(12) // 4
    task = ArrayTasks({"train": ClassIndexed.from_labels(x, y)}, n_way=2, k_shot=1, k_query=2)
    alike = ArrayTasks({"train": ClassIndexed.from_labels(x.contiguous(), y)}, n_way=2, k_shot=1, k_query=2)
    ours, theirs = (tasks.sample(2, "train", seeded()) for tasks in (task, alike))
    assert ours.hash() == theirs.hash()
    assert ours.query.x.stride() == theirs.query.x.stride()
