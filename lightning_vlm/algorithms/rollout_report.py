"""What is told of a rollout: rewards, groups, lengths, entropies, speed. Sums and counts, so that ranks add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_vlm.algorithms.rollout import Rollout
from lightning_vlm.losses.policy_gradient import has_spread
from lightning_vlm.metrics.pass_at_k import diversity, pass_at_k, powers_of_two

Sums = dict[str, tuple[float, float]]  # name → (sum, count)


def rollout_sums(
    rollouts: Sequence[Rollout],
    *,
    names: Sequence[str],
    judged: str | None,
    group_size: int,
    answer_start: Callable[[Sequence[int], str], int],
) -> Sums:
    """Means over completions, groups or tokens of one rank's rollouts; the same names on every rank.

    `reward` and `reward/PART`; `reward_std`, spread within groups; `zero_spread` and `zero_spread/PART`, share of
    groups whose completions all got the same; `pass_at_k`, by the part `judged`, whose right completions get 1 or more;
    `completion_length`, `truncated`, `duplicates` (1 − distinct texts / completions of a group); `entropy` and its
    split into `entropy_thinking` and `entropy_answer`; `removed_mass`, what bans and filters took out of distributions.

    Args:
        rollouts: of this rank, maybe none. names: of the reward's parts.
        judged: the part that says what is right; None without rewards.
        group_size: completions of a prompt.
        answer_start: (ids, text) of a completion → its first token that belongs to the answer.
    """
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    sums: Sums = {
        "completion_length": (float(sum(len(c.ids) for c in completions)), float(len(completions))),
        "truncated": (float(sum(not c.finished for c in completions)), float(len(completions))),
        "duplicates": (sum(1 - diversity([c.text for c in r.completions]) for r in rollouts), float(len(rollouts))),
        "removed_mass": _mean(
            1
            - torch.tensor([a - b for c in completions for a, b in zip(c.logprobs, c.sampling_logprobs, strict=True)])
            .clamp(max=0)
            .exp()
        ),
    }
    sums |= _entropies(completions, answer_start)
    if judged is None:
        return sums
    totals = _stack([r.totals for r in rollouts], group_size)
    values = torch.stack([r.values for r in rollouts]) if rollouts else torch.zeros(0, group_size, len(names))
    sums["reward"] = _mean(totals)
    sums["reward_std"] = _mean(totals.std(1)) if group_size > 1 and rollouts else (0.0, float(len(totals)))
    sums["zero_spread"] = _mean((~has_spread(totals)).double())
    for place, name in enumerate(names):
        part = values[..., place]
        known = part[~part.isnan()]
        sums[f"reward/{name}"] = _mean(known)
        sums[f"zero_spread/{name}"] = _mean((~has_spread(part.nan_to_num(0.0))).double())
    right = (values[..., list(names).index(judged)] >= 1).sum(1).tolist()
    for k in powers_of_two(group_size):
        sums[f"pass_at_{k}"] = (sum(pass_at_k(group_size, c, k) for c in right), float(len(right)))
    return sums


def _entropies(completions: Sequence, answer_start: Callable[[Sequence[int], str], int]) -> Sums:
    """Of all sampled tokens, nats; of those before the answer and in it."""
    parts = {"": [0.0, 0.0], "_thinking": [0.0, 0.0], "_answer": [0.0, 0.0]}
    for completion in completions:
        if not completion.entropies:
            continue
        border = answer_start(completion.ids, completion.text)
        values = completion.entropies
        for name, part in (("", values), ("_thinking", values[:border]), ("_answer", values[border:])):
            parts[name][0] += sum(part)
            parts[name][1] += len(part)
    return {f"entropy{name}": (total, count) for name, (total, count) in parts.items()}


def _stack(rows: list[Tensor], width: int) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64)


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.double().sum()), float(values.numel())


def answer_finder(decode: Callable[[Sequence[int]], str], marks: Sequence[str]) -> Callable[[Sequence[int], str], int]:
    """A function that says where the answer of a completion begins.

    Args:
        decode: ids → text.
        marks: texts, in order of preference, with whose last occurrence the answer begins; a completion without any is
            thinking to its end.
    """

    def start(ids: Sequence[int], text: str) -> int:
        at = next((place for mark in marks if (place := text.rfind(mark)) >= 0), None)
        if at is None:
            return len(ids)
        low, high = 0, len(ids)  # the fewest tokens whose text reaches beyond `at`
        while low < high:
            middle = (low + high) // 2
            if len(decode(ids[:middle])) > at:
                high = middle
            else:
                low = middle + 1
        return max(low - 1, 0)

    return start
