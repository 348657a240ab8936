"""Meta-Neural-Network: a network reads the support features and emits the task's model."""

from mlframework.meta_layers.neural_network.hypernetwork import Hypernetwork
from mlframework.meta_layers.neural_network.prototypes import Prototypes

__all__ = ["Hypernetwork", "Prototypes"]
