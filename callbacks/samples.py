"""What the model answered: every record as JSONL, and a table with pictures to look at."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger
from PIL import Image

from lightning_vlm.data.images import load_image

FOLDER = "evaluations"
_STYLE = (
    "body{font:14px sans-serif}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:6px;vertical-align:top;text-align:left}"
    "pre{white-space:pre-wrap;margin:0;max-width:32em}.right{background:#e6f4e6}.wrong{background:#fbe9e7}"
)


class SampleTable(Callback):
    """Writes down each evaluation of each benchmark.

    To run_dir/evaluations/<benchmark>/step-N: `records.jsonl` with every example (id, draw, prompt, output, extraction,
    gold, score), `conditions.json` with the grading rule, prompt, sampling settings and metrics, and for the first
    samples `images/*.png` and `table.html` (prompt, picture, output, gold, right or wrong; pictures inside the file).
    Under an MLflow logger the folder becomes an artifact of the same path.

    Args:
        count: samples shown with their pictures; the same ones every time. 0 writes records only.
        size: longer side of the pictures in pixels.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, *, count: int = 16, size: int = 160) -> None:
        if count < 0 or size < 1:
            raise ValueError(f"SampleTable: count cannot be negative and size must be positive, got {count}, {size}")
        self.count, self.size = count, size

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
        for name, records in pl_module.records.items():
            benchmark = trainer.datamodule.evaluations[name]
            # Evaluations that score given answers have nothing to show.
            if benchmark.encoding != "prompt":
                continue
            place = Path(FOLDER) / name / f"step-{pl_module.clock:08d}"
            folder = Path(trainer.default_root_dir) / place
            prefix = f"{stage}/{name}/"
            metrics = {
                key.removeprefix(prefix): float(trainer.callback_metrics[key])
                for key in sorted(pl_module.fresh_metrics)
                if key.startswith(prefix)
            }
            self._write_folder(folder, benchmark, records, metrics, pl_module.clock)
            for logger in trainer.loggers:
                if isinstance(logger, MLFlowLogger):
                    logger.experiment.log_artifacts(logger.run_id, str(folder), artifact_path=str(place))

    def _write_folder(
        self, folder: Path, benchmark: Any, records: list[dict[str, Any]], metrics: dict[str, float], step: int
    ) -> None:
        """Written under another name and renamed, so that a folder that is there is whole."""
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        conditions = benchmark.conditions()
        described = {"prompt_id": conditions["prompt_id"], "rule": conditions["rule"]}
        with (temporary / "records.jsonl").open("w", encoding="utf-8") as stream:
            for record in records:
                stream.write(json.dumps(record | described, ensure_ascii=False) + "\n")
        facts = conditions | {"step": step, "metrics": metrics}
        (temporary / "conditions.json").write_text(json.dumps(facts, indent=2) + "\n")
        if self.count:
            rows = self._rows(temporary / "images", benchmark.samples, records)
            title = f"{conditions['benchmark']}, step {step}, {conditions['rule']}"
            (temporary / "table.html").write_text(_page(title, metrics, rows), encoding="utf-8")
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
                pictures.append(_inline(picture))
            rows += [_row(answer, pictures) for answer in answers]
        return rows


def _inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _row(record: dict[str, Any], pictures: list[str]) -> str:
    texts = [record["id"], record["prompt"], record["output"], record.get("extraction"), record.get("gold")]
    cells = [f"<pre>{_escaped(text)}</pre>" for text in texts]
    cells.insert(2, " ".join(pictures))
    score = float(record["score"])
    cells.append(f"{score:g}")
    style = "right" if score == 1 else "wrong"
    return f'<tr class="{style}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _escaped(value: Any) -> str:
    return "" if value is None else html.escape(str(value))


def _page(title: str, metrics: dict[str, float], rows: list[str]) -> str:
    heads = "".join(f"<th>{h}</th>" for h in ("id", "prompt", "image", "output", "extracted", "gold", "score"))
    summary = ", ".join(f"{html.escape(name)} {value:.4g}" for name, value in metrics.items())
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{html.escape(title)}</h1><p>{summary}</p><table><tr>{heads}</tr>{''.join(rows)}</table>\n"
    )
