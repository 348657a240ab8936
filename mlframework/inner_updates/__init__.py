"""Inner update rules: how parameters move, given the gradient of the support loss."""

from mlframework.inner_updates.adam import Adam
from mlframework.inner_updates.inner_update import InnerUpdate, fraction, positive
from mlframework.inner_updates.learned_rates import LayerStepRates, LearnedRates
from mlframework.inner_updates.learned_update import LearnedUpdate
from mlframework.inner_updates.meta_curvature import MetaCurvature
from mlframework.inner_updates.rmsprop import RMSprop
from mlframework.inner_updates.sgd import SGD, Momentum

__all__ = [
    "SGD",
    "Adam",
    "InnerUpdate",
    "LayerStepRates",
    "LearnedRates",
    "LearnedUpdate",
    "MetaCurvature",
    "Momentum",
    "RMSprop",
    "fraction",
    "positive",
]
