from .ensemble import Ensemble as Ensemble
from .estimators import FewShotClassifier as FewShotClassifier, FewShotRegressor as FewShotRegressor
from .in_notebook import evaluate as evaluate, train as train
from .launchers.in_turn import InTurnLauncher as InTurnLauncher
from .launchers.with_joblib import JoblibLauncher as JoblibLauncher
from .launchers.with_ray import RayLauncher as RayLauncher
from .launchers.with_submitit import SlurmLauncher as SlurmLauncher, SubmititLauncher as SubmititLauncher
from .prior_fitted import TableClassifier as TableClassifier
from .saved import save as save
from .search import OptunaSweeper as OptunaSweeper
from .sweep import RememberFolder as RememberFolder
from .trained import TaskModel as TaskModel, Trained as Trained, load as load
