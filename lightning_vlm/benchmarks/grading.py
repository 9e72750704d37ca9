"""Grading many answers, symbolic comparisons in several processes at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from lightning_vlm.benchmarks.rule import Record, Rule
from lightning_vlm.data.schema import Sample

_MOST_WORKERS = 8


def grade_all(rule: Rule, answers: Sequence[tuple[str, Sample]], *, workers: int | None = None) -> Iterator[Record]:
    """The record of each (output, sample), in order, as they are graded.

    Args:
        rule: how. answers: what.
        workers: processes for rules that compare symbolically; default the number of cores, at most 8.

    Raises:
        ValueError: what grading raises; nothing is scored 0 for it.
    """
    if not rule.symbolic:
        return (rule.record(output, sample) for output, sample in answers)
    pool = _pool(workers or min(os.cpu_count() or 1, _MOST_WORKERS), os.getpid())
    return pool.map(lambda answer: rule.record(*answer), answers)


@cache
def _pool(workers: int, pid: int) -> ThreadPoolExecutor:
    """Threads that live as long as the process: each has a grading process, which is slow to start."""
    return ThreadPoolExecutor(workers, thread_name_prefix="grading")
