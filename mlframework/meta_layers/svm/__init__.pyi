from .kernel_machine import Fitted as Fitted, KernelMachine as KernelMachine, RegularisedFit as RegularisedFit
from .kernels import Kernel as Kernel, LinearKernel as LinearKernel, RBFKernel as RBFKernel
from .logistic import Logistic as Logistic
from .ridge import Ridge as Ridge
from .support_vectors import (
    CrammerSingerSVM as CrammerSingerSVM,
    OneVsRestSVM as OneVsRestSVM,
    SupportVectorMachine as SupportVectorMachine,
)
