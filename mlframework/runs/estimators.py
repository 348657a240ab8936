"""A trained run as an estimator of scikit-learn: `fit` adapts to a support set, `predict` answers queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from mlframework.episode import Kind
from mlframework.errors import InvalidData, InvalidValue
from mlframework.meta_layers.meta_layer import BatchNormPolicy, MetaLayer
from mlframework.runs.build import build_device
from mlframework.runs.saved import holds_model, read_model
from mlframework.runs.trained import TaskModel, Trained, load
from mlframework.tasks.own_data import as_numbers
from mlframework.tasks.tables.encoding import texts_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FewShotClassifier", "FewShotEstimator", "FewShotRegressor"]

Labels = TypeVar("Labels")


class FewShotEstimator(BaseEstimator):
    """What the classifier and the regressor share.

    `fit` adapts to the rows that it is given, as to the support set of a new task, and forgets earlier ones. Nothing of
    the run changes. Inputs are what `Trained.adapt` takes: arrays of any numeric type, files, PIL images, data frames.

    Args:
        run: a run folder, a file that `save` wrote, a `Trained`, or the meta layer itself.
        inner_steps: of adapting; None: the algorithm's own number at test.
        batch_norm: how queries are normalised; None: the algorithm's own policy. See `MetaLayer`.
        weights: of a run folder: `best` or `last`.
        device: `auto`, `cpu`, `cuda`, ...; of a run folder or a file.
    """

    #: The kind of task that the estimator is for, and the name of the other one.
    kind: Kind
    other: str

    def __init__(
        self,
        run: str | Path | Trained | MetaLayer,
        *,
        inner_steps: int | None = None,
        batch_norm: BatchNormPolicy | None = None,
        weights: str = "best",
        device: str = "auto",
    ) -> None:
        self.run, self.inner_steps, self.batch_norm = run, inner_steps, batch_norm
        self.weights, self.device = weights, device

    @classmethod
    def load(
        cls, run: str | Path, *, device: str = "auto", classes: Sequence[type] = (), weights: str = "best"
    ) -> Self:
        """An estimator from a run folder, from a file that `mlframework.save` wrote, or a fitted one from its own file.

        For the arguments see `mlframework.load`.
        """
        path = Path(run)
        if not (path.is_file() and holds_model(path)):
            made = cls(load(path, weights=weights, device=device, classes=classes))
            made.trained()  # the wrong kind of run is named here
            return made
        stored = read_model(path, classes, build_device(device))
        made = cls(Trained(stored.meta_layer))
        made.trained()
        made.model_ = TaskModel(stored.meta_layer, stored.adapted, stored.support, own=stored.own, n_way=stored.n_way)
        made.restore(stored.labels)
        return made

    def save(self, path: str | Path) -> None:
        """Writes the fitted estimator to one file of safetensors, which `load` reads."""
        check_is_fitted(self, "model_")
        self.model_.save(path, labels=self.labels())

    def labels(self) -> Sequence[Any]:
        """What a file keeps of the user's targets."""
        raise NotImplementedError

    def restore(self, labels: Sequence[Any] | None) -> None:
        """Takes over what `labels` gave."""
        raise NotImplementedError

    def trained(self) -> Trained:
        """The run, loaded; one for tasks of another kind is refused."""
        run = self.run
        found = run if isinstance(run, Trained) else Trained(run) if isinstance(run, MetaLayer) else None
        found = found or load(run, weights=self.weights, device=self.device)  # type: ignore[arg-type]
        kind = found.meta_layer.task.spec.kind
        if kind != self.kind:
            shown = run if isinstance(run, str | Path) else type(found.meta_layer).__name__
            raise InvalidValue("run", shown, f"was trained on {kind} tasks: use {self.other}")
        return found

    def checked(self, X: Any, *, like: Trained, fitting: bool) -> Any:
        """The inputs, with scikit-learn's own checks where they are rows of numbers."""
        if has_columns(X):
            return validate_data(self, X, reset=fitting, skip_check_array=True) if not isinstance(X, Mapping) else X
        if len(like.meta_layer.task.spec.x_shape) != 1:
            return X
        # NaN and infinity are left to the task, which may fill them in.
        return validate_data(self, as_plain("x", X), reset=fitting, dtype="numeric", ensure_all_finite=False)

    def queries(self, X: Any) -> tuple[TaskModel, Any]:
        check_is_fitted(self, "model_")
        return self.model_, self.checked(X, like=Trained(self.model_.meta_layer), fitting=False)

    def __sklearn_clone__(self) -> Self:
        """An estimator that is not fitted, of the same run: nothing changes that, so that copies share it."""
        return type(self)(**self.get_params(deep=False))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        layer = self.run.meta_layer if isinstance(self.run, Trained) else self.run
        tags.input_tags.allow_nan = isinstance(layer, MetaLayer) and layer.task.takes_missing
        return tags


class FewShotClassifier(ClassifierMixin, FewShotEstimator):
    """A trained run as a classifier; `classes_` are the user's own labels.

    Algorithms whose model is made of the support set alone take any number of classes (`MetaLayer.any_n_way`). Others
    take as many as they were trained with, or fewer: the outputs for the rest are left out.

    Where classes keep their names in all tasks, as those of a table, `classes_` are all of them, whichever the support
    set holds.

    >>> from mlframework import LinearModel, LinearTables, Prototypes, TablePrior
    >>> task = TablePrior(kind="classification", generator={"linear": LinearTables()})
    >>> shop = FewShotClassifier(Prototypes(LinearModel(task.spec), task))
    >>> shop.fit([[1.0, 2.0], [3.0, 1.0], [0.5, 2.5]], ["tea", "coffee", "tea"]).predict([[0.9, 2.1]]).tolist()
    ['tea']
    """

    kind, other = "classification", "FewShotRegressor"

    def fit(self, X: Any, y: Any) -> Self:
        """Adapts to inputs and their labels: texts, numbers or truth values, of classes of any size."""
        trained = self.trained()
        X = self.checked(X, like=trained, fitting=True)
        y = self.labels_of(y, count_of(X))
        names = trained.meta_layer.task.class_names
        self.classes_, ids = np.unique(y, return_inverse=True) if names is None else numbered(y, names)
        self.model_ = trained.adapt(X, ids.reshape(-1), inner_steps=self.inner_steps, n_way=len(self.classes_))
        return self

    @staticmethod
    def labels_of(y: Any, count: int) -> np.ndarray:
        """The labels `[n]`, one for each of so many inputs."""
        if y is None:
            raise InvalidData("y", None, "requires y to be passed, but the target y is None: one label for each input")
        y = column_or_1d(to_numpy(y), warn=True)
        check_classification_targets(y)
        if len(y) != count:
            raise InvalidData("y", f"{len(y)} labels", f"must be one for each of {count} inputs")
        return y

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest label of each input, `[n]`."""
        likeliest = self.predict_proba(X).argmax(1)
        return self.classes_[likeliest]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `[n, classes]`, in the order of `classes_`."""
        model, X = self.queries(X)
        return model.predict(X, batch_norm=self.batch_norm).double().softmax(-1).cpu().numpy()

    def labels(self) -> Sequence[Any]:
        return list(self.classes_)

    def restore(self, labels: Sequence[Any] | None) -> None:
        if labels is None:
            raise InvalidValue("run", "a file without labels", "TaskModel.load reads it")
        self.classes_ = np.array(labels)


class FewShotRegressor(RegressorMixin, FewShotEstimator):
    """A trained run as a regressor, in the data's own units."""

    kind, other = "regression", "FewShotClassifier"

    def fit(self, X: Any, y: Any) -> Self:
        """Adapts to inputs and their values, `[n]` or `[n, outputs]`."""
        if y is None:
            raise InvalidData("y", None, "requires y to be passed, but the target y is None: one value for each input")
        trained = self.trained()
        X = self.checked(X, like=trained, fitting=True)
        y = check_array(as_plain("y", to_numpy(y)), ensure_2d=False, dtype="numeric", input_name="y")
        if y.ndim == 2 and y.shape[1] == 1 and trained.meta_layer.task.spec.out_features == 1:
            y = column_or_1d(y, warn=True)
        self.flat_ = y.ndim == 1
        self.model_ = trained.adapt(X, y, inner_steps=self.inner_steps)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Values `[n]` or `[n, outputs]`, as `y` was; with `return_std` their standard deviations as well.

        Raises:
            InvalidValue: the algorithm states no deviation.
        """
        model, X = self.queries(X)
        found = model.predict_distribution(X, batch_norm=self.batch_norm)
        values = [found.prediction]
        if return_std:
            if found.variance is None:
                why = f"{type(model.meta_layer).__name__} states no deviation: deep_kernel does"
                raise InvalidValue("return_std", True, why)
            values.append(found.variance.sqrt())
        arrays = [each.double().cpu().numpy() for each in values]
        flat = [each[:, 0] if self.flat_ else each for each in arrays]
        return tuple(flat) if return_std else flat[0]

    def labels(self) -> Sequence[Any]:
        return [self.flat_]

    def restore(self, labels: Sequence[Any] | None) -> None:
        self.flat_ = labels != [False]


def has_columns(X: Any) -> bool:
    """Whether inputs are a data frame, or a dictionary of columns."""
    is_sparse = hasattr(X, "toarray")  # one of scipy's formats is a dictionary
    return not is_sparse and (isinstance(X, Mapping) or hasattr(X, "columns"))


def count_of(X: Any) -> int:
    """The number of inputs; of a dictionary of columns their length."""
    first = next(iter(X.values())) if isinstance(X, Mapping) else X
    return int(first.shape[0]) if hasattr(first, "shape") else len(first)


def to_numpy(y: Any) -> np.ndarray:
    """Targets as an array, tensors of any device included."""
    if np.ma.is_masked(y):
        raise InvalidData("y", "masked values", "must be a target for each input: leave the masked ones out")
    return y.detach().cpu().numpy() if hasattr(y, "detach") else np.asarray(y)


def as_plain(field: str, values: Any) -> Any:
    """The same values, as numbers where scikit-learn would take texts for numbers, or masked values for known ones."""
    try:
        is_misread = isinstance(values, Tensor | np.ma.MaskedArray) or holds_texts(np.asarray(values))
    except ValueError:  # rows of different lengths
        is_misread = True
    return as_numbers(field, values).numpy() if is_misread else values


def holds_texts(array: np.ndarray) -> bool:
    """Whether texts stand in an array of objects; scikit-learn itself refuses an array of texts."""
    return array.dtype == object and any(isinstance(value, str | bytes) for value in array.flat)


def numbered(y: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The classes of all tasks in the type of the labels, and the number of each label."""
    number = {name: place for place, name in enumerate(names)}
    found = texts_of(y)
    if unknown := [text for text in found if text not in number]:
        raise InvalidData("y", unknown[0], f"is none of the classes of the training: {', '.join(names)}")
    classes = np.array(names) if y.dtype.kind in "OUS" else np.array(names).astype(float).astype(y.dtype)
    return classes, np.array([number[text] for text in found])
