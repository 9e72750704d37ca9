"""Sampling from the policy token by token over its own key-value cache. Ours.

The prompt runs once, however many completions it gets; a completion that has ended leaves the batch.

Shape suffixes: P prompts, R completions of all prompts, L completions still in the batch, T prompt tokens with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .sampling import Sampling, draw_tokens, keyed_uniform

if TYPE_CHECKING:
    from lightning_vlm.models.batch import ModelBatch
    from lightning_vlm.models.policy import Policy

_ROOM = 64  # tokens that a cache grows by at least
_COPY = 2**28  # bytes of a head that is copied for speed
_LEAVE = 8  # completions that have ended leave the batch once they are one in this many


class Decoded(NamedTuple):
    """R completions.

    Attributes:
        lengths: tokens of each, those that ended it included.
        ended: of each, whether it ended by itself.
        ids: [R, longest] int64; logprobs, sampling_logprobs, entropies: [R, longest] nats (`sampling.Drawn`). What
            stands behind a completion's length has no meaning.
    """

    lengths: list[int]
    ended: list[bool]
    ids: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor
    entropies: Tensor


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer with room to grow, so that a new token does not copy what is there."""

    buffers: tuple[Tensor, Tensor] | None = None
    room = _ROOM

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[rows, heads, tokens, d] of new tokens → those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < after:
            self._move(None if before == 0 else slice(None), after, like=(key_states, value_states))
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:after] = states
        self.keys, self.values = (buffer[:, :, :after] for buffer in self.buffers)
        return self.keys, self.values

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order, each as often as it is named."""
        self._move(rows, self.get_seq_length(), like=(self.keys, self.values))
        self.keys, self.values = (buffer[:, :, : self.keys.shape[-2]] for buffer in self.buffers)

    def _move(self, rows: Tensor | slice | None, length: int, *, like: tuple[Tensor, Tensor]) -> None:
        """Into new buffers of some length and room behind it, with the rows that are kept, if any."""
        buffers = []
        for old, states in zip((self.keys, self.values), like, strict=True):
            kept = states if rows is None else old[rows]
            shape = (kept.shape[0], states.shape[1], length + self.room, states.shape[-1])
            buffers.append(states.new_empty(shape))
            if rows is not None:
                buffers[-1][:, :, : kept.shape[-2]] = kept
        self.buffers = tuple(buffers)


def decode(
    policy: Policy,
    batch: ModelBatch,
    prompt_R: Tensor,
    keys_R: Tensor,
    sampling: Sampling,
    *,
    eos: Collection[int],
    banned: Collection[int],
    text: Callable[[Sequence[int]], str],
    done: Callable[[int], Any] = lambda count: None,
    penalty_R: Tensor | None = None,
) -> Decoded:
    """Continues prompts until each completion ends by itself or has `max_new_tokens`.

    Args:
        policy: in evaluation mode and without gradients, its weights whole.
        batch: the prompts, padded on the left, on the policy's device; each runs once, and so does each image.
        prompt_R: [R] which prompt each completion continues.
        keys_R: [R] int64 key of each completion's draws (`draw_key`).
        sampling: how to draw.
        eos: ids that end a completion.
        banned: ids that are never drawn.
        text: ids → text, to look for `sampling.stop` in.
        done: called with the number of completions that have just ended.
        penalty_R: [R] repetition penalty of each completion, on the completion's own tokens alone; in place of
            `sampling.repetition_penalty`.
    """
    device, count = batch.input_ids.device, len(prompt_R)
    eos_ids, banned_ids = (torch.tensor(sorted(ids), dtype=torch.long, device=device) for ids in (eos, banned))
    cache = Cache(layer_class_to_replicate=GrowingLayer)
    with policy.inputs(batch) as inputs:
        inputs["position_ids"] = policy.positions(batch, inputs)
        out = policy.model.model(**inputs, past_key_values=cache, use_cache=True)
    head_DV = _head(policy)
    logits_LV = (out.last_hidden_state[:, -1] @ head_DV)[prompt_R]
    for layer in cache.layers:
        layer.room = min(sampling.max_new_tokens, max(_ROOM, layer.get_seq_length() // 2))
        layer.select(prompt_R)
    next_L = next_positions(inputs["position_ids"], batch.attention_mask)[prompt_R]
    masks = _Masks(policy, batch.attention_mask[prompt_R], sampling.max_new_tokens)
    axes = inputs["position_ids"].shape[:-2]

    lengths = torch.full((count,), sampling.max_new_tokens, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    columns: list[tuple[Tensor, ...]] = []  # per step: who is in the batch, and what was drawn for them
    history_LT = batch.input_ids[prompt_R] if sampling.repetition_penalty != 1 else None
    if penalty_R is not None:
        history_LT = batch.input_ids.new_empty(count, 0)
    place_L = torch.arange(count, device=device)
    live_L = torch.ones(count, dtype=torch.bool, device=device)
    stops = _Stops(sampling.stop, text, count)
    for step in range(sampling.max_new_tokens):
        own_L = None if penalty_R is None else penalty_R[place_L]
        drawn = draw_tokens(logits_LV, sampling, keyed_uniform(keys_R[place_L], step), banned_ids, history_LT, own_L)
        columns.append((place_L, *drawn))
        over_L = torch.isin(drawn.tokens, eos_ids) | stops.reached(place_L, drawn.tokens)
        over_L &= live_L
        if bool(over_L.any()):
            lengths[place_L[over_L]] = step + 1
            ended[place_L[over_L]] = True
            live_L = live_L & ~over_L
            done(int(over_L.sum()))
        alive = int(live_L.sum())
        if alive == 0 or step + 1 == sampling.max_new_tokens:
            done(alive)
            break
        tokens_L = drawn.tokens
        if history_LT is not None:
            history_LT = torch.cat([history_LT, tokens_L[:, None]], 1)
        if (len(live_L) - alive) * _LEAVE >= len(live_L):
            stay = live_L.nonzero()[:, 0]
            for layer in cache.layers:
                layer.select(stay)
            place_L, tokens_L, next_L, live_L = place_L[stay], tokens_L[stay], next_L[stay], live_L[stay]
            history_LT = None if history_LT is None else history_LT[stay]
            masks.select(stay)
        out = policy.model.model(
            input_ids=tokens_L[:, None],
            attention_mask=masks.at(step + 1),
            position_ids=(next_L + step)[:, None].expand(*axes, len(tokens_L), 1),
            past_key_values=cache,
            use_cache=True,
        )
        logits_LV = out.last_hidden_state[:, -1] @ head_DV
    return Decoded(lengths.tolist(), ended.tolist(), *_joined(columns, count))


def _head(policy: Policy) -> Tensor:
    """[D, V] head weight; on a CPU laid out as a product with few rows wants it, unless that copy were large."""
    weight = policy.head_weight().detach()
    small = weight.numel() * weight.element_size() <= _COPY
    return weight.T.contiguous() if weight.device.type == "cpu" and small else weight.T


def next_positions(positions: Tensor, mask: Tensor) -> Tensor:
    """[P] position of the first new token: one behind the largest of the prompt, over all axes of M-RoPE.

    Args:
        positions: [P, T], or [3, P, T] with M-RoPE. mask: [P, T], 0 on padding.
    """
    axes = positions if positions.ndim == 3 else positions[None]
    return axes.masked_fill(mask == 0, -1).amax((0, 2)) + 1


class _Masks:
    """Attention masks of one new token per row: none where no prompt is padded, else made once and cut to length."""

    def __init__(self, policy: Policy, mask_LT: Tensor, new_tokens: int) -> None:
        self.width = mask_LT.shape[1]
        self.mask = None if bool(mask_LT.all()) else torch.nn.functional.pad(mask_LT, (0, new_tokens), value=1)
        # Ready-made masks save transformers the work; flash-attn and sliding windows need the plain one.
        text = policy.model.config.get_text_config()
        sliding = "sliding_attention" in (getattr(text, "layer_types", None) or ())
        self.ready = "flash" not in (text._attn_implementation or "") and not sliding

    def select(self, rows: Tensor) -> None:
        if self.mask is not None:
            self.mask = self.mask[rows]

    def at(self, new_tokens: int) -> Tensor | None:
        if self.mask is None:
            return None
        cut = self.mask[:, : self.width + new_tokens]
        return cut.bool()[:, None, None] if self.ready else cut


class _Stops:
    """Looks for stop texts at the end of what has been written."""

    def __init__(self, stop: Sequence[str], text: Callable[[Sequence[int]], str], count: int) -> None:
        self.stop, self.text = stop, text
        # A text of m characters ends within its last m tokens, some of which may write nothing by themselves.
        self.window = max(map(len, stop), default=0) + 8
        self.tails: list[list[int]] = [[] for _ in range(count if stop else 0)]

    def reached(self, place_L: Tensor, tokens_L: Tensor) -> Tensor:
        if not self.stop:
            return torch.zeros_like(tokens_L, dtype=torch.bool)
        found = []
        for place, token in zip(place_L.tolist(), tokens_L.tolist(), strict=True):
            tail = self.tails[place] = [*self.tails[place], token][-self.window :]
            written = self.text(tail)
            found.append(any(stop in written for stop in self.stop))
        return torch.tensor(found, device=tokens_L.device)


def _joined(columns: list[tuple[Tensor, ...]], count: int) -> list[Tensor]:
    """[R, steps] each: ids, log-probs, log-probs of sampling, entropies."""
    joined = []
    for entry in range(1, len(columns[0])):
        out = columns[0][entry].new_zeros(count, len(columns))
        for step, column in enumerate(columns):
            out[column[0], step] = column[entry]
        joined.append(out)
    return joined
