"""How much the query loss after each inner step counts."""

from __future__ import annotations

from abc import ABC, abstractmethod

from mlframework.errors import InvalidValue
from mlframework.files import KeepsArguments
from mlframework.inner_loop.inner_update import at_least

__all__ = ["LastStep", "MultiStep", "StepWeights"]


class StepWeights(KeepsArguments, ABC):
    """The weights of the query losses after 1, 2, ..., `inner_steps` steps; a loss of weight 0 is not computed."""

    @abstractmethod
    def __call__(self, inner_steps: int, outer_step: int) -> list[float]:
        """`inner_steps` weights that sum to 1, the last of them above 0, at an outer step."""


class LastStep(StepWeights):
    """Only the query loss after the last inner step counts.

    >>> LastStep()(inner_steps=3, outer_step=0)
    [0.0, 0.0, 1.0]
    """

    def __call__(self, inner_steps: int, outer_step: int) -> list[float]:
        return [0.0] * (inner_steps - 1) + [1.0]


class MultiStep(StepWeights):
    """MAML++'s multi-step loss: at first every inner step counts alike, in the end the last one alone.

    With `S` inner steps, at outer step `t` of `T` (`steps`), every step but the last weighs `max(1 - t/T, floor) / S`
    and the last one the rest. From `T` on, only the last one counts.

    Args:
        steps: outer steps until only the last inner step counts.
        floor: least weight of an earlier step until then, as a share of its initial `1/S`.

    Reference: Antoniou, Edwards, Storkey, How to train your MAML, 2019, arXiv:1810.09502, section 4 (multi-step loss).
        The paper says that weights start equal and are annealed towards the last step, and gives no schedule; this is
        that of the official code, with its floor of 0.03 and its end. Deviations: weights move at every outer step,
        where the code moves them once per epoch of 500; and the paper's sum begins with the initialisation (step 0),
        which neither the code nor this counts.

    >>> MultiStep(steps=10)(inner_steps=2, outer_step=5)
    [0.25, 0.75]
    """

    def __init__(self, steps: int, floor: float = 0.03) -> None:
        if not 0 <= floor <= 1:
            raise InvalidValue("floor", floor, "must be at least 0 and at most 1")
        self.steps, self.floor = at_least("steps", steps, 1), floor

    def __call__(self, inner_steps: int, outer_step: int) -> list[float]:
        if outer_step >= self.steps:
            return LastStep()(inner_steps, outer_step)
        earlier = max(1 - outer_step / self.steps, self.floor) / inner_steps
        return [earlier] * (inner_steps - 1) + [1 - earlier * (inner_steps - 1)]
