"""From samples to the rows of one optimizer step.

One loader batch is everything one optimizer step needs on this rank. Which samples step k takes is a pure function of
(seed, epoch, step): ranks take every world-th of the step's samples, so the step is the same for any number of ranks,
workers and restarts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_vlm.data.schema import BadSample, Sample
from lightning_vlm.models.batch import Row


@dataclass(slots=True)
class StepBatch:
    """What one loader hands over.

    Attributes:
        items: units that must stay together in one micro-batch (a row, or chosen and rejected), in sample order.
        samples: the samples behind the items, for grading and reports.
        skipped: (id, reason, detail) of samples that could not be used.
        steps: of each item, which of the batch's optimizer steps it belongs to; all 0 where a batch is one step.
        places: of each item, its place among the samples of its step on this rank, skipped ones counted.
    """

    items: list[list[Row]]
    samples: list[Sample]
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class StepSampler:
    """Batches of sample indices for one rank, one per loader batch, without end: the run's clock decides when to stop.

    Batch k holds positions of epoch k // batches_per_epoch, a permutation keyed by (seed, epoch); the last batch of an
    epoch may be short. Rank r takes elements r, r + world, … of each batch. Indices count on over epochs
    (epoch · size + position), so that a mixture goes on where the last epoch stopped. There is no edge between epochs
    that a resumed run could fall into: it starts at the batch that comes next.

    Args:
        size: number of samples. batch_size: samples of one optimizer step over all ranks. seed: of the permutations.
        steps: optimizer steps' samples in one batch, one step after the other.
        rank, world: this rank and the number of data-parallel ranks.
        shuffle: False keeps the data set's order.
        start: called when iteration starts: how many batches are done already.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        steps: int = 1,
        shuffle: bool = True,
        start: Callable[[], int] = lambda: 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.size, self.batch_size, self.seed, self.steps = size, batch_size, seed, steps
        self.rank, self.world, self.shuffle, self.start = rank, world, shuffle, start
        self.batches_per_epoch = -(-size // (batch_size * steps))
        self.per_step = len(range(rank, batch_size, world))  # samples of a whole step on this rank

    def epoch_order(self, epoch: int) -> list[int]:
        """Indices of all samples in the order of `epoch`."""
        first = epoch * self.size
        if not self.shuffle:
            return list(range(first, first + self.size))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return (first + torch.randperm(self.size, generator=generator)).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start(), self.batches_per_epoch)
        while True:
            order = self.epoch_order(epoch)
            for batch in range(position, self.batches_per_epoch):
                firsts = [(batch * self.steps + step) * self.batch_size for step in range(self.steps)]
                parts = [order[first : first + self.batch_size][self.rank :: self.world] for first in firsts]
                yield [index for part in parts for index in part]
            epoch, position = epoch + 1, 0


class EncodedDataset(Dataset):
    """Samples encoded on access, in a worker; what cannot be used comes back as the `BadSample` itself.

    Args:
        samples: any map-style sequence of `Sample`.
        encode: Sample → rows that stay together.
    """

    def __init__(self, samples: Sequence[Sample], encode: Callable[[Sample], list[Row]]) -> None:
        self.samples, self.encode = samples, encode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Sample, list[Row]] | BadSample:
        try:
            sample = self.samples[index]
            rows = self.encode(sample)
        except BadSample as bad:
            return bad
        return _light(sample), rows


def _light(sample: Sample) -> Sample:
    """The sample without its pictures and callables, which need not travel between processes."""
    info = {k: v for k, v in sample.info.items() if not callable(v)}
    return Sample(sample.id, sample.messages, [], sample.rejected, sample.answer, sample.source, info)


def join(encoded: list[Any], per_step: int = 0) -> StepBatch:
    """Joins a batch's encoded samples; those that cannot be used are listed apart.

    Args:
        encoded: (sample, rows) or the BadSample. per_step: samples of one optimizer step; 0 for a batch that is one.
    """
    batch = StepBatch([], [])
    for place, entry in enumerate(encoded):
        if isinstance(entry, BadSample):
            batch.skipped.append((entry.id, entry.reason, entry.detail))
        else:
            batch.samples.append(entry[0])
            batch.items.append(entry[1])
            step, own = divmod(place, per_step) if per_step else (0, place)
            batch.steps.append(step)
            batch.places.append(own)
    return batch


class RankShard:
    """Evaluation batches of this rank: every sample exactly once over all ranks, none repeated to fill up.

    Args:
        size: number of samples. batch_size: samples per batch on this rank. rank, world: as for `StepSampler`.
    """

    def __init__(self, size: int, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self.indices, self.batch_size = list(range(rank, size, world)), batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield self.indices[start : start + self.batch_size]


class DueLoader:
    """A loader that yields nothing while its evaluation is not due, and starts no workers then.

    Args:
        loader: the real loader. due: whether the evaluation is due now.
    """

    def __init__(self, loader: DataLoader, due: Callable[[], bool]) -> None:
        self.loader, self.due = loader, due

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[StepBatch]:
        return iter(self.loader) if self.due() else iter(())
