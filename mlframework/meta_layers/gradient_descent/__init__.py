"""Meta-Gradient-Descent: MAML and its relatives."""

from mlframework.meta_layers.gradient_descent.maml import MAML
from mlframework.meta_layers.gradient_descent.meta_gradients import Exact, FirstOrder, MetaGradient, ParameterDifference

__all__ = ["MAML", "Exact", "FirstOrder", "MetaGradient", "ParameterDifference"]
