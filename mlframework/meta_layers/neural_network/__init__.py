"""Meta-Neural-Network: a network reads the support features and emits the task's model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
