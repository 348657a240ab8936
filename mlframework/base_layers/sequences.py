"""What networks over sequences check alike."""

from __future__ import annotations

from mlframework.episode import TaskSpec
from mlframework.errors import IncompatibleTask, InvalidValue

__all__ = ["check_sequence"]


def check_sequence(spec: TaskSpec, name: str, **sizes: int) -> None:
    """Refuses tasks that are no sequences, and sizes below 1."""
    if spec.kind != "sequence":
        other = "conv4" if len(spec.x_shape) == 3 else "mlp"
        raise IncompatibleTask(
            f"base_layer={name} reads sequences of tokens, this task is a {spec.kind}: use base_layer={other}"
        )
    for field, value in sizes.items():
        if value < 1:
            raise InvalidValue(field, value, "must be at least 1")
