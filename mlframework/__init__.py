"""mlframework: meta-learning research on today's PyTorch."""

from importlib import import_module

import lazy_loader

__version__ = "0.1.0"

#: The rooms whose public names are importable from here. A module is imported when one of its names is first used.
ROOMS = ("base_layers", "evaluation", "inner_loop", "meta_layers", "regularisers", "runs", "tasks", "text", "training")

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "episode": ["Episode", "Examples", "TaskSpec"],
        "errors": ["InvalidValue", "UserError"],
        **{room: import_module(f"{__name__}.{room}").__all__ for room in ROOMS},
    },
)
