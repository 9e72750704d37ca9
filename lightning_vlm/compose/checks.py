"""What every command checks first."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_vlm.compose.weights import parse_size

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_common(out: str | Path, max_shard_size: str, dtype: str | None) -> tuple[int, torch.dtype | None]:
    """The settings that all commands have.

    Args:
        out: directory to make, which must not be there.
        max_shard_size: such as 4GB.
        dtype: name of a floating dtype, or None for none.

    Returns:
        Bytes of a shard, and the dtype.

    Raises:
        ValueError: what is wrong with one of them.
    """
    if Path(out).exists():
        raise ValueError(f"--out {out} is there already: choose another directory, or remove it")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    return parse_size(max_shard_size), getattr(torch, dtype) if dtype else None
