"""Segmentation probe: which objects a patch shows, as far as a small network can tell from the patch's own feature.

A two-layer perceptron is fitted on single patches. Its loss is the binary cross-entropy of the labels that the picture
has at all, so that it is asked where things are rather than what there is; it is judged by recall over the same labels
(PIVOT, after the patch-level probes of Locality Alignment, Covert et al. 2025). A patch may have several labels.

Shapes: N patches of all pictures, D width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_vlm.metrics.statistics import mean_interval
from lightning_vlm.probes.influence import Track, untracked

from .data import Picture, ProbeData
from .features import VisionEncoder

COVER = 0.05  # of a patch; the thinnest object of the embedded world, a letter, covers 8 % of a 16-pixel patch


@dataclass(frozen=True)
class Patches:
    """The patches of some pictures, one after the other.

    Attributes:
        features: [N, D]. labels: [N, C] bool. present: [N, C] bool, the labels of the patch's picture.
        grids: (h, w) of each picture.
    """

    features: Tensor
    labels: Tensor
    present: Tensor
    grids: list[tuple[int, int]]


@dataclass(frozen=True)
class SegmentationResult:
    """What a segmentation probe found, means over seeds of the probe; patches and labels present alone count.

    Attributes:
        recall: mean over classes of the share of a class's patches that are found. low, high: its 95 % t interval
            over seeds; NaN for one seed, or where all agree.
        recall_patches: the same over all patches alike. precision: share of what is said to be there that is.
        iou: mean over classes of intersection over union. accuracy: share of all yes-or-no answers that are right.
        positives: share of them that are yes: the precision of a probe that always says yes, whose recall is 1.
        per_seed: recall of each seed. by_class: {class: recall}. classes: their names.
        seeds: those of the probe. train, test: pictures of each side. patches: (h, w) of the first test picture.
        logits: [N, C] of the test's patches by the first seed, for pictures of it.
        data: the test's patches.
    """

    recall: float
    low: float
    high: float
    recall_patches: float
    precision: float
    iou: float
    accuracy: float
    positives: float
    per_seed: list[float]
    by_class: dict[str, float]
    classes: list[str]
    seeds: list[int]
    train: int
    test: int
    patches: tuple[int, int]
    logits: Tensor = field(repr=False)
    data: Patches = field(repr=False)


def segmentation_probe(
    encoder: VisionEncoder,
    data: ProbeData,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    cover: float = COVER,
    hidden: int = 256,
    steps: int = 600,
    batch_size: int = 32,
    track: Track = untracked,
) -> SegmentationResult:
    """Fits a segmentation probe on an encoder's patch features.

    Args:
        encoder: what is probed. data: pictures with masks.
        seeds: of the probe's first weights and the order of its patches, a fit each.
        cover: a patch has every class that covers this share of it.
        hidden: width of the perceptron. steps: of AdamW, 1024 patches each.
        batch_size: pictures in the tower at a time. track: wraps (items, what is done), to show progress.

    Raises:
        ValueError: pictures without masks, fewer than two classes, or a cover that is no share.
    """
    if not 0 < cover <= 1:
        raise ValueError(f"cover is {cover}: it must be above 0 and at most 1")
    if missing := [p.id for p in (*data.train, *data.test) if p.masks is None]:
        raise ValueError(f"{data.name}: picture {missing[0]} has no masks, which a segmentation probe needs")
    classes = sorted({name for p in data.train for name in p.masks()[0]})
    train, test = (
        take_patches(encoder, side, classes, cover=cover, batch_size=batch_size, track=track)
        for side in (data.train, data.test)
    )
    return fit_segmentation(train, test, classes, seeds=seeds, hidden=hidden, steps=steps, track=track)


def take_patches(
    encoder: VisionEncoder,
    pictures: Sequence[Picture],
    classes: Sequence[str],
    *,
    cover: float = COVER,
    batch_size: int = 32,
    track: Track = untracked,
) -> Patches:
    """Features and labels of the patches of some pictures; classes that are none of `classes` are left out."""
    index = {name: n for n, name in enumerate(classes)}
    features, labels, present, grids = [], [], [], []
    found = encoder.features([p.image for p in pictures], batch_size=batch_size, track=track)
    for shown, grid in zip(pictures, found, strict=True):
        h, w = grid.shape[:2]
        names, masks = shown.masks()
        own = torch.zeros(h * w, len(classes), dtype=torch.bool)
        for name, covered in zip(names, patch_cover(masks, h, w), strict=True):
            if name in index:
                own[:, index[name]] |= covered.flatten() >= cover
        features.append(grid.flatten(0, 1))
        labels.append(own)
        present.append(own.any(0).expand_as(own))
        grids.append((h, w))
    return Patches(torch.cat(features), torch.cat(labels), torch.cat(present), grids)


def patch_cover(masks: np.ndarray, h: int, w: int) -> Tensor:
    """[objects, h, w] share of each patch that an object covers; masks are [objects, H, W] bool."""
    if not len(masks):
        return torch.zeros(0, h, w)
    return F.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(masks)).float()[None], (h, w))[0]


def fit_segmentation(
    train: Patches,
    test: Patches,
    classes: Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    hidden: int = 256,
    steps: int = 600,
    track: Track = untracked,
) -> SegmentationResult:
    """The probe on patches that are there already; arguments as for `segmentation_probe`.

    Raises:
        ValueError: no seeds, fewer than two classes, or no labels to find.
    """
    if not seeds:
        raise ValueError("seeds is empty: give one at least")
    if len(classes) < 2:
        raise ValueError(f"a segmentation probe needs at least two classes, got {len(classes)}: {list(classes)}")
    for name, side in (("fit on", train), ("judge by", test)):
        if not bool(side.labels.any()):
            raise ValueError(f"no patch to {name} has a label: lower cover, or give other pictures")
    mean, scale = train.features.mean(0), train.features.std(0).clamp(min=1e-6)
    inputs = [(side.features - mean) / scale for side in (train, test)]
    logits = [_fit(inputs[0], train, inputs[1], seed, hidden, steps) for seed in track(list(seeds), "probe")]
    scores = [_score(found, test) for found in logits]
    per_seed = [float(score["recall"].nanmean()) for score in scores]
    low, high = mean_interval(per_seed) if len(per_seed) > 1 else (math.nan, math.nan)
    means = {name: torch.stack([score[name] for score in scores]).mean(0) for name in scores[0]}
    by_class = {name: float(v) for name, v in zip(classes, means["recall"], strict=True) if not math.isnan(v)}
    return SegmentationResult(
        recall=float(np.mean(per_seed)),
        low=low,
        high=high,
        recall_patches=float(means["recall_patches"]),
        precision=float(means["precision"]),
        iou=float(means["iou"].nanmean()),
        accuracy=float(means["accuracy"]),
        positives=float(test.labels.sum() / test.present.sum()),
        per_seed=per_seed,
        by_class=by_class,
        classes=list(classes),
        seeds=list(seeds),
        train=len(train.grids),
        test=len(test.grids),
        patches=test.grids[0],
        logits=logits[0],
        data=test,
    )


def present_loss(logits: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """Mean binary cross-entropy in nats over the labels that each patch's picture has; all [N, C]."""
    losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return (losses * present).sum() / present.sum().clamp(min=1)


def _fit(inputs: Tensor, train: Patches, asked: Tensor, seed: int, hidden: int, steps: int) -> Tensor:
    """[N, C] logits of the patches `asked`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(inputs.shape[1], hidden), nn.GELU(), nn.Linear(hidden, train.labels.shape[1]))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # Patches of pictures without any label say nothing.
    useful = train.present.any(1).nonzero()[:, 0]
    for _ in range(steps):
        chosen = useful[torch.randint(len(useful), (min(1024, len(useful)),), generator=generator)]
        loss = present_loss(net(inputs[chosen]), train.labels[chosen], train.present[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        falling.step()
    with torch.no_grad():
        return net(asked)


def _score(logits: Tensor, test: Patches) -> dict[str, Tensor]:
    """Scores over the labels present; recall and iou by class, NaN for a class that is nowhere."""
    said = (logits > 0) & test.present
    hits, gold, all_said = ((v & test.present).sum(0).double() for v in (said & test.labels, test.labels, said))
    absent = gold == 0
    recall = (hits / gold).masked_fill(absent, math.nan)
    iou = (hits / (gold + all_said - hits)).masked_fill(absent, math.nan)
    right = ((said == test.labels) & test.present).sum() / test.present.sum()
    return {
        "recall": recall,
        "iou": iou,
        "recall_patches": hits.sum() / gold.sum(),
        "precision": hits.sum() / all_said.sum().clamp(min=1),
        "accuracy": right.double(),
    }
