"""Scoring the texts of a learning-dynamics probe, and keeping the distributions that a stage started with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_vlm.benchmarks.grading import grade_all
from lightning_vlm.benchmarks.probe import Probe, has_gold
from lightning_vlm.data.loading import StepBatch
from lightning_vlm.losses.kernel import TokenScores, divergences, token_scores
from lightning_vlm.models.batch import ModelBatch, Row
from lightning_vlm.models.policy import HeadInput, Policy
from lightning_vlm.rollouts import PolicyEngine, prompt_of

START_FILE = "start.safetensors"
Record = dict[str, Any]


class StartDistributions:
    """Head inputs of the chosen texts as the stage started: what later distributions are compared with.

    A distribution is kept as the hidden state that the head turns into it: per sample [tokens, D], and once the head's
    weight [V, D], on the CPU in the dtype they had. They are collected on each rank and written to one file, from which
    every rank reads, in this run and when it is resumed.

    Args:
        keep_head: whether this rank keeps the head's weight, which all ranks have; the first one does.
    """

    def __init__(self, *, keep_head: bool) -> None:
        self._keep_head = keep_head
        self._hidden: dict[str, Tensor] = {}
        self._weight: Tensor | None = None
        self._file: Any = None
        self._ids: frozenset[str] = frozenset()

    @property
    def complete(self) -> bool:
        """Whether the file is there to compare with."""
        return self._file is not None

    def add(self, id: str, hidden: Tensor, weight: Tensor) -> None:
        """Collect a sample on this rank.

        Args:
            id: of the sample. hidden: [tokens, D]. weight: [V, D], the same for all samples.
        """
        self._hidden[f"hidden/{id}"] = hidden.detach().to("cpu", copy=True)
        if self._keep_head and self._weight is None:
            self._weight = weight.detach().to("cpu", copy=True)

    def write(self, folder: Path, *, rank: int, world: int, barrier: Callable[[], Any]) -> None:
        """Write what all ranks collected to `folder/start.safetensors`, and read from there from now on.

        Args:
            folder: the same for all ranks, created where it is missing. rank, world: of this process.
            barrier: waits for all ranks.
        """
        folder.mkdir(parents=True, exist_ok=True)
        parts = [folder / f".start-{other}.safetensors" for other in range(world)]
        save_file(self._hidden | ({"weight": self._weight} if self._keep_head else {}), parts[rank])
        barrier()
        if rank == 0:
            tensors = {}
            for part in parts:
                with safe_open(part, framework="pt") as stored:
                    tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            temporary = folder / f".{START_FILE}.tmp"
            save_file(tensors, temporary)
            temporary.replace(folder / START_FILE)
            for part in parts:
                part.unlink()
        barrier()
        self._hidden, self._weight = {}, None
        self.open(folder)

    def open(self, folder: Path) -> None:
        """Read from the file of an earlier run.

        Raises:
            ValueError: there is none.
        """
        path = folder / START_FILE
        if not path.is_file():
            raise ValueError(f"{path} is missing: a resumed run compares its probe with it; start a new run")
        self._file = safe_open(path, framework="pt")
        self._ids = frozenset(self._file.keys())

    def weight(self, device: torch.device) -> Tensor:
        """[V, D] of the head at the start."""
        return self._file.get_tensor("weight").to(device)

    def hidden(self, ids: Sequence[str], device: torch.device) -> Tensor:
        """[tokens, D] of these samples, one after the other.

        Raises:
            ValueError: a sample that was not there at the start.
        """
        for id in ids:
            if f"hidden/{id}" not in self._ids:
                raise ValueError(
                    f"sample {id} was not probed at the start of the run; keep the probe's source as it was"
                )
        return torch.cat([self._file.get_tensor(f"hidden/{id}") for id in ids]).to(device)


class Prober:
    """Makes the records of one probe during one evaluation.

    Args:
        probe: what is measured.
        policy: whose weights are whole on every rank as long as this lives.
        engine: answers greedily.
        micro_batches: cuts items into batches on the policy's device.
        keys: (seed, step) of the engine.
    """

    def __init__(
        self,
        probe: Probe,
        policy: Policy,
        engine: PolicyEngine,
        *,
        micro_batches: Callable[[list[list[Row]]], Iterator[ModelBatch]],
        keys: tuple[int, int],
    ) -> None:
        self.probe, self.policy, self.engine = probe, policy, engine
        self.micro_batches, self.keys = micro_batches, keys
        self._start_weight: Tensor | None = None

    @torch.no_grad()
    def records(self, batch: StepBatch) -> list[Record]:
        """One record per sample: see `Probe.summary`."""
        found: dict[str, Record] = {sample.id: {"id": sample.id} for sample in batch.samples}
        for model_batch in self.micro_batches(batch.items):
            self._score(model_batch, found)
        if self.probe.rule is not None:
            self._ask(batch, found)
        return list(found.values())

    def _score(self, batch: ModelBatch, found: dict[str, Record]) -> None:
        head = self.policy(batch, raw=True)
        labels = batch.labels
        scores = token_scores(*head, labels)
        lengths = [row.scored for row in batch.rows]
        for row, logprobs in zip(batch.rows, _on_host(scores.logprobs).split(lengths), strict=True):
            found[row.id] |= {row.name: float(logprobs.mean()), f"{row.name}_tokens": len(logprobs)}
        chosen = [row for row in batch.rows if row.name == "chosen"]
        along = torch.tensor([row.name == "chosen" for row in batch.rows]).repeat_interleave(torch.tensor(lengths))
        along = along.to(labels.device)
        scores = TokenScores(*(values[along] for values in scores))
        columns = {
            "argmax": scores.top_logprobs,
            "entropy": scores.entropies,
            "top1": scores.top_logprobs.exp().clamp(max=1),
            "correct": (scores.top_ids == labels[along]).to(scores.logprobs.dtype),
            **self._divergences(chosen, HeadInput(head.hidden[along], head.weight)),
        }
        lengths = [row.scored for row in chosen]
        for name, values in columns.items():
            for row, own in zip(chosen, _on_host(values).split(lengths), strict=True):
                found[row.id][name] = own.tolist() if name == "correct" else float(own.mean())
                if name == "top1":
                    found[row.id]["confidences"] = own.tolist()

    def _divergences(self, rows: list[Row], now: HeadInput) -> dict[str, Tensor]:
        """TV and JS of each chosen token to the start; exactly 0 at the start itself, which is collected."""
        start = self.probe.start
        if not self.probe.distributions:
            return {}
        if start is None or not start.complete:
            for row, hidden in zip(rows, now.hidden.split([row.scored for row in rows]), strict=True):
                if start is not None:  # there is none while training has not begun (Lightning's sanity check)
                    start.add(row.id, hidden, now.weight)
            zero = torch.zeros(len(now.hidden))
            return {"tv": zero, "js": zero}
        device = now.hidden.device
        if self._start_weight is None:
            self._start_weight = start.weight(device)
        found = divergences(*now, start.hidden([row.id for row in rows], device), self._start_weight)
        return {"tv": found.tv, "js": found.js}

    def _ask(self, batch: StepBatch, found: dict[str, Record]) -> None:
        """Greedy answers, graded; their confidence is the probability that the model gives them as a whole."""
        asked = {sample.id: sample for sample in batch.samples if has_gold(sample)}
        prompts = [prompt_of(item[0]) for item in batch.items if item[0].id in asked]
        if not prompts:
            return
        answers = self.engine.generate(prompts, sampling=self.probe.sampling, keys=self.keys)
        graded = grade_all(
            self.probe.rule, [(answer.text, asked[row.id]) for row, (answer,) in zip(prompts, answers, strict=True)]
        )
        for row, (answer,), verdict in zip(prompts, answers, graded, strict=True):
            confidence = min(1.0, math.exp(math.fsum(answer.logprobs)))
            found[row.id] |= {"output": answer.text, "confidence": confidence, "score": float(verdict["score"])}


def _on_host(values: Tensor) -> Tensor:
    """In float64 on the CPU, where taking single numbers does not wait for a device."""
    return values.detach().double().cpu()
