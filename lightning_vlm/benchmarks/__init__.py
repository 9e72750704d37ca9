"""Benchmarks: named samples with a prompt, sampling settings, a grading rule and an interval."""

from .benchmark import Benchmark, BenchmarkSpec, open_benchmark
from .held_out import HeldOut
