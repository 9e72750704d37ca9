"""A child process that calls users' reward functions, and is killed when one hangs.

A plain child process that speaks pickled frames, as `metrics.grading_worker`: it starts the same from a script, a
notebook or a test, never imports the caller's main module, and ends with its parent. Users' code is imported there and
nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_vlm.rewards.serving import receive, send

_SCRIPT = str(Path(__file__).with_name("serving.py"))
_START_SECONDS = 120.0  # importing torch and whatever else a function wants, on a loaded machine


class Hung(Exception):
    """A call took longer than it may; the process was killed."""


class Failed(Exception):
    """A call gave no reward.

    Attributes:
        problem: what happened, in a line.
        at: index of the completion within the call, where the failure itself tells.
        trace: the function's traceback.
    """

    def __init__(self, problem: str, at: int | None = None, trace: str = "") -> None:
        super().__init__(problem)
        self.problem, self.at, self.trace = problem, at, trace


class Worker:
    """One child process, started at the first use and again after a hang. Used by one thread at a time.

    Args:
        functions: part → `function`, `style`, `options`, `columns`, `pattern`, plain values.
    """

    def __init__(self, functions: Mapping[str, Mapping[str, Any]]) -> None:
        self._functions = functions
        self._process: subprocess.Popen | None = None
        self._stopped = False
        self._lock = threading.Lock()  # between starting a process and stopping from another thread
        self._loaded: dict[str, dict[str, Any]] | None = None

    def load(self) -> dict[str, dict[str, Any]]:
        """Starts the process where there is none; part → `together` (called for a whole group), `digest` of its file.

        A part that cannot be loaded has `error` and `trace` instead.

        Raises:
            RuntimeError: the process did not start, or stopped.
        """
        if self._process is not None and self._process.poll() is None:
            return self._loaded
        self.close()
        with self._lock:
            if self._stopped:
                raise RuntimeError("the reward workers were closed")
            self._process = subprocess.Popen(
                [sys.executable, "-P", _SCRIPT, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # so that what a function starts is killed with it
            )
        path = [*sys.path, *([os.getcwd()] if os.getcwd() not in sys.path else [])]
        try:
            send(self._process.stdin, ("load", {"path": path, "functions": self._functions}))
            loaded = self._read(_START_SECONDS)
        except Hung:
            raise RuntimeError(
                f"reward functions were not imported within {_START_SECONDS:.0f} s: {self._names()}"
            ) from None
        except (Failed, BrokenPipeError) as error:
            raise RuntimeError(f"importing reward functions ({self._names()}) failed: {error}") from None
        self._loaded = loaded
        return loaded

    def call(self, part: str, arguments: Mapping[str, Any], seconds: float) -> list[tuple[float | None, dict]]:
        """(reward, sub-scores) of each completion of `arguments`.

        Raises:
            Hung: it took more than `seconds`, not counting start and transfer.
            Failed: the function raised, returned what is no reward, or ended its process.
        """
        self.load()
        try:
            send(self._process.stdin, ("call", {"part": part, **arguments}))
        except BrokenPipeError:
            raise self._died() from None
        answer = self._read(_START_SECONDS)
        if answer == "begun":
            answer = self._read(seconds)
        if "error" in answer:
            raise Failed(answer["error"], answer["at"], answer["trace"])
        return answer["result"]

    def stop(self) -> None:
        """Kills the process for good, from any thread; one that waits for it gets `Failed`."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                _kill(self._process)

    def close(self) -> None:
        """Ends the process and its pipes."""
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            _kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # a request that could not be written
                pipe.close()

    def _read(self, seconds: float) -> Any:
        poll = select.poll()  # select() refuses the high file numbers of a process with many loaders
        poll.register(self._process.stdout, select.POLLIN)
        if not poll.poll(seconds * 1000):
            self.close()
            raise Hung
        frame = receive(self._process.stdout.raw)  # unbuffered: what a buffer held, poll would not see
        if frame is None:
            raise self._died()
        return pickle.loads(frame)

    def _died(self) -> Failed:
        code = self._process.wait()
        self.close()
        if code < 0:
            return Failed(f"its process was killed by signal {signal.Signals(-code).name}; is memory short?")
        return Failed(f"it ended its process with exit code {code}; its message, if any, stands above")

    def _names(self) -> str:
        return ", ".join(str(spec["function"]) for spec in self._functions.values())


def _kill(process: subprocess.Popen) -> None:
    """Kills a process with all that it started; it leads a session of its own."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
