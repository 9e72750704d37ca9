"""The file that distillation writes: resumable while it grows, whole once it has its name."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_vlm.data.pair_files import PairFile
from lightning_vlm.data.schema import Sample
from lightning_vlm.distill.chains import Chain
from lightning_vlm.distill.questions import question_text
from lightning_vlm.distill.scorers import Scores

_FLAT = ("family", "split", "level", "subject", "task")  # columns of `info` that data sources should see, too


class RecordFile(PairFile):
    """Conversations as JSONL, with the pictures that are no files beside it.

    Until `publish` the records stand in `NAME.jsonl.tmp` behind a line of settings, and stay there when the command is
    interrupted: the same command goes on behind them. Another command's are refused.

    Args:
        out: the JSONL. settings: what the records depend on. overwrite: replace what is there, half-written or whole.

    Raises:
        ValueError: as `PairFile`; a half-written file of other settings.
    """

    def __init__(self, out: Path, *, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        if out.suffix != ".jsonl":
            raise ValueError(f"--out {out}: conversations are written as JSONL; name it {out.stem}.jsonl")
        super().__init__(out, overwrite=overwrite)
        self.done: dict[str, dict[str, Any] | str] = {}
        self._settings = json.loads(json.dumps(settings))
        if self._file.is_file() and not overwrite:
            self._read()

    def __enter__(self) -> RecordFile:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if not self.done:
            shutil.rmtree(self._pictures, ignore_errors=True)
            self._file.write_text(json.dumps({"settings": self._settings}) + "\n", encoding="utf-8")
        elif self._pictures.is_dir():
            self.written = {path.name for path in self._pictures.iterdir()}
        self._stream = self._file.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if kind is not None and not self.done:
            self.discard()

    def add(self, made: Iterable[tuple[str, dict[str, Any] | str]]) -> None:
        """Records of some samples by id, or why one was dropped; on disk when this returns."""
        for id, record in made:
            self.done[id] = record
            self._stream.write(json.dumps({"id": id, "record": record}, ensure_ascii=False) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def records(self) -> list[dict[str, Any]]:
        """What was kept, in the order in which it was made."""
        return [record for record in self.done.values() if not isinstance(record, str)]

    def dropped(self) -> Counter[str]:
        """Why samples were dropped → how many."""
        return Counter(why for why in self.done.values() if isinstance(why, str))

    def publish(self) -> None:
        """Give file and folder their names; what was half-written is gone."""
        self._stream.close()
        whole = self.out.with_name(self.out.name + ".whole")
        with whole.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records())
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.written:
            os.replace(self._pictures, self.folder)
        os.replace(whole, self.out)
        self._file.unlink()

    def _read(self) -> None:
        """What an interrupted command has written; a line that it did not finish is cut off."""
        content = self._file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode("utf-8").splitlines()
        settings = json.loads(lines[0])["settings"] if lines else None
        if settings is not None and settings != self._settings:
            other = sorted(
                name for name in {*settings, *self._settings} if settings.get(name) != self._settings.get(name)
            )
            raise ValueError(
                f"{self._file} was begun with other settings ({', '.join(other)}): give the same to go on with it, "
                "or --overwrite to begin anew"
            )
        if whole != content:
            self._file.write_bytes(whole)
        self.done = {row["id"]: row["record"] for row in map(json.loads, lines[1:])}


def record_of(sample: Sample, images: list[str], scores: Scores, chain: Chain, judge: str) -> dict[str, Any]:
    """One line of the file.

    Args:
        sample: the question, with its gold. images: as the file names them.
        scores, chain: of the sample. judge: who judged.
    """
    info = {name: value for name, value in sample.info.items() if _plain(value)}
    users = [message for message in sample.prompt() if message["role"] == "user"]
    answer = {"role": "assistant", "content": [{"type": "text", "text": chain.text}]}
    parts = users[-1]["content"] if users else []
    tagged = "".join("<image>" if part["type"] == "image" else part.get("text", "") for part in parts)
    return {
        "id": sample.id,
        "images": images,
        "messages": [*sample.prompt(), answer],
        # The prompt once more for the kind `qa`, which reinforcement learning reads; only where it is all there is.
        **({"question": tagged} if sample.prompt() == users[-1:] and question_text(sample) else {}),
        "answer": sample.answer,
        **{name: info[name] for name in _FLAT if name in info},
        "score": chain.reward.score,
        "score_parts": chain.reward.parts,
        "own_score": chain.own_reward.score,
        "penalty": scores.penalty,
        "vision_score": scores.vision,
        "text_score": scores.text,
        "integration_score": scores.integration,
        "scores": scores.scaled,
        "raw_scores": scores.raw,
        "judge": judge,
        "right": chain.verdict.right,
        "extraction": chain.verdict.extraction,
        "judge_said": chain.verdict.said,
        "rewritten": chain.rewritten,
        "own": chain.own,
        "finished": chain.finished,
        "own_tokens": chain.own_tokens,
        "tokens": chain.tokens,
        "info": info,
    }


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_plain, value.values()))
    return value is None or isinstance(value, str | int | float | bool)
