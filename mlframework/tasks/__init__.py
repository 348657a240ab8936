"""Task distributions: where episodes come from."""

from mlframework.tasks.few_shot import ArrayTasks, ClassIndexed, FewShotClassification
from mlframework.tasks.images.digits import Digits
from mlframework.tasks.images.glyphs import Glyphs
from mlframework.tasks.images.image_folder import ImageFolder
from mlframework.tasks.images.omniglot import Omniglot
from mlframework.tasks.regression.sinusoid import Sinusoid
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.tasks.text import TextFolder, TextLanguages, TextRoles, TextTasks

__all__ = [
    "ArrayTasks",
    "ClassIndexed",
    "Digits",
    "FewShotClassification",
    "Glyphs",
    "ImageFolder",
    "Omniglot",
    "Sinusoid",
    "TaskDistribution",
    "TextFolder",
    "TextLanguages",
    "TextRoles",
    "TextTasks",
]
