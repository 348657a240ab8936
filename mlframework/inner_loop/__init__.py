"""The inner loop: gradient steps on the support loss, and the rules by which parameters move."""

from mlframework.inner_loop.adam import Adam
from mlframework.inner_loop.barzilai_borwein import BarzilaiBorwein
from mlframework.inner_loop.inner_loop import ends, inner_loop, last
from mlframework.inner_loop.inner_update import InnerUpdate, fraction, positive
from mlframework.inner_loop.learned_rates import LayerStepRates, LearnedRates
from mlframework.inner_loop.learned_update import LearnedUpdate
from mlframework.inner_loop.meta_curvature import MetaCurvature
from mlframework.inner_loop.proximal import Proximal
from mlframework.inner_loop.rmsprop import RMSprop
from mlframework.inner_loop.sgd import SGD, Momentum

__all__ = [
    "SGD",
    "Adam",
    "BarzilaiBorwein",
    "InnerUpdate",
    "LayerStepRates",
    "LearnedRates",
    "LearnedUpdate",
    "MetaCurvature",
    "Momentum",
    "Proximal",
    "RMSprop",
    "ends",
    "fraction",
    "inner_loop",
    "last",
    "positive",
]
