"""Generation: sampling settings, beam search and the engines that sample from a policy."""

from .engine import Completion, Engine, PolicyEngine, completion_row, prompt_of
from .sampling import RolloutSampling, Sampling
from .server import ServerEngine
