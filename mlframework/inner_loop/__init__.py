"""The inner loop: gradient steps on the support loss, and the rules by which parameters move."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
