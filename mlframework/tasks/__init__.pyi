from .few_shot import (
    ArrayTasks as ArrayTasks,
    ClassIndexed as ClassIndexed,
    FewShotClassification as FewShotClassification,
)
from .images.digits import Digits as Digits
from .images.glyphs import Glyphs as Glyphs
from .images.image_folder import ImageFolder as ImageFolder
from .images.omniglot import Omniglot as Omniglot
from .ratings.latent_factors import LatentFactors as LatentFactors
from .ratings.movielens import MovieLens as MovieLens
from .ratings.rating_table import RatingTable as RatingTable
from .ratings.rating_tasks import RatingTasks as RatingTasks
from .ratings.recbole import RecBole as RecBole
from .ratings.source import Ratings as Ratings, RatingSource as RatingSource
from .regression.sinusoid import Sinusoid as Sinusoid
from .task_distribution import TaskDistribution as TaskDistribution
from .text.text_data import TextLanguages as TextLanguages, TextRoles as TextRoles
from .text.text_folder import TextFolder as TextFolder
from .text.text_lists import TextLists as TextLists
from .text.text_tasks import Source as Source, TextTasks as TextTasks
from .text.tokens import Bytes as Bytes, PretrainedTokenizer as PretrainedTokenizer, Tokens as Tokens
