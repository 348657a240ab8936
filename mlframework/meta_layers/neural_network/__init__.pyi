from .conditional_neural_process import ConditionalNeuralProcess as ConditionalNeuralProcess
from .hypernetwork import Hypernetwork as Hypernetwork
from .in_context import InContext as InContext
from .matching import Matching as Matching
from .meta_networks import MetaNetworks as MetaNetworks
from .prototypes import Prototypes as Prototypes
from .relation import RelationNetwork as RelationNetwork
