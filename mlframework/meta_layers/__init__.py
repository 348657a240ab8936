"""Meta layers: the algorithms, in their families."""

from mlframework.meta_layers.feature_meta_layer import FeatureMetaLayer
from mlframework.meta_layers.meta_layer import Adapted, MetaLayer, Metrics

__all__ = ["Adapted", "FeatureMetaLayer", "MetaLayer", "Metrics"]
