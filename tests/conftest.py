"""Shared fixtures: where the real data is, and runs in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data; tests that need it skip where it is absent."""
    path = os.environ.get("LVLM_REAL_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip("LVLM_REAL_DATA names no folder of real data")
    return Path(path)


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_scenarios(
    specs: list[dict], folder: Path, *, processes: int = 1, timeout: int = 240
) -> subprocess.CompletedProcess:
    """Run training scenarios in `processes` processes; records land in folder/records.pt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(specs))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    command += ["-m", "tests.runs.scenarios", str(folder / "spec.json"), str(folder / "records.pt")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
