"""Linear probe: which class a picture's mean feature tells, as far as one linear map can say.

A picture's patch features are averaged and scaled to length one; a multinomial logistic regression is fitted on them
(scikit-learn). Its C is chosen on a part of the training pictures, never on the test (PIVOT does likewise).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from lightning_vlm.metrics.statistics import bootstrap_interval
from lightning_vlm.probes.influence import Track, untracked

from .data import ProbeData
from .features import VisionEncoder

CS = tuple(10.0**power for power in range(-1, 6))  # features have length one, so that C is large
_HELD = 5  # every fifth picture of a class is held out of training to choose C
_ITERATIONS = 2000


@dataclass(frozen=True)
class LinearResult:
    """What a linear probe found.

    Attributes:
        accuracy: share of the test pictures whose class is told. low, high: its 95 % bootstrap interval over pictures.
        C: inverse strength of the penalty, as chosen. validation: {C: accuracy on the pictures held out of training}.
        classes: their names. chance: accuracy of the most frequent class of the test.
        by_class: {class: accuracy on its test pictures}.
        gold, predicted: [test] class of each test picture.
        train, test: pictures of each side. converged: whether the last fit came to its end.
        seed: of the split that C is chosen on.
    """

    accuracy: float
    low: float
    high: float
    C: float
    validation: dict[float, float]
    classes: list[str]
    chance: float
    by_class: dict[str, float]
    gold: list[str]
    predicted: list[str]
    train: int
    test: int
    converged: bool
    seed: int


def linear_probe(
    encoder: VisionEncoder,
    data: ProbeData,
    *,
    seed: int = 0,
    batch_size: int = 32,
    grid: Sequence[float] = CS,
    track: Track = untracked,
) -> LinearResult:
    """Fits a linear probe on an encoder's mean features.

    Args:
        encoder: what is probed. data: pictures with labels.
        seed: of the split that C is chosen on. batch_size: pictures in the tower at a time.
        grid: values of C to choose from. track: wraps (items, what is done), to show progress.

    Raises:
        ValueError: pictures without labels, fewer than two classes, or a class with one picture to fit on.
    """
    if missing := [p.id for p in (*data.train, *data.test) if p.label is None]:
        raise ValueError(f"{data.name}: picture {missing[0]} has no class, which a linear probe needs")
    sides = [
        encoder.pooled([p.image for p in side], batch_size=batch_size, track=track).numpy()
        for side in (data.train, data.test)
    ]
    labels = [[p.label for p in side] for side in (data.train, data.test)]
    return fit_linear(sides[0], labels[0], sides[1], labels[1], seed=seed, grid=grid)


def fit_linear(
    train: np.ndarray,
    train_labels: Sequence[str],
    test: np.ndarray,
    test_labels: Sequence[str],
    *,
    seed: int = 0,
    grid: Sequence[float] = CS,
) -> LinearResult:
    """The probe on features that are there already.

    Args:
        train, test: [pictures, D] mean features. train_labels, test_labels: a class each.
        seed, grid: as for `linear_probe`.

    Raises:
        ValueError: fewer than two classes, a class with one picture to fit on, or features that are not finite.
    """
    gold, asked = np.asarray(train_labels), np.asarray(test_labels)
    classes, counts = np.unique(gold, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"a linear probe needs at least two classes, got {len(classes)} ({', '.join(classes)})")
    if counts.min() < 2:
        raise ValueError(
            f"class {str(classes[counts.argmin()])!r} has one picture to fit on: C is chosen on a part of "
            "each class, give two at least"
        )
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        raise ValueError("features are not finite: are the weights?")
    train, test = _unit(train), _unit(test)
    held = _held_out(gold, seed)
    validation = {}
    for C in grid:
        model, _ = _fit(train[~held], gold[~held], C)
        validation[float(C)] = float((model.predict(train[held]) == gold[held]).mean())
    best = max(validation, key=lambda C: (validation[C], -C))  # of equal ones the strongest penalty
    model, converged = _fit(train, gold, best)
    predicted = model.predict(test)
    right = (predicted == asked).astype(float)
    low, high = bootstrap_interval(right, seed=seed)
    return LinearResult(
        accuracy=float(right.mean()),
        low=low,
        high=high,
        C=best,
        validation=validation,
        classes=classes.tolist(),
        chance=float(np.unique(asked, return_counts=True)[1].max() / len(asked)),
        by_class={str(name): float(right[asked == name].mean()) for name in np.unique(asked)},
        gold=asked.tolist(),
        predicted=predicted.tolist(),
        train=len(train),
        test=len(test),
        converged=converged,
        seed=seed,
    )


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length one; a row of zeros stays."""
    wide = np.asarray(features, np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def _held_out(gold: np.ndarray, seed: int) -> np.ndarray:
    """[train] bool: a fifth of every class, one picture at least and never all."""
    rng, held = np.random.default_rng(seed), np.zeros(len(gold), bool)
    for name in np.unique(gold):
        own = rng.permutation(np.flatnonzero(gold == name))
        held[own[: max(1, len(own) // _HELD)]] = True
    return held


def _fit(features: np.ndarray, gold: np.ndarray, C: float) -> tuple[LogisticRegression, bool]:
    model = LogisticRegression(C=C, max_iter=_ITERATIONS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.fit(features, gold)
    return model, not any(issubclass(w.category, ConvergenceWarning) for w in said)
