"""Evaluation and prediction, the same for every algorithm.

All ranks generate (or score) their share of each evaluation; records are gathered, and the evaluation turns them
into metrics. Callbacks read `records`, `summaries` and `fresh_metrics`; they never call the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch

from lightning_vlm.algorithms.micro import Item, micro_batches
from lightning_vlm.algorithms.probing import Prober
from lightning_vlm.benchmarks.grading import grade_all
from lightning_vlm.benchmarks.rule import Summary
from lightning_vlm.data.loading import StepBatch
from lightning_vlm.data.module import Evaluation
from lightning_vlm.metrics.records import Records
from lightning_vlm.models.batch import ModelBatch, Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.packing import Pack, laid_out
from lightning_vlm.rollouts import PolicyEngine, Sampling
from lightning_vlm.strategies.sync import unsharded


class EvaluationMixin:
    """The evaluating half of `Algorithm`.

    Attributes:
        records: evaluation name → per-example records of the evaluations that ran last, over all ranks; complete on the
            first rank, where they were summed up.
        summaries: evaluation name → what its records add up to; on the first rank.
        fresh_metrics: names of the metrics logged by the validation that ran last.
        sampling, samples: how `predict` draws, and how many answers per prompt.
    """

    records: dict[str, list[dict[str, Any]]]
    summaries: dict[str, Summary]
    fresh_metrics: set[str]
    sampling: Sampling
    samples: int

    def evaluation_due(self, evaluation: Evaluation) -> bool:
        """Whether the clock crossed a multiple of the interval since this evaluation last ran, or the run ends here.

        An evaluation with `at_start` is due before the first step, too, and wherever the run is stopped early.
        """
        at_start = getattr(evaluation, "at_start", False)
        if at_start and evaluation.name not in self._evaluated:
            return True
        last = self._evaluated.get(evaluation.name, 0)
        ends = self.clock >= self._total_steps or (at_start and self.trainer.should_stop)
        return self.clock != last and (ends or self.clock // evaluation.every > last // evaluation.every)

    def evaluated_at(self, name: str) -> int | None:
        """The optimizer step at which an evaluation last ran in this run; None if it never did."""
        return self._evaluated.get(name)

    def evaluation_state(self) -> dict[str, Any]:
        """What a checkpoint keeps: when each evaluation last ran."""
        return {"evaluated": dict(self._evaluated)}

    def restore_evaluation_state(self, state: dict[str, Any]) -> None:
        """Restore `evaluation_state`."""
        self._evaluated = dict(state["evaluated"])

    def _open_engine(self) -> None:
        """Whole weights on every rank until `_weights` is closed, and an engine over them."""
        self._weights = ExitStack()
        self._weights.enter_context(unsharded(self.policy))
        batch_size = getattr(self.trainer.datamodule, "eval_batch_size", 64)
        self._engine = PolicyEngine(self.policy, self.processor, batch_size=batch_size)

    def _start_evaluation(self) -> None:
        data = self.trainer.datamodule
        evaluations = getattr(data, "evaluations", {})
        self._running = {name: e for name, e in evaluations.items() if data.due(e)}
        self._weights = ExitStack()
        if self._running:
            self._open_engine()
        self._probers = {name: self._prober(e) for name, e in self._running.items() if e.encoding == "probe"}
        self._gathering = {name: Records().to(self.device) for name in self._running}
        for records in self._gathering.values():
            records.update([])  # a rank that no example falls to takes part in the gather
        self.records, self.summaries, self.fresh_metrics = {}, {}, set()

    def _end_evaluation(self, prefix: str) -> None:
        self._weights.close()
        for name in self._running:
            self.records[name] = self._gathering[name].compute()
            results = self._on_first_rank(lambda name=name: self._summarised(name))
            metrics = {f"{prefix}/{name}/{metric}": float(value) for metric, value in results.items()}
            self.fresh_metrics |= set(metrics)
            if not self.trainer.sanity_checking:
                self._evaluated[name] = self.clock
            self.log_dict(metrics, batch_size=1)
        self._gathering, self._probers = {}, {}
        if self._running:
            self.log("step", float(self.clock), batch_size=1)

    def _summarised(self, name: str) -> dict[str, float]:
        self.summaries[name] = self._running[name].summary(self.records[name])
        return self.summaries[name].metrics

    def _on_first_rank(self, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `compute` returns on the first rank, or its error, on every rank: scoring may start other programs."""
        outcome: dict[str, float] | Exception | None = None
        if self.trainer.is_global_zero:
            try:
                outcome = compute()
            except Exception as error:  # the other ranks wait: they must hear of it
                outcome = error
        heard = self.trainer.strategy.broadcast(str(outcome) if isinstance(outcome, Exception) else outcome)
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(heard, str):
            raise ValueError(heard)
        return heard

    def on_validation_epoch_start(self) -> None:
        """Whole weights on every rank while the evaluation lasts, so that ranks need not stay in step."""
        self._start_evaluation()

    def on_validation_epoch_end(self) -> None:
        """Gather, turn records into metrics, log them as `val/<evaluation>/<metric>`."""
        self._end_evaluation("val")

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        self._start_evaluation()

    def on_test_epoch_end(self) -> None:
        """As for validation, logged as `test/…`."""
        self._end_evaluation("test")

    def validation_step(self, batch: StepBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Generate and grade, or score, one batch of one evaluation."""
        name = list(self.trainer.datamodule.evaluations)[dataloader_idx]
        evaluation = self._running[name]
        records = {"prompt": self._graded, "probe": self._probed}.get(evaluation.encoding, self._scored)
        self._gathering[name].update(records(evaluation, batch))

    def test_step(self, batch: StepBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As for validation."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_predict_epoch_start(self) -> None:
        """As for validation."""
        self._open_engine()

    def on_predict_epoch_end(self) -> None:
        """Give the gathered weights back."""
        self._weights.close()

    def predict_step(self, batch: StepBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """`id`, `sample`, `prompt`, `output`, `gold`, `finished` for every completion of every prompt."""
        return self._answers(batch, self.sampling, self.samples)

    def _graded(self, evaluation: Any, batch: StepBatch) -> list[dict[str, Any]]:
        records = self._answers(batch, evaluation.sampling, evaluation.n)
        samples = {sample.id: sample for sample in batch.samples}
        graded = grade_all(evaluation.rule, [(record["output"], samples[record["id"]]) for record in records])
        return [record | verdict for record, verdict in zip(records, graded, strict=True)]

    def _answers(self, batch: StepBatch, sampling: Sampling, n: int) -> list[dict[str, Any]]:
        rows = [row for item in batch.items for row in item]
        completions = self._engine.generate(rows, n=n, sampling=sampling, keys=(self.seed, self.clock))
        return [
            {
                "id": sample.id,
                "sample": draw,
                "prompt": _text(sample.prompt()),
                "output": completion.text,
                "gold": sample.answer,
                "finished": completion.finished,
            }
            for sample, drawn in zip(batch.samples, completions, strict=True)
            for draw, completion in enumerate(drawn)
        ]

    def _prober(self, evaluation: Any) -> Prober:
        keys = (self.seed, self.clock)
        return Prober(evaluation, self.policy, self._engine, micro_batches=self.evaluation_batches, keys=keys)

    def _probed(self, evaluation: Any, batch: StepBatch) -> list[dict[str, Any]]:
        return self._probers[evaluation.name].records(batch)

    def evaluation_batches(self, items: list[Item]) -> Iterator[ModelBatch]:
        """Micro-batches on the device; weights are whole here, so ranks need not have equally many."""
        for group in micro_batches(items, self.micro_batch_tokens, share_prompts=self.share_prompts):
            rows: list[Row | Pack] = [row for item in group for row in laid_out(item, self.share_prompts)]
            batch = collate(rows, self.policy.family, self.processor.pad_id, share_images=self.share_images)
            yield batch.to(self.device)

    @torch.no_grad()
    def _scored(self, evaluation: Any, batch: StepBatch) -> list[dict[str, Any]]:
        records = []
        for model_batch in self.evaluation_batches(batch.items):
            scores, rows = self.policy.score(model_batch), model_batch.rows
            right = (scores.top_ids == model_batch.labels).to(scores.logprobs.dtype)
            ones = torch.ones_like(scores.logprobs)
            columns = {"logprob": scores.logprobs, "entropy": scores.entropies, "right": right, "tokens": ones}
            sums = {name: scores.per_row(values, len(rows)).tolist() for name, values in columns.items()}
            records += [
                {"id": row.id, "name": row.name} | {name: values[i] for name, values in sums.items()}
                for i, row in enumerate(rows)
            ]
        return records


def _text(messages: list[dict[str, Any]]) -> str:
    parts = [part for message in messages for part in message["content"]]
    return "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in parts)
