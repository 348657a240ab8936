"""A fixed number of training tasks, for any task; training characters that keep their labels."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch

from mlframework.errors import InvalidValue
from mlframework.tasks import ArrayTasks, ClassIndexed, Omniglot, OmniglotFixedLabels, Sinusoid
from mlframework.tasks.fixed_train_tasks import fix_train_tasks
from mlframework.testing import check_task_distribution

DATA = Path(os.environ.get("MLFRAMEWORK_DATA") or Path(__file__).parents[2] / "shared" / "data")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def hashes(task, split="train", draws=400, seed=0):
    """The tasks of a number of draws, by their hashes."""
    episode = task.sample(draws, split, seeded(seed))
    return [part.hash() for part in episode.chunks(1)]


@pytest.mark.parametrize("count", [1, 4, 20])
def test_a_train_split_holds_as_many_tasks_as_asked_for_all_equally_often(count):
    found = hashes(fix_train_tasks(Sinusoid(), count, seed=0))
    assert len(set(found)) == count
    assert min(found.count(one) for one in set(found)) > 400 / count / 4


def test_the_first_tasks_of_a_larger_number_are_those_of_a_smaller_one_and_seeds_differ():
    few, many = (set(hashes(fix_train_tasks(Sinusoid(), count, seed=0))) for count in (4, 16))
    assert few < many
    assert not few & set(hashes(fix_train_tasks(Sinusoid(), 4, seed=1)))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_validation_and_test_stay_as_they_are(split):
    assert hashes(fix_train_tasks(Sinusoid(), 4, seed=0), split) == hashes(Sinusoid(), split)


def test_the_task_stays_what_it_is_and_the_original_goes_on_drawing():
    task = Sinusoid()
    fixed = fix_train_tasks(task, 4, seed=0)
    assert type(fixed) is Sinusoid
    assert len(set(hashes(task))) == 400
    check_task_distribution(fixed)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_a_copy_has_the_same_training_tasks(copied):
    task = fix_train_tasks(Sinusoid(), 4, seed=0)
    before = hashes(task)
    assert hashes(copied(task)) == before


def test_classifications_can_be_fixed_too():
    x, y = torch.randn(60, 3, generator=seeded()), torch.arange(6).repeat(10)
    splits = dict.fromkeys(("train", "validation", "test"), ClassIndexed.from_labels(x, y))
    task = ArrayTasks(splits, n_way=3, k_shot=1, k_query=4)
    assert len(set(hashes(fix_train_tasks(task, 5, seed=0)))) == 5


def test_no_task_is_refused():
    with pytest.raises(InvalidValue, match="train_tasks=0: must be at least 1, or null"):
        fix_train_tasks(Sinusoid(), 0, seed=0)


needs_omniglot = pytest.mark.skipif(
    not (DATA / "omniglot" / "images_background.zip").is_file(), reason=f"Omniglot is not in {DATA}"
)


def omniglot(kind, **settings):
    sizes = {"n_way": 5, "k_shot": 1, "k_query": 1, "image_size": 14}
    return kind(**sizes, data_dir=DATA, download=False, **settings)


def labels_by_class(task, split, draws=200):
    """All labels that each class gets."""
    classes, generator, found = task.classes(split), seeded(), {}
    drawn = task.drawn_classes(draws, split, generator)
    for label, numbers in enumerate(drawn.T.tolist()):
        for number in numbers:
            found.setdefault(classes.names[number], set()).add(label)
    return found


@needs_omniglot
@pytest.mark.parametrize("rotations", [True, False])
def test_a_training_character_has_one_label_and_all_are_drawn(rotations):
    task = omniglot(OmniglotFixedLabels, rotations=rotations, train_classes=23)
    found = labels_by_class(task, "train", 3000)
    assert len(found) == 23 * (4 if rotations else 1)
    assert all(len(labels) == 1 for labels in found.values())
    counts = [sum(labels == {label} for labels in found.values()) for label in range(5)]
    assert max(counts) - min(counts) <= 1


@needs_omniglot
def test_test_characters_change_their_labels_as_ever():
    task, ordinary = omniglot(OmniglotFixedLabels), omniglot(Omniglot)
    assert any(len(labels) > 1 for labels in labels_by_class(task, "test", 2000).values())
    for split in ("validation", "test"):
        assert task.sample(3, split, seeded()).hash() == ordinary.sample(3, split, seeded()).hash()


@needs_omniglot
def test_fewer_training_characters_leave_the_other_splits_as_they_are():
    few, all_of_them = omniglot(Omniglot, train_classes=10, rotations=False), omniglot(Omniglot, rotations=False)
    assert few.classes("train").names == all_of_them.classes("train").names[:10]
    assert few.sample(3, "test", seeded()).hash() == all_of_them.sample(3, "test", seeded()).hash()
