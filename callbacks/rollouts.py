"""What the policy writes while it trains: completions with what they earned, as JSONL and as a page to look at."""

from __future__ import annotations

import html
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger

from callbacks._clock import crossed
from lightning_vlm.algorithms.rollout import ADVANTAGES, Rollout
from lightning_vlm.data import pages
from lightning_vlm.data.images import load_image

FOLDER = "rollouts"
_HEADS = (
    "prompt", "image", "gold", "completion", "output", "reward", "parts", "advantage", "tokens", "log-prob", "entropy",
)  # fmt: skip


class RolloutTable(Callback):
    """Writes down what the policy has written in on-policy training, now and then.

    To run_dir/rollouts/step-N, N the optimizer steps done: `rollouts.jsonl` with one line per completion (see
    `records`) and `table.html`, grouped by prompt, the best completions of a group in green, the worst in red. Pictures
    are shown where the prompts still carry them, which they do with `model.server`. Under an MLflow logger the folder
    becomes an artifact of the same path. Rank 0 writes what rank 0 has.

    Args:
        every: optimizer steps between tables; where one rollout feeds several, the table is of the rollout in which a
            multiple was crossed.
        count: prompts of a table, the first ones of the rollout; all their completions are written.
        size: longer side of the pictures in pixels.

    Raises:
        ValueError: a number out of range, or an algorithm without rollouts.
    """

    def __init__(self, *, every: int = 50, count: int = 8, size: int = 160) -> None:
        for name, value in (("every", every), ("count", count), ("size", size)):
            if value < 1:
                raise ValueError(f"RolloutTable: {name} must be at least 1, got {value}")
        self.every, self.count, self.size = every, count, size

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an algorithm that never writes anything."""
        if not hasattr(pl_module, "last_rollouts"):
            raise ValueError(
                f"RolloutTable: {type(pl_module).__name__} has no rollouts to write down; leave RolloutTable out"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the batch's rollouts, where it is time to."""
        due = crossed(pl_module.clock_before, pl_module.clock, self.every)
        if not due or not trainer.is_global_zero:
            return
        place = Path(FOLDER) / f"step-{pl_module.clock:08d}"
        folder = Path(trainer.default_root_dir) / place
        self._write(folder, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifacts(logger.run_id, str(folder), artifact_path=str(place))

    def _write(self, folder: Path, pl_module: LightningModule) -> None:
        """Written under another name and renamed, so that a folder that is there is whole."""
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        rollouts = pl_module.last_rollouts[: self.count]
        groups = [records(rollout, list(pl_module.rewards), step=pl_module.clock_before) for rollout in rollouts]
        lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for group in groups for record in group]
        (temporary / "rollouts.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        title = f"rollouts of the policy after {pl_module.clock_before} optimizer steps"
        rows = [
            row
            for rollout, group in zip(rollouts, groups, strict=True)
            for row in _rows(group, [self._shown(picture) for picture in _pictures(rollout)])
        ]
        page = pages.page(title, _summary(groups, len(pl_module.last_rollouts)), _HEADS, rows)
        (temporary / "table.html").write_text(page, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # a step repeated after a restart
        os.replace(temporary, folder)

    def _shown(self, source: Any) -> str:
        picture = load_image(source)
        picture.thumbnail((self.size, self.size))
        return pages.inline(picture)


def records(rollout: Rollout, names: Sequence[str], *, step: int) -> list[dict[str, Any]]:
    """One record per completion of a prompt.

    `id`, `source`, `step` (optimizer steps done when it was written), `writer`, `completion` (its number in the group),
    `prompt`, `output`, `finished`, `tokens`, `reward` (weighted sum), `rewards` (by part; None where a part does not
    apply), `advantage` (mean over its tokens; None where it is not learned from), `logprob` and `entropy` (means over
    its tokens, nats; None where the engine does not say), `gold`, and `mark`: `best` or `worst` of a group whose
    rewards differ, else None.

    Args:
        rollout: a prompt and its completions. names: of the reward's parts, in the order of their values.
        step: see above.
    """
    totals = rollout.totals.tolist() or [None] * len(rollout.completions)
    values = rollout.values.tolist() or [[] for _ in rollout.completions]
    advantages = {
        row.info["completion"]: float(row.info[ADVANTAGES].double().mean())
        for row in rollout.rows
        if ADVANTAGES in row.info and row.scored
    }
    return [
        {
            "id": rollout.sample.id,
            "source": rollout.sample.source,
            "step": step,
            "writer": rollout.writer,
            "completion": index,
            "prompt": _text(rollout.sample.prompt()),
            "output": completion.text,
            "finished": completion.finished,
            "tokens": len(completion.ids),
            "reward": _number(total),
            "rewards": {name: _number(value) for name, value in zip(names, parts, strict=bool(parts))},
            "advantage": _number(advantages.get(index)),
            "logprob": _mean(completion.logprobs),
            "entropy": _mean(completion.entropies),
            "gold": rollout.sample.answer,
            "mark": _mark(total, totals),
        }
        for index, (completion, total, parts) in enumerate(zip(rollout.completions, totals, values, strict=True))
    ]


def _mark(total: float | None, totals: Sequence[float | None]) -> str | None:
    if total is None or max(totals) == min(totals):
        return None
    return {max(totals): "best", min(totals): "worst"}.get(total)


def _mean(values: Sequence[float]) -> float | None:
    return _number(fmean(values)) if values else None


def _number(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return None if value is None or not math.isfinite(value) else value


def _text(messages: Sequence[dict[str, Any]]) -> str:
    parts = [part for message in messages for part in message["content"]]
    return "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in parts)


def _pictures(rollout: Rollout) -> list[Any]:
    """Of the prompt, where they have not been left behind."""
    return rollout.prompt.info.get("pictures") or rollout.sample.images


def _rows(group: Sequence[dict[str, Any]], pictures: Sequence[str]) -> list[str]:
    """HTML rows of a prompt; what all its completions share stands in the first one."""
    rows = []
    for number, record in enumerate(group):
        shared = [_pre(f"{record['id']}\n{record['prompt']}"), " ".join(pictures), _pre(record["gold"])]
        numbers = [
            _shown(record["reward"]) + (f" ({record['mark']})" if record["mark"] else ""),
            "<br>".join(f"{html.escape(name)} {_shown(value)}" for name, value in record["rewards"].items()),
            _shown(record["advantage"]),
            f"{record['tokens']}" + ("" if record["finished"] else " (cut)"),
            _shown(record["logprob"]),
            _shown(record["entropy"]),
        ]
        who = "" if record["writer"] == "policy" else f" ({html.escape(record['writer'])})"
        cells = [
            *(shared if number == 0 else [""] * 3),
            f"{record['completion']}{who}",
            _pre(record["output"]),
            *numbers,
        ]
        rows.append(pages.row(cells, {"best": "right", "worst": "wrong"}.get(record["mark"], "")))
    return rows


def _pre(value: Any) -> str:
    return "" if value is None else f"<pre>{html.escape(str(value))}</pre>"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _summary(groups: Sequence[Sequence[dict[str, Any]]], total: int) -> str:
    everything = [record for group in groups for record in group]
    rewards = [record["reward"] for record in everything if record["reward"] is not None]
    mean = f", mean reward {fmean(rewards):.4g}" if rewards else ""
    return f"{len(groups)} of the {total} prompts of this rank, {len(everything)} completions{mean}"
