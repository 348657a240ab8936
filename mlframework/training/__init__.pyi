from .logger import Logger as Logger
from .mlflow_logger import MLflowLogger as MLflowLogger
from .outer_loop import OuterLoop as OuterLoop
from .tensorboard_logger import TensorBoardLogger as TensorBoardLogger
from .trainer import Trainer as Trainer
