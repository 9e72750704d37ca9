"""A fresh projector: what stands between a tower and a language model that have never met."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_vlm.compose.shells import Shapes
from lightning_vlm.compose.weights import Piece

PROJECTORS = ("mlp2x_gelu",)


def fresh_projector(shapes: Shapes, *, seed: int, dtype: torch.dtype) -> dict[str, Piece]:
    """Random tensors for a projector: matrices from N(0, 1/fan-in), biases zero, norms one (ours).

    A variance of 1/fan-in keeps the size of what is normalised through the first layer, whatever the widths; a tower's
    usual .02 would make image tokens of a wide projector hundreds of times smaller than a narrow one's. Each matrix is
    drawn in float32 from a generator of its own, (seed, place), so it does not depend on dtype or shards.

    Args:
        shapes: {name within the projector: shape}.
        seed: of the draws.
        dtype: of the tensors.
    """
    return {
        name: Piece(shape, dtype, _draw(name, shape, seed + 7919 * i, dtype))
        for i, (name, shape) in enumerate(shapes.items())
    }


def _draw(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype):
    def draw() -> Tensor:
        if len(shape) >= 2:
            generator = torch.Generator().manual_seed(seed)
            return (torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))).to(dtype)
        return torch.zeros(shape, dtype=dtype) if name.endswith("bias") else torch.ones(shape, dtype=dtype)

    return draw
