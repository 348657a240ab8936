"""scikit-learn's digits."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mlframework.errors import InvalidValue
from mlframework.tasks import Digits

SPLITS = {"train": {"0", "1", "2", "3", "4", "5"}, "validation": {"6", "7"}, "test": {"8", "9"}}


def digits(*, n_way=2, k_shot=5, k_query=15, **settings):
    return Digits(n_way=n_way, k_shot=k_shot, k_query=k_query, **settings)


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_holds_all_images_of_its_digits_scaled_to_one(split):
    data, original = digits().classes(split), load_digits()
    assert set(data.names) == SPLITS[split]
    for name, x in zip(data.names, data.x.split(data.sizes.tolist()), strict=True):
        assert np.array_equal(x[:, 0].numpy() * 16, original.images[original.target == int(name)])


def test_the_smallest_class_is_known_beforehand():
    tasks = digits()
    sizes = torch.cat([tasks.classes(split).sizes for split in SPLITS])
    assert sizes.min() == tasks.smallest_class
    assert sizes.sum() == 1797


def test_held_out_digits_may_be_chosen():
    tasks = digits(n_way=3, validation_digits=[0, 1, 2], test_digits=[3, 4, 5])
    assert set(tasks.classes("train").names) == {"6", "7", "8", "9"}
    assert tasks.sample(4, "test", torch.Generator().manual_seed(0)).query.x.shape == (4, 45, 1, 8, 8)


@pytest.mark.parametrize(
    ("field", "setting"),
    [
        ("test_digits", {"test_digits": [7, 8]}),
        ("test_digits", {"test_digits": [9, 10]}),
        ("n_way", {"n_way": 3}),
        ("k_shot", {"k_shot": 174}),
    ],
)
def test_a_wrong_setting_is_named_at_once(field, setting):
    with pytest.raises(InvalidValue) as caught:
        digits(**setting)
    assert caught.value.field == field
