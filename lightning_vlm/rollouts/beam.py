"""Beam search over the policy's own key-value cache: likely continuations of a prompt with their exact log-probs.

Hugging Face's beam search repeats the rows of its inputs by itself, and images from the seam would no longer fit. Ours.

Shape suffixes: P prompts, K beams of a prompt, L live beams of all prompts, W extensions of a beam that are looked at,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .decode import next_positions

if TYPE_CHECKING:
    from lightning_vlm.models.batch import ModelBatch
    from lightning_vlm.models.policy import Policy


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """Settings of a beam search.

    Args:
        beams: sequences kept per prompt at every step.
        max_new_tokens: longest sequence in tokens, end-of-turn token included.
        length_penalty: a sequence of n tokens with log-prob s ranks by s / n**length_penalty. 0 ranks by s itself, 1 by
            the mean per token; what is positive favours long sequences.

    Raises:
        ValueError: `beams` or `max_new_tokens` below 1.
    """

    beams: int
    max_new_tokens: int
    length_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a beam search must be at least 1, got {getattr(self, name)}")


class Beam(NamedTuple):
    """A sequence that was found.

    Attributes:
        ids: up to and including the token that ended it, or cut at `max_new_tokens`.
        logprobs: per id, nats, full softmax: what a trainer recomputes.
        sampling_logprobs: per id, nats, after banned ids were removed.
    """

    ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]


class _Beams(NamedTuple):
    """All beams after t steps, best first; what stands behind the end of a sequence has no meaning.

    Attributes:
        total: [P, K] float64 sums of log-probs; -inf marks a place without a sequence.
        length: [P, K] tokens of each.
        live: [P, K] bool, neither ended nor without a sequence.
        tokens: [P, K, t].
        logprobs: [P, K, t].
        sampling_logprobs: [P, K, t].
    """

    total: Tensor
    length: Tensor
    live: Tensor
    tokens: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor


def beam_search(
    policy: Policy, batch: ModelBatch, search: BeamSearch, *, eos: Collection[int], banned: Collection[int]
) -> list[list[Beam]]:
    """The beams of every prompt, best first.

    Every step keeps the best among the sequences that have ended and all extensions of the others by one token. One
    that has ended keeps its log-prob and its place until better ones push it out. The search ends when all have ended,
    or at `max_new_tokens`. Prompts run through the model once, and so does each distinct image of the batch.

    Args:
        policy: in evaluation mode and without gradients, its weights whole.
        batch: the prompts, padded on the left, on the policy's device.
        search: the settings.
        eos: ids that end a sequence.
        banned: ids that are never drawn, not even when they are the most likely.

    Returns:
        For each prompt `search.beams` beams, or as many sequences as there are where there are fewer.
    """
    device = batch.input_ids.device
    eos_ids, banned_ids = (torch.tensor(sorted(ids), dtype=torch.long, device=device) for ids in (eos, banned))
    with policy.inputs(batch) as inputs:
        inputs["position_ids"] = policy.positions(batch, inputs)
        out = policy.model(**inputs, use_cache=True, logits_to_keep=1)
    beams = _prompts_alone(len(batch.input_ids), device)
    beams, rows_L = _advance(beams, out.logits[:, -1], search, eos_ids, banned_ids)
    next_P = next_positions(inputs["position_ids"], batch.attention_mask)
    for step in range(search.max_new_tokens - 1):
        if not len(rows_L):
            break
        # The cache holds the live beams alone: a sequence that has ended costs nothing more.
        out.past_key_values.reorder_cache(rows_L)
        prompt_L = beams.live.nonzero()[:, 0]
        mask = batch.attention_mask[prompt_L]
        positions = (next_P[prompt_L] + step)[:, None]
        out = policy.model(
            input_ids=beams.tokens[..., -1][beams.live][:, None],
            attention_mask=torch.cat([mask, mask.new_ones(len(mask), step + 1)], 1),
            position_ids=positions.expand(3, *positions.shape) if inputs["position_ids"].ndim == 3 else positions,
            past_key_values=out.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
        beams, rows_L = _advance(beams, out.logits[:, -1], search, eos_ids, banned_ids)
    return _found(beams)


def _prompts_alone(prompts: int, device: torch.device) -> _Beams:
    """One live beam of no tokens per prompt."""
    shape, nothing = (prompts, 1), torch.zeros(prompts, 1, 0, device=device)
    return _Beams(
        total=torch.zeros(shape, dtype=torch.double, device=device),
        length=torch.zeros(shape, dtype=torch.long, device=device),
        live=torch.ones(shape, dtype=torch.bool, device=device),
        tokens=nothing.long(),
        logprobs=nothing,
        sampling_logprobs=nothing,
    )


def _advance(
    beams: _Beams, logits_LV: Tensor, search: BeamSearch, eos_ids: Tensor, banned_ids: Tensor
) -> tuple[_Beams, Tensor]:
    """One step: (the beams that are kept, [L'] which of the present L live beams each live one continues)."""
    full_LV = logits_LV.float().log_softmax(-1)
    kept_LV = full_LV.index_fill(1, banned_ids[banned_ids < full_LV.shape[1]], -torch.inf)
    # No more than `beams` extensions of one beam can be among the best `beams` of all.
    best_LW, tokens_LW = kept_LV.topk(min(search.beams, kept_LV.shape[1]))
    width = best_LW.shape[1]

    def spread(values_LW: Tensor) -> Tensor:
        """[L, W] → [P, K·W], zero at beams that are not live."""
        return values_LW.new_zeros(*beams.live.shape, width).masked_scatter(beams.live[..., None], values_LW).flatten(1)

    # A sequence that has ended is a candidate of its own, in the first of its beam's W places.
    total = beams.total[..., None].repeat(1, 1, width)
    total[..., 1:].masked_fill_(~beams.live[..., None], -torch.inf)
    total = total.flatten(1) + spread(best_LW.double())
    length = (beams.length + beams.live).repeat_interleave(width, 1)
    ranked, chosen = (total / length.clamp(min=1) ** search.length_penalty).topk(min(search.beams, total.shape[1]))

    parent = chosen // width
    grown = beams.live.gather(1, parent)
    token = spread(tokens_LW).gather(1, chosen)

    def follow(past: Tensor, new_LW: Tensor) -> Tensor:
        """The chosen parents' [P, K, t] continued by what was chosen, [P, K', t + 1]."""
        past = past.gather(1, parent[..., None].expand(-1, -1, past.shape[2]))
        return torch.cat([past, spread(new_LW).gather(1, chosen)[..., None]], 2)

    after = _Beams(
        total=total.gather(1, chosen),
        length=length.gather(1, chosen),
        live=grown & ~torch.isin(token, eos_ids) & ranked.isfinite(),
        tokens=follow(beams.tokens, tokens_LW),
        logprobs=follow(beams.logprobs, best_LW),
        sampling_logprobs=follow(beams.sampling_logprobs, best_LW - kept_LV.logsumexp(-1, keepdim=True)),
    )
    row = (beams.live.flatten().cumsum(0) - 1).view_as(beams.live)
    return after, row.gather(1, parent)[after.live]


def _found(beams: _Beams) -> list[list[Beam]]:
    values = zip(*(part.tolist() for part in (beams.tokens, beams.logprobs, beams.sampling_logprobs)), strict=True)
    lengths = beams.length.masked_fill(beams.total.isinf(), 0).tolist()
    return [
        [Beam(*(part[:n] for part in sequence)) for n, *sequence in zip(ns, *parts, strict=True) if n]
        for ns, parts in zip(lengths, values, strict=True)
    ]
