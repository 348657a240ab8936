"""A trained run, for use: load it, adapt it to examples, predict or generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlframework.episode import Examples
from mlframework.errors import InvalidValue, UserError
from mlframework.meta_layers.meta_layer import Adapted, MetaLayer
from mlframework.run import load_run
from mlframework.run_folder import RunFolder
from mlframework.text.generation import Sampling, generate

__all__ = ["TaskModel", "Trained", "load"]


def load(run: str | Path, *, weights: str = "best", device: str = "auto") -> Trained:
    """The trained algorithm of a run folder.

    Args:
        run: the folder.
        weights: `best` or `last`.
        device: `auto`, `cpu`, `cuda`, ...
    """
    return Trained(load_run(RunFolder(run, key="run"), weights=weights, device=device).meta_layer)


class Trained:
    """An algorithm that has been meta-trained.

    Args:
        meta_layer: the algorithm, on its device.
    """

    def __init__(self, meta_layer: MetaLayer) -> None:
        self.meta_layer = meta_layer.eval()
        self.meta_layer.engine = "loop"  # which takes any module; there is one task at a time
        self.device = next(meta_layer.parameters()).device

    def adapt(self, examples: Examples | Sequence[str], *, inner_steps: int | None = None) -> TaskModel:
        """The model of one new task, from its support set.

        Args:
            examples: texts, for a text task; else `Examples` of one task, leaves `[1, n, ...]`.
            inner_steps: None: as many as the algorithm takes at test; an algorithm without inner steps has none.
        """
        support = (examples if isinstance(examples, Examples) else self.encoded(examples)).to(self.device)
        steps = self.meta_layer.test_inner_steps if inner_steps is None else inner_steps
        if steps < 0:
            raise InvalidValue("inner_steps", steps, "must be at least 0, or null for the algorithm's own number")
        with torch.no_grad():
            *_, adapted = self.meta_layer.trajectory(support, steps)
        return TaskModel(self.meta_layer, adapted)

    def encoded(self, texts: Sequence[str]) -> Examples:
        """Texts as the support set of one task."""
        from mlframework.tasks.text import TextTasks

        task = self.meta_layer.task
        if not isinstance(task, TextTasks):
            raise UserError(f"{type(task).__name__} is no text task: it adapts to Examples(x, y, mask)")
        return task.encode(texts)


class TaskModel:
    """A task's own model.

    Args:
        meta_layer: the algorithm.
        adapted: what came of the support set; leaves `[1, ...]`.
    """

    def __init__(self, meta_layer: MetaLayer, adapted: Adapted) -> None:
        self.meta_layer, self.adapted = meta_layer, adapted

    def predict(self, x: Tensor) -> Tensor:
        """Predictions `[n, ..., out_features]` for inputs `[n, *x_shape]`."""
        with torch.no_grad():
            return self.meta_layer.predict(self.adapted, x.unsqueeze(0))[0]

    def generate(
        self,
        n: int,
        *,
        prompt: str = "",
        length: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: str | None = None,
        seed: int = 0,
    ) -> list[str]:
        """`n` new texts in the task's manner; see `mlframework.text.generation.Sampling`."""
        return generate(
            self.meta_layer,
            self.adapted,
            count=n,
            sampling=Sampling(length, temperature, top_p, stop),
            generator=torch.Generator().manual_seed(seed),
            prompt=prompt,
        )
