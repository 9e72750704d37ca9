"""What an evaluation found: every example as JSONL, scores with intervals, and a table with pictures to look at."""

from __future__ import annotations

import html
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger

from lightning_vlm.benchmarks.report import EVALUATIONS, scores_of, write_evaluation
from lightning_vlm.data import pages
from lightning_vlm.data.images import load_image
from lightning_vlm.export.provenance import evaluated


class EvaluationRecord(Callback):
    """Writes down each evaluation of each benchmark; part of every run.

    To run_dir/evaluations/<benchmark>/step-N: `per_example.jsonl` with every example (id, draw, prompt, output,
    extraction, gold, score), `scores.json` with the metrics and their 95 % intervals, `breakdown.json`,
    `conditions.json` with the grading rule, prompt, sampling settings and where the weights come from; and for the
    first samples `images/*.png` and `table.html` (prompt, picture, output, gold, score; pictures inside the file).
    Under an MLflow logger the folder becomes an artifact of the same path.

    Args:
        count: samples shown with their pictures; the same ones every time. 0 makes no page.
        size: longer side of the pictures in pixels.
        config_file: the run's resolved configuration, which tells where the weights come from.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, *, count: int = 16, size: int = 160, config_file: str | None = None) -> None:
        if count < 0 or size < 1:
            raise ValueError(
                f"EvaluationRecord: count cannot be negative and size must be positive, got {count}, {size}"
            )
        self.count, self.size, self.config_file = count, size, config_file

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the benchmarks that were just evaluated."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        for name, records in getattr(pl_module, "records", {}).items():  # a module of the user's own may have none
            benchmark = trainer.datamodule.evaluations[name]
            # Evaluations that score given answers have nothing to show.
            if benchmark.encoding != "prompt":
                continue
            place = Path(EVALUATIONS) / name / f"step-{pl_module.clock:08d}"
            folder = Path(trainer.default_root_dir) / place
            conditions = benchmark.conditions() | {
                "stage": stage,
                "step": pl_module.clock,
                "provenance": self._provenance(trainer, pl_module),
            }
            self._write_folder(folder, benchmark, records, pl_module.summaries[name], conditions)
            for logger in trainer.loggers:
                if isinstance(logger, MLFlowLogger):
                    logger.experiment.log_artifacts(logger.run_id, str(folder), artifact_path=str(place))

    def _provenance(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any] | None:
        if self.config_file is None:
            return None
        config = yaml.safe_load(Path(self.config_file).read_text())
        training = trainer.state.fn == "fit"
        return evaluated(config, step=pl_module.clock if training else None, checkpoint=trainer.ckpt_path)

    def _write_folder(
        self, folder: Path, benchmark: Any, records: list[dict[str, Any]], summary: Any, conditions: dict[str, Any]
    ) -> None:
        """Written under another name and renamed, so that a folder that is there is whole."""
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        scores = scores_of(summary, conditions["rule"])
        write_evaluation(temporary, records, summary, scores, conditions)
        if self.count:
            rows = self._rows(temporary / "images", benchmark.samples, records)
            title = f"{conditions['benchmark']}, step {conditions['step']}, {conditions['rule']}"
            (temporary / "table.html").write_text(_page(title, scores, rows), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # an evaluation repeated at the same step
        os.replace(temporary, folder)

    def _rows(self, folder: Path, samples: Any, records: list[dict[str, Any]]) -> list[str]:
        """HTML rows of the first samples that were graded, one per answer; saves their pictures."""
        folder.mkdir()
        by_id: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            by_id.setdefault(record["id"], []).append(record)
        rows = []
        for index in range(min(self.count, len(samples))):
            sample = samples[index]
            answers = by_id.get(sample.id, [])
            if not answers:
                continue
            pictures = []
            for number, source in enumerate(sample.images):
                picture = load_image(source)
                picture.thumbnail((self.size, self.size))
                picture.save(folder / f"{index:03d}-{number}.png")
                pictures.append(pages.inline(picture))
            rows += [_row(answer, pictures) for answer in answers]
        return rows


def _row(record: dict[str, Any], pictures: list[str]) -> str:
    texts = [record["id"], record["prompt"], record["output"], record.get("extraction"), record.get("gold")]
    cells = [f"<pre>{_escaped(text)}</pre>" for text in texts]
    cells.insert(2, " ".join(pictures))
    score = float(record["score"])
    return pages.row([*cells, f"{score:g}"], {1.0: "right", 0.0: "wrong"}.get(score, ""))


def _escaped(value: Any) -> str:
    if isinstance(value, list):  # the references of a caption
        return "\n".join(_escaped(entry) for entry in value)
    return "" if value is None else html.escape(str(value))


def _page(title: str, scores: dict[str, Any], rows: list[str]) -> str:
    numbers = {name: value for name, value in scores.items() if isinstance(value, int | float)}
    summary = ", ".join(f"{name} {value:.4g}{_interval(scores, name)}" for name, value in numbers.items())
    return pages.page(title, summary, ("id", "prompt", "image", "output", "extracted", "gold", "score"), rows)


def _interval(scores: dict[str, Any], name: str) -> str:
    found = scores["intervals"].get(name)
    return "" if found is None else " [{:.3g}, {:.3g}]".format(*found)
