"""The clock of optimizer steps."""

from __future__ import annotations


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; several optimizer steps may happen per batch.

    Args:
        before: optimizer steps done before the batch.
        after: optimizer steps done after it.
        every: the interval; 0 never fires.
    """
    return every > 0 and after // every > before // every
