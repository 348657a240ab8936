from .few_shot import (
    ArrayTasks as ArrayTasks,
    ClassIndexed as ClassIndexed,
    FewShotClassification as FewShotClassification,
)
from .images.digits import Digits as Digits
from .images.glyphs import Glyphs as Glyphs
from .images.image_folder import ImageFolder as ImageFolder
from .images.omniglot import Omniglot as Omniglot
from .images.omniglot_fixed_labels import OmniglotFixedLabels as OmniglotFixedLabels
from .prior.cluster_tables import ClusterTables as ClusterTables
from .prior.gaussian_process_tables import GaussianProcessTables as GaussianProcessTables
from .prior.linear_tables import LinearTables as LinearTables
from .prior.network_tables import NetworkTables as NetworkTables
from .prior.table_generator import TableGenerator as TableGenerator, TableShape as TableShape
from .prior.table_prior import HasPosterior as HasPosterior, TablePrior as TablePrior
from .prior.tree_tables import TreeTables as TreeTables
from .ratings.latent_factors import LatentFactors as LatentFactors
from .ratings.movielens import MovieLens as MovieLens
from .ratings.rating_table import RatingTable as RatingTable
from .ratings.rating_tasks import RatingTasks as RatingTasks
from .ratings.recbole import RecBole as RecBole
from .ratings.source import Ratings as Ratings, RatingSource as RatingSource
from .regression.correlated_outputs import CorrelatedOutputs as CorrelatedOutputs
from .regression.cubics import Cubics as Cubics
from .regression.damped_oscillator import DampedOscillator as DampedOscillator
from .regression.functions import Functions as Functions
from .regression.gaussian_process import GaussianProcess as GaussianProcess
from .regression.pose import Pose as Pose
from .regression.sinusoid import Sinusoid as Sinusoid
from .regression.steps import Steps as Steps
from .tables.sklearn_tables import SklearnTables as SklearnTables
from .tables.table import Table as Table
from .task_distribution import TaskDistribution as TaskDistribution
from .text.text_data import TextLanguages as TextLanguages, TextRoles as TextRoles
from .text.text_folder import TextFolder as TextFolder
from .text.text_lists import TextLists as TextLists
from .text.text_tasks import Source as Source, TextTasks as TextTasks
from .text.tokens import Bytes as Bytes, PretrainedTokenizer as PretrainedTokenizer, Tokens as Tokens
