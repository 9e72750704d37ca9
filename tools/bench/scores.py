"""Numbers from token ids alone, which both sides compute alike."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from typing import Any


def checksum(ids: Sequence[int]) -> float:
    """A number in [0, 1) that any other id, order or length changes."""
    return zlib.crc32(array("q", ids).tobytes()) / 2**32


def reward(completion_ids: Sequence[Sequence[int]], **others: Any) -> list[float]:
    """A reward in TRL's style that differs between all completions and that no model can learn."""
    return [checksum(ids) for ids in completion_ids]
