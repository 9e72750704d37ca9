"""How clear a picture is: the detail that it resolves. Ours.

The variance of the Laplacian, the usual measure of blur, falls with every blank area and with contrast, so that a line
drawing scores below a blurred photograph. Divided by the energy of the gradient it is a mean squared frequency of the
edges: blank areas and contrast drop out, and blurring always lowers it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image
from scipy.fft import dctn

# Grey levels are whole numbers, which adds 1/12 to the energy of each coefficient and colour. ω⁴ would make much of it
# in a blurred picture; four times the mean keeps it out.
_ROUNDING = 4 * 3 / 12


def resolved_detail(picture: Image.Image) -> float:
    """Root mean square frequency of the picture's edges, in cycles along the side of a square of its area.

    D = √(W·H) / 2π · √(Σ ω⁴|F|² / Σ ω²|F|²) over the frequencies ω of the picture and its three colours: the energy of
    the Laplacian over that of the gradient, both exact by a cosine transform. A Gaussian blur tilts the mean towards
    small ω, so it lowers D; scaling a picture down cuts the high ones off and lowers D as far as there was something to
    lose, while frequencies per picture stay. D ≤ √(W·H)/√2; 0 where all pixels are equal.

    Args:
        picture: RGB.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    energy = sum(dctn(pixels[..., channel], norm="ortho") ** 2 for channel in range(3))
    energy[energy < _ROUNDING] = 0.0
    height, width = energy.shape
    down, across = _squared(height), _squared(width)
    rows, columns = energy.sum(1, dtype=np.float64), energy.sum(0, dtype=np.float64)
    gradient = rows @ down + columns @ across
    if gradient == 0:
        return 0.0
    laplacian = rows @ down**2 + 2 * (down @ (energy @ across.astype(np.float32))) + columns @ across**2
    return math.sqrt(width * height * laplacian / gradient) / (2 * math.pi)


@cache
def _squared(length: int) -> np.ndarray:
    """Squared angular frequencies of a cosine transform, in radians per pixel."""
    return (np.arange(length) * (math.pi / length)) ** 2


def clarity(pictures: Sequence[Image.Image]) -> float:
    """S_v1 = log2(1 + D) of the least clear picture (each octave of detail counts alike); 0 without pictures."""
    return min((math.log2(1 + resolved_detail(picture)) for picture in pictures), default=0.0)
