"""Grading in a worker process that is killed when it hangs.

Symbolic comparison of model output can run forever (`9^{9^{9^9}}`). A signal cannot interrupt it outside the main
thread, a process can always be killed. The worker is a plain child process speaking JSON lines, so it starts the same
from a script, a notebook, a data-loader worker or a test, imports neither torch nor the caller's main module, and ends
with its parent. Every thread has a worker of its own (`grade_apart`): as many threads, as many processes.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import subprocess
import sys
import threading
from typing import Any

_SERVE = "from lightning_vlm.metrics.grading_worker import serve; serve()"
_PACKAGE = "lightning_vlm.metrics"
_MEMORY = 4 << 30  # bytes of address space of a worker: a tower of powers ends in an error, not in swapping
_START_SECONDS = 120.0  # importing sympy on a loaded machine


class GradingTimeout(RuntimeError):
    """Grading took longer, or more memory, than it may; the answer could not be graded."""


class GradingWorker:
    """Calls pure functions of the metrics in one child process, started at the first use and again after a hang.

    Args:
        seconds: longest time one call may take.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        if seconds <= 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        self.seconds = seconds
        self._process: subprocess.Popen | None = None
        self._owner = os.getpid()

    def call(self, function: str, *arguments: Any) -> Any:
        """The result of a function of the metrics package.

        Args:
            function: `module.name` in `lightning_vlm.metrics`, for example `mathematics.math_equal`.
            arguments: JSON values; the result is one too.

        Raises:
            GradingTimeout: no result within `seconds`; the worker was killed.
            ValueError: what the function raises (a gold answer that cannot be parsed).
            RuntimeError: the worker died.
        """
        if self._owner != os.getpid():  # a forked copy must not talk into its parent's pipe
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self._start()
        self._process.stdin.write(json.dumps([function, *arguments]).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._read(self.seconds)
        shown = ", ".join(repr(argument)[:200] for argument in arguments)
        if answer is None:
            self.close()
            raise GradingTimeout(f"{function}({shown}) took more than {self.seconds} s")
        if "exhausted" in answer:
            raise GradingTimeout(f"{function}({shown}): {answer['exhausted']}")
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """Ends the worker."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                pipe.close()
            self._process = None

    def _start(self) -> None:
        self.close()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        if self._read(_START_SECONDS) is None:
            self.close()
            raise RuntimeError(f"the grading worker did not start within {_START_SECONDS:.0f} s")

    def _read(self, seconds: float) -> dict | None:
        """The worker's next line; None when it does not come in time."""
        poll = select.poll()  # select() refuses the high file numbers of a process with many loaders
        poll.register(self._process.stdout, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self.close()
            raise RuntimeError(f"the grading worker died with exit code {code}; its message stands above")
        return json.loads(line)

    def __getstate__(self) -> dict:
        return {"seconds": self.seconds, "_process": None, "_owner": 0}

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None and self._owner == os.getpid():
            self.close()


_own = threading.local()


def grade_apart(function: str, *arguments: Any, seconds: float = 10.0) -> Any:
    """`GradingWorker.call` in the worker of the calling thread."""
    if not hasattr(_own, "worker"):
        _own.worker = GradingWorker()
    _own.worker.seconds = seconds
    return _own.worker.call(function, *arguments)


def serve() -> None:
    """The worker's loop: one `[function, arguments…]` per line in, one result per line out."""
    # Whatever a library prints must not mix with the answers.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import resource

    from lightning_vlm.metrics.mathematics import math_equal

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    math_equal("1", "1")  # imports sympy and the parsers before the clock runs

    def reply(content: dict) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    reply({"ready": True})
    for line in iter(sys.stdin.readline, ""):
        function, *arguments = json.loads(line)
        module, _, name = function.rpartition(".")
        try:
            reply({"result": getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name)(*arguments)})
        except ValueError as error:
            reply({"error": str(error)})
        except (MemoryError, RecursionError, OverflowError) as error:
            reply({"exhausted": f"{type(error).__name__} {error}".strip()})
