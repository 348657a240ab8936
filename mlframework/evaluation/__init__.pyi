from .baselines.conventional import Conventional as Conventional
from .baselines.conventional_on_features import ConventionalOnFeatures as ConventionalOnFeatures
from .baselines.exact_posterior import ExactPosterior as ExactPosterior
from .baselines.fine_tuning import FineTuned as FineTuned
from .baselines.from_scratch import FromScratch as FromScratch
from .baselines.in_context import SameWeightsInContext as SameWeightsInContext
from .baselines.linear_probe import LinearProbe as LinearProbe
from .baselines.matrix_factorisation import MatrixFactorisation as MatrixFactorisation
from .baselines.ngram import NGrams as NGrams
from .baselines.pooled import Pooled as Pooled
from .baselines.popularity import Popularity as Popularity
from .baselines.pretraining import Pretraining as Pretraining
from .baselines.rating_means import RatingMeans as RatingMeans
from .baselines.rating_regression import OnAllUsers as OnAllUsers, OnEachUser as OnEachUser
from .baselines.scikit_learn import OnFeatures as OnFeatures, ScikitLearn as ScikitLearn
from .choices import Candidate as Candidate, Trial as Trial
from .displays.by_inner_step import ByInnerStep as ByInnerStep
from .displays.confusion import Confusion as Confusion
from .displays.contact_sheet import ContactSheet as ContactSheet
from .displays.fits import Fits as Fits
from .displays.inner_steps import InnerSteps as InnerSteps
from .displays.learned import Learned as Learned
from .displays.predictions import Predictions as Predictions
from .displays.reliability import Reliability as Reliability
from .displays.samples import Samples as Samples
from .displays.support_influence import SupportInfluence as SupportInfluence
from .displays.text_quality import TextQuality as TextQuality
from .evaluation import Evaluation as Evaluation
from .interval import Interval as Interval
from .measures.over_fitting import OverFitting as OverFitting
from .part import Baseline as Baseline, Display as Display, Log as Log, Measure as Measure, Validated as Validated
from .predictors.laplace import LaplaceHead as LaplaceHead
from .predictors.predictor import DerivedPredictor as DerivedPredictor
from .predictors.temperature import Temperature as Temperature
from .report import Measured as Measured, MethodResult as MethodResult, Report as Report
from .task_set import TaskSet as TaskSet
from .uncertainty import Uncertainty as Uncertainty
