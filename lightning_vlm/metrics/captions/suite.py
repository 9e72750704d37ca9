"""The COCO caption suite: BLEU, METEOR, ROUGE-L, CIDEr-D, and SPICE where its models are, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_vlm.metrics.captions.cider import DocumentFrequencies, cider_of_tokens
from lightning_vlm.metrics.captions.inputs import (
    Tokenizer,
    check_predictions,
    check_references,
    check_same_images,
    tokenize,
    tokenize_groups,
)
from lightning_vlm.metrics.captions.java import meteor_score, meteor_sums
from lightning_vlm.metrics.captions.spice import require_spice, spice_scores
from lightning_vlm.metrics.statistics import DRAWS, percentile_interval, resample_counts

BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")


@dataclass(frozen=True)
class CaptionScores:
    """Scores as fractions (CIDEr: 0 to 10) under pycocoevalcap's names; papers print them times 100.

    Attributes:
        rule: `coco/ptb` or `coco/python`; numbers of different rules are not comparable.
        corpus: metric → score of the whole set.
        per_image: image id → metric → score. Means of these are the corpus' ROUGE_L, CIDEr and SPICE, but not its BLEU
            and METEOR, which are formulas of sums.
        empty: predictions without text, scored as captions of no words.
    """

    rule: str
    corpus: dict[str, float]
    per_image: dict[str, dict[str, float]] = field(repr=False)
    empty: int
    _sums: dict[str, np.ndarray] = field(repr=False, compare=False)

    def intervals(self, draws: int = DRAWS, seed: int = 0) -> dict[str, tuple[float, float]]:
        """95 % bootstrap interval over images of each corpus score.

        BLEU and METEOR are formed anew from the sums of each draw, the others are means. CIDEr's document frequencies
        stay those of the whole set.

        Args:
            draws: how many.
            seed: of the draws.

        Returns:
            Metric → (low, high).
        """
        columns = np.concatenate(list(self._sums.values()), axis=1)
        sums = np.concatenate([c @ columns for c in resample_counts(len(columns), draws=draws, seed=seed)])
        ends = np.cumsum([part.shape[1] for part in self._sums.values()])
        parts = dict(zip(self._sums, np.split(sums, ends[:-1], axis=1), strict=True))
        return {name: percentile_interval(values) for name, values in _scores(parts, len(columns)).items()}


def score_captions(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    tokenizer: Tokenizer = "ptb",
    spice: bool = False,
    allow_empty: bool = False,
) -> CaptionScores:
    """Scores one caption per image against its references as pycocoevalcap does.

    CIDEr counts how rare words are in `references`: scores of different sets of images are not comparable, and a single
    image scores 0.

    Args:
        predictions: image id → caption.
        references: image id → captions, of the same images.
        tokenizer: `ptb` (Stanford's, needs Java; rule `coco/ptb`) or `python` (rule `coco/python`, without METEOR).
        spice: also SPICE, which needs files that pycocoevalcap does not ship, and Java.
        allow_empty: whether an empty prediction counts as a caption of no words (which scores 0 against references that
            have words) instead of being refused.

    Raises:
        ValueError: nothing to score, different images on both sides, something that is no text or empty, no Java, no
            SPICE.
        RuntimeError: Java failed.
    """
    empty = check_predictions(predictions, allow_empty=allow_empty)
    check_same_images(predictions, references)
    check_references(references)
    if spice:
        require_spice()
    captions = tokenize(list(predictions.values()), tokenizer)
    groups = tokenize_groups([references[id] for id in predictions], tokenizer)
    sums = {"BLEU": bleu_sums(captions, groups)}
    if tokenizer == "ptb":
        sums["METEOR"] = meteor_sums(captions, groups)
    sums["ROUGE_L"] = rouge_l(captions, groups)[:, None]
    sums["CIDEr"] = cider_of_tokens(captions, groups, DocumentFrequencies.of_tokens(groups, tokenizer))[:, None]
    if spice:
        sums["SPICE"] = spice_scores(captions, groups)[:, None]
    corpus = _scores({name: values.sum(axis=0) for name, values in sums.items()}, len(captions))
    rows = _scores(sums, 1)
    return CaptionScores(
        rule=f"coco/{tokenizer}",
        corpus={name: float(value) for name, value in corpus.items()},
        per_image={id: {name: float(rows[name][i]) for name in rows} for i, id in enumerate(predictions)},
        empty=empty,
        _sums=sums,
    )


def _scores(sums: Mapping[str, np.ndarray], images: int) -> dict[str, np.ndarray]:
    """Metrics from sums [..., columns] over so many images; of single images with images = 1."""
    scores = {}
    for name, values in sums.items():
        if name == "BLEU":
            scores |= dict(zip(BLEU, np.moveaxis(_bleu(values), -1, 0), strict=True))
        elif name == "METEOR":
            scores[name] = meteor_score(values)
        else:
            scores[name] = values[..., 0] / images
    return scores


def bleu_sums(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """[N, 10]: n-grams of order 1 to 4 that match, n-grams in all, length, closest length of a reference."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for caption, group in zip(captions, references, strict=True):
        scorer += (caption, list(group))
    rows = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        closest = min(counts["reflen"], key=lambda other: (abs(other - length), other))
        rows.append([*counts["correct"], *counts["guess"], length, closest])
    return np.array(rows, dtype=np.float64)


def _bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-1 to 4 of [..., 10] sums → [..., 4], with the package's constants against division by zero."""
    correct, guessed, length, reference = sums[..., :4], sums[..., 4:8], sums[..., 8:9], sums[..., 9:10]
    precision = np.cumprod((correct + 1e-15) / (guessed + 1e-9), axis=-1) ** (1 / np.arange(1, 5))
    ratio = (length + 1e-15) / (reference + 1e-9)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """[N]: F of the longest common subsequence, β 1.2, best precision and best recall over the references."""
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    return np.array([rouge.calc_score([c], group) for c, group in zip(captions, references, strict=True)])
