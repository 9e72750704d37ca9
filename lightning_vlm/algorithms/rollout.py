"""What the policy has just written: completions, what they earned, and the rows that are learned from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_vlm.algorithms.micro import Item
from lightning_vlm.algorithms.reference import TOKENS
from lightning_vlm.data.schema import Sample
from lightning_vlm.losses.policy_gradient import Tokens
from lightning_vlm.models.batch import ModelBatch, Row
from lightning_vlm.models.families import blocks
from lightning_vlm.models.policy import Policy
from lightning_vlm.rewards import Group
from lightning_vlm.rollouts import Completion, completion_row

# In Row.info of a completion, [tokens] each, on the host.
ADVANTAGES, OLD, ENGINE, SAMPLING = "advantages", "old_logprobs", "engine_logprobs", "sampling_logprobs"
TEACHER, CORRECTION, ENTROPIES = "teacher_logprobs", "correction", "entropies"  # and reference.TOKENS


@dataclass(slots=True)
class Rollout:
    """One prompt and its completions.

    Attributes:
        prompt: the row that was continued. others: rows of the same prompt for other models' eyes.
        sample: the prompt's sample, for rewards.
        completions: G of them.
        place: (attempt, optimizer step of the batch, place among that step's prompts over all ranks): where it stands
            among all rollouts, whatever rank has it.
        values: [G, K] rewards by part. totals: [G] weighted sums. Empty without rewards.
        rows: completions to be learned from, each behind its prompt.
        writer: who wrote the completions: `policy`, `data` or `teacher`.
    """

    prompt: Row
    others: list[Row]
    sample: Sample
    completions: list[Completion]
    place: tuple[int, int, int]
    values: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    totals: Tensor = field(default_factory=lambda: torch.zeros(0))
    rows: list[Row] = field(default_factory=list)
    writer: str = "policy"

    @property
    def group(self) -> Group:
        """As rewards take it."""
        return Group(self.sample, self.completions)

    def make_rows(self, *, truncated: bool) -> None:
        """Fill `rows`.

        Args:
            truncated: whether completions that were cut at the length limit are learned from, too.
        """
        self.rows = []
        for index, completion in enumerate(self.completions):
            if not completion.finished and not truncated:
                continue
            row = completion_row(self.prompt, completion)
            row.info = {"generated": True, "source": self.sample.source, "completion": index}
            # NaN where nobody of ours has drawn the tokens.
            own = self.writer == "policy"
            for name, values in ((ENGINE, completion.logprobs), (SAMPLING, completion.sampling_logprobs)):
                row.info[name] = torch.tensor(values if own else [math.nan] * row.scored, dtype=torch.float64)
            if completion.entropies and own:
                row.info[ENTROPIES] = torch.tensor(completion.entropies, dtype=torch.float32)
            self.rows.append(row)

    def advise(self, advantages: Tensor) -> None:
        """Give every token of a completion that completion's advantage.

        Args:
            advantages: [G].
        """
        for row in self.rows:
            row.info[ADVANTAGES] = advantages[row.info["completion"]].double().expand(row.scored)


def tokens_of(batch: ModelBatch, *, by_completion: bool, device: torch.device) -> Tokens:
    """What is known of the scored tokens of a micro-batch of completions, in their order.

    Args:
        batch: rows that `Rollout.make_rows` made; a dummy row has no scored token.
        by_completion: weigh each token by 1/|y| of its completion.
        device: where to.
    """
    rows = [row for row in batch.rows if row.scored]

    def column(name: str) -> Tensor | None:
        if not rows or name not in rows[0].info:
            return None
        return torch.cat([row.info[name] for row in rows]).to(device)

    dtype = torch.float64 if device.type == "cpu" else torch.float32
    weights = [torch.full((row.scored,), 1 / row.scored if by_completion else 1.0, dtype=dtype) for row in rows]
    nothing = torch.zeros(0, dtype=dtype, device=device)
    advantages = column(ADVANTAGES)
    return Tokens(
        advantages=nothing if advantages is None else advantages,
        weights=torch.cat(weights).to(device) if rows else nothing,
        rows=batch.row_index,
        count=len(batch.rows),
        old=column(OLD),
        reference=column(TOKENS),
        correction=column(CORRECTION),
        teacher=column(TEACHER),
    )


def items_of(rollouts: Iterable[Rollout], together: Callable[[int, float], int]) -> list[Item]:
    """Rows of each rollout in items of some that stay together, and so share their prompt.

    Args:
        rollouts: with rows. together: (tokens of the prompt, mean tokens of a completion) → rows of one item.
    """
    items: list[Item] = []
    for rollout in rollouts:
        if not rollout.rows:
            continue
        scored = sum(row.scored for row in rollout.rows) / len(rollout.rows)
        size = together(len(rollout.prompt), scored)
        items += [rollout.rows[start : start + size] for start in range(0, len(rollout.rows), size)]
    return items


@dataclass(frozen=True)
class Together:
    """How many completions to lay behind one copy of their prompt, so that the language model's work is least.

    Every copy of the prompt runs through the model again; but attention looks over the whole physical row, other
    completions included.

    Attributes:
        most: completions of a prompt. hidden: width of the language model. layer: parameters of one of its layers.
    """

    most: int
    hidden: int
    layer: float

    @classmethod
    def of(cls, policy: Policy, most: int) -> Together:
        """For a policy's language model."""
        hidden = policy.model.config.get_text_config().hidden_size
        language = [b for name, b in blocks(policy.model).items() if name.startswith(policy.family.language)]
        size = sum(p.numel() for block in language for p in block.parameters())
        return cls(most, hidden, size / max(1, len(language)))

    def __call__(self, prompt: int, completion: float) -> int:
        """Completions of one physical row, given the tokens of the prompt and the mean tokens of a completion."""

        def work(size: int) -> float:
            tokens = math.ceil(self.most / size) * prompt + self.most * completion
            return tokens * (2 * self.layer + 4 * self.hidden * (prompt + size * completion))

        return min(range(1, self.most + 1), key=work)


def keep_first(places: Sequence[Sequence[tuple[int, int, int]]], wanted: int) -> dict[tuple[int, int, int], int]:
    """Of what all ranks have, the first `wanted` by place: place → its number."""
    everything = sorted(place for own in places for place in own)
    return {place: number for number, place in enumerate(everything[:wanted])}
