"""Mutual k-nearest-neighbour alignment: do pictures lie near each other where their captions do?

The metric of the Platonic Representation Hypothesis (Huh et al. 2024): of n pictures with captions, the k nearest
neighbours of each by the one feature and by the other, and the mean share of them that are the same ones. Features of
pictures are means over patches, features of captions means over the tokens of a language model's last hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from lightning_vlm.data.schema import Sample
from lightning_vlm.metrics.statistics import bootstrap_interval
from lightning_vlm.models.load import check_path
from lightning_vlm.probes.influence import Track, untracked

from .features import VisionEncoder
from .load import load_encoder, model_of


@dataclass(frozen=True)
class AlignmentResult:
    """How far two spaces agree on who is near whom.

    Attributes:
        score: mean share of common neighbours, 0 to 1. low, high: its 95 % bootstrap interval over samples.
        chance: k/(n − 1), what independent features reach.
        k: neighbours. n: samples. seed: of the bootstrap.
        language: where the captions' features come from.
        shares: [n] each sample's own share.
    """

    score: float
    low: float
    high: float
    chance: float
    k: int
    n: int
    seed: int
    language: str
    shares: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class TextFeatures:
    """A language model without its head, and its tokenizer.

    Attributes:
        name: for reports. model: token ids → last hidden states. tokenizer: of the model.
    """

    name: str
    model: Any
    tokenizer: Any

    @torch.no_grad()
    def pooled(self, texts: Sequence[str], *, batch_size: int = 32, track: Track = untracked) -> Tensor:
        """[texts, D] mean of the last hidden states over each text's tokens, float32 on the CPU."""
        found = []
        device = next(self.model.parameters()).device
        parts = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        for part in track(parts, "captions"):
            ids = [torch.tensor(self.tokenizer(text).input_ids, dtype=torch.long) for text in part]
            if empty := [text for text, own in zip(part, ids, strict=True) if not len(own)]:
                raise ValueError(f"caption {empty[0]!r} has no tokens")
            # Padding on the right, which causal attention does not see.
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(own) for own in ids], batch_first=True).to(device)
            hidden = self.model(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state.float()
            found.append(((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu())
        return torch.cat(found)


def load_language(path: str | Path) -> TextFeatures:
    """A causal language model directory, or the language model within a VLM's.

    Raises:
        ValueError: no such directory, or one without a language model or tokenizer.
    """
    path = str(path)
    if path.startswith("embedded:"):
        return language_of(load_encoder(path))
    check_path(path)
    config = AutoConfig.from_pretrained(path)
    if hasattr(config, "vision_config"):
        return language_of(load_encoder(path))
    if not hasattr(config, "vocab_size"):
        raise ValueError(f"{path} holds a {config.model_type!r} model, which reads no text: give a language model")
    try:
        model, report = AutoModel.from_pretrained(path, config=config, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if names := sorted(str(name) for name in report["missing_keys"]):
        raise ValueError(f"weights of {path} do not fill the model: {len(names)} missing ({', '.join(names[:3])})")
    return TextFeatures(path, model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)


def language_of(encoder: VisionEncoder) -> TextFeatures:
    """The language model that an encoder's own model has.

    Raises:
        ValueError: a tower alone.
    """
    policy, processor = model_of(encoder, "alignment with its own language model")
    language = policy.model.get_submodule(policy.family.language[0])
    return TextFeatures(encoder.path, language, processor.tokenizer)


def alignment(
    encoder: VisionEncoder,
    samples: Sequence[Sample],
    *,
    language: TextFeatures | None = None,
    k: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    track: Track = untracked,
) -> AlignmentResult:
    """Mutual k-NN alignment of an encoder's pictures with a language model's captions.

    Args:
        encoder: of the pictures. samples: one picture each; the last answer is its caption.
        language: of the captions; by default the encoder's own model's.
        k: neighbours. seed: of the bootstrap.
        batch_size: pictures or captions at a time. track: wraps (batches, what is done), to show progress.

    Raises:
        ValueError: samples without one picture and a caption, or too few of them for k.
    """
    language = language_of(encoder) if language is None else language
    for sample in samples:
        if len(sample.images) != 1 or not sample.chosen():
            raise ValueError(f"sample {sample.id} is not one picture with a caption, which alignment needs")
    _check_k(k, len(samples))
    pictures = encoder.pooled([s.images[0] for s in samples], batch_size=batch_size, track=track)
    captions = language.pooled([s.chosen() for s in samples], batch_size=batch_size, track=track)
    shares = mutual_knn(pictures, captions, k).numpy()
    low, high = bootstrap_interval(shares, seed=seed)
    n = len(shares)
    return AlignmentResult(float(shares.mean()), low, high, k / (n - 1), k, n, seed, language.name, shares)


def mutual_knn(a: Tensor, b: Tensor, k: int) -> Tensor:
    """[n] share of each sample's k nearest neighbours that are the same by both features; cosine similarity.

    Of neighbours that are equally near, the first come first.

    Args:
        a: [n, D]. b: [n, D'] of the same samples. k: neighbours, a sample itself not among them.

    Raises:
        ValueError: different numbers of samples, or too few of them for k.
    """
    if len(a) != len(b):
        raise ValueError(f"features of {len(a)} and {len(b)} samples cannot be compared: they must be the same ones")
    _check_k(k, len(a))
    near = []
    for features in (a, b):
        unit = torch.nn.functional.normalize(features.double(), dim=1)
        similar = (unit @ unit.T).fill_diagonal_(-torch.inf)
        order = similar.argsort(dim=1, descending=True, stable=True)[:, :k]
        near.append(torch.zeros_like(similar, dtype=torch.bool).scatter_(1, order, True))
    return (near[0] & near[1]).sum(1).double() / k


def _check_k(k: int, n: int) -> None:
    if not 1 <= k < n:
        raise ValueError(f"k is {k} with {n} samples: it must be at least 1 and below their number")
