"""Jobs of a study on a SLURM cluster, through submitit.

The queue, the waiting and the nodes are SLURM's; the batch file and the way back of the result are submitit's. Here is
what a study needs besides: a job that is found again after the study's process died, and ends told apart in words.
Jobs are named NAME.FOLDER.INPUTS, the last two hashes of the run's folder and of the fingerprint of its inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_vlm.config.tree import nearest
from lightning_vlm.studies.launch import THREADS, Job
from lightning_vlm.studies.record import RECORD, read_json, write_json

if TYPE_CHECKING:
    from submitit import SlurmExecutor

JOB_FILE = "slurm_job"  # in the run's folder while its job has not been seen to end
PROGRAMS = ("sbatch", "srun", "squeue", "scancel")
PLACES = ("partition", "qos", "account", "constraint", "nodelist", "exclude")
SBATCH = (*PLACES, "mem", "mem_per_cpu", "mem_per_gpu", "cpus_per_task", "gpus_per_node", "gres", "exclusive")
OTHERS = ("time", "restarts", "setup", "srun_args", "comment", "signal_delay_s", "additional_parameters")
ENDED = {
    # state: exit code, what to say
    "CANCELLED": (143, "was cancelled"),
    "TIMEOUT": (124, "ran into its time limit: raise `time` under `slurm`"),
    "DEADLINE": (124, "did not end before its deadline"),
    "PREEMPTED": (75, "was preempted by another job"),
    "OUT_OF_MEMORY": (137, "ran out of memory: raise `mem` under `slurm`"),
    "NODE_FAIL": (70, "lost its node"),
    "BOOT_FAIL": (70, "got a node that did not start"),
}
FINISHED = {"COMPLETED", "FAILED", *ENDED}
RESULT_SECONDS = 20.0  # how long a shared file system may take to show the result of a job that ended


class SlurmLauncher:
    """Submits jobs and follows them; a `Launcher`.

    Each is one task on one node. A `fit` that reaches the time limit, or is preempted, is requeued and goes on from its
    last checkpoint; other commands end.

    Args:
        folder: for submitit's files; on a file system that the nodes share.
        parameters: a study's `slurm` mapping: `time` (text with a unit: 90m, 12h, 1-12:00:00; required), `partition`
            and sbatch's other options by submitit's names (`cpus_per_task`: threads x processes of the stage by
            default; `gpus_per_node`: its devices; 0 asks for none), `restarts` (how often a fit may reach the time
            limit and go on, 3 by default), `setup` (shell lines before), `additional_parameters` (any other option of
            sbatch).
        refresh: seconds between questions to SLURM, one question for all jobs.
        command: what runs a job that is given as JSON behind it.

    Raises:
        ValueError: submitit or SLURM's programs are absent; an unknown or malformed parameter; SLURM does not answer,
            or refuses the partition or another option.
    """

    def __init__(
        self,
        *,
        folder: Path,
        parameters: Mapping[str, Any],
        refresh: float = 5.0,
        command: Sequence[str] = (sys.executable, "-m", "lightning_vlm.studies.launch"),
    ) -> None:
        try:
            import submitit  # noqa: F401
        except ModuleNotFoundError as err:
            raise ValueError("submitit is not installed: pip install 'lightning-vlm[slurm]'") from err
        absent = [name for name in PROGRAMS if shutil.which(name) is None]
        if absent:
            raise ValueError(f"no {', '.join(absent)} on the PATH: start the study on a machine that submits to SLURM")
        self.parameters = check_parameters(parameters)
        self.folder, self.refresh, self.command = Path(folder).absolute(), refresh, tuple(command)
        self._queue = _Queue(refresh)
        self._queue.ask(strict=True)
        _try_out(self.parameters)

    def submit(self, job: Job) -> SlurmHandle:
        """Hand a job to SLURM, or find the one that was handed over before.

        Raises:
            ValueError: sbatch refuses it; with its words.
        """
        import submitit

        fingerprint = read_json(job.folder / RECORD).get("fingerprint", "")
        if (found := self.find(job.name, job.folder, fingerprint)) is not None:
            return found
        stage = Stage(command=self.command, minutes=self.parameters["time"], delay=self.parameters["signal_delay_s"])
        name = _name(job.name, job.folder, fingerprint)
        try:
            submitted = self._executor(job, name).submit(stage, job)
        except submitit.core.utils.FailedJobError as err:
            raise ValueError(f"SLURM refused {job.name}: {_one_line(str(err))}") from err
        write_json(job.folder / JOB_FILE, {"job_id": submitted.job_id, "name": name})
        return SlurmHandle(job.folder, submitted.job_id, launcher=self)

    def find(self, name: str, folder: Path, fingerprint: str) -> SlurmHandle | None:
        """The job that was submitted for a run: waiting, running, or ended well with nobody there to see it.

        To be called before the folder is changed. A job that writes into it from other inputs is cancelled first.

        Args:
            name: of the run. folder: it writes into. fingerprint: of its inputs.
        """
        name, queue = _name(name, folder, fingerprint), self._queue.ask(fresh=True)
        for number, entry in queue.items():
            if entry.name.rpartition(".")[0] != name.rpartition(".")[0] or not entry.active:
                continue
            handle = SlurmHandle(folder, number, launcher=self, found=True)
            if handle.result() is not None:  # the command ended; SLURM is still clearing up
                continue
            if entry.name == name:
                write_json(folder / JOB_FILE, {"job_id": number, "name": name})
                return handle
            handle.stop(wait=True)
        record = read_json(folder / JOB_FILE)
        if record.get("name") != name:
            return None
        handle = SlurmHandle(folder, record["job_id"], launcher=self, found=True)
        return handle if handle.poll() == 0 else None

    def close(self) -> None:
        """Nothing is cancelled: jobs go on without the study's process, and it finds them when it is started again."""

    def _executor(self, job: Job, name: str) -> SlurmExecutor:
        import submitit

        own = dict(self.parameters)
        executor = submitit.SlurmExecutor(folder=self.folder, max_num_timeout=own.pop("restarts"))
        cpus = own.pop("cpus_per_task", job.threads * job.processes)
        gpus = own.pop("gpus_per_node", 0 if "gres" in own else job.devices)
        more = {("requeue" if job.words[0] == "fit" else "no-requeue"): True}
        executor.update_parameters(
            **own
            | {
                "job_name": name,
                "nodes": 1,
                "ntasks_per_node": 1,
                "cpus_per_task": cpus,
                "gpus_per_node": gpus or None,
                # Since SLURM 22.05 srun no longer takes the number from the batch job.
                "srun_args": [f"--cpus-per-task={cpus}", *own.get("srun_args", [])],
                "additional_parameters": more | own.get("additional_parameters", {}),
                "stderr_to_stdout": True,
            }
        )
        return executor


class SlurmHandle:
    """A job in SLURM's hands.

    Attributes:
        job_id: SLURM's. found: whether an earlier process of the study submitted it. said: how it ended, or what it
            waits for; for people.
    """

    def __init__(self, folder: Path, job_id: str, *, launcher: SlurmLauncher, found: bool = False) -> None:
        self.folder, self.job_id, self.found, self.said = folder, job_id, found, ""
        self._launcher, self._code, self._ended = launcher, None, None

    def poll(self) -> int | None:
        """The exit code of the command; 143 if cancelled, 124 at a time limit, 75 if preempted; None before the end."""
        if self._code is None and (end := self._end()) is not None:
            self._code, self.said = end
            (self.folder / JOB_FILE).unlink(missing_ok=True)
        return self._code

    def stop(self, *, wait: bool = False) -> None:
        """Cancel it.

        Args:
            wait: until it is gone from its node.
        """
        subprocess.run(["scancel", self.job_id], capture_output=True)
        while wait and self.poll() is None:
            time.sleep(min(1.0, self._launcher.refresh))

    def _end(self) -> tuple[int, str] | None:
        entry = self._launcher._queue.ask().get(self.job_id)
        if (result := self.result()) is not None and (result[0] == 0 or entry is None):
            return result
        if entry is None:
            entry = _accounted(self.job_id)
        if entry is None:
            return self._after_a_while(f"job {self.job_id} is unknown to SLURM and left no result")
        if entry.active:
            self.said = f"{entry.state.lower()} ({entry.reason})" if entry.state == "PENDING" else entry.state.lower()
            return None
        if entry.state in ENDED:
            code, words = ENDED[entry.state]
            return code, f"job {self.job_id} {words}"
        if result is not None:
            return result
        return self._after_a_while(f"job {self.job_id} ended ({entry.state}) without a result: see {self._log()}")

    def _after_a_while(self, words: str) -> tuple[int, str] | None:
        self._ended = self._ended or time.monotonic()
        return (1, words) if time.monotonic() - self._ended > RESULT_SECONDS else None

    def result(self) -> tuple[int, str] | None:
        """Exit code and words as the job's own process left them; None where it did not come to that."""
        import submitit

        job = submitit.SlurmJob(folder=self._launcher.folder, job_id=self.job_id)
        if not job.paths.result_pickle.exists():
            return None
        if (error := job.exception()) is None:
            code = job.result()
            return code, f"job {self.job_id} ended with exit code {code}"
        for state in ("TIMEOUT", "PREEMPTED"):
            if f"Interrupted: {state}" in str(error):
                code, words = ENDED[state]
                return code, f"job {self.job_id} {words}"
        return 1, f"job {self.job_id} could not run the command: see {self._log()}"

    def _log(self) -> Path:
        return self._launcher.folder / f"{self.job_id}_0_log.out"


class Interrupted(Exception):
    """SLURM takes the node away from a command that cannot go on where it stood."""


class Stage:
    """What runs on the node: the command in a process of its own, so that its threads are pinned before it imports.

    Args:
        command: to which the job is given as JSON. minutes: time limit. delay: seconds before it that SLURM warns.
    """

    def __init__(self, *, command: Sequence[str], minutes: int, delay: int) -> None:
        self.command, self.minutes, self.delay = command, minutes, delay
        self._process: subprocess.Popen | None = None
        self._started = 0.0

    def __call__(self, job: Job) -> int:
        """Run it; its exit code."""
        self._started = time.monotonic()
        words = list(job.words)
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) and words[0] == "fit" and "--resume" not in words:
            words.append("--resume")
        # The name by which Lightning knows that it is not SLURM who starts its processes.
        env = os.environ | {name: str(job.threads) for name in THREADS} | {"SLURM_JOB_NAME": "interactive"}
        given = json.dumps(job._replace(words=words)._asdict(), default=str)
        self._process = subprocess.Popen([*self.command, given], env=env, preexec_fn=_deaf, start_new_session=True)
        signal.signal(signal.SIGTERM, self._end)
        return self._process.wait()

    def checkpoint(self, job: Job) -> Any:
        """What to requeue when time is up: the same, for a fit goes on from its last checkpoint.

        Raises:
            Interrupted: the command is another one.
        """
        from submitit.helpers import DelayedSubmission

        self._end()
        if job.words[0] == "fit":
            return DelayedSubmission(Stage(command=self.command, minutes=self.minutes, delay=self.delay), job)
        near = time.monotonic() - self._started > 60 * self.minutes - self.delay - 60
        raise Interrupted("TIMEOUT" if near else "PREEMPTED")

    def _end(self, *_: Any) -> None:
        """Tell the command's process group; SLURM ends it if it does not listen."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)


def _deaf() -> None:
    """SLURM's warning goes to every process of the job; the command must not die of it, it is told by `Stage`."""
    from submitit.core.job_environment import JobEnvironment

    signal.signal(JobEnvironment._usr_sig(), signal.SIG_IGN)


# --- what SLURM says -------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A job as SLURM shows it."""

    state: str
    reason: str
    name: str

    @property
    def active(self) -> bool:
        """Whether it waits or runs: every state but an end."""
        return self.state not in FINISHED


class _Queue:
    """All of this user's jobs, asked for at most every `refresh` seconds."""

    def __init__(self, refresh: float) -> None:
        self.refresh, self._at, self._jobs, self._silent = refresh, -float("inf"), {}, False

    def ask(self, *, fresh: bool = False, strict: bool = False) -> dict[str, Entry]:
        """Job id → entry; the last answer while SLURM does not answer, with a warning, unless `strict`."""
        if not fresh and time.monotonic() - self._at < self.refresh:
            return self._jobs
        words = ["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%r|%j"]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode and strict:
            raise ValueError(f"SLURM does not answer: {_one_line(done.stderr)}")
        if done.returncode and not self._silent:
            print(f"warning: SLURM does not answer, waiting: {_one_line(done.stderr)}", file=sys.stderr)
        self._silent, self._at = bool(done.returncode), time.monotonic()
        if not done.returncode:
            self._jobs = {row[0]: Entry(*row[1:]) for row in (line.split("|", 3) for line in done.stdout.splitlines())}
        return self._jobs


def _accounted(job_id: str) -> Entry | None:
    """What the accounting says of a job that left the queue; None where there is none."""
    if shutil.which("sacct") is None:
        return None
    words = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=State,JobName", "--jobs", job_id]
    done = subprocess.run(words, capture_output=True, text=True)
    first = done.stdout.splitlines()[:1] if done.returncode == 0 else []
    return Entry(first[0].split("|")[0].split()[0], "", first[0].partition("|")[2]) if first else None


def _try_out(parameters: Mapping[str, Any]) -> None:
    """Let sbatch look at the options without submitting.

    Raises:
        ValueError: it refuses them.
    """
    given = {key: parameters[key] for key in PLACES if key in parameters} | {"time": parameters["time"]}
    words = ["sbatch", "--test-only", *(f"--{key}={value}" for key, value in given.items()), "--wrap", "true"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"SLURM refuses what `slurm` asks for: {_one_line(done.stderr)}")


def _one_line(text: str) -> str:
    return "; ".join(line.strip().removeprefix("sbatch: error: ") for line in text.splitlines() if line.strip())


def _name(name: str, folder: Path, fingerprint: str) -> str:
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:8] for text in (str(folder.absolute()), fingerprint)]
    return ".".join([re.sub(r"[^\w-]+", "_", name), *hashes])


# --- a study's `slurm` mapping ---------------------------------------------------------------------------------------


def check_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with `time` in minutes and the defaults of this module.

    Raises:
        ValueError: an unknown key, or a value that cannot be.
    """
    known = (*SBATCH, *OTHERS)
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"slurm.{key}: unknown{nearest(key, known)}; other options of sbatch go under additional_parameters"
            )
        kind = {"setup": list, "srun_args": list, "additional_parameters": dict}.get(key)
        if kind is not None and not isinstance(value, kind):
            raise ValueError(f"slurm.{key}: must be a {kind.__name__}, got {value!r}")
    if "time" not in given:
        raise ValueError("slurm.time: missing: say how long a stage may take, for example time: 12h")
    for key in ("restarts", "signal_delay_s", "cpus_per_task", "gpus_per_node"):
        least = 1 if key == "cpus_per_task" else 0
        if key in given and (not isinstance(given[key], int) or given[key] < least):
            raise ValueError(f"slurm.{key}: must be a whole number of at least {least}, got {given[key]!r}")
    return {"restarts": 3, "signal_delay_s": 90, **given, "time": minutes(given["time"])}


def minutes(text: Any) -> int:
    """A time limit in minutes, rounded up: `90m`, `12h`, `2d`, or as SLURM writes it, `HH:MM:SS`, `D-HH[:MM[:SS]]`.

    Raises:
        ValueError: anything else; above all a number, for YAML reads 1:00:00 as 3600.
    """
    if isinstance(text, str) and (found := re.fullmatch(r"(\d+)\s*(m|h|d)", text)):
        return int(found[1]) * {"m": 1, "h": 60, "d": 1440}[found[2]]
    pattern = r"(?:(?P<d>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?|(?P<H>\d+):(?P<M>\d+):(?P<S>\d+))"
    if isinstance(text, str) and (found := re.fullmatch(pattern, text)):
        part = {key.lower(): int(value) for key, value in found.groupdict(default="0").items() if value != "0"}
        return part.get("d", 0) * 1440 + part.get("h", 0) * 60 + part.get("m", 0) + (part.get("s", 0) > 0)
    raise ValueError(f"slurm.time: {text!r} is no time: write '90m', '12h', '2d' or, in quotes, '1-12:00:00'")
