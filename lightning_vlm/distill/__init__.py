"""Adaptive-length chain-of-thought distillation, and the choice of samples by what chains are worth."""

from .chains import Chain, Distiller
from .judge import Judge, ModelJudge, RuleJudge, Verdict
from .model import Model
from .penalty import Weights, min_max, penalty
from .reward import Reward, score_answer, score_gold
from .scorers import NAMES, REGISTRY, Scorer, Scores, score_samples, scorer_of
from .selection import Selection, select
