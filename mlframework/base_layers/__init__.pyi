from .attribute_embedding import AttributeEmbedding as AttributeEmbedding
from .base_layer import (
    BaseLayer as BaseLayer,
    MixesExamples as MixesExamples,
    PlainLayer as PlainLayer,
    Stack as Stack,
    TakesMask as TakesMask,
)
from .conv4 import Conv4 as Conv4
from .gru import GRU as GRU
from .linear import LinearModel as LinearModel
from .mlp import MLP as MLP
from .model_zoos import Timm as Timm, Torchvision as Torchvision
from .normalisation import BatchStatistics as BatchStatistics, FixedStatistics as FixedStatistics
from .perturbed import Perturbed as Perturbed, PerturbedConv4 as PerturbedConv4
from .pretrained import Pretrained as Pretrained
from .resnet import ResNet12 as ResNet12, ResNet18 as ResNet18
from .transformer import Transformer as Transformer
