"""A SLURM cluster of one node, all of it in a folder of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel")
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
CredType=cred/munge
# A job that is requeued waits as long as a credential lives.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
KillWait=2
# The node has the CPUs that stand below, whatever the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""


def missing() -> str | None:
    """Why no cluster can be started here; None where it can."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd needs root"


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@contextmanager
def single_node(folder: Path, *, cpus: int = 2) -> Iterator[dict[str, str]]:
    """Runs munged, slurmctld and slurmd, all of whose files lie in `folder`.

    Args:
        folder: an empty one with a short path: it holds a socket. cpus: what the node says it has.

    Yields:
        What the environment needs for sbatch and the others to talk to it.

    Raises:
        RuntimeError: it does not come up; with the ends of its logs.
    """
    host = socket.gethostname().partition(".")[0]
    controller, daemon = _free_ports(2)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, controller=controller, daemon=daemon, folder=folder, cpus=cpus))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o400)
    key.write_bytes(secrets.token_bytes(128))
    env = {"SLURM_CONF": str(conf)}
    munge = [f"--{name}={folder}/munge.{file}" for name, file in (("socket", "socket"), ("key-file", "key"))]
    munge += [f"--{name}={folder}/munge.{name[:-5]}" for name in ("pid-file", "log-file", "seed-file")]
    with ExitStack() as stack:
        for words in (
            ["munged", "--foreground", "--force", *munge],
            ["slurmctld", "-D", "-c", "-f", str(conf)],
            ["slurmd", "-D", "-c", "-f", str(conf), "-N", host],
        ):
            stack.callback(_kill, _start(words, folder / f"{words[0]}.out", env))
            if words[0] == "munged":
                _wait_for(lambda: (folder / "munge.socket").exists(), "munged", folder)
        _wait_for(lambda: "idle" in _said(["sinfo", "-h", "-o", "%t"], env), "the node", folder)
        stack.callback(_cancel_all, env)
        yield env


def _start(words: list[str], out: Path, env: dict[str, str]) -> subprocess.Popen:
    with out.open("w") as stream:
        program = _program(words[0])
        return subprocess.Popen(
            [program, *words[1:]], env=os.environ | env, stdout=stream, stderr=stream, start_new_session=True
        )


def _kill(process: subprocess.Popen) -> None:
    """At once: nothing of the cluster is to be kept."""
    process.kill()
    process.wait()


def _cancel_all(env: dict[str, str]) -> None:
    """End all jobs, and wait until their processes are gone."""
    subprocess.run(["scancel", "--signal=KILL", "--full", "--me"], env=os.environ | env, capture_output=True)
    subprocess.run(["scancel", "--me"], env=os.environ | env, capture_output=True)
    end = time.monotonic() + 10
    while _said(["squeue", "--noheader", "--states=running,completing"], env) and time.monotonic() < end:
        time.sleep(0.2)


def _said(words: list[str], env: dict[str, str]) -> str:
    return subprocess.run(words, env=os.environ | env, capture_output=True, text=True).stdout


def _wait_for(done, what: str, folder: Path, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            logs = "\n".join(
                f"{p.name}: {p.read_text()[-800:]}" for p in sorted(folder.iterdir()) if p.suffix in (".out", ".log")
            )
            raise RuntimeError(f"{what} did not come up:\n{logs}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
