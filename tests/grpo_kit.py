"""Tiny GRPO runs of the embedded world, in this process or in others, and a slow oracle of their first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_vlm.algorithms import GRPO
from lightning_vlm.algorithms.rollout import Rollout
from lightning_vlm.models.batch import Row

from .runs import scenarios
from .test_sft_c import MODEL, full_logprobs, start

PROMPTS, GROUP, LONGEST = 5, 4, 8
# A stop text of one letter ends completions after a few tokens, so that their lengths, and rewards, differ.
ROLLOUT = {"temperature": 1.0, "max_new_tokens": LONGEST, "stop": ["e"]}
EQUAL = {"rewards": {"form": {"kind": "format"}}}  # 0 for all
SETTINGS = {
    "lr": 1e-2,
    "clip_norm": 0.0,
    "micro_batch_tokens": 10**6,
    "schedule": "constant",
    "group_size": GROUP,
    "rollout": ROLLOUT,
    "rewards": {"length": {"kind": "length", "target": 4}},
}


def spec(name: str, folder: Path, own: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A scenario: float64, five prompts a step, two questions about each picture."""
    base = {"model": MODEL, "world": {"size": 15, "questions_per_image": 2}, "batch_size": PROMPTS, "shuffle": False}
    base |= {"algorithm": "GRPO", "steps": 1}
    return base | {"name": name, "run_dir": str(folder / name), "settings": SETTINGS | (own or {})} | changes


class Kept(GRPO):
    """Keeps itself, and all rollouts that were drawn, in order."""

    last: Kept

    def on_fit_start(self) -> None:
        Kept.last, self.drawn = self, []
        super().on_fit_start()

    def answered(self, batch, *, attempt):
        rollouts = super().answered(batch, attempt=attempt)
        self.drawn.append(rollouts)
        return rollouts


def fit(folder: Path, own: dict[str, Any] | None = None, algorithm: type = Kept, **changes: Any) -> dict[str, Any]:
    """The record of a run in this process; `record["module"]` is the algorithm."""
    scenarios.Trained = algorithm
    try:
        record = scenarios.run(spec("run", folder, own, algorithm="Trained", **changes), 1)
    finally:
        del scenarios.Trained
    return record | {"module": getattr(algorithm, "last", None)}


def column(record: dict[str, Any], name: str) -> list[float]:
    """A metric over the steps."""
    return [step[f"train/{name}"] for step in record["steps"]]


def drawn(record: dict[str, Any]) -> list[list[tuple]]:
    """Of each step, what was learned from, whichever rank it was on: sorted (sample id, ids of the completion)."""
    return [sorted((row[0], row[3]) for rank in step for row in rank) for step in zip(*record["rows"], strict=True)]


def units(rows: list[Row], aggregation: str, longest: int = LONGEST) -> tuple[list[float], float]:
    """Weight of each row's tokens, and the one denominator."""
    if aggregation == "sequence":
        return [1 / row.scored for row in rows], float(len(rows))
    count = sum(row.scored for row in rows) if aggregation == "token" else longest * len(rows)
    return [1.0] * len(rows), float(count)


def oracle(
    rollouts: list[Rollout],
    *,
    aggregation: str = "token",
    std: bool = True,
    entropy_coef: float = 0.0,
    kl_beta: float = 0.0,
    reference=None,
    temperature: float = 1.0,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of the first update, from each row's whole distributions: −A + β·k3 − c·H per token."""
    policy, total = start(), 0.0
    rows = [row for rollout in rollouts for row in rollout.rows]
    weights, count = units(rows, aggregation)
    groups = {id(row): rollout for rollout in rollouts for row in rollout.rows}
    for row, weight in zip(rows, weights, strict=True):
        rewards = groups[id(row)].totals
        advantage = rewards[row.info["completion"]] - sum(rewards) / len(rewards)
        if std:
            squares = sum((r - sum(rewards) / len(rewards)) ** 2 for r in rewards)
            advantage = advantage / ((squares / (len(rewards) - 1)) ** 0.5 + 1e-4)
        logprobs, ids = full_logprobs(policy, row)
        logprobs = (logprobs / temperature).log_softmax(-1)
        own = logprobs.gather(1, ids[:, None])[:, 0]
        loss = -advantage * torch.exp(own - own.detach())
        if kl_beta:
            with torch.no_grad():
                gap = (full_logprobs(reference, row)[0] / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            gap = gap - own
            loss = loss + kl_beta * (gap.exp() - gap - 1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        total = total + weight * (loss - entropy_coef * entropies).sum() / count
    total.backward()
    named = policy.model.named_parameters()
    return total.item(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}
