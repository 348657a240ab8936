"""What text needs beyond other domains: generating it, judging what was generated, and n-grams to judge models by."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
