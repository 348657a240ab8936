"""Digits: the small handwritten digits that scikit-learn ships."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlframework.episode import Split
from mlframework.errors import InvalidValue
from mlframework.tasks.few_shot import ClassIndexed, FewShotClassification
from mlframework.tasks.images.own_images import as_images

__all__ = ["Digits"]

SMALLEST_CLASS = 174  # the eights


class Digits(FewShotClassification):
    """Which of `n_way` digits is it? 1,797 images of 8x8 pixels, ink 1 and paper 0; nothing to download.

    Ten classes are too few to learn much that carries over: good for a quick look, not for results.

    Args:
        n_way, k_shot, k_query: see `FewShotClassification`.
        validation_digits: the digits of the validation split.
        test_digits: the digits of the test split; the remaining ones are trained on.

    Reference: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.

    >>> Digits(n_way=2, k_shot=1, k_query=15).sample(4, "train", torch.Generator().manual_seed(0)).query.x.shape
    torch.Size([4, 30, 1, 8, 8])
    """

    divided_by = ("validation_digits", "test_digits")

    def __init__(
        self,
        *,
        n_way: int,
        k_shot: int | Sequence[int],
        k_query: int,
        validation_digits: Sequence[int] = (6, 7),
        test_digits: Sequence[int] = (8, 9),
    ) -> None:
        super().__init__((1, 8, 8), n_way=n_way, k_shot=k_shot, k_query=k_query, smallest_class=SMALLEST_CLASS)
        held_out = (*validation_digits, *test_digits)
        if len(set(held_out)) < len(held_out) or not set(held_out) <= set(range(10)):
            why = "no digit twice, here and in validation_digits; all in 0...9"
            raise InvalidValue("test_digits", test_digits, why)
        train = [digit for digit in range(10) if digit not in held_out]
        self.digits: dict[Split, Sequence[int]]
        self.digits = {"train": train, "validation": list(validation_digits), "test": list(test_digits)}
        for split, digits in self.digits.items():
            if len(digits) < n_way:
                why = f"the {split} split has only the digits {', '.join(map(str, digits))}"
                raise InvalidValue("n_way", n_way, why)

    def encode_inputs(self, x: Any, support: Tensor | None = None) -> Tensor:
        return as_images(x, self.spec.x_shape, ink=True)

    def load(self, split: Split) -> ClassIndexed:
        from sklearn.datasets import load_digits  # here: it takes a second, and every other task would pay it

        data = load_digits()
        x, y = torch.from_numpy(data.images).float().unsqueeze(1) / 16, torch.from_numpy(data.target)
        chosen = torch.isin(y, torch.tensor(self.digits[split]))
        return ClassIndexed.from_labels(x[chosen], y[chosen])
