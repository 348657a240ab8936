"""Generation of text, measures of generated texts, and n-gram models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
