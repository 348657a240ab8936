"""Meta-Neural-Network: a network reads the support features and emits the task's model."""

from mlframework.meta_layers.neural_network.conditional_neural_process import ConditionalNeuralProcess
from mlframework.meta_layers.neural_network.hypernetwork import Hypernetwork
from mlframework.meta_layers.neural_network.in_context import InContext
from mlframework.meta_layers.neural_network.matching import Matching
from mlframework.meta_layers.neural_network.meta_networks import MetaNetworks
from mlframework.meta_layers.neural_network.prototypes import Prototypes
from mlframework.meta_layers.neural_network.relation import RelationNetwork

__all__ = [
    "ConditionalNeuralProcess",
    "Hypernetwork",
    "InContext",
    "Matching",
    "MetaNetworks",
    "Prototypes",
    "RelationNetwork",
]
