"""What tools that run studies share: lightning-vlm commands in processes of their own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

Runner = Callable[[list[str], Path], int]
"""Runs the words after `lightning-vlm`, output appended to a log; gives the exit code."""


def run_logged(words: list[str], log: Path) -> int:
    """Print a lightning-vlm command and run it on one thread, its output appended to `log`; the exit code."""
    print(f"$ lightning-vlm {shlex.join(words)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        command = [sys.executable, "-m", "lightning_vlm.cli.main", *words]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env).returncode


def run_forked(words: list[str], log: Path) -> int:
    """Print a lightning-vlm command, run it in a fork of this process, its output appended to `log`; the exit code."""
    print(f"$ lightning-vlm {shlex.join(words)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        sys.stdout = sys.stderr = out = log.open("a", buffering=1)
        os.dup2(out.fileno(), 1)  # what libraries write themselves
        os.dup2(out.fileno(), 2)
        from lightning_vlm.cli.main import main as lightning_vlm

        code = lightning_vlm(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)  # nothing of the parent's may run here
