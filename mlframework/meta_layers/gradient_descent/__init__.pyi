from .cavia import CAVIA as CAVIA, FiLM as FiLM, Shift as Shift
from .imaml import Implicit as Implicit
from .lora import LoRA as LoRA
from .maml import MAML as MAML
from .meta_gradients import (
    AnnealedOrder as AnnealedOrder,
    Exact as Exact,
    FirstOrder as FirstOrder,
    Joint as Joint,
    MetaGradient as MetaGradient,
    ParameterDifference as ParameterDifference,
    Truncated as Truncated,
)
from .norm_weights import NormWeights as NormWeights, PerStepNorm as PerStepNorm, SharedNorm as SharedNorm
from .proto_maml import ProtoMAML as ProtoMAML
from .step_weights import LastStep as LastStep, MultiStep as MultiStep, StepWeights as StepWeights
