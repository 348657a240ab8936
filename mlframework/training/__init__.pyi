from .logger import TensorBoardLogger as TensorBoardLogger
from .outer_loop import OuterLoop as OuterLoop
from .trainer import Trainer as Trainer
