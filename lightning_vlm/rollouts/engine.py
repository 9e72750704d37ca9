"""The one way to generate: `Engine.generate(prompts, n=…, sampling=…, keys=…)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList

from lightning_vlm.models.batch import ModelBatch, Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.policy import Policy, evaluating

from .beam import BeamSearch, beam_search
from .sampling import KeyedSampler, Sampling, draw_key

if TYPE_CHECKING:
    from lightning_vlm.models.processor import Processor


@dataclass(frozen=True, slots=True)
class Completion:
    """One continuation of a prompt, sampled or found by beam search.

    Attributes:
        ids: token ids, up to and including the end-of-turn token where there is one.
        text: the ids decoded, without special tokens.
        finished: whether it ended by an end-of-turn token; False when it was cut at `max_new_tokens`.
        logprobs: per id, nats, full softmax at the sampling temperature (1 for greedy): what a trainer recomputes.
        sampling_logprobs: per id, nats, after banned ids and top-k/top-p/min-p were removed: what importance
            correction uses.
    """

    ids: list[int]
    text: str
    finished: bool
    logprobs: list[float]
    sampling_logprobs: list[float]


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


class HFEngine:
    """Hugging Face's generate behind the engine's interface, in this process.

    Args:
        policy: the policy; its Hugging Face model generates, with images encoded once per distinct image.
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
        self, prompts: Sequence[Row], *, n: int = 1, sampling: Sampling, keys: tuple[int, int]
    ) -> list[list[Completion]]:
        """See `Engine.generate`.

        Raises:
            ValueError: n below 1, an empty prompt, or a prompt with an image that is cut off.
        """
        _check(prompts, n)
        draws = 1 if sampling.greedy else n  # greedy draws of one prompt are one and the same
        # By length, so that a batch pads little; longest first, so that too large a batch shows at once.
        jobs = sorted(((p, d) for p in range(len(prompts)) for d in range(draws)), key=lambda j: -len(prompts[j[0]]))
        done: dict[tuple[int, int], Completion] = {}
        with torch.no_grad(), self.context(self.policy), _generating(self.policy), self._bar(len(jobs)) as bar:
            for start in range(0, len(jobs), self.batch_size):
                batch = jobs[start : start + self.batch_size]
                rows = [prompts[p] for p, _ in batch]
                draw_keys = [draw_key(*keys, prompts[p].id, d) for p, d in batch]
                done.update(zip(batch, self._generate(rows, draw_keys, sampling), strict=True))
                bar.update(len(batch))
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
        search = BeamSearch(beams=beams, max_new_tokens=max_new_tokens, length_penalty=length_penalty)
        if n > beams:
            raise ValueError(f"a search with {beams} beams has no {n} best: set n to at most {beams}, or more beams")
        found: list[list[Completion]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda p: -len(prompts[p]))
        together = max(1, self.batch_size // beams)
        with torch.no_grad(), self.context(self.policy), _generating(self.policy), self._bar(len(order)) as bar:
            for start in range(0, len(order), together):
                some = order[start : start + together]
                batch = self._collate([prompts[p] for p in some])
                ids = {"eos": self.processor.eos_ids, "banned": self.processor.banned_ids}
                for p, best in zip(some, beam_search(self.policy, batch, search, **ids), strict=True):
                    found[p] = [self._completion(*beam) for beam in best[:n]]
                bar.update(len(some))
        return found

    def _collate(self, rows: list[Row]) -> ModelBatch:
        device = next(self.policy.model.parameters()).device
        return collate(rows, self.policy.family, self.processor.pad_id, side="left").to(device)

    def _generate(self, rows: list[Row], draw_keys: list[int], sampling: Sampling) -> list[Completion]:
        model, processor = self.policy.model, self.processor
        batch = self._collate(rows)
        draw_keys = torch.tensor(draw_keys, device=batch.input_ids.device)
        sampler = KeyedSampler(sampling, draw_keys, processor.banned_ids)
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(processor.eos_ids),
            pad_token_id=processor.pad_id,
        )
        with self.policy.inputs(batch) as inputs:
            output = model.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                # Weights are whole here (`context`), so ranks need not generate in step.
                synced_gpus=False,
            )
        new_ids = output[:, batch.input_ids.shape[1] :].tolist()
        logprobs, sampling_logprobs = sampler.logprobs(), sampler.sampling_logprobs()
        return [self._completion(*row) for row in zip(new_ids, logprobs, sampling_logprobs, strict=True)]

    def _completion(self, ids: list[int], logprobs: list[float], sampling_logprobs: list[float]) -> Completion:
        """Cuts a padded row behind its first end-of-turn token."""
        end = next((i for i, token in enumerate(ids) if token in self.processor.eos_ids), None)
        length = len(ids) if end is None else end + 1
        text_ids = ids[:length] if end is None else ids[:end]
        return Completion(
            ids=ids[:length],
            text=self.processor.tokenizer.decode(text_ids, skip_special_tokens=True),
            finished=end is not None,
            logprobs=logprobs[:length],
            sampling_logprobs=sampling_logprobs[:length],
        )

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


@contextmanager
def _generating(policy: nn.Module) -> Iterator[None]:
    """Evaluation mode and neutral generation settings for the policy's model; everything is put back afterwards.

    `generate` fills what its config leaves open from the model directory's own generation settings (a repetition
    penalty in Qwen2.5-VL's), which would silently change the distribution. Gradient checkpointing rests in evaluation
    mode.
    """
    own_config = policy.model.generation_config
    policy.model.generation_config = GenerationConfig()
    try:
        with evaluating(policy):
            yield
    finally:
        policy.model.generation_config = own_config
