"""A trained run, for use: load it, adapt it to examples, predict or generate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidValue, UserError
from mlframework.inner_loop.inner_loop import last
from mlframework.meta_layers.meta_layer import Adapted, BatchNormPolicy, MetaLayer
from mlframework.runs.run import load_run
from mlframework.runs.run_folder import RunFolder
from mlframework.text.generation import Sampling, generate

__all__ = ["TaskModel", "Trained", "load"]

log = logging.getLogger(__name__)


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
        self.meta_layer.engine = "loop"  # takes any module; there is one task at a time
        self.device = next(meta_layer.parameters()).device

    def adapt(self, examples: Examples | Sequence[str], *, inner_steps: int | None = None) -> TaskModel:
        """The model of one new task, from its support set.

        Args:
            examples: texts, for a text task; else `Examples` of one task, leaves `[1, n, ...]`.
            inner_steps: None: the algorithm's own number at test, which is 0 without an inner loop.
        """
        support = (examples if isinstance(examples, Examples) else self.encoded(examples)).to(self.device)
        steps = self.meta_layer.test_inner_steps if inner_steps is None else inner_steps
        if steps < 0:
            raise InvalidValue("inner_steps", steps, "must be at least 0, or null for the algorithm's own number")
        with torch.no_grad():
            adapted = last(self.meta_layer.trajectory(support, steps))
        return TaskModel(self.meta_layer, adapted, support)

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
        adapted: the model that the support set led to; leaves `[1, ...]`.
        support: the support set, leaves `[1, n, ...]`: it normalises queries where the batch-norm policy says so.
    """

    def __init__(self, meta_layer: MetaLayer, adapted: Adapted, support: Examples) -> None:
        self.meta_layer, self.adapted, self.support = meta_layer, adapted, support
        self.warned = False

    def predict(self, x: Tensor, *, batch_norm: BatchNormPolicy | None = None) -> Tensor:
        """Predictions `[n, ..., out_features]` for inputs `[n, *x_shape]`, by the code that evaluation uses.

        Under `support` and `inductive` a query's prediction depends on the support set and on that query alone: one
        query or a hundred give the same numbers. Under `transductive` queries are normalised by one another: hand over
        all of them in one call, for a prediction depends on the others in it. Without layers that mix examples all
        policies are the same.

        Args:
            x: the queries.
            batch_norm: the policy; None takes the algorithm's own.

        Raises:
            InvalidValue: no such policy; or it is `transductive`, examples mix, and there is only one query.
        """
        policy = self.meta_layer.batch_norm if batch_norm is None else batch_norm
        self.meta_layer.check_policy(policy)
        if policy == "transductive" and self.meta_layer.base_layer.mixes_examples:
            self.check_all_queries(len(x))
        x = x.to(self.support.x.device).unsqueeze(0)
        positions = x.shape[2:] if self.meta_layer.task.spec.kind == "sequence" else ()
        mask = self.support.mask.new_ones(*x.shape[:2], *positions)
        with torch.no_grad():  # predictions do not read targets
            return self.meta_layer.predict_query(self.adapted, Episode(self.support, Examples(x, mask, mask)), policy)[
                0
            ]

    def check_all_queries(self, count: int) -> None:
        """Refuses a lone query that others should normalise; says once that all queries belong in one call."""
        if count < 2:
            why = "normalises queries by one another, and there is only one: hand over all of them, or take support"
            raise InvalidValue("batch_norm", "transductive", why)
        if not self.warned:
            self.warned = True
            log.warning("batch_norm=transductive: predictions hold for these %d queries together", count)

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
