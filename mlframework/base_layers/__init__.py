"""Base layers: inputs to features, features to predictions."""

from mlframework.base_layers.base_layer import BaseLayer, Stack, TakesMask
from mlframework.base_layers.conv4 import Conv4
from mlframework.base_layers.convolution import Convolution
from mlframework.base_layers.gru import GRU
from mlframework.base_layers.mlp import MLP
from mlframework.base_layers.normalisation import BatchStatistics
from mlframework.base_layers.transformer import Transformer

__all__ = ["GRU", "MLP", "BaseLayer", "BatchStatistics", "Conv4", "Convolution", "Stack", "TakesMask", "Transformer"]
