"""Thin torchmetrics classes over pure functions: per-example records, gathered over ranks, each counted once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchmetrics import Metric

from lightning_vlm.metrics.calibration import BINS, reliability
from lightning_vlm.metrics.pass_at_k import pass_at_k

Record = dict[str, Any]


class Records(Metric):
    """Per-example records of all ranks; `compute` gives the distinct ones, sorted by id and draw.

    Distributed samplers repeat samples so that all ranks have equally many; sums over ranks count those twice. Here
    every record carries its example's `id` (and `sample`, the index of the draw), and after the gather each example
    counts once. Records travel as JSON lines in a byte tensor, so that any pure function of texts and numbers becomes a
    metric: a subclass overrides `compute`.

    Example:
        >>> records = Records()
        >>> records.update([{"id": "a", "score": 1.0}, {"id": "a", "score": 1.0}])
        >>> records.compute()
        [{'id': 'a', 'score': 1.0}]
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("lines", default=[], dist_reduce_fx="cat")

    def update(self, records: Sequence[Record]) -> None:
        """Add records.

        Args:
            records: JSON objects with an `id`, and `sample` where an example has several.
        """
        self._add(records)

    def _add(self, records: Sequence[Record]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        self.lines.append(torch.frombuffer(bytearray(text.encode() or b"\n"), dtype=torch.uint8).to(self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather over ranks; a rank without records takes part with an empty line."""
        if not self.lines:
            self._add([])
        super().sync(*args, **kwargs)

    def distinct(self) -> list[Record]:
        """The records, each once.

        Raises:
            ValueError: one example has two different scores: two examples share an id.
        """
        parts = self.lines if isinstance(self.lines, list) else [self.lines]
        found: dict[tuple[str, int], Record] = {}
        for line in b"".join(part.cpu().numpy().tobytes() for part in parts).splitlines():
            if not line:
                continue
            record = json.loads(line)
            key = (record["id"], record.get("sample", 0))
            if found.setdefault(key, record).get("score") != record.get("score"):
                raise ValueError(
                    f"two different scores for example {key[0]!r}, draw {key[1]}: are there two examples of that id? "
                    "Give mixed sources different labels"
                )
        return [found[key] for key in sorted(found)]

    def compute(self) -> Any:
        """The distinct records."""
        return self.distinct()


class MeanScore(Records):
    """Mean of per-example scores, float64; NaN when nothing was scored."""

    def update(self, ids: Sequence[str], scores: Sequence[float] | torch.Tensor) -> None:
        """Add scores: one id per score; for several draws of one example make ids distinct (`f"{id}#{draw}"`).

        Raises:
            ValueError: lengths differ.
        """
        super().update(_rows(ids, score=scores))

    def compute(self) -> torch.Tensor:
        """Scalar."""
        scores = [record["score"] for record in self.distinct()]
        return torch.tensor(scores, dtype=torch.float64).mean()


class PassAtK(Records):
    """Mean over problems of the unbiased pass@k.

    Args:
        k: size of the subset; every problem needs at least k answers.
    """

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k

    def update(self, ids: Sequence[str], draws: Sequence[int], correct: Sequence[float] | torch.Tensor) -> None:
        """Add verdicts: the problem's id, the index of the draw, 1 where it is right."""
        super().update(_rows(ids, sample=draws, score=correct))

    def compute(self) -> torch.Tensor:
        """Scalar.

        Raises:
            ValueError: a problem with fewer than k answers.
        """
        verdicts: dict[str, list[float]] = {}
        for record in self.distinct():
            verdicts.setdefault(record["id"], []).append(record["score"])
        values = [pass_at_k(len(v), sum(score == 1 for score in v), self.k) for v in verdicts.values()]
        return torch.tensor(values, dtype=torch.float64).mean()


class CalibrationError(Records):
    """Expected calibration error over equal bins of confidence.

    Args:
        bins: how many.
    """

    higher_is_better = False

    def __init__(self, bins: int = BINS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = bins

    def update(self, ids: Sequence[str], confidences: Sequence[float], correct: Sequence[float]) -> None:
        """Add answers: id, probability given to the answer, 1 where it is right."""
        super().update(_rows(ids, confidence=confidences, score=correct))

    def compute(self) -> torch.Tensor:
        """Scalar."""
        records = self.distinct()
        columns = [torch.tensor([r[name] for r in records], dtype=torch.float64) for name in ("confidence", "score")]
        return torch.tensor(reliability(*columns, self.bins).error, dtype=torch.float64)


class CaptionScores(Records):
    """The COCO caption suite; `compute` gives its corpus metrics under pycocoevalcap's names.

    Args:
        tokenizer: `ptb` (needs Java) or `python`.
    """

    def __init__(self, tokenizer: str = "ptb", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokenizer = tokenizer

    def update(self, captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
        """Add captions and references by image id."""
        super().update([{"id": id, "caption": captions[id], "gold": list(references[id])} for id in captions])

    def compute(self) -> dict[str, torch.Tensor]:
        """Name → scalar."""
        from lightning_vlm.metrics.captions import score_captions

        records = self.distinct()
        scores = score_captions(
            {r["id"]: r["caption"] for r in records},
            {r["id"]: r["gold"] for r in records},
            tokenizer=self.tokenizer,
            allow_empty=True,
        )
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in scores.corpus.items()}


def _rows(ids: Sequence[str], **columns: Sequence[Any] | torch.Tensor) -> list[Record]:
    """One record per id."""
    lists = {name: values.tolist() if isinstance(values, torch.Tensor) else values for name, values in columns.items()}
    for name, values in lists.items():
        if len(values) != len(ids):
            raise ValueError(f"got {len(ids)} ids and {len(values)} values of {name!r}; one {name} per id is needed")
    return [{"id": id} | {name: lists[name][i] for name in lists} for i, id in enumerate(ids)]
