"""Lightning callbacks: observe, score, record, save, stop.

Names are imported when they are first used, so that one callback's dependencies are not everybody's.
"""

from importlib import import_module

_HOME = {
    "Answers": "callbacks.named_benchmarks",
    "BadSamples": "callbacks.bad_samples",
    "Benchmarks": "callbacks.benchmarks",
    "Checkpoint": "callbacks.checkpoint",
    "CocoCaptions": "callbacks.named_benchmarks",
    "Costs": "callbacks.costs",
    "DeltaLogprobStop": "callbacks.alarms",
    "EntropyCollapse": "callbacks.entropy_collapse",
    "EntropyFloor": "callbacks.alarms",
    "EntropyMonitor": "callbacks.entropy",
    "EvaluationRecord": "callbacks.evaluation_record",
    "Geometry3K": "callbacks.named_benchmarks",
    "HeldOutLoss": "callbacks.benchmarks",
    "LearningDynamics": "callbacks.dynamics",
    "MathVision": "callbacks.named_benchmarks",
    "MathVista": "callbacks.named_benchmarks",
    "Mmvp": "callbacks.named_benchmarks",
    "Progress": "callbacks.progress",
    "RolloutTable": "callbacks.rollouts",
    "RunRecord": "callbacks.record",
    "SaveModel": "callbacks.checkpoint",
    "SqueezingStop": "callbacks.alarms",
    "TaskEarlyStopping": "callbacks.early_stopping",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'callbacks' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
