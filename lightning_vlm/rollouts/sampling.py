"""How tokens are drawn: settings, and the keyed draw itself.

Shape suffixes: B rows of a generation batch, V vocabulary, T tokens seen so far, K banned ids.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as signed 64 bit, SplitMix64's increment
_BLOCK = 128  # tokens whose probabilities are added up before the inverse of the CDF is looked for among blocks
_CACHED = 2**17  # logits that a CPU handles at once: what they become stays in its cache
_HEAD = 1024  # tokens that are sorted first to find a nucleus, which seldom has more


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of a generation.

    They apply in the order repetition penalty, temperature, top-k, top-p, min-p, as in Hugging Face's generate.

    Args:
        max_new_tokens: longest completion in tokens, end-of-turn token included.
        temperature: divides the logits; 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        repetition_penalty: logits of tokens that stand in the prompt or the completion are divided by this where
            positive and multiplied where negative (Keskar et al. 2019); 1 is off.
        stop: texts that end a completion, which keeps them, as soon as it contains one of them.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)

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
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be positive (1 is off), got {self.repetition_penalty}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be a list of texts, none of them empty, got {self.stop!r}")
        if self.greedy and self.filtered:
            raise ValueError(
                "top_p, top_k and min_p have no effect with temperature 0 (greedy): drop them or set temperature"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken instead of a draw."""
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether top-p, top-k or min-p take tokens out."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True, kw_only=True)
class RolloutSampling(Sampling):
    """Settings of the rollouts that are learned from: as `Sampling`, but drawn by default, at temperature 1."""

    temperature: float = 1.0


def draw_key(seed: int, step: int, row_id: str, draw: int) -> int:
    """Signed 64-bit key of one completion: a hash of what names it, and of nothing else."""
    text = f"{seed}\x1f{step}\x1f{draw}\x1f{row_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def keyed_uniform(keys_B: Tensor, position: int) -> Tensor:
    """Uniform numbers in [0, 1) as a function of (key, position) alone: a counter-based generator without state.

    Entry b is output `position` of the SplitMix64 stream that is seeded by the row's key, in 53 bits. Integer
    arithmetic is exact, so CPU and GPU draw the same numbers, and no row depends on its neighbours.

    Args:
        keys_B: [B] int64, one per row (`draw_key`).
        position: index of the token within the completion.

    Returns:
        [B] float64.
    """
    bits_B = _shift(_splitmix(keys_B + (position + 1) * _GOLDEN_TENSOR.to(keys_B.device)), 11)
    return bits_B.double() * 2.0**-53


_GOLDEN_TENSOR = torch.tensor(_GOLDEN)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch shifts in copies of the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on int64 with wrap-around."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


class Drawn(NamedTuple):
    """One token per row.

    Attributes:
        tokens: [B] int64.
        logprobs: [B] float64, nats, under the full softmax at the sampling temperature (1 for greedy).
        sampling_logprobs: [B] float64, nats, under what is left after penalty, bans and filters. Without a penalty the
            difference to `logprobs` is minus the log of the mass that was kept.
        entropies: [B] float64, nats, of the full softmax at the sampling temperature.
    """

    tokens: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor
    entropies: Tensor


def draw_tokens(
    logits_BV: Tensor,
    sampling: Sampling,
    uniform_B: Tensor,
    banned_K: Tensor,
    seen_BT: Tensor | None = None,
    penalty_B: Tensor | None = None,
) -> Drawn:
    """Draw one token per row by inverting the cumulative distribution at `uniform_B`.

    Two levels: probabilities are added up in blocks, the block is found among their sums, the token inside the block.
    It costs some passes over [B, V], no sort and no copy of a distribution; a CPU takes some rows at a time.

    Args:
        logits_BV: [B, V] logits as the model gives them; overwritten.
        sampling: how.
        uniform_B: [B] float64 in [0, 1) (`keyed_uniform`); not looked at by greedy.
        banned_K: [K] ids that are never drawn, not even when they are the most likely.
        seen_BT: [B, T] ids that the repetition penalty bears on; needed where there is one.
        penalty_B: [B] repetition penalty of each row, in place of `sampling.repetition_penalty`.
    """
    rows = logits_BV.shape[0] if logits_BV.is_cuda else max(1, _CACHED // logits_BV.shape[1])
    banned_K = banned_K[banned_K < logits_BV.shape[1]]
    if rows >= logits_BV.shape[0]:
        return _draw(logits_BV, sampling, uniform_B, banned_K, seen_BT, penalty_B)
    none = [None] * -(-len(uniform_B) // rows)
    seen = none if seen_BT is None else seen_BT.split(rows)
    penalties = none if penalty_B is None else penalty_B.split(rows)
    parts = zip(logits_BV.split(rows), uniform_B.split(rows), seen, penalties, strict=True)
    drawn = [_draw(logits, sampling, uniform, banned_K, *own) for logits, uniform, *own in parts]
    return Drawn(*(torch.cat(column) for column in zip(*drawn, strict=True)))


def _draw(
    logits_BV: Tensor,
    sampling: Sampling,
    uniform_B: Tensor,
    banned_K: Tensor,
    seen_BT: Tensor | None,
    penalty_B: Tensor | None,
) -> Drawn:
    logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    kept_BV = _kept(logits_BV, sampling, banned_K, seen_BT, penalty_B)
    if sampling.temperature not in (0, 1):
        logits_BV /= sampling.temperature
    banned_BK = logits_BV[:, banned_K].double()
    softmax = _Softmax.of(logits_BV.index_fill_(1, banned_K, -torch.inf))
    left = softmax if kept_BV is None else _Softmax.of(kept_BV)
    tokens = left.shifted.argmax(-1) if sampling.greedy else _invert(left.probs, uniform_B)
    total, entropies = softmax.with_banned(banned_BK)
    return Drawn(tokens, softmax.logits(tokens) - total, left.logits(tokens) - left.log_total, entropies)


def _kept(
    logits_BV: Tensor, sampling: Sampling, banned_K: Tensor, seen_BT: Tensor | None, penalty_B: Tensor | None
) -> Tensor | None:
    """[B, V] logits after penalty, temperature, bans and filters; None where there are only bans."""
    if not sampling.filtered and sampling.repetition_penalty == 1 and penalty_B is None:
        return None
    if penalty_B is not None:
        logits_BV = _penalised(logits_BV, seen_BT, penalty_B[:, None].to(logits_BV.dtype))
    elif sampling.repetition_penalty != 1:
        logits_BV = _penalised(logits_BV, seen_BT, sampling.repetition_penalty)
    kept_BV = logits_BV / (sampling.temperature or 1.0)
    return filter_logits(kept_BV.index_fill_(1, banned_K, -torch.inf), sampling)


class _Softmax(NamedTuple):
    """A distribution over what is not -inf.

    Attributes:
        shifted: [B, V] logits less the largest. probs: [B, V] their exponentials.
        peak: [B] the largest logit. log_total: [B] log of the sum of exponentials. mean: [B] mean logit.
    """

    shifted: Tensor
    probs: Tensor
    peak: Tensor
    log_total: Tensor
    mean: Tensor

    @classmethod
    def of(cls, logits_BV: Tensor) -> _Softmax:
        """Of logits, which are overwritten: few passes over [B, V], and one new buffer."""
        peak_B1 = logits_BV.amax(-1, keepdim=True)
        # What was taken out has no share in the mean, but 0 · -inf would be NaN.
        shifted_BV = logits_BV.sub_(peak_B1).clamp_(min=-1e4)
        probs_BV = shifted_BV.exp()
        sums_B = probs_BV.sum(-1).double()
        dots_B = (probs_BV * shifted_BV).sum(-1).double()
        peak_B = peak_B1[:, 0].double()
        return cls(shifted_BV, probs_BV, peak_B, peak_B + sums_B.log(), peak_B + dots_B / sums_B)

    def logits(self, tokens_B: Tensor) -> Tensor:
        """[B] logits of the tokens."""
        return self.shifted.gather(1, tokens_B[:, None])[:, 0].double() + self.peak

    def with_banned(self, logits_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the sum, and entropy, of the distribution that has the banned ids, too, however likely they are."""
        total_B = torch.cat([self.log_total[:, None], logits_BK], 1).logsumexp(-1)
        mean_B = (self.log_total - total_B).exp() * self.mean
        mean_B = mean_B + ((logits_BK - total_B[:, None]).exp() * logits_BK).sum(-1)
        return total_B, total_B - mean_B


def _invert(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """[B] the first token at which the cumulative sum of probabilities exceeds uniform · sum; never one of mass 0."""
    vocabulary = probs_BV.shape[1]
    whole = vocabulary // _BLOCK * _BLOCK
    sums = [probs_BV[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)] if whole else []
    if whole < vocabulary:
        sums.append(probs_BV[:, whole:].sum(-1, keepdim=True))
    cumulative = torch.cat(sums, 1).double().cumsum(-1)
    target_B = uniform_B * cumulative[:, -1]
    block_B = _first_above(cumulative, target_B)
    before_B = torch.where(block_B > 0, cumulative.gather(1, (block_B - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    places = block_B[:, None] * _BLOCK + torch.arange(_BLOCK, device=probs_BV.device)
    inside = probs_BV.gather(1, places.clamp(max=vocabulary - 1)).double().masked_fill(places >= vocabulary, 0.0)
    return block_B * _BLOCK + _first_above(inside.cumsum(-1), target_B - before_B)


def _first_above(cumulative: Tensor, target_B: Tensor) -> Tensor:
    """[B] index of the first entry above the target, which rounding must not have carried to the last entry itself."""
    last_B = cumulative[:, -1]
    target_B = torch.minimum(target_B, torch.nextafter(last_B, torch.zeros_like(last_B))).clamp(min=0.0)
    return torch.searchsorted(cumulative, target_B[:, None], right=True)[:, 0]


def _penalised(logits_BV: Tensor, seen_BT: Tensor, penalty: float | Tensor) -> Tensor:
    """The logits with those of ids in `seen_BT` made smaller; `penalty` is one number, or [B, 1]."""
    seen = logits_BV.gather(1, seen_BT)
    return logits_BV.scatter(1, seen_BT, torch.where(seen < 0, seen * penalty, seen / penalty))


def filter_logits(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Sets what top-k, top-p and min-p remove to -inf; the most likely token always stays.

    Args:
        logits_BV: [B, V] float32, already divided by the temperature.
        sampling: the settings.
    """
    if sampling.top_k and sampling.top_k < logits_BV.shape[1]:
        smallest_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if sampling.top_p < 1:
        logits_BV = _nucleus(logits_BV, sampling.top_p)
    if sampling.min_p > 0:
        probs_BV = logits_BV.softmax(-1)
        logits_BV = logits_BV.masked_fill(probs_BV < sampling.min_p * probs_BV.amax(-1, keepdim=True), -torch.inf)
    return logits_BV


def _nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """A token stays while the mass of those more likely is short of top_p; sorts all of V only where it must."""
    log_total_B1 = logits_BV.logsumexp(-1, keepdim=True)
    for size in (_HEAD, logits_BV.shape[1]):
        size = min(size, logits_BV.shape[1])
        values, order = logits_BV.topk(size)
        probs = (values - log_total_B1).exp()
        stays = probs.cumsum(-1) - probs < top_p
        if size == logits_BV.shape[1] or not bool(stays[:, -1].any()):
            break
    kept_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(1, order, stays)
    return logits_BV.masked_fill(~kept_BV, -torch.inf)
