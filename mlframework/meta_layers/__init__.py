"""Meta layers: the algorithms, in their families."""

from mlframework.meta_layers.meta_layer import Adapted, MetaLayer, Metrics
from mlframework.meta_layers.on_features import OnFeatures

__all__ = ["Adapted", "MetaLayer", "Metrics", "OnFeatures"]
