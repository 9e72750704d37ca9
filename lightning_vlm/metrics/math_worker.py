"""`math_equal` in a worker process that is killed when it hangs.

Symbolic comparison of model output can run forever (`9^{9^{9^9}}`). A signal cannot interrupt it outside the main
thread, a process can always be killed. The worker is a plain child process speaking JSON lines, so it starts the same
from a script, a notebook, a data-loader worker or a test, imports neither torch nor the caller's main module, and ends
with its parent.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys

_SERVE = "from lightning_vlm.metrics.math_worker import serve; serve()"
_START_SECONDS = 120.0  # importing sympy on a loaded machine


class GradingTimeout(RuntimeError):
    """A comparison took longer than it may; the answer could not be graded."""


class MathWorker:
    """Compares answers in one child process, started at the first use and again after a hang.

    Args:
        seconds: longest time one comparison may take.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        if seconds <= 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        self.seconds = seconds
        self._process: subprocess.Popen | None = None
        self._owner = os.getpid()

    def equal(self, prediction: str, gold: str) -> bool:
        """`math_equal(prediction, gold)`.

        Raises:
            GradingTimeout: not decided within `seconds`; the worker was killed.
            ValueError: what `math_equal` raises (a gold answer that cannot be parsed).
            RuntimeError: the worker died.
        """
        if self._owner != os.getpid():  # a forked copy must not talk into its parent's pipe
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self._start()
        self._process.stdin.write(json.dumps([prediction, gold]).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._read(self.seconds)
        if answer is None:
            self.close()
            raise GradingTimeout(f"comparing {prediction!r} with {gold!r} took more than {self.seconds} s")
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["equal"]

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
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
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


def serve() -> None:
    """The worker's loop: one `[prediction, gold]` per line in, one verdict per line out."""
    # Whatever a library prints must not mix with the answers.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from lightning_vlm.metrics.mathematics import math_equal

    math_equal("1", "1")  # imports sympy and the parsers before the clock runs

    def reply(content: dict) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    reply({"ready": True})
    for line in iter(sys.stdin.readline, ""):
        prediction, gold = json.loads(line)
        try:
            reply({"equal": bool(math_equal(prediction, gold))})
        except ValueError as error:
            reply({"error": str(error)})
