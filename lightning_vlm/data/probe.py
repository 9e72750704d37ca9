"""Samples of a learning-dynamics probe: beside the chosen answer, the texts whose fate tells what training does.

Ours, after Ren & Sutherland, Learning Dynamics of LLM Finetuning, who follow such texts through a run. Every draw is
keyed by (seed, sample id), so that a probe set is the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.schema import BadSample, Sample
from lightning_vlm.models.batch import Row

TEXTS = ("chosen", "rejected", "paraphrase", "irrelevant", "permutation")


class ProbeSamples(Sequence[Sample]):
    """Samples with the texts of a probe in `info["probe"]` (name → text), as far as they exist.

    `chosen` and `rejected` are the sample's own. `paraphrase` is another one of `info["references"]`. `irrelevant` is
    the chosen answer of a sample with other images, none of this sample's own texts. `permutation` is the words of the
    chosen answer in another order.

    Args:
        samples: each ends with an assistant message. seed: of all draws.

    Attributes:
        texts: names of the texts that at least one sample has.

    Raises:
        ValueError: a sample without a chosen answer.
    """

    def __init__(self, samples: Sequence[Sample], *, seed: int = 0) -> None:
        self._samples, self._seed = samples, seed
        entries = [(sample.id, sample.chosen(), _shown(sample)) for sample in samples]
        self._chosen = [_answer(id, chosen) for id, chosen, _ in entries]
        self._shown = [shown for _, _, shown in entries]
        self._texts = [self._texts_of(index, sample) for index, sample in enumerate(samples)]
        self.texts = tuple(name for name in TEXTS if any(name in texts for texts in self._texts))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self._samples[index]
        return replace(sample, info={**sample.info, "probe": self._texts[index]})

    def _texts_of(self, index: int, sample: Sample) -> dict[str, str]:
        chosen = self._chosen[index]
        references = [text.strip() for text in sample.info.get("references") or [] if text.strip()]
        others = [text for text in references if text != chosen.strip()]
        drawn = {
            "rejected": sample.rejected,
            "paraphrase": self._draws(sample, "paraphrase").choice(others) if others else None,
            "irrelevant": self._irrelevant(index, sample, {chosen.strip(), *references}),
            "permutation": _permuted(chosen, self._draws(sample, "permutation")),
        }
        return {"chosen": chosen} | {name: text for name, text in drawn.items() if text is not None}

    def _irrelevant(self, index: int, sample: Sample, own: set[str]) -> str | None:
        """From a drawn place on, the first chosen answer that belongs to other images and is none of `own`."""
        own = own | ({sample.rejected.strip()} if sample.rejected else set())
        start = self._draws(sample, "irrelevant").randrange(len(self))
        for other in (*range(start, len(self)), *range(start)):
            same_images = self._shown[other] is not None and self._shown[other] == self._shown[index]
            if not same_images and self._chosen[other].strip() not in own:
                return self._chosen[other]
        return None

    def _draws(self, sample: Sample, what: str) -> Random:
        return Random(f"probe/{self._seed}/{sample.id}/{what}")


def encode_probe(encoder: Encoder, sample: Sample) -> list[Row]:
    """The prompt continued by each text of `info["probe"]`.

    Raises:
        BadSample: it cannot be used as it is; says why.
    """
    return encoder.encode_answers(sample, sample.info["probe"])


def _answer(id: str, chosen: str | None) -> str:
    if chosen is None:
        raise BadSample(id, "empty_answer", "does not end with an assistant message, which a probe follows")
    return chosen


def _shown(sample: Sample) -> int | None:
    """What tells the sample's images apart from others'; None where only decoding them would."""
    if "image" in sample.info:  # the embedded world numbers its pictures
        return hash(sample.info["image"])
    if not sample.images or not all(isinstance(image, str | bytes) for image in sample.images):
        return None
    return hash(tuple(sample.images))


def _permuted(text: str, draws: Random) -> str | None:
    """The words in another order; None where there is no other."""
    words = text.split()
    if len(set(words)) < 2:
        return None
    while True:
        permuted = draws.sample(words, len(words))
        if permuted != words:
            return " ".join(permuted)
