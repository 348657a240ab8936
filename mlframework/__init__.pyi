from .base_layers import *
from .episode import Episode as Episode, Examples as Examples, TaskSpec as TaskSpec
from .errors import InvalidValue as InvalidValue, UserError as UserError
from .evaluation import *
from .inner_loop import *
from .meta_layers import *
from .regularisers import *
from .runs import *
from .tasks import *
from .text import *
from .training import *

ROOMS: tuple[str, ...]
__all__: list[str]
__version__: str
