"""Refuses a part of an algorithm of the wrong form: an object where a function builds one, a class where one is due."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mlframework.episode import Params
from mlframework.errors import InvalidValue
from mlframework.inner_loop.inner_update import InnerUpdate
from mlframework.meta_layers.gradient_descent.meta_gradients import MetaGradient

__all__ = ["built", "check_parts"]


def check_parts(*, update: object, inner_loss: object, norm: object, meta_gradient: object) -> None:
    """Refuses an object where a function is wanted that builds one, and the other way round."""
    check_factory("update", update, "functools.partial(SGD, lr=0.01)")
    check_factory("inner_loss", inner_loss, "functools.partial(LearnedLoss, hidden=[40])")
    check_factory("norm", norm, "functools.partial(PerStepNorm, steps=5)")
    if not isinstance(meta_gradient, MetaGradient):
        name = getattr(meta_gradient, "__name__", type(meta_gradient).__name__)
        raise InvalidValue("meta_gradient", name, "must be an object, as in Exact()")


def built(update: Callable[[Params], InnerUpdate], params: Params) -> InnerUpdate:
    """The update rule of parameters."""
    try:
        return update(params)
    except TypeError as error:  # a setting is missing, as with the bare class
        why = f"cannot be built ({error}): settings are bound before, as in functools.partial(SGD, lr=0.01)"
        raise InvalidValue("update", getattr(update, "__name__", update), why) from error


def check_factory(field: str, value: object, example: str) -> None:
    """Refuses an object where a function is wanted that builds one; None is the default."""
    if value is not None and (isinstance(value, nn.Module) or not callable(value)):
        raise InvalidValue(field, f"a {type(value).__name__}", f"must be a function that builds one, as in {example}")
