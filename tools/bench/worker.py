"""A contender in a process of its own, which does one optimizer step whenever it is told to."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from tools.bench.material import Material
from tools.bench.works import Contender


class Step(NamedTuple):
    """One optimizer step.

    Attributes:
        seconds: wall clock, from the word to go until the step is logged, the loading of its data included.
        cpu: seconds of processor time of the process.
        loss: of the step. grad_norm: before clipping.
        peak: highest resident memory of the process so far, bytes.
        lengths: tokens of every completion that was sampled in the step.
    """

    seconds: float
    cpu: float
    loss: float
    grad_norm: float
    peak: int
    lengths: tuple[int, ...] = ()


class Gate:
    """The worker's side: stops a training loop between two steps until the parent says go.

    When the parent has closed the pipe, waiting raises EOFError, which ends the training.
    """

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def ready(self) -> None:
        """Model and data are there, no step is done yet."""
        self.pipe.send(resident_bytes())
        self._wait()

    def stepped(self, loss: float, grad_norm: float, lengths: Sequence[int] = ()) -> None:
        """A step is done; comes back when the next one may begin."""
        seconds, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
        self.pipe.send(Step(seconds, cpu, loss, grad_norm, peak_bytes(), tuple(lengths)))
        self._wait()

    def _wait(self) -> None:
        self.pipe.recv()
        self.start, self.cpu = time.perf_counter(), time.process_time()


class Worker:
    """The parent's side.

    Args:
        contender: what to train.
        material: model and data.
        threads: of the process.
        steps: most optimizer steps that will be asked for.

    Attributes:
        base: resident memory with model and data loaded, before the first step, bytes; set by `wait_until_ready`.
        steps: all steps done so far.
    """

    def __init__(self, contender: Contender, material: Material, *, threads: int, steps: int) -> None:
        self.contender = contender
        self.log = material.folder / f"{contender.name.replace(' ', '_').replace(',', '')}.log"
        self.steps: list[Step] = []
        self.base = 0
        context = multiprocessing.get_context("spawn")  # nothing of the parent's memory counts as the worker's
        self.pipe, other = context.Pipe()
        args = (other, contender, material, threads, steps, str(self.log))
        self.process = context.Process(target=work, args=args, daemon=True)
        self.process.start()
        other.close()

    def wait_until_ready(self) -> None:
        """Wait for model and data.

        Raises:
            RuntimeError: the process died; shows the end of its log.
        """
        self.base = self._receive()

    def step(self) -> Step:
        """Let it do one optimizer step, wait for its end.

        Raises:
            RuntimeError: the process died; shows the end of its log.
        """
        self.pipe.send("go")
        self.steps.append(self._receive())
        return self.steps[-1]

    def stop(self) -> None:
        """Let the process end; one that does not is killed."""
        self.pipe.close()
        self.process.join(20)
        self.process.kill()
        self.process.join()

    def _receive(self):
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join(5)
            tail = "\n".join(Path(self.log).read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"{self.contender.name} ended by itself; the end of its log:\n{tail}") from None


def work(pipe: Connection, contender: Contender, material: Material, threads: int, steps: int, log: str) -> None:
    """What the process does: train, at the pace of the pipe."""
    # Before torch is imported: it reads them once.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    # Waiting must not take the processor from the one whose turn it is.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["LVLM_CACHE"] = str(material.folder / "cache")
    os.environ["HF_DATASETS_CACHE"] = str(material.folder / "datasets")
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(threads)
    if contender.side == "ours":
        from tools.bench.our_side import train
    else:
        from tools.bench.trl_side import train
    # The parent has heard enough, or is gone.
    with suppress(EOFError):
        train(contender, material, Gate(pipe), steps=steps)


def peak_bytes() -> int:
    """Highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes; the highest so far where the system does not say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_bytes()
    return int(statm.read_text().split()[1]) * resource.getpagesize()
