"""Pose regression: by what angle is an object turned? On objects of the project's own."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from mlframework.episode import Episode, Examples, Split, TaskSpec
from mlframework.errors import InvalidValue
from mlframework.tasks.data_folder import Arrays, cached
from mlframework.tasks.few_shot import check_at_least, distinct
from mlframework.tasks.images.own_images import as_images
from mlframework.tasks.regression import solids
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Pose"]

SPLITS = get_args(Split)
#: Objects of the validation and the test split.
OTHERS = {"validation": 15, "test": 30}


class Pose(TaskDistribution):
    """The azimuth of one object in grey images, as its cosine and sine. A task is an object.

    The metric `degrees` is the angle between the predicted direction and the right one: 90 on average by chance.

    Objects are random solids of boxes and pyramids, drawn from a seed; an object's pose at azimuth 0 is arbitrary. Each
    view has its own azimuth and elevation. No two splits share an object. Validation has 15 objects, test 30.

    With `exclusive: false` a training object keeps its pose at azimuth 0 in all tasks. One network without a support
    set can then solve all training tasks, and fails on new objects. With `exclusive: true` each training task draws
    that pose anew. Validation and test tasks are the same either way.

    Args:
        k_shot, k_query: support and query views of a task.
        exclusive: see above.
        objects: to train on.
        views: of each object, from which a task draws.
        image_size: height and width.
        seed: of objects and views.

    Reference: Yin, Tucker, Zhou, Levine, Finn, Meta-Learning without Memorization, 2020, arXiv:1912.03820, section 6.2.
        Deviations: random solids, where the paper renders models of Pascal 3D; a direction, where it takes the angle
        as a number, which jumps once a turn.
    """

    def __init__(
        self,
        *,
        k_shot: int,
        k_query: int,
        exclusive: bool,
        objects: int = 50,
        views: int = 100,
        image_size: int = 28,
        seed: int = 0,
    ) -> None:
        check_at_least(1, k_shot=k_shot, k_query=k_query, objects=objects)
        check_at_least(8, image_size=image_size)
        if views < k_shot + k_query:
            raise InvalidValue("views", views, f"must be at least k_shot + k_query, {k_shot + k_query}")
        self.k_shot, self.k_query, self.exclusive = k_shot, k_query, exclusive
        self.objects, self.views, self.image_size, self.seed = objects, views, image_size, seed
        self.spec = TaskSpec("regression", (1, image_size, image_size), out_features=2, ragged=False)
        self._loaded: dict[Split, tuple[Tensor, Tensor]] = {}

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        images, turns = self.views_of(split)
        count = self.k_shot + self.k_query
        which = torch.randint(len(images), (num_tasks, 1), generator=generator)
        rows = distinct(torch.full((num_tasks,), self.views), count, generator)  # [tasks, count]
        x, turn = images[which, rows].float() / 255, turns[which, rows]
        if self.exclusive and split == "train":
            turn = turn + torch.rand(num_tasks, 1, generator=generator, dtype=turn.dtype)
        azimuth = 2 * torch.pi * turn
        y = torch.stack([azimuth.cos(), azimuth.sin()], -1).float()
        examples = Examples(x, y, torch.ones(num_tasks, count))
        return Episode(examples.rows(slice(self.k_shot)), examples.rows(slice(self.k_shot, None)))

    def encode_inputs(self, x: Any, support: Tensor | None = None) -> Tensor:
        return as_images(x, self.spec.x_shape)

    def metrics(self, prediction: Tensor, y: Tensor) -> dict[str, Tensor]:
        across = prediction[..., 0] * y[..., 1] - prediction[..., 1] * y[..., 0]
        return {"degrees": torch.rad2deg(torch.atan2(across, (prediction * y).sum(-1)).abs())}

    def drawn_from(self, num_tasks: int, split: Split, generator: torch.Generator) -> list[tuple[str, ...]]:
        which = torch.randint(len(self.views_of(split)[0]), (num_tasks, 1), generator=generator)
        return [(f"object {number}",) for number in which.flatten().tolist()]

    def views_of(self, split: Split) -> tuple[Tensor, Tensor]:
        """The views of a split: images `[objects, views, 1, height, width]`, azimuths `[objects, views]` in turns."""
        if split not in self._loaded:
            count = OTHERS.get(split, self.objects)
            settings = SPLITS.index(split), count, self.views, self.image_size, self.seed
            arrays = cached("pose", settings, lambda: draw(*settings), source=solids.__file__)
            self._loaded[split] = torch.from_numpy(arrays["images"]).unsqueeze(2), torch.from_numpy(arrays["turns"])
        return self._loaded[split]


def draw(split: int, objects: int, views: int, image_size: int, seed: int) -> Arrays:
    """uint8 `images` `[objects, views, height, width]`, and azimuths `turns` `[objects, views]` from 0 to 1."""
    rngs = [np.random.default_rng([seed, split, number]) for number in range(objects)]
    images, turns = zip(*(solids.draw_views(rng, views, image_size) for rng in rngs), strict=True)
    return {"images": np.array(images), "turns": np.array(turns)}
