from .inner_update import InnerUpdate as InnerUpdate
from .learned_rules import (
    LayerStepRates as LayerStepRates,
    LearnedRates as LearnedRates,
    LearnedUpdate as LearnedUpdate,
    MetaCurvature as MetaCurvature,
)
from .rules import (
    SGD as SGD,
    Adam as Adam,
    BarzilaiBorwein as BarzilaiBorwein,
    Momentum as Momentum,
    Proximal as Proximal,
    RMSprop as RMSprop,
)
