"""Jobs of a study on a real SLURM of one node; skipped where its programs are not installed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lightning_vlm._version import __version__
from lightning_vlm.studies.launch import Job
from lightning_vlm.studies.slurm import JOB_FILE, Interrupted, SlurmLauncher, Stage, check_parameters, minutes

from .runs.slurm import missing, single_node

# Instead of a command of this package: the words behind the first, with `--resume` as $0 where it was added.
SHELL = (
    sys.executable,
    "-c",
    "import json, subprocess, sys; w = json.loads(sys.argv[1])['words']; "
    "sys.exit(subprocess.call(['sh', '-c', w[1], *w[2:]]))",
)
PARAMETERS = {"time": "5m", "partition": "main", "gpus_per_node": 0}


@pytest.fixture(scope="module")
def cluster():
    """A running SLURM, for this process's environment."""
    if (why := missing()) is not None:
        pytest.skip(f"no SLURM: {why}")
    folder = Path(tempfile.mkdtemp(prefix="lvlm-slurm-"))  # short: sockets are in it
    with pytest.MonkeyPatch.context() as patch, single_node(folder) as env:
        for name, value in env.items():
            patch.setenv(name, value)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def launch(cluster, tmp_path):
    """Makes launchers, each as a study's process that is started anew would."""

    def make(*, command=SHELL, **parameters) -> SlurmLauncher:
        return SlurmLauncher(
            folder=tmp_path / "submitit", parameters=PARAMETERS | parameters, refresh=0.2, command=command
        )

    return make


def job(tmp_path, *words: str, name: str = "stage-0", fingerprint: str = "a", threads: int = 1) -> Job:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    (folder / "stage.json").write_text(json.dumps({"name": name, "fingerprint": fingerprint, "state": "running"}))
    return Job(name, list(words), folder, tmp_path / "logs" / f"{name}.log", threads, 1, 1, {"STAGE": name})


def end(handle, seconds: float = 60) -> int:
    """The exit code, once there is one."""
    until = time.monotonic() + seconds
    while (code := handle.poll()) is None:
        assert time.monotonic() < until, handle.said
        time.sleep(0.1)
    return code


def wait_for(condition, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


# ------------------------------------------------------------------------------------------------ without a cluster


def test_time_limits():
    """Units and SLURM's own forms; a bare number could be minutes or what YAML made of 1:00:00."""
    texts = ("90m", "12h", "2d", "00:00:30", "01:30:00", "1-12", "1-12:15", "2-00:00:01")
    assert [minutes(t) for t in texts] == [90, 720, 2880, 1, 90, 2160, 2175, 2881]
    for wrong in (3600, "1:00", "soon", None):
        with pytest.raises(ValueError, match=r"slurm.time: .* is no time: write '90m'"):
            minutes(wrong)


def test_parameters_are_checked():
    assert check_parameters({"time": "2h", "mem": "64GB"}) == {
        "time": 120,
        "mem": "64GB",
        "restarts": 3,
        "signal_delay_s": 90,
    }
    for given, said in (
        ({"partion": "gpu", "time": "1h"}, "slurm.partion: unknown; did you mean 'partition'?; other options"),
        ({"partition": "gpu"}, "slurm.time: missing"),
        ({"time": "1h", "setup": "module load cuda"}, "slurm.setup: must be a list, got 'module load cuda'"),
        ({"time": "1h", "gpus_per_node": -1}, "slurm.gpus_per_node: must be a whole number of at least 0, got -1"),
        ({"time": "1h", "cpus_per_task": 0}, "slurm.cpus_per_task: must be a whole number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said.replace("?", r"\?")):
            check_parameters(given)


def test_no_slurm_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no sbatch, srun, squeue, scancel on the PATH"):
        SlurmLauncher(folder=tmp_path / "submitit", parameters=PARAMETERS)
    assert list(tmp_path.iterdir()) == []


def test_a_requeued_fit_resumes_and_nothing_else_goes_on(tmp_path, monkeypatch):
    stage = Stage(command=SHELL, minutes=60, delay=90)
    first = job(tmp_path, "fit", 'echo "$0" >> out; echo $OMP_NUM_THREADS $SLURM_JOB_NAME >> out', threads=3)
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert stage(first) == 0
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert stage(first) == 0
        assert stage(first._replace(words=["test", *first.words[1:]])) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert Path("out").read_text().split("\n") == [
        "sh",
        "3 interactive",
        "--resume",
        "3 interactive",
        "sh",
        "3 interactive",
        "",
    ]
    assert stage.checkpoint(first).args == (first,)
    other = first._replace(words=["test", "true"])
    with pytest.raises(Interrupted, match="PREEMPTED"):  # the first of 60 minutes
        stage.checkpoint(other)
    short = Stage(command=SHELL, minutes=1, delay=30)
    short._started = time.monotonic() - 31  # 60 - 30 seconds are over
    with pytest.raises(Interrupted, match="TIMEOUT"):
        short.checkpoint(other)


# --------------------------------------------------------------------------------------------------- on the cluster


def test_commands_run_on_the_node_and_give_their_exit_codes(launch, tmp_path):
    """`--version` ends with 0 and an unknown command with 2; both in SLURM, each with its log and measured costs."""
    launcher = launch(command=(sys.executable, "-m", "lightning_vlm.studies.launch"))
    good, bad = job(tmp_path, "--version", name="good"), job(tmp_path, "fti", name="bad")
    handles = [launcher.submit(good), launcher.submit(bad)]
    assert [(good.folder / JOB_FILE).exists(), (bad.folder / JOB_FILE).exists()] == [True, True]
    assert [end(h) for h in handles] == [0, 2]
    assert f"lightning-vlm {__version__}" in good.log.read_text() and "unknown command 'fti'" in bad.log.read_text()
    assert handles[1].said == f"job {handles[1].job_id} ended with exit code 2"
    record = json.loads((good.folder / "stage.json").read_text())
    assert record["fingerprint"] == "a" and record["seconds"] > 0
    assert not (good.folder / JOB_FILE).exists()  # seen to end
    launcher.close()


def test_a_cancelled_job_is_told_from_a_failed_one(launch, tmp_path):
    launcher = launch()
    waiting = launcher.submit(job(tmp_path, "test", f"touch {tmp_path}/runs; sleep 60"))
    wait_for((tmp_path / "runs").exists)
    assert waiting.poll() is None and waiting.said == "running"
    waiting.stop()
    assert end(waiting) == 143 and waiting.said == f"job {waiting.job_id} was cancelled"


def test_a_study_that_died_finds_its_jobs(launch, tmp_path):
    """One that runs, and one that ended meanwhile; each was run once."""
    go, words = tmp_path / "go", "echo once >> {0}; until [ -e {1} ]; do sleep 0.1; done"
    running = job(tmp_path, "fit", words.format(tmp_path / "out", go), name="running")
    ended = job(tmp_path, "test", f"echo once >> {tmp_path}/out2", name="ended")
    first = launch()
    ids = [first.submit(j).job_id for j in (running, ended)]
    wait_for(lambda: (tmp_path / "submitit" / f"{ids[1]}_0_result.pkl").exists() and (tmp_path / "out").exists())

    (running.folder / JOB_FILE).unlink()  # killed between sbatch and the file: the name tells
    again = launch()
    found = [again.submit(running._replace(words=[*running.words, "--resume"])), again.submit(ended)]
    assert [h.job_id for h in found] == ids and all(h.found for h in found)
    assert found[1].poll() == 0 and found[0].poll() is None
    go.touch()
    assert end(found[0]) == 0
    assert (tmp_path / "out").read_text() == (tmp_path / "out2").read_text() == "once\n"

    third = again.submit(ended)  # seen to end: what is submitted now runs
    assert not third.found and end(third) == 0 and (tmp_path / "out2").read_text() == "once\nonce\n"


def test_changed_inputs_cancel_what_still_runs(launch, tmp_path):
    old = launch().submit(job(tmp_path, "test", f"touch {tmp_path}/runs; sleep 60", fingerprint="a"))
    wait_for((tmp_path / "runs").exists)
    new = launch().submit(job(tmp_path, "test", f"touch {tmp_path}/new", fingerprint="b"))
    assert new.job_id != old.job_id and not new.found
    assert end(new) == 0 and end(old) == 143


def test_a_fit_that_slurm_interrupts_goes_on(launch, tmp_path):
    """SLURM's warning signal: the fit is requeued and resumes; another command ends, and says why."""
    script = f'echo "$0" >> {tmp_path}/out; [ "$0" = --resume ] || sleep 60'
    fit = launch().submit(job(tmp_path, "fit", script, name="fit"))
    test = launch().submit(job(tmp_path, "test", f"touch {tmp_path}/runs; sleep 60", name="test"))
    wait_for(lambda: (tmp_path / "out").exists() and (tmp_path / "runs").exists())
    for handle in (fit, test):
        subprocess.run(["scancel", handle.job_id, "--signal", "USR2"], check=True)
    assert end(test) == 75 and test.said == f"job {test.job_id} was preempted by another job"
    assert end(fit) == 0 and (tmp_path / "out").read_text() == "sh\n--resume\n"


def test_what_slurm_refuses_is_one_line(launch, tmp_path):
    with pytest.raises(ValueError, match=r"^SLURM refuses what `slurm` asks for: .*[Ii]nvalid partition.*$"):
        launch(partition="nope")
    launcher = launch(gpus_per_node=1)
    with pytest.raises(ValueError, match=r"^SLURM refused stage-0: .*generic resource.*$"):
        launcher.submit(job(tmp_path, "test", "true"))
    assert not (tmp_path / "stage-0" / JOB_FILE).exists()
    with pytest.raises(ValueError, match="SLURM does not answer: "), pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", os.devnull)
        launch()


def test_a_job_that_waits_says_for_what(launch, tmp_path):
    """The node has two CPUs: a job of two waits for one that runs."""
    launcher = launch()
    first = launcher.submit(job(tmp_path, "test", f"touch {tmp_path}/runs; sleep 60", name="first", threads=2))
    wait_for((tmp_path / "runs").exists)
    second = launcher.submit(job(tmp_path, "test", "true", name="second", threads=2))
    wait_for(lambda: second.poll() is None and second.said == "pending (Resources)")
    for handle in (second, first):
        handle.stop(wait=True)
    assert (first.poll(), second.poll()) == (143, 143)
