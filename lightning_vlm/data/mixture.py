"""Mixtures of sources."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from lightning_vlm.data.schema import Sample
from lightning_vlm.data.sources.base import draw, hash_unit


class Mixture(Sequence[Sample]):
    """Several sources as one; what stands at an index is a pure function of (seed, index).

    Sources take turns by weight as evenly as can be: after any number of draws each has had its share to within the
    number of sources. Each is walked in a permutation of its own per pass: nothing repeats before its pass ends.

    Indices past the end continue the walk: a sampler that hands out `epoch * len(mixture) + i` goes on where the last
    epoch stopped, so that a source whose share is small is seen whole over the epochs. A single source, and sources
    without weights, are walked in their own order, one after the other, again from the start in each epoch.

    Args:
        sources: sequences of samples.
        weights: relative shares of the draws (any positive numbers), or None to concatenate.
        seed: of turns and permutations.
        length: what `len` says, one epoch; default the sum of the sources' lengths.

    Raises:
        ValueError: no source, an empty one, two of the same label, or weights that are not one positive number each.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Sample]],
        weights: Sequence[float] | None,
        *,
        seed: int = 0,
        length: int | None = None,
    ) -> None:
        if not sources:
            raise ValueError("a mixture needs at least one source")
        if weights is not None and len(weights) != len(sources):
            raise ValueError(f"{len(sources)} sources but {len(weights)} weights; give one weight per source")
        for weight in weights or ():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(
                    f"weights must be positive numbers, got {weight}; leave a source out that has no share"
                )
        self.sources, self.seed = list(sources), seed
        self._sizes = [len(s) for s in sources]
        if 0 in self._sizes:
            raise ValueError(f"source {self._sizes.index(0)} of the mixture is empty")
        labels = [label for s in sources if (label := getattr(s, "label", ""))]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two sources of the mixture are labelled {label!r}; give each a `label` of its own")
        self.length = sum(self._sizes) if length is None else length
        if self.length < 1:
            raise ValueError(f"a mixture's length must be at least 1, got {length}")
        self._concatenated = weights is None or len(sources) == 1
        self._turns = [] if self._concatenated else _turns([Fraction(str(w)) for w in weights], seed)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(self.length))

    def locate(self, index: int) -> tuple[int, int, int]:
        """(source, element, pass) at any index ≥ 0.

        `pass` counts the walks through that source before this one.
        """
        if self._concatenated:
            epoch, position = divmod(index, sum(self._sizes))
            for source, size in enumerate(self._sizes):
                if position < size:
                    return source, position, epoch
                position -= size
        source, drawn = self._turn(index)
        epoch, position = divmod(drawn, self._sizes[source])
        return source, int(_permutation(self.seed, source, epoch, self._sizes[source])[position]), epoch

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if index < 0:
            index += self.length
        if index < 0:
            raise IndexError(f"index {index - self.length} of a mixture of length {self.length}")
        source, element, epoch = self.locate(index)
        return draw(self.sources[source], element, epoch)

    def _turn(self, index: int) -> tuple[int, int]:
        """Whose turn it is, and how often it had its turn before.

        Each source in order takes floor(k·share + offset) of the first k turns that are left to it and those after it.
        """
        for source, (share, offset) in enumerate(self._turns):
            before = math.floor(index * share + offset)
            if math.floor((index + 1) * share + offset) > before:
                return source, before
            index -= before
        return len(self.sources) - 1, index


def _turns(weights: list[Fraction], seed: int) -> list[tuple[Fraction, Fraction]]:
    """Of all sources but the last: share among those not yet served, and the offset in [0, 1) that the seed gives."""
    left, turns = sum(weights), []
    for source, weight in enumerate(weights[:-1]):
        turns.append((weight / left, Fraction(hash_unit(seed, f"turn {source}"))))
        left -= weight
    return turns


@lru_cache(maxsize=16)
def _permutation(seed: int, source: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed % 2**63, source, epoch]).permutation(size)
