"""mlframework: meta-learning research on today's PyTorch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlframework.runs.trained import load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Not imported above: what only asks for the version, or for help, need not wait for torch.
    if name == "load":
        from mlframework.runs.trained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
