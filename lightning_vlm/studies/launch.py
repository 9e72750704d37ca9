"""Runs one command of a study in a process of its own; `execute` is what every launcher starts."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lightning_vlm.studies.record import LOCK, finish_record

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
STOP_SECONDS = 10.0  # between asking a process to end and ending it


class Job(NamedTuple):
    """A command to run.

    Attributes:
        name: of the run. words: behind `lightning-vlm`. folder: it writes into. log: its output, appended.
        threads: CPU threads of each process. processes: torchrun inside where more than one. devices: GPUs.
        env: further environment. output: what it must leave in the folder; None for nothing of one name.
    """

    name: str
    words: list[str]
    folder: Path
    log: Path
    threads: int
    processes: int
    devices: int
    env: dict[str, str]
    output: str | None = None


class Handle(Protocol):
    """A command that was started."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def stop(self) -> None:
        """End it and what it started."""


class Launcher(Protocol):
    """Starts commands."""

    def submit(self, job: Job) -> Handle:
        """Start one."""

    def find(self, name: str, folder: Path, fingerprint: str) -> Handle | None:
        """One that an earlier study process started and that still runs; None where there is none."""

    def close(self) -> None:
        """End what is left."""


def execute(job: Job) -> int:
    """Run a job in this process, which becomes the leader of its own process group; the exit code.

    Its output goes to the log. The folder is locked as long as it runs, so that no second one writes there. Threads are
    pinned. How it ended, seconds, CPU seconds and peak memory go to the folder's stage.json. It ends with its parent.
    """
    if os.getpid() != os.getsid(0):
        os.setsid()
    _end_with(os.getppid())
    os.environ.update(job.env)
    for name in THREADS:
        os.environ[name] = str(job.threads)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = out = job.log.open("a", buffering=1, encoding="utf-8")
    os.dup2(out.fileno(), 1)  # what libraries write themselves
    os.dup2(out.fileno(), 2)
    started, spent = time.monotonic(), _cpu_seconds()
    code = 1
    with (job.folder / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            print(f"$ lightning-vlm {' '.join(job.words)}", flush=True)
            code = _torchrun(job) if job.processes > 1 else _command(job)
        except SystemExit as err:
            code = err.code if isinstance(err.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            costs = (time.monotonic() - started, _cpu_seconds() - spent, _peak_gib())
            finish_record(job.folder, code, job.output, costs)
    return code


def _command(job: Job) -> int:
    import importlib

    if (torch := sys.modules.get("torch")) is not None:  # imported before the thread count was known
        torch.set_num_threads(job.threads)
    # The command line stands above studies and is started, not built upon.
    return importlib.import_module("lightning_vlm.cli.main").main(job.words)


def _torchrun(job: Job) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={job.processes}"]
    return subprocess.run([*command, "-m", "lightning_vlm.cli.main", *job.words]).returncode


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak * unit / 2**30


def _end_with(parent: int) -> None:
    """End this process group when the parent is gone: a study that was killed leaves nothing running."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGTERM)  # torchrun ends its processes, which are no members of the group, only if asked
        time.sleep(STOP_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


# --- on this machine -------------------------------------------------------------------------------------------------


class LocalLauncher:
    """Starts processes here: forks of one that has imported everything (no GPU), or fresh interpreters.

    Args:
        threads: CPU threads that forks start with; jobs of another number get a fresh interpreter.
        forks: whether to fork; not where jobs use GPUs, whose driver does not survive it.
    """

    def __init__(self, *, threads: int = 1, forks: bool = True) -> None:
        self.threads, self.forks = threads, forks
        self._handles: list[LocalHandle] = []
        self._context: Any = None

    def submit(self, job: Job) -> Handle:
        """Start a process."""
        if self.forks and job.processes == 1 and job.threads == self.threads and not job.devices:
            process: Any = self._forkserver().Process(target=_forked, args=(job,))
            process.start()
        else:
            env = os.environ | {name: str(job.threads) for name in THREADS}
            given = json.dumps(job._asdict(), default=str)
            process = subprocess.Popen([sys.executable, "-m", "lightning_vlm.studies.launch", given], env=env)
        handle = LocalHandle(process)
        self._handles.append(handle)
        return handle

    def find(self, name: str, folder: Path, fingerprint: str) -> Handle | None:
        """Nothing: what a study started here ends with it."""
        return None

    def _forkserver(self) -> Any:
        if self._context is None:
            # Numerical libraries read it once, when the server imports them; this process keeps what it had.
            for name in THREADS:
                os.environ[name] = str(self.threads)
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(["lightning_vlm.studies.preload"])
        return self._context

    def close(self) -> None:
        """End all that still run."""
        for handle in self._handles:
            handle.stop()


class LocalHandle:
    """A process.

    Args:
        process: of multiprocessing or subprocess.
    """

    def __init__(self, process: Any) -> None:
        self.process = process

    def poll(self) -> int | None:
        """Its exit code; negative for the signal that ended it."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def stop(self) -> None:
        """Ask its group to end, and end it after a while."""
        if self.poll() is not None:
            return
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sent)
            except (ProcessLookupError, PermissionError):  # not yet the leader of a group, or gone
                self.process.kill()
            until = time.monotonic() + STOP_SECONDS
            while self.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            if self.poll() is not None:
                return


def _forked(job: Job) -> None:
    sys.exit(execute(job))


def main(argv: list[str]) -> int:
    """Run the job that is given as JSON."""
    given = json.loads(argv[0])
    return execute(Job(**given | {"folder": Path(given["folder"]), "log": Path(given["log"])}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
