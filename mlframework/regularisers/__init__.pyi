from .inequality import Inequality as Inequality
from .information_penalty import InformationPenalty as InformationPenalty
from .inner_dropout import InnerDropout as InnerDropout
from .label_permutation import LabelPermutation as LabelPermutation
from .meta_dropout import MetaDropout as MetaDropout
from .random_key import RandomKey as RandomKey, RandomTurn as RandomTurn
from .task_mixup import TaskMixup as TaskMixup
