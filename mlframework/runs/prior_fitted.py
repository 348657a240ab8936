"""A trained prior-fitted network as a classifier of one small table, averaged over orders of columns and classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mlframework.episode import Examples
from mlframework.errors import InvalidData, InvalidValue, UserError
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.runs.estimators import FewShotClassifier
from mlframework.runs.trained import Trained
from mlframework.tasks.own_data import as_numbers
from mlframework.tasks.prior.columns import padded, scaled

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TableClassifier"]


class TableClassifier(FewShotClassifier):
    """Predicts classes of rows from other rows of the same table, with a network that was trained on `task=prior`.

    Nothing is trained: `fit` keeps the rows, and the network reads them with each prediction. A prediction is the mean
    over members, each of which sees the columns and the class numbers in another order: orders do not matter, and the
    network has learned this only approximately. A missing value becomes the median of the rows kept. Of too many
    columns, `fit` keeps those that tell the classes apart best.

    Args:
        run: a run folder, a file that `save` wrote, a `Trained`, or the meta layer itself.
        members: how many orders; the first is the table's own.
        seed: of the other orders.
        weights, device: see `FewShotClassifier`.

    Reference: Hollmann et al., TabPFN, 2023, arXiv:2207.01848, section 5.1 (ensembles over orders).
    """

    def __init__(
        self,
        run: str | Path | Trained | MetaLayer,
        *,
        members: int = 8,
        seed: int = 0,
        weights: str = "best",
        device: str = "auto",
    ) -> None:
        super().__init__(run, weights=weights, device=device)
        self.members, self.seed = members, seed

    def trained(self) -> Trained:
        found = super().trained()
        spec = found.meta_layer.task.spec
        if len(spec.x_shape) != 1:
            raise InvalidValue("run", self.run, "must be trained on classifications of tables: task=prior")
        at_least("members", self.members, 1)
        return found

    def fit(self, X: Any, y: Any) -> Self:
        """Keeps the rows `X` `[n, columns]`, numbers or NaN, with their classes `y` `[n]`."""
        trained = self.trained()
        rows = as_rows(self.checked(X, like=trained, fitting=True))
        self.classes_, labels = np.unique(self.labels_of(y, len(rows)), return_inverse=True)
        self.network_, spec = trained, trained.meta_layer.task.spec
        if len(self.classes_) > spec.out_features:
            why = f"the network was trained on at most {spec.out_features}: task.classes=[2,{len(self.classes_)}]"
            raise InvalidData("y", f"{len(self.classes_)} classes", why)
        there = [column[~np.isnan(column)] for column in rows.T]
        self.middle_ = np.array([np.median(values) if len(values) else 0.0 for values in there])
        rows = self.filled(rows)
        self.columns_ = most_telling(rows, labels, spec.x_shape[0])
        self.rows_, self.labels_ = torch.from_numpy(rows[:, self.columns_]), torch.from_numpy(labels.reshape(-1))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `[n, classes]` for rows `[n, columns]`, in the order of `classes_`."""
        check_is_fitted(self, "network_")
        trained = self.network_
        X = self.checked(X, like=trained, fitting=False)
        queries = torch.from_numpy(self.filled(as_rows(X))[:, self.columns_])
        rows = torch.cat([self.rows_, queries])
        seen = torch.arange(len(rows)) < len(self.rows_)
        rows = scaled(rows[None], seen[None])[0]
        generator, count = torch.Generator().manual_seed(self.seed), len(self.classes_)
        orders = [order(rows.shape[1], member, generator) for member in range(self.members)]
        names = torch.stack([order(count, member, generator) for member in range(self.members)])
        width = trained.meta_layer.task.spec.x_shape[0]
        inputs = padded(torch.stack([rows[:, columns] for columns in orders]), width, rescale=True)
        logits = self.logits(trained.meta_layer, inputs[:, seen], names[:, self.labels_], inputs[:, ~seen])
        own = logits.gather(2, names[:, None].expand(-1, len(queries), -1))
        return own.double().softmax(-1).mean(0).numpy()

    def save(self, path: str | Path) -> None:
        raise UserError("a TableClassifier keeps rows, and no model: mlframework.save writes the network, fit the rows")

    def logits(self, layer: MetaLayer, x: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Logits `[members, queries, most classes]`; `labels` `[members, n]` are the classes of the known rows `x`."""
        like = next(layer.parameters())
        support = Examples(x.to(like), labels.to(like.device), torch.ones(labels.shape, device=like.device))
        with torch.no_grad():
            return layer.predict(layer.adapt(support), queries.to(like)).cpu()

    def filled(self, rows: np.ndarray) -> np.ndarray:
        """The rows with the median of the rows kept in place of missing values."""
        return np.where(np.isnan(rows), self.middle_, rows)


def order(count: int, member: int, generator: torch.Generator) -> Tensor:
    """The order of so many things for a member; the first one keeps it."""
    return torch.randperm(count, generator=generator) if member else torch.arange(count)


def as_rows(X: Any) -> np.ndarray:
    """Rows `[n, columns]` of numbers or NaN."""
    rows = as_numbers("x", X).double().numpy()
    if np.isinf(rows).any():
        raise InvalidData("x", "infinity", "is no number of a table: leave it out, or write NaN for a missing value")
    return rows


def most_telling(x: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
    """The numbers of at most so many columns, in order: those with the largest F statistic over the classes."""
    if x.shape[1] <= most:
        return np.arange(x.shape[1])
    from sklearn.feature_selection import f_classif

    varies = np.ptp(x, axis=0) > 0  # a deviation may be rounding: that of a column of 0.1 is not 0
    scores = np.where(varies, 0.0, -1.0)
    if varies.any() and 1 < len(np.unique(labels)) < len(labels):  # else there is no F statistic
        with np.errstate(divide="ignore"):  # a column that is constant within each class has the statistic infinity
            scores[varies] = np.nan_to_num(f_classif(x[:, varies], labels)[0], nan=0.0, posinf=np.inf)
    return np.sort(np.argsort(-scores, kind="stable")[:most])
