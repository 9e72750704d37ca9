"""The one way to generate: `Engine.generate(prompts, n=…, sampling=…, keys=…)`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lightning_vlm.models.batch import ModelBatch, Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.policy import Policy, evaluating

from .beam import BeamSearch, beam_search
from .decode import decode
from .sampling import Sampling, draw_key

if TYPE_CHECKING:
    from lightning_vlm.models.processor import Processor


@dataclass(frozen=True, slots=True)
class Completion:
    """One continuation of a prompt, sampled or found by beam search.

    Attributes:
        ids: token ids, up to and including the end-of-turn token where there is one.
        text: the ids decoded, without special tokens.
        finished: whether it ended by an end-of-turn token or a stop text; False when it was cut at `max_new_tokens`.
        logprobs: per id, nats, full softmax at the sampling temperature (1 for greedy): what a trainer recomputes.
        sampling_logprobs: per id, nats, after penalty, bans and top-k/top-p/min-p: what importance correction uses.
        entropies: per id, nats, of the full softmax at the sampling temperature; empty where the engine does not say.
    """

    ids: list[int]
    text: str
    finished: bool
    logprobs: list[float]
    sampling_logprobs: list[float]
    entropies: list[float] = field(default_factory=list)


def prompt_of(row: Row) -> Row:
    """What stands before a row's first scored token, to be continued."""
    length = int(row.loss_mask.int().argmax())
    mask = torch.zeros(length, dtype=torch.bool)
    return Row(row.id, row.input_ids[:length], mask, images=row.images, name="prompt", info=row.info)


def completion_row(prompt: Row, completion: Completion) -> Row:
    """The prompt continued by the completion, the completion's tokens scored: what is trained is what was generated."""
    ids = torch.cat([prompt.input_ids, torch.tensor(completion.ids, dtype=prompt.input_ids.dtype)])
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[len(prompt) :] = True
    return Row(prompt.id, ids, mask, images=prompt.images, name="completion", info=prompt.info)


class Engine(Protocol):
    """What samples from a policy."""

    def generate(
        self, prompts: Sequence[Row], *, n: int = 1, sampling: Sampling, keys: tuple[int, int]
    ) -> list[list[Completion]]:
        """Samples completions.

        Every draw is a function of (seed, step, row id, index of the draw) and the model's distribution alone: batch
        size, the order of the prompts, rank, worker and the global random state do not enter. Rows of equal id draw
        alike.

        Args:
            prompts: rows that end where the answer begins (`Encoder.encode_prompt`).
            n: completions per prompt.
            sampling: how to draw.
            keys: (seed, step).

        Returns:
            For each prompt, in order, its n completions.
        """
        ...


class PolicyEngine:
    """Generates with the policy itself, in this process: images once, prompts once, keys and values kept.

    Args:
        policy: the policy; its Hugging Face model runs, with images encoded once per distinct image of a batch.
        processor: gives the end-of-turn, padding and banned ids, and decodes.
        batch_size: sequences (prompts × n, prompts × beams) generated together. Changes speed and memory, not what is
            drawn.
        context: called with the policy around all of a `generate`, for strategies that have to gather sharded weights
            first.
        progress: show a progress bar when a rollout takes longer than a few seconds (main process, terminal only).

    Raises:
        ValueError: `batch_size` below 1.
    """

    def __init__(
        self,
        policy: Policy,
        processor: Processor,
        *,
        batch_size: int = 64,
        context: Callable[[Policy], AbstractContextManager[Any]] | None = None,
        progress: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size of the engine must be at least 1, got {batch_size}")
        self.policy, self.processor = policy, processor
        self.batch_size, self.progress = batch_size, progress
        self.context = context or nullcontext

    def generate(
        self,
        prompts: Sequence[Row],
        *,
        n: int = 1,
        sampling: Sampling,
        keys: tuple[int, int],
        penalties: Sequence[float] | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`.

        Args:
            prompts, n, sampling, keys: see there.
            penalties: repetition penalty of each prompt's completions, in place of `sampling.repetition_penalty`. It
                bears on tokens of the completion alone: a prompt holds the token that ends a turn, and a penalty on
                that one would make completions longer.

        Raises:
            ValueError: n below 1, an empty prompt, a prompt with an image that is cut off, or one that leaves no room
                for `max_new_tokens` in the model's context; penalties that are not positive, not one per prompt, or
                beside one of `sampling`.
        """
        _check(prompts, n)
        _check_penalties(penalties, len(prompts), sampling)
        self._check_context(prompts, sampling.max_new_tokens)
        draws = 1 if sampling.greedy else n  # greedy draws of one prompt are one and the same
        jobs = [(p, d) for p in _order(prompts) for d in range(draws)]
        done: dict[tuple[int, int], Completion] = {}
        with torch.no_grad(), self.context(self.policy), evaluating(self.policy), self._bar(len(jobs)) as bar:
            for start in range(0, len(jobs), self.batch_size):
                some = jobs[start : start + self.batch_size]
                draw_keys = [draw_key(*keys, prompts[p].id, d) for p, d in some]
                own = None if penalties is None else [penalties[p] for p, _ in some]
                completions = self._generate(prompts, [p for p, _ in some], draw_keys, sampling, bar.update, own)
                done.update(zip(some, completions, strict=True))
        return [[done[p, d % draws] for d in range(n)] for p in range(len(prompts))]

    def beams(
        self,
        prompts: Sequence[Row],
        *,
        beams: int,
        n: int = 1,
        max_new_tokens: int,
        length_penalty: float = 0.0,
    ) -> list[list[Completion]]:
        """The most likely completions that a beam search finds (see `rollouts.beam`).

        Args:
            prompts: rows that end where the answer begins (`Encoder.encode_prompt`).
            beams: sequences kept per prompt at every step; 1 is greedy.
            n: how many of them to return.
            max_new_tokens: longest completion in tokens, end-of-turn token included.
            length_penalty: completions rank by log-prob / tokens**length_penalty; 0 ranks by log-prob.

        Returns:
            For each prompt, in order, its n best completions, best first; fewer only where fewer exist.

        Raises:
            ValueError: n below 1 or above `beams`, `beams` or `max_new_tokens` below 1, an empty prompt, or a prompt
                with an image that is cut off.
        """
        _check(prompts, n)
        self._check_context(prompts, max_new_tokens)
        search = BeamSearch(beams=beams, max_new_tokens=max_new_tokens, length_penalty=length_penalty)
        if n > beams:
            raise ValueError(f"a search with {beams} beams has no {n} best: set n to at most {beams}, or more beams")
        found: list[list[Completion]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda p: -len(prompts[p]))
        together = max(1, self.batch_size // beams)
        with torch.no_grad(), self.context(self.policy), evaluating(self.policy), self._bar(len(order)) as bar:
            for start in range(0, len(order), together):
                some = order[start : start + together]
                batch = self._collate([prompts[p] for p in some])
                ids = {"eos": self.processor.eos_ids, "banned": self.processor.banned_ids}
                for p, best in zip(some, beam_search(self.policy, batch, search, **ids), strict=True):
                    found[p] = [self._completion(*beam) for beam in best[:n]]
                bar.update(len(some))
        return found

    def _check_context(self, prompts: Sequence[Row], new_tokens: int) -> None:
        """Beyond its context a model writes nonsense, silently."""
        limit = getattr(self.policy.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(prompts, key=len, default=None)
        if limit is not None and longest is not None and len(longest) + new_tokens > limit:
            raise ValueError(
                f"prompt {longest.id!r} has {len(longest)} tokens and may be continued by {new_tokens}, more than the "
                f"{limit} that the model can see: lower max_new_tokens, or data.max_length"
            )

    def _collate(self, rows: list[Row]) -> ModelBatch:
        device = next(self.policy.model.parameters()).device
        return collate(rows, self.policy.family, self.processor.pad_id, side="left").to(device)

    def _generate(
        self,
        prompts: Sequence[Row],
        chosen: list[int],
        draw_keys: list[int],
        sampling: Sampling,
        done: Callable[[int], Any],
        penalties: list[float] | None = None,
    ) -> list[Completion]:
        """One completion per entry of `chosen`, which prompts they continue; each prompt runs once."""
        places = {p: place for place, p in enumerate(dict.fromkeys(chosen))}
        batch = self._collate([prompts[p] for p in places])
        device = batch.input_ids.device
        out = decode(
            self.policy,
            batch,
            torch.tensor([places[p] for p in chosen], device=device),
            torch.tensor(draw_keys, device=device),
            sampling,
            eos=self.processor.eos_ids,
            banned=self.processor.banned_ids,
            text=self._text,
            done=done,
            penalty_R=None if penalties is None else torch.tensor(penalties, dtype=torch.float64, device=device),
        )
        values = zip(*(part.tolist() for part in out[2:]), strict=True)
        return [
            self._completion(*(part[:length] for part in row), finished=finished)
            for length, finished, row in zip(out.lengths, out.ended, values, strict=True)
        ]

    def _completion(
        self,
        ids: list[int],
        logprobs: list[float],
        sampling_logprobs: list[float],
        entropies: Sequence[float] = (),
        finished: bool | None = None,
    ) -> Completion:
        ended = bool(ids) and ids[-1] in self.processor.eos_ids
        return Completion(
            ids=ids,
            text=self._text(ids[:-1] if ended else ids),
            finished=ended if finished is None else finished,
            logprobs=logprobs,
            sampling_logprobs=sampling_logprobs,
            entropies=list(entropies),
        )

    def _text(self, ids: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def _bar(self, total: int) -> Any:
        from tqdm import tqdm

        other = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
        hidden = True if other or not self.progress else None  # None: shown on a terminal only
        return tqdm(total=total, desc="generating", unit="seq", leave=False, delay=5, disable=hidden)


def _check(prompts: Sequence[Row], n: int) -> None:
    if n < 1:
        raise ValueError(f"n completions per prompt must be at least 1, got {n}")
    for row in prompts:
        if len(row) == 0:
            raise ValueError(f"prompt {row.id!r} is empty: nothing to continue")


def _check_penalties(penalties: Sequence[float] | None, prompts: int, sampling: Sampling) -> None:
    if penalties is None:
        return
    if len(penalties) != prompts:
        raise ValueError(f"penalties: {len(penalties)} for {prompts} prompts; give one for each")
    if sampling.repetition_penalty != 1:
        raise ValueError(f"repetition_penalty {sampling.repetition_penalty} has no effect beside penalties: leave it 1")
    for penalty in penalties:
        if not 0 < penalty < math.inf:
            raise ValueError(f"penalties must be positive numbers (1 is off), got {penalty}")


def _order(prompts: Sequence[Row]) -> list[int]:
    """Prompts of the same images together, so that these are encoded once; else by length, so that little is padded.

    Longest first, so that too large a batch shows at once.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for p, row in enumerate(prompts):
        groups.setdefault(tuple(image.key for image in row.images) or (f"#{p}",), []).append(p)
    ordered = sorted(groups.values(), key=lambda group: -max(len(prompts[p]) for p in group))
    return [p for group in ordered for p in group]
