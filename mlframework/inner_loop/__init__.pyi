from .adam import Adam as Adam
from .barzilai_borwein import BarzilaiBorwein as BarzilaiBorwein
from .inner_update import InnerUpdate as InnerUpdate
from .learned_rates import LayerStepRates as LayerStepRates, LearnedRates as LearnedRates
from .learned_update import LearnedUpdate as LearnedUpdate
from .meta_curvature import MetaCurvature as MetaCurvature
from .proximal import Proximal as Proximal
from .rmsprop import RMSprop as RMSprop
from .sgd import SGD as SGD, Momentum as Momentum
