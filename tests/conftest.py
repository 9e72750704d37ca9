"""Shared fixtures: where the real data is, and runs in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import NamedTuple

import pytest

from .runs import scenarios
from .runs.commands import Refused


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data; tests that need it skip where it is absent."""
    path = os.environ.get("LVLM_REAL_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip("LVLM_REAL_DATA names no folder of real data")
    return Path(path)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """The folder of stores for all tests, so that none reads or writes the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LVLM_CACHE"] = str(folder)
    return folder


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return datasets


@pytest.fixture
def refused(capfd, tmp_path):
    """Runs a command that must be refused in one line, and gives the line."""
    return Refused(capfd, tmp_path / "run")


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Done(NamedTuple):
    """How a run of scenarios ended: the worst exit code (−9: killed) and the end of what it printed."""

    returncode: int
    stderr: str


def run_scenarios(specs: list[dict], folder: Path, *, processes: int = 1, timeout: int = 240) -> Done:
    """Run training scenarios in `processes` fresh processes; records land in folder/records.pt.

    Processes are forked from a server that has the imports done, which take longer than most scenarios; they share no
    state with this process or each other, and are told their rank as torchrun tells it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(specs))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs.scenarios"])
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    env["LVLM_CACHE"] = os.environ["LVLM_CACHE"]
    if processes > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        env |= {"LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0"}
    logs = [folder / f"rank{rank}.log" for rank in range(processes)]
    ranks = []
    for rank, log in enumerate(logs):
        own = env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
        args = (str(folder / "spec.json"), str(folder / "records.pt"), own, str(log))
        ranks.append(context.Process(target=scenarios.in_process, args=args))
        ranks[-1].start()
    for process in ranks:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    codes = [process.exitcode for process in ranks]
    text = "\n".join(log.read_text()[-4000:] for log, code in zip(logs, codes, strict=True) if code and log.exists())
    return Done(min(codes, key=lambda code: (code == 0, code)), text)
