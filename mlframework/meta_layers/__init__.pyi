from .feature_meta_layer import FeatureMetaLayer as FeatureMetaLayer
from .gradient_descent.cavia import CAVIA as CAVIA, FiLM as FiLM, Shift as Shift
from .gradient_descent.imaml import Implicit as Implicit
from .gradient_descent.inner_losses import (
    InnerLoss as InnerLoss,
    LearnedLoss as LearnedLoss,
    SupportLoss as SupportLoss,
)
from .gradient_descent.lora import LoRA as LoRA
from .gradient_descent.maml import MAML as MAML
from .gradient_descent.meta_gradients import (
    AnnealedOrder as AnnealedOrder,
    Exact as Exact,
    FirstOrder as FirstOrder,
    Joint as Joint,
    MetaGradient as MetaGradient,
    ParameterDifference as ParameterDifference,
    Truncated as Truncated,
)
from .gradient_descent.per_step import (
    LastStep as LastStep,
    MultiStep as MultiStep,
    NormWeights as NormWeights,
    PerStepNorm as PerStepNorm,
    SharedNorm as SharedNorm,
    StepWeights as StepWeights,
)
from .gradient_descent.proto_maml import ProtoMAML as ProtoMAML
from .gradient_descent.stopped_loss import StoppedLoss as StoppedLoss
from .meta_layer import Adapted as Adapted, MetaLayer as MetaLayer, Metrics as Metrics
from .neural_network.conditional_neural_process import ConditionalNeuralProcess as ConditionalNeuralProcess
from .neural_network.densities import BarDensity as BarDensity, Density as Density, GaussianDensity as GaussianDensity
from .neural_network.hypernetwork import Hypernetwork as Hypernetwork
from .neural_network.in_context import InContext as InContext
from .neural_network.matching import Matching as Matching
from .neural_network.meta_networks import MetaNetworks as MetaNetworks
from .neural_network.prototypes import Prototypes as Prototypes
from .neural_network.relation import RelationNetwork as RelationNetwork
from .predictive import Predictive as Predictive
from .regulariser import Regulariser as Regulariser
from .svm.deep_kernel import DeepKernel as DeepKernel
from .svm.kernel_machine import Fitted as Fitted, KernelMachine as KernelMachine
from .svm.kernels import (
    CosineKernel as CosineKernel,
    Kernel as Kernel,
    LinearKernel as LinearKernel,
    MaternKernel as MaternKernel,
    RBFKernel as RBFKernel,
)
from .svm.regularised import Logistic as Logistic, RegularisedFit as RegularisedFit, Ridge as Ridge
from .svm.shared_head import SharedHeadRidge as SharedHeadRidge
from .svm.support_vectors import (
    CrammerSingerSVM as CrammerSingerSVM,
    OneVsRestSVM as OneVsRestSVM,
    SupportVectorMachine as SupportVectorMachine,
)
