from .sweep import RememberFolder as RememberFolder
from .trained import TaskModel as TaskModel, Trained as Trained, load as load
