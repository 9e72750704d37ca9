"""What tools that run studies share: lightning-vlm commands in processes of their own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path


def run_logged(words: list[str], log: Path) -> int:
    """Print a lightning-vlm command and run it on one thread, its output appended to `log`; the exit code."""
    print(f"$ lightning-vlm {shlex.join(words)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        command = [sys.executable, "-m", "lightning_vlm.cli.main", *words]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env).returncode
