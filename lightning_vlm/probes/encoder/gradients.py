"""Gradient maps: where a model looks for an answer, as far as the gradient of its loss says.

A patch's value is the L1 norm over channels of ∂L/∂f, f the patch's feature as the projector is given it and L the
negative log-likelihood of the gold answer in nats (PIVOT). Where the objects that a question is about are known, the
share of the map that falls on their patches says how well it localises (the energy-based pointing game of Score-CAM,
Wang et al. 2020); the share of the patches that they are is what a map without any sense of place would reach.

Shapes: h, w patches of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.schema import Sample
from lightning_vlm.metrics.statistics import Difference, bootstrap_interval, paired_bootstrap
from lightning_vlm.models.batch import Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.policy import evaluating
from lightning_vlm.models.vision import image_rows, replayed, tower_outputs
from lightning_vlm.probes.influence import Track, untracked

from .data import asked_about
from .features import VisionEncoder
from .load import model_of
from .segmentation import COVER, patch_cover

MAX_LENGTH = 1 << 20  # tokens of a row: nothing is cut


@dataclass(frozen=True)
class GradientMaps:
    """The maps of some samples' pictures.

    Attributes:
        samples: as given. maps: [h, w] each, L1 norm of the gradient; nats per unit of feature.
        inside: [h, w] bool each, patches of the objects that the question is about; None where they are not known or
            there are none.
        losses: negative log-likelihood of each gold answer, nats.
        seed: of the bootstrap.
    """

    samples: list[Sample]
    maps: list[Tensor]
    inside: list[Tensor | None]
    losses: list[float]
    seed: int

    @property
    def energy(self) -> np.ndarray:
        """[samples] share of each map inside; NaN where that is not known or the map is 0."""
        return np.array([_share(m, i) for m, i in zip(self.maps, self.inside, strict=True)])

    @property
    def area(self) -> np.ndarray:
        """[samples] share of the patches inside; NaN where not known."""
        return np.array([math.nan if i is None else float(i.float().mean()) for i in self.inside])

    @property
    def pointing(self) -> np.ndarray:
        """[samples] 1 where the largest value is inside, else 0; NaN where not known."""
        pairs = zip(self.maps, self.inside, strict=True)
        return np.array([math.nan if i is None else float(i.flatten()[m.argmax()]) for m, i in pairs])

    def summary(self) -> dict[str, Any]:
        """Means over the samples whose objects are known, with 95 % bootstrap intervals over samples.

        `energy`, `area` and `pointing` as above, `lift` the mean of energy − area, each (mean, low, high); `scored` the
        number of samples, `loss` the mean loss of all. Without any known objects the four are None.
        """
        known = np.isfinite(self.energy)
        found: dict[str, Any] = {"scored": int(known.sum()), "samples": len(self.maps)}
        values = {
            "energy": self.energy,
            "area": self.area,
            "lift": self.energy - self.area,
            "pointing": self.pointing,
        }
        for name, value in values.items():
            own = value[known]
            found[name] = (float(own.mean()), *bootstrap_interval(own, seed=self.seed)) if known.any() else None
        return found | {"loss": float(np.mean(self.losses))}


def gradient_maps(
    encoder: VisionEncoder,
    samples: Sequence[Sample],
    *,
    seed: int = 0,
    cover: float = COVER,
    batch_size: int = 16,
    track: Track = untracked,
) -> GradientMaps:
    """Gradient maps of samples with one picture and a gold answer each.

    Args:
        encoder: of a whole model, without `layer`.
        samples: conversations; the last answer is what the loss is of. Samples of the embedded world know their
            objects.
        seed: of the bootstrap. cover: a patch is an object's if it covers this share of it.
        batch_size: samples at a time. track: wraps (batches, what is done), to show progress.

    Raises:
        ValueError: no samples, one without exactly one picture, a tower without a model, or a layer.
    """
    policy, processor = model_of(encoder, "a gradient of the answer's loss")
    if encoder.layer is not None:
        raise ValueError(f"layer is {encoder.layer}: gradients are taken where the projector begins, leave it out")
    if not samples:
        raise ValueError("there are no samples to take gradients of")
    if odd := [s for s in samples if len(s.images) != 1]:
        raise ValueError(f"sample {odd[0].id} has {len(odd[0].images)} pictures: gradient maps need one")
    encode = Encoder(processor, max_length=MAX_LENGTH)
    parts = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    maps, losses = [], []
    with evaluating(policy):
        for part in track(parts, "gradients"):
            shown = [replace(s, images=[partial(encoder.view, s.images[0])]) for s in part]
            rows = [encode.encode_answer(sample)[0] for sample in shown]
            found, nats = feature_gradients(encoder, rows)
            maps += [gradient.abs().sum(-1).float().cpu() for gradient in found]
            losses += nats
    inside = [_inside(sample, own.shape, cover) for sample, own in zip(samples, maps, strict=True)]
    return GradientMaps(list(samples), maps, inside, losses, seed)


def feature_gradients(encoder: VisionEncoder, rows: Sequence[Row]) -> tuple[list[Tensor], list[float]]:
    """∂L/∂f of each row's picture, [h, w, D] in the places of its patches, and L of each row in nats.

    Args:
        encoder: of a whole model. rows: with one picture each; what is scored is the loss's.

    Raises:
        ValueError: a tower without a model.
    """
    policy, processor = model_of(encoder, "a gradient of the answer's loss")
    # Equal pictures are kept apart, so that each row has a gradient of its own.
    batch = collate(rows, policy.family, processor.pad_id, share_images=False).to(encoder.device)
    pixels = [row.images[0].tensors for row in rows]
    outputs = tower_outputs(policy.model, policy.family, batch.pixels, [image_rows(policy.family, p) for p in pixels])
    leaves = [output.detach().requires_grad_() for output in outputs]
    with torch.enable_grad(), replayed(policy.model, policy.family, leaves):
        scores = policy.score(batch)
        nats = -scores.per_row(scores.logprobs, len(rows))
        found = torch.autograd.grad(nats.sum(), leaves)
    return [encoder.on_grid(own, p) for own, p in zip(found, pixels, strict=True)], nats.tolist()


def compare_energy(before: GradientMaps, after: GradientMaps) -> Difference:
    """Share of the map inside, after − before, over the samples that both know; paired bootstrap over samples.

    Raises:
        ValueError: maps of other samples, or none whose objects are known.
    """
    if [s.id for s in before.samples] != [s.id for s in after.samples]:
        raise ValueError("before and after are maps of different samples")
    known = np.isfinite(before.energy) & np.isfinite(after.energy)
    if not known.any():
        raise ValueError("no sample's objects are known: nothing to compare")
    return paired_bootstrap(after.energy[known], before.energy[known], seed=before.seed)


def _inside(sample: Sample, shape: Sequence[int], cover: float) -> Tensor | None:
    if "masks" not in sample.info:
        return None
    covered = patch_cover(asked_about(sample)[1], *shape) >= cover
    return covered.any(0) if bool(covered.any()) else None


def _share(values: Tensor, inside: Tensor | None) -> float:
    total = float(values.sum())
    return math.nan if inside is None or total == 0 else float(values[inside].sum()) / total
