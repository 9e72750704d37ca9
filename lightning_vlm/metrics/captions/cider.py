"""CIDEr-D (Vedantam et al. 2015) with document frequencies that can be fixed: a metric, a reward, the best of k.

How rare an n-gram is follows from the references of a set, so the same captions score otherwise in another set: never
compare across sets, and for a reward fix the frequencies, once, from the references of the training set.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_vlm.metrics.captions.inputs import (
    Tokenizer,
    check_references,
    check_same_images,
    id_list,
    is_group,
    tokenize,
    tokenize_groups,
)

NGram = tuple[str, ...]

_ORDERS, _SIGMA = 4, 6.0


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many images' references each n-gram occurs.

    Attributes:
        tokenizer: that made the n-grams.
        images: how many there are.
        counts: n-gram (1 to 4 words) → images. An n-gram of one image is left out: it weighs as much as an unseen one.
    """

    tokenizer: str
    images: int
    counts: dict[NGram, int]

    @classmethod
    def from_references(
        cls, references: Mapping[str, Sequence[str]], *, tokenizer: Tokenizer = "ptb"
    ) -> DocumentFrequencies:
        """Counts the references of a set.

        Args:
            references: image id → captions.
            tokenizer: `ptb` (needs Java) or `python`.

        Raises:
            ValueError: no images, an image without references, a reference that is empty or no string, no Java.
        """
        check_references(references)
        return cls.of_tokens(tokenize_groups(list(references.values()), tokenizer), tokenizer)

    @classmethod
    def of_tokens(cls, references: Sequence[Sequence[str]], tokenizer: str) -> DocumentFrequencies:
        """Counts tokenised references, one group per image."""
        counts: Counter[NGram] = Counter()
        for group in references:
            counts.update({gram for text in group for grams in _ngrams(text) for gram in grams})
        return cls(tokenizer, len(references), {gram: n for gram, n in counts.items() if n > 1})

    def save(self, path: str | Path) -> None:
        """Writes JSON: tokenizer, images, counts under the words joined by spaces."""
        counts = {" ".join(gram): n for gram, n in sorted(self.counts.items())}
        text = json.dumps({"tokenizer": self.tokenizer, "images": self.images, "counts": counts}, ensure_ascii=False)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, *, tokenizer: Tokenizer = "ptb") -> DocumentFrequencies:
        """Reads what `save` wrote.

        Args:
            path: of the file.
            tokenizer: by which captions will be scored; must be the file's.

        Raises:
            ValueError: the file is another tokenizer's, or no such file's.
            OSError: it cannot be read.
        """
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            found = cls(
                saved["tokenizer"], saved["images"], {tuple(k.split(" ")): n for k, n in saved["counts"].items()}
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{path} holds no document frequencies: write it with DocumentFrequencies.save") from None
        if found.tokenizer != tokenizer:
            raise ValueError(
                f"{path} was counted with tokenizer {found.tokenizer!r}, not {tokenizer!r}: load it as tokenizer="
                f"{found.tokenizer!r} or count the references anew"
            )
        return found


def cider_d(
    captions: Sequence[str], references: Sequence[Sequence[str]], frequencies: DocumentFrequencies
) -> np.ndarray:
    """CIDEr-D of each caption, by itself: n 1 to 4, σ 6, clipped, times 10.

    With the frequencies of the scored set this is pycocoevalcap's score of each image.

    Args:
        captions: N raw captions; one without words scores 0.
        references: raw references of each; the same list may stand for many captions.
        frequencies: whose tokenizer is used.

    Returns:
        [N] float64, 0 to 10.

    Raises:
        ValueError: lengths differ, a caption without references, frequencies of a single image (all would score 0).
    """
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions but {len(references)} lists of references: give one for each")
    if bad := [i for i, group in enumerate(references) if not is_group(group)]:
        raise ValueError(f"captions {id_list(bad)}: expected a non-empty list of reference captions for each")
    if frequencies.images < 2:
        raise ValueError("document frequencies of 1 image make every CIDEr 0: count the references of a whole set")
    texts = dict.fromkeys([*captions, *(text for group in references for text in group)])
    words = dict(zip(texts, tokenize(list(texts), frequencies.tokenizer), strict=True))
    groups = [[words[text] for text in group] for group in references]
    return cider_of_tokens([words[text] for text in captions], groups, frequencies)


def cider_of_tokens(
    captions: Sequence[str], references: Sequence[Sequence[str]], frequencies: DocumentFrequencies
) -> np.ndarray:
    """`cider_d` of tokenised texts."""
    log_images = math.log(frequencies.images)
    counts = frequencies.counts
    # Captions of one image in a row share its references; more than those would fill the memory.
    reference = lru_cache(maxsize=256)(lambda text: _vector(text, counts, log_images))
    scores = np.zeros(len(captions))
    for i, (caption, group) in enumerate(zip(captions, references, strict=True)):
        own = _vector(caption, counts, log_images)
        scores[i] = 10 / _ORDERS * sum(_similarity(own, reference(text)) for text in group) / len(group)
    return scores


def topk_cider(
    captions_per_image: Mapping[str, Sequence[str]],
    references: Mapping[str, Sequence[str]],
    *,
    tokenizer: Tokenizer = "ptb",
) -> np.ndarray:
    """CIDEr-D of each of the k generations of each image; document frequencies are those of `references`.

    The mean over images of a row's maximum is the oracle, of its mean the mean CIDEr over the top k.

    Args:
        captions_per_image: image id → k captions, the same k for all.
        references: image id → captions.
        tokenizer: `ptb` (needs Java) or `python`.

    Returns:
        [images, k], in the order of `captions_per_image`.

    Raises:
        ValueError: ids or numbers of captions differ, fewer than two images, or what `from_references` refuses.
    """
    if bad := [id for id, captions in captions_per_image.items() if not is_group(captions)]:
        raise ValueError(f"images {id_list(bad)}: expected a non-empty list of captions for each")
    check_same_images(captions_per_image, references)
    frequencies = DocumentFrequencies.from_references(references, tokenizer=tokenizer)
    sizes = {len(captions) for captions in captions_per_image.values()}
    if len(sizes) > 1:
        raise ValueError(f"images have from {min(sizes)} to {max(sizes)} captions: give every image the same number")
    texts = [text for captions in captions_per_image.values() for text in captions]
    groups = [references[id] for id, captions in captions_per_image.items() for _ in captions]
    return cider_d(texts, groups, frequencies).reshape(len(captions_per_image), -1)


class _Vector(NamedTuple):
    """Weighted n-grams of a text, by order, their norms, and the text's bigrams (its length to CIDEr)."""

    weights: list[dict[NGram, float]]
    norms: list[float]
    length: int


def _ngrams(text: str) -> list[Counter[NGram]]:
    """How often each n-gram is in the text, one counter per order."""
    words = text.split()
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, _ORDERS + 1)]


def _vector(text: str, images_with: dict[NGram, int], log_images: float) -> _Vector:
    grams = _ngrams(text)
    weights = [{g: n * (log_images - math.log(images_with.get(g, 1))) for g, n in counts.items()} for counts in grams]
    return _Vector(weights, [math.hypot(*w.values()) for w in weights], grams[1].total())


def _similarity(caption: _Vector, reference: _Vector) -> float:
    """Clipped cosines summed over orders, less the farther the lengths lie apart."""
    total = 0.0
    for own, own_norm, other, other_norm in zip(
        caption.weights, caption.norms, reference.weights, reference.norms, strict=True
    ):
        if own_norm and other_norm:
            total += sum(min(w, other[g]) * other[g] for g, w in own.items() if g in other) / (own_norm * other_norm)
    return total * math.exp(-((caption.length - reference.length) ** 2) / (2 * _SIGMA**2))
