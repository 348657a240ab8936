"""Meta-Gradient-Descent: MAML and its relatives."""

from mlframework.meta_layers.gradient_descent.maml import MAML
from mlframework.meta_layers.gradient_descent.meta_gradients import (
    AnnealedOrder,
    Exact,
    FirstOrder,
    Joint,
    MetaGradient,
    ParameterDifference,
    Truncated,
)
from mlframework.meta_layers.gradient_descent.norm_weights import NormWeights, PerStepNorm, SharedNorm
from mlframework.meta_layers.gradient_descent.step_weights import LastStep, MultiStep, StepWeights

__all__ = [
    "MAML",
    "AnnealedOrder",
    "Exact",
    "FirstOrder",
    "Joint",
    "LastStep",
    "MetaGradient",
    "MultiStep",
    "NormWeights",
    "ParameterDifference",
    "PerStepNorm",
    "SharedNorm",
    "StepWeights",
    "Truncated",
]
