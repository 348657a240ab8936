"""Honest evaluation: frozen task sets, choices on validation tasks, intervals, baselines, displays."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
