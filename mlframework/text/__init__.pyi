from .generation import Sampling as Sampling
from .ngram import NGramModel as NGramModel
