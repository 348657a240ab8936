"""A trained prior-fitted network as a classifier of one small table: numpy in, probabilities out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlframework.episode import Examples
from mlframework.errors import InvalidValue, UserError
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.runs.trained import load
from mlframework.tasks.prior.columns import padded, scaled

__all__ = ["TableClassifier"]


class TableClassifier:
    """Predicts classes of rows from other rows of the same table, with a network that was trained on `task=prior`.

    Nothing is trained: `fit` keeps the rows, and the network reads them with each prediction. A prediction is the mean
    over members that see columns and class numbers in other orders, for the network has learned that orders do not
    matter, but only about.

    Args:
        run: a run folder, a file that `save` wrote, or the meta layer itself.
        members: how many orders; the first is the table's own.
        seed: of the other orders.
        weights: of a run folder: `best` or `last`.

    Reference: Hollmann et al., TabPFN, 2023, arXiv:2207.01848, section 5.1 (ensembles over orders).
    """

    def __init__(self, run: str | Path | MetaLayer, *, members: int = 8, seed: int = 0, weights: str = "best") -> None:
        layer = run if isinstance(run, MetaLayer) else load(run, weights=weights).meta_layer
        if layer.task.spec.kind != "classification" or len(layer.task.spec.x_shape) != 1:
            raise InvalidValue("run", run, "must be trained on classifications of tables: task=prior")
        self.meta_layer, self.members, self.seed = layer.eval(), at_least("members", members, 1), seed
        self.width, self.most_classes = layer.task.spec.x_shape[0], layer.task.spec.out_features

    def fit(self, x: np.ndarray, y: np.ndarray) -> TableClassifier:
        """Keeps the rows `x` `[n, columns]`, numbers or NaN, with their classes `y` `[n]`."""
        x = as_numbers(x)
        if len(x) != len(y) or not len(x):
            raise UserError(f"x has {len(x)} rows and y {len(y)}: one class for each row is needed")
        self.classes_, labels = np.unique(np.asarray(y), return_inverse=True)
        if len(self.classes_) > self.most_classes:
            why = f"the network was trained on at most {self.most_classes}: task.classes=[2,{len(self.classes_)}]"
            raise UserError(f"y has {len(self.classes_)} classes, and {why}")
        there = [column[~np.isnan(column)] for column in x.T]
        self.middle = np.array([np.median(values) if len(values) else 0.0 for values in there])
        x = self.filled(x)
        self.columns = most_telling(x, labels, self.width)
        self.x, self.labels = torch.from_numpy(x[:, self.columns]), torch.from_numpy(labels.reshape(-1))
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The likeliest class of each row, `[n]`."""
        return self.classes_[self.predict_proba(x).argmax(1)]

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """Probabilities `[n, classes]` for rows `[n, columns]`, in the order of `classes_`."""
        queries = torch.from_numpy(self.filled(as_numbers(x))[:, self.columns])
        rows = torch.cat([self.x, queries])
        seen = torch.arange(len(rows)) < len(self.x)
        rows = scaled(rows[None], seen[None])[0]
        generator, count = torch.Generator().manual_seed(self.seed), len(self.classes_)
        orders = [order(rows.shape[1], member, generator) for member in range(self.members)]
        names = torch.stack([order(count, member, generator) for member in range(self.members)])
        inputs = padded(torch.stack([rows[:, columns] for columns in orders]), self.width, rescale=True)
        logits = self.logits(inputs[:, seen], names[:, self.labels], inputs[:, ~seen])
        own = logits.gather(2, names[:, None].expand(-1, len(queries), -1))
        return own.double().softmax(-1).mean(0).numpy()

    def logits(self, x: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Logits `[members, queries, most classes]`; `labels` `[members, n]` are the classes of the known rows `x`."""
        like = next(self.meta_layer.parameters())
        support = Examples(x.to(like), labels.to(like.device), torch.ones(labels.shape, device=like.device))
        with torch.no_grad():
            return self.meta_layer.predict(self.meta_layer.adapt(support), queries.to(like)).cpu()

    def filled(self, x: np.ndarray) -> np.ndarray:
        """The rows with the median of the rows kept in place of missing values."""
        if x.shape[1] != len(self.middle):
            raise UserError(f"x has {x.shape[1]} columns, and the rows kept have {len(self.middle)}")
        return np.where(np.isnan(x), self.middle, x)


def order(count: int, member: int, generator: torch.Generator) -> Tensor:
    """The order of so many things for a member; the first one keeps it."""
    return torch.randperm(count, generator=generator) if member else torch.arange(count)


def as_numbers(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2:
        raise UserError(f"x has shape {x.shape}, and must be [rows, columns]")
    if np.isinf(x).any():
        raise UserError("x holds infinite values: leave them out, or write NaN for a missing value")
    return x


def most_telling(x: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
    """The numbers of at most so many columns, in order: those with the largest F statistic over the classes."""
    if x.shape[1] <= most:
        return np.arange(x.shape[1])
    from sklearn.feature_selection import f_classif

    varies = x.std(axis=0) > 0
    scores = np.full(x.shape[1], -1.0)
    if len(np.unique(labels)) > 1:
        scores[varies] = np.nan_to_num(f_classif(x[:, varies], labels)[0], nan=0.0, posinf=np.inf)
    return np.sort(np.argsort(-scores, kind="stable")[:most])
