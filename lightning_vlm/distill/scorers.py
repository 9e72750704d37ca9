"""The scorers of a sample, by name or by dotted path: `(Sample, pictures) -> float`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lightning_vlm.data.images import BadImage, load_image
from lightning_vlm.data.schema import BadSample, Sample
from lightning_vlm.data.sources.spec import one_of
from lightning_vlm.distill import clarity as pictures_
from lightning_vlm.distill import questions
from lightning_vlm.distill.penalty import Weights, min_max, penalty

Scorer = Callable[[Sample, Sequence[Image.Image]], float]

NAMES = ("clarity", "necessity", "difficulty", "demand", "integration")
"""What is scored. S_v = mean(clarity, necessity), S_t = mean(difficulty, demand), S_I = integration."""


def clarity(sample: Sample, pictures: Sequence[Image.Image]) -> float:
    """S_v1, the detail that the least clear picture resolves (`clarity.clarity`)."""
    return pictures_.clarity(pictures)


def necessity(sample: Sample, pictures: Sequence[Image.Image]) -> float:
    """S_v2 by the words of the question (`questions.necessity_of`); 0 without pictures."""
    return questions.necessity_of(questions.asked(sample)) if pictures else 0.0


def difficulty(sample: Sample, pictures: Sequence[Image.Image]) -> float:
    """Half of S_t: length, quantities and mathematics of the question (`questions.difficulty_of`)."""
    return questions.difficulty_of(questions.asked(sample))


def demand(sample: Sample, pictures: Sequence[Image.Image]) -> float:
    """Half of S_t: the reasoning that is asked for (`questions.demand_of`)."""
    return questions.demand_of(questions.asked(sample))


def integration(sample: Sample, pictures: Sequence[Image.Image]) -> float:
    """S_I: picture and text both needed, reasons asked for (`questions.integration_of`)."""
    return questions.integration_of(questions.asked(sample))


REGISTRY: dict[str, Scorer] = {f.__name__: f for f in (clarity, necessity, difficulty, demand, integration)}


def scorer_of(name: str) -> Scorer:
    """A scorer by its name in `REGISTRY`, or by `package.module:function`.

    Raises:
        ValueError: no such name, module or function; or something that cannot be called.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    module, separator, function = name.partition(":")
    if not separator:
        raise ValueError(f"unknown scorer {name!r}{one_of(name, REGISTRY)}; or give package.module:function")
    try:
        found: Any = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ValueError(f"scorer {name!r}: module {module!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"scorer {name!r}: module {module!r} has no function {function!r}")
    return found


@dataclass(frozen=True)
class Scores:
    """All scores of one sample.

    Attributes:
        raw: name → what the scorer said. scaled: name → the same, min-max over the data set, in [0, 1].
        vision, text, integration: S_v, S_t, S_I in [0, 1].
        penalty: P in [1, 2].
    """

    raw: dict[str, float]
    scaled: dict[str, float]
    vision: float
    text: float
    integration: float
    penalty: float


def raw_scores(sample: Sample, scorers: Mapping[str, Scorer]) -> dict[str, float]:
    """What the scorers say of a sample; its pictures are decoded once.

    Raises:
        BadSample: a picture is missing or broken.
        ValueError: a scorer that raises, or returns what is no finite number.
    """
    try:
        pictures = [load_image(image) for image in sample.images]
    except BadImage as bad:
        raise BadSample(sample.id, bad.reason, str(bad)) from bad
    found = {}
    for name, scorer in scorers.items():
        try:
            value = float(scorer(sample, pictures))
        except BadSample:
            raise
        except Exception as error:
            raise ValueError(
                f"scorer of {name}, sample {sample.id}: raised {type(error).__name__}: {error}; mend the function"
            ) from error
        if not math.isfinite(value):
            raise ValueError(f"scorer of {name}, sample {sample.id}: returned {value}; it must return a finite number")
        found[name] = value
    return found


def scaled_scores(raw: Sequence[Mapping[str, float]], weights: Weights) -> list[Scores]:
    """The scores of a data set from what its scorers said: min-max of each, means, penalties.

    Args:
        raw: of each sample, every one of `NAMES`. weights: of the penalty.
    """
    columns = {name: min_max([row[name] for row in raw]) for name in NAMES}
    found = []
    for index, row in enumerate(raw):
        scaled = {name: columns[name][index] for name in NAMES}
        vision = (scaled["clarity"] + scaled["necessity"]) / 2
        text = (scaled["difficulty"] + scaled["demand"]) / 2
        value = penalty(vision, text, scaled["integration"], weights)
        found.append(Scores(dict(row), scaled, vision, text, scaled["integration"], value))
    return found


def score_samples(
    samples: Iterable[Sample], scorers: Mapping[str, Scorer] | None = None, weights: Weights | None = None
) -> list[Scores]:
    """All scores of a data set.

    Args:
        samples: the data set. scorers: in place of the rules, by name. weights: of the penalty.

    Raises:
        BadSample, ValueError: as `raw_scores`.
    """
    chosen = {**REGISTRY, **(scorers or {})}
    raw = [raw_scores(sample, {name: chosen[name] for name in NAMES}) for sample in samples]
    return scaled_scores(raw, weights or Weights())
