"""Meta-SVM: a task's model is the optimum of a convex problem on its support features."""

from mlframework.meta_layers.svm.kernel_machine import Fitted, KernelMachine, RegularisedFit
from mlframework.meta_layers.svm.kernels import RBF, Kernel, Linear
from mlframework.meta_layers.svm.logistic import Logistic
from mlframework.meta_layers.svm.ridge import Ridge
from mlframework.meta_layers.svm.support_vectors import CrammerSingerSVM, OneVsRestSVM, SupportVectorMachine

__all__ = [
    "RBF",
    "CrammerSingerSVM",
    "Fitted",
    "Kernel",
    "KernelMachine",
    "Linear",
    "Logistic",
    "OneVsRestSVM",
    "RegularisedFit",
    "Ridge",
    "SupportVectorMachine",
]
