"""The folder of a run, and the checkpoint it starts from."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks.checkpoint import last_checkpoint
from lightning_vlm.config.tree import Config
from lightning_vlm.export import check_checkpoint


def choose_run_dir(command: str, config: Config) -> Path:
    """`run_dir`, or runs/<experiment>-<time>; the same in every process of the run.

    Raises:
        ValueError: `run_dir` is a file; or processes started from outside have none and cannot agree on a time.
    """
    given = config.tree.get("run_dir")
    if given is not None:
        if Path(str(given)).is_file():
            raise config.error(("run_dir",), f"'{given}' is a file: give a directory")
        return Path(str(given))
    if int(os.environ.get("LOCAL_RANK", 0)) > 0 and "LVLM_RUN_DIR" in os.environ:
        return Path(os.environ["LVLM_RUN_DIR"])  # started by rank 0 on this machine
    stamp = os.environ.get("SLURM_JOB_ID")
    if stamp is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("processes started from outside need one folder: give --run_dir DIR")
    first = config.files[-1] if config.files else Path("run")
    name = re.sub(r"-\d{8}-\d{6}$", "", first.parent.name) if first.stem == "config" else first.stem
    name = name if command == "fit" else f"{name}-{command}"
    run_dir = Path("runs") / f"{name}-{stamp or time.strftime('%Y%m%d-%H%M%S')}"
    os.environ["LVLM_RUN_DIR"] = str(run_dir)
    return run_dir


def checkpoint_to_load(command: str, run_dir: Path, options: dict[str, Any]) -> Path | None:
    """The checkpoint that `--resume` or `--ckpt` means.

    Raises:
        FileNotFoundError: the named checkpoint is not there.
        ValueError: `run_dir` holds a run and `--resume` was not given; or what was named is no checkpoint.
    """
    if command == "fit" and "resume" not in options:
        if rank_zero_only.rank == 0 and (run_dir / "config.yaml").exists():
            raise ValueError(
                f"{run_dir} holds a run already: add --resume to go on with it, or choose another --run_dir"
            )
        return None
    named = options.get("resume" if command == "fit" else "ckpt")
    if named is None:
        return last_checkpoint(run_dir) if command == "fit" else None
    if (Path(named) / "config.json").exists():
        raise ValueError(f"'{named}' is a model directory, not a checkpoint: give it as --backbone.path {named}")
    check_checkpoint(named)
    return Path(named)
