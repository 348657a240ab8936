"""What an algorithm learns beside its network: rates, scales, kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from mlframework.evaluation.part import Display, Log, Validated
from mlframework.meta_layers.meta_layer import MetaLayer

__all__ = ["Learned", "learned_numbers"]


class Learned(Display):
    """Writes the meta-parameters outside the base layer: single numbers as curves, others as histograms.

    Learned rates are named by the parameters that they move, as in `learned/update/features.0.weight`: one histogram
    over the entries (a rate for each) or over the inner steps (a rate for each step).
    """

    def show(self, validated: Validated, log: Log) -> None:
        numbers = {f"learned/{name}": value for name, value in learned_numbers(validated.meta_layer).items()}
        log.scalars({tag: float(value) for tag, value in numbers.items() if value.numel() == 1}, validated.step)
        log.histograms({tag: value for tag, value in numbers.items() if value.numel() > 1}, validated.step)


def learned_numbers(meta_layer: MetaLayer) -> dict[str, Tensor]:
    """The learned numbers of an algorithm outside its base layer, detached, by part and name.

    A part with a method `learned` names its own, as a kernel does with `gamma`; of others all parameters count.
    """
    found = {f"{name}": p.detach() for name, p in meta_layer.named_parameters(recurse=False) if p.requires_grad}
    for name, part in meta_layer.named_children():
        if name not in ("base_layer", "regularisers"):
            found |= {f"{name}/{number}": value for number, value in numbers_of(part).items()}
    return found


def numbers_of(part: nn.Module) -> Mapping[str, Tensor]:
    if callable(getattr(part, "learned", None)):
        return cast(Callable[[], dict[str, Tensor]], cast(Any, part).learned)()
    return {name: p.detach() for name, p in part.named_parameters() if p.requires_grad}
