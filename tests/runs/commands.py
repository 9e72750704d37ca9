"""Commands run in this process, in a folder with a configuration and data to spoil."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_vlm.cli.main import main

BASE, HELD_OUT = "base.yaml", "held_out.yaml"
_BASE = """\
backbone: {path: "embedded:qwen2_5_vl-tiny"}
model:
  class_path: SFT
  init_args: {lr: 1.0e-3, schedule: constant}
data:
  class_path: VLMData
  init_args:
    train:
      toy: {kind: messages, path: good.jsonl}
    batch_size: 3
    workers: 0
    max_length: 256
trainer: {max_steps: 2, max_epochs: -1, accelerator: cpu, log_every_n_steps: 1}
callbacks: {SaveModel: null}
logger: {CSV: {}}
"""
_HELD_OUT = "callbacks: {HeldOutLoss: {source: {kind: messages, path: good.jsonl}, name: toy, every: 1}}\n"


def row(id: str, question: str = "<image>what is there ?", answer: str = "red", image: Any = "red.png", **more: Any):
    """A row of the kind `messages`."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": id, "image": image, "messages": turns, **more}


def write(path: str | Path, *rows: dict[str, Any]) -> None:
    """A JSONL file."""
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows))


def workplace(folder: Path) -> None:
    """A folder with a configuration that runs, a benchmark to add, and three good samples."""
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    (folder / BASE).write_text(_BASE)
    (folder / HELD_OUT).write_text(_HELD_OUT)
    write(folder / "good.jsonl", *(row(f"good{n}") for n in range(3)))


def enter(folder: Path, monkeypatch: Any) -> None:
    """Work in `folder`, without the network and without tracebacks."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LVLM_TRACEBACK", raising=False)


class Refused:
    """Runs commands that must fail, and gives their one line.

    Args:
        capfd: pytest's. run_dir: of the commands that have one.
    """

    def __init__(self, capfd: Any, run_dir: Path) -> None:
        self.capfd, self.run_dir = capfd, run_dir

    def __call__(self, *argv: str, command: str = "fit", config: tuple[str, ...] = (BASE,)) -> str:
        if command in ("fit", "validate", "test", "predict"):
            files = [word for file in config for word in ("-c", file)]
            argv = (*files, "--run_dir", str(self.run_dir), *argv)
        self.capfd.readouterr()
        assert main([command, *argv]) == 2
        lines = self.capfd.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        assert "Traceback" not in "".join(lines) and len(lines[-1]) < 700
        return lines[-1]
