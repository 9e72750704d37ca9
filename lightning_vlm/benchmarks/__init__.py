"""Benchmarks: named samples with a prompt, sampling settings, a grading rule and an interval.

Names are imported when they are first used: scoring answers made elsewhere needs no torch.
"""

from importlib import import_module

_HOME = {
    "Benchmark": "benchmark",
    "BenchmarkSpec": "benchmark",
    "HeldOut": "held_out",
    "RULES": "rules",
    "Rule": "rule",
    "Summary": "rule",
    "open_benchmark": "benchmark",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
