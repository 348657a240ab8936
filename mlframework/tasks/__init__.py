"""Task distributions: where episodes come from."""

from mlframework.tasks.few_shot import ArrayTasks, ClassIndexed, FewShotClassification
from mlframework.tasks.omniglot import Omniglot
from mlframework.tasks.sinusoid import Sinusoid
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["ArrayTasks", "ClassIndexed", "FewShotClassification", "Omniglot", "Sinusoid", "TaskDistribution"]
