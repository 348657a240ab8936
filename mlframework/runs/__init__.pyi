from .ensemble import Ensemble as Ensemble
from .in_notebook import evaluate as evaluate, train as train
from .prior_fitted import TableClassifier as TableClassifier
from .saved import save as save
from .sweep import RememberFolder as RememberFolder
from .trained import TaskModel as TaskModel, Trained as Trained, load as load
