"""Necessity of the picture by context ablation: how much worse the gold text gets without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from lightning_vlm.data.schema import BadSample, Sample, message, text
from lightning_vlm.distill.model import Model


class Ablation:
    """S_v2 = log p(gold | question, picture) − log p(gold | question, blank picture), nats per token of the gold text.

    Gold is the sample's own last text, or its gold answer where it has none. A blank picture is a white page of its
    size: the mean colour would tell what colour things have. 0 without pictures; below 0 where the picture misleads
    the model. Ours, after Skywork R1V's "necessity".

    Args:
        model: reads both.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, sample: Sample, pictures: Sequence[Image.Image]) -> float:
        """The score of a sample.

        Raises:
            BadSample: nothing to score, or what the encoder refuses.
        """
        if not pictures:
            return 0.0
        gold = sample.chosen() or sample.answer
        if gold is None or not gold.strip():
            raise BadSample(sample.id, "empty_answer", "has no gold text whose log-prob the ablation could compare")
        messages = [*sample.prompt(), message("assistant", text(gold))]
        rows = [
            self.model.encoder.encode_answer(replace(sample, messages=messages, images=list(images)))[0]
            for images in (pictures, [blank(picture) for picture in pictures])
        ]
        seen, unseen = self.model.logprobs(rows)
        return seen - unseen


def blank(picture: Image.Image) -> Image.Image:
    """A white page of the picture's size."""
    return Image.new("RGB", picture.size, "white")
