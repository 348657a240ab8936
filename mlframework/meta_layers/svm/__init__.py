"""Meta-SVM: a task's model is the optimum of a convex problem on its support features."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
