"""How tokens are drawn: settings, and the keyed draw itself.

Shape suffixes: B rows of a generation batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as signed 64 bit, SplitMix64's increment


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of a generation.

    Filters apply in the order temperature, top-k, top-p, min-p, as in Hugging Face's generate.

    Args:
        max_new_tokens: longest completion in tokens, end-of-turn token included.
        temperature: divides the logits; 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")
        if self.greedy and (self.top_p < 1 or self.top_k or self.min_p):
            raise ValueError(
                "top_p, top_k and min_p have no effect with temperature 0 (greedy): drop them or set temperature"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken instead of a draw."""
        return self.temperature == 0


def draw_key(seed: int, step: int, row_id: str, draw: int) -> int:
    """Signed 64-bit key of one completion: a hash of what names it, and of nothing else."""
    text = f"{seed}\x1f{step}\x1f{draw}\x1f{row_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def gumbel_noise(keys_B: torch.Tensor, position: int, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise as a function of (key, position, token) alone: a counter-based generator without state.

    Entry (b, v) is output v of a SplitMix64 stream that is seeded by output `position` of the row's own stream. Integer
    arithmetic is exact, so CPU and GPU draw the same numbers, and no row depends on its neighbours.

    Args:
        keys_B: [B] int64, one per row (`draw_key`).
        position: index of the token within the completion.
        vocabulary: V.

    Returns:
        [B, V] float64.
    """
    seeds_B1 = _splitmix(keys_B + (position + 1) * _GOLDEN_TENSOR.to(keys_B.device))[:, None]
    counters_V = torch.arange(1, vocabulary + 1, device=keys_B.device) * _GOLDEN_TENSOR.to(keys_B.device)
    bits_BV = _shift(_splitmix(seeds_B1 + counters_V), 11)  # 53 random bits
    return -torch.log(-torch.log((bits_BV.double() + 0.5) * 2.0**-53))


_GOLDEN_TENSOR = torch.tensor(_GOLDEN)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (torch shifts in copies of the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on int64 with wrap-around."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


class KeyedSampler(LogitsProcessor):
    """Bans, filters and draws; Hugging Face's argmax over what it returns takes the drawn token.

    By the Gumbel-max trick, argmax(log p + noise) is a draw from p. The log-probs of every drawn token are kept as they
    arise: `logprobs` under the full softmax at the sampling temperature (1 for greedy), `sampling_logprobs` under what
        is
    left after bans and filters. Their difference is the log of the mass that was kept.

    Args:
        sampling: the settings.
        keys: [B] int64, one per row of the batch.
        banned: ids that are never drawn, not even when they are the most likely.
    """

    def __init__(self, sampling: Sampling, keys: torch.Tensor, banned: Collection[int]) -> None:
        self.sampling, self.keys = sampling, keys
        self.banned = torch.tensor(sorted(banned), dtype=torch.int64, device=keys.device)
        self._logprobs: list[torch.Tensor] = []
        self._sampling_logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[B, V] logits to [B, V] scores whose argmax is the drawn token."""
        logits_BV = scores.float()
        if not self.sampling.greedy:
            logits_BV = logits_BV / self.sampling.temperature
        kept_BV = logits_BV.index_fill(1, self.banned[self.banned < logits_BV.shape[1]], -torch.inf)
        kept_BV = filter_logits(kept_BV, self.sampling)
        drawn_BV = kept_BV
        if not self.sampling.greedy:
            drawn_BV = kept_BV.double() + gumbel_noise(self.keys, len(self._logprobs), kept_BV.shape[1])
        token_B1 = drawn_BV.argmax(-1, keepdim=True)
        self._logprobs.append(_logprob(logits_BV, token_B1))
        self._sampling_logprobs.append(_logprob(kept_BV, token_B1))
        return drawn_BV

    def logprobs(self) -> Sequence[Sequence[float]]:
        """Per row, per drawn position: log-prob in nats under the full softmax."""
        return torch.stack(self._logprobs, dim=1).tolist()

    def sampling_logprobs(self) -> Sequence[Sequence[float]]:
        """Per row, per drawn position: log-prob in nats after bans and filters."""
        return torch.stack(self._sampling_logprobs, dim=1).tolist()


def filter_logits(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Sets what top-k, top-p and min-p remove to -inf; the most likely token always stays.

    Args:
        logits_BV: [B, V] float32, already divided by the temperature.
        sampling: the settings.
    """
    if sampling.top_k and sampling.top_k < logits_BV.shape[1]:
        smallest_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
        probs_BV = sorted_BV.softmax(-1)
        # A token stays while the mass before it is short of top_p.
        beyond_BV = probs_BV.cumsum(-1) - probs_BV >= sampling.top_p
        logits_BV = logits_BV.masked_fill(torch.zeros_like(beyond_BV).scatter(1, order_BV, beyond_BV), -torch.inf)
    if sampling.min_p > 0:
        probs_BV = logits_BV.softmax(-1)
        logits_BV = logits_BV.masked_fill(probs_BV < sampling.min_p * probs_BV.amax(-1, keepdim=True), -torch.inf)
    return logits_BV


def _logprob(logits_BV: torch.Tensor, token_B1: torch.Tensor) -> torch.Tensor:
    return (logits_BV.gather(1, token_B1) - logits_BV.logsumexp(-1, keepdim=True)).squeeze(1)
