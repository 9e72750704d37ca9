"""`lightning-vlm study run|status|report|check|clean FILE`: many runs as one thing that can be stopped and compared."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_vlm.cli.arguments import Parser
from lightning_vlm.cli.stage import parse_value
from lightning_vlm.config.tree import nearest

if TYPE_CHECKING:
    from lightning_vlm.studies.graph import Graph

ACTIONS = {
    "run": "run what is missing, then write the report",
    "status": "what is done, what is missing, what failed",
    "report": "write the report of what there is",
    "check": "check the file, its configurations and its metrics; runs nothing",
    "clean": "remove what is no longer needed",
}
DESCRIPTION = """\
A study is a YAML file: stages (any command), what they use from each other, axes (arms, seeds, settings) over which
they are repeated, and the endpoints on which arms are compared. Every stage runs as a process of its own. What is done
is not done again; what was cut off goes on; what depends on a changed input runs again, and nothing else.

""" + "\n".join(f"  {name:<8}{text}" for name, text in ACTIONS.items())
EXAMPLES = """\
examples:
  lightning-vlm study run study/demo
  lightning-vlm study run study/world-warm-start --jobs 2 --axes.seed '[0, 1, 2]'
  lightning-vlm study status study/world-warm-start
  lightning-vlm study clean study/world-warm-start --checkpoints

Any key of the file can be overridden: --run_dir DIR, --vars.steps 50, --axes.seed '[0, 1]', --threads 2."""
CHECKED = "checked.json"  # in run_dir: what was checked, so that a restart need not check it again


def main(command: str, argv: list[str]) -> int:
    """Read the study, do what is asked."""
    parser = _parser(command)
    args, rest = parser.parse_known_args(argv)
    overrides = _overrides(rest)
    _refuse_without_effect(args)

    from lightning_vlm.studies.graph import Graph
    from lightning_vlm.studies.spec import read_spec

    graph = Graph(read_spec(args.file, overrides))
    if args.action == "run":
        return _run(graph, args, [args.file, *rest])
    if args.action == "check":
        from lightning_vlm.cli.study_check import check_study

        check_study(graph)
        print(f"{graph.spec.name}: {len(graph.spec.stages)} stages, {len(graph.runs)} runs: nothing wrong is seen")
        return 0
    if args.action == "status":
        return _status(graph)
    if args.action == "report":
        _report(graph, args.out)
        return 0
    return _clean(graph, args)


def _parser(command: str) -> Parser:
    parser = Parser(
        command,
        usage=f"lightning-vlm {command} {'|'.join(ACTIONS)} FILE [options] [--key value ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("action", choices=ACTIONS, metavar="ACTION", help=" | ".join(ACTIONS))
    add("file", metavar="FILE", help="a path, or a name in configs/ such as study/demo")
    add("--jobs", type=int, default=None, metavar="N", help="run: stages at once (default: one per set of GPUs, or 1)")
    add("--gpus", metavar="0,1", help="run: devices to share out among stages (default: all that are visible)")
    add("--launcher", choices=("local", "slurm"), default="local", help="run: processes here, or jobs of SLURM")
    add("--no_mlflow", action="store_true", help="run: keep no records in MLflow")
    add("--no_report", action="store_true", help="run: write no report at the end")
    add("--out", type=Path, metavar="DIR", help="report: where to (default: run_dir/report)")
    add("--checkpoints", action="store_true", help="clean: checkpoints of runs that are done and not picked from")
    add("--all", action="store_true", help="clean: everything the study made")
    add("--yes", action="store_true", help="clean: remove; without it only say what would go")
    return parser


def _overrides(rest: Sequence[str]) -> list[tuple[str, Any]]:
    """`--key value` pairs of the study file."""
    from lightning_vlm.studies.spec import TOP

    found, words = [], list(rest)
    while words:
        word = words.pop(0)
        flag, equals, text = word.partition("=")
        key = flag.removeprefix("--")
        if not flag.startswith("--") or key.split(".")[0].rstrip("+-") not in TOP:
            known = [*TOP, "jobs", "gpus", "launcher", "no_mlflow", "no_report", "out", "checkpoints", "all", "yes"]
            raise ValueError(f"unknown option '{word}'{nearest(key.split('.')[0], known)}")
        if not equals:
            if not words:
                raise ValueError(f"{flag} needs a value")
            text = words.pop(0)
        found.append((key, parse_value(text)))
    return found


def _refuse_without_effect(args: argparse.Namespace) -> None:
    given = {
        "run": {"--jobs": args.jobs, "--gpus": args.gpus, "--no_mlflow": args.no_mlflow, "--no_report": args.no_report}
        | {"--launcher": args.launcher != "local"},
        "report": {"--out": args.out},
        "clean": {"--checkpoints": args.checkpoints, "--all": args.all, "--yes": args.yes},
    }
    for action, options in given.items():
        for name, value in options.items():
            if value and action != args.action:
                raise ValueError(f"{name} has no effect on `study {args.action}`; it belongs to `study {action}`")
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")


# --- run -------------------------------------------------------------------------------------------------------------


def _run(graph: Graph, args: argparse.Namespace, given: list[str]) -> int:
    from lightning_vlm.studies.runner import Runner
    from lightning_vlm.studies.table import Watcher

    spec = graph.spec
    gpus = _gpus(args.gpus, graph) if args.launcher == "local" else None
    jobs = args.jobs or _jobs(graph, gpus)
    most = max(run.devices for run in graph.runs)
    if gpus is not None and most > len(gpus):
        raise ValueError(f"a stage wants {most} GPUs, {len(gpus)} are visible: set `devices`, --gpus, or use SLURM")
    launcher = _launcher(graph, args.launcher)
    done = False
    try:
        _check_first(graph, launcher, given)
        lineage = _lineage(graph, args)
        runner = Runner(graph, launcher, jobs=jobs, gpus=gpus, lineage=lineage)
        todo = sum(state != "done" for state in runner.states.values())
        print(f"{spec.name}: {len(graph.runs)} runs, {todo} to do, {jobs} at once, in {spec.run_dir}", flush=True)
        with Watcher(graph, runner.states) as watcher:
            runner.watch = watcher
            done = runner.run()
    except KeyboardInterrupt:
        print(f"interrupted; `lightning-vlm study run {' '.join(given)}` goes on", file=sys.stderr)
        return 130
    finally:
        launcher.close()
    files = [] if args.no_report else _report(graph, None)
    if lineage is not None:
        lineage.finish(files, failed=not done)
    if not done:
        failed = [name for name, state in runner.states.items() if state == "failed"]
        waiting = sum(state not in ("done", "failed") for state in runner.states.values())
        print(
            f"error: {len(failed)} runs failed ({', '.join(failed[:5])}), {waiting} wait behind them", file=sys.stderr
        )
        return 2
    return 0


def _gpus(given: str | None, graph: Graph) -> tuple[str, ...]:
    if given is not None:
        return tuple(part.strip() for part in given.split(",") if part.strip())
    if not any(run.devices for run in graph.runs):
        return ()
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(part for part in visible.split(",") if part)
    import torch

    return tuple(str(i) for i in range(torch.cuda.device_count()))


def _jobs(graph: Graph, gpus: tuple[str, ...] | None) -> int:
    """As many as there are sets of GPUs; on the CPU one, for the cores are its threads'; under SLURM all."""
    if gpus is None:
        return len(graph.runs)
    most = max(run.devices for run in graph.runs)
    return max(1, len(gpus) // most) if most else 1


def _launcher(graph: Graph, name: str) -> Any:
    spec = graph.spec
    if name == "slurm":
        from lightning_vlm.studies.slurm import SlurmLauncher

        return SlurmLauncher(folder=spec.run_dir / "slurm", parameters=spec.slurm)
    from lightning_vlm.studies.launch import LocalLauncher

    return LocalLauncher(threads=spec.threads, forks=not any(run.devices for run in graph.runs))


def _check_first(graph: Graph, launcher: Any, given: list[str]) -> None:
    """`study check` in a process of its own, unless just this was checked before.

    Raises:
        ValueError: what it found.
    """
    import time

    from lightning_vlm.studies.launch import Job, LocalLauncher
    from lightning_vlm.studies.record import read_json, write_json

    spec = graph.spec
    facts = [[run.name, run.fingerprint, *run.options] for run in graph.runs] + [spec.report, repr(spec.endpoints)]
    digest = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
    if read_json(spec.run_dir / CHECKED).get("digest") == digest:
        return
    print("checking every stage's configuration …", flush=True)
    log = spec.run_dir / "logs" / "check.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    here = launcher if isinstance(launcher, LocalLauncher) else LocalLauncher(forks=False)
    words = ["study", "check", *given]
    handle = here.submit(Job("check", words, log.parent, log, spec.threads, 1, 0, {}))
    while (code := handle.poll()) is None:
        time.sleep(0.1)
    if code:
        said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        raise ValueError(said[-1].removeprefix("error: ") if said else f"the check failed with code {code}; see {log}")
    write_json(spec.run_dir / CHECKED, {"digest": digest})


def _lineage(graph: Graph, args: argparse.Namespace) -> Any:
    if args.no_mlflow:
        return None
    from lightning_vlm.studies.lineage import started

    return started(graph)


# --- the others ------------------------------------------------------------------------------------------------------


def _status(graph: Graph) -> int:
    from rich.console import Console

    from lightning_vlm.studies.state import state_of
    from lightning_vlm.studies.table import failure, overview

    states = {run.name: state_of(run) for run in graph.runs}
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(overview(graph, states))
    for run in graph.runs:
        if states[run.name] == "failed":
            print(f"\n{failure(run)}")
    done = sum(state == "done" for state in states.values())
    print(f"\n{graph.spec.name}: {done} of {len(states)} runs are done")
    return 0


def _report(graph: Graph, out: Path | None) -> list[Path]:
    from lightning_vlm.studies.report import write_report
    from lightning_vlm.studies.results import collect

    results = collect(graph)
    files = write_report(results, out or graph.spec.run_dir / "report")
    for measured in results.measured[:1]:
        print(f"\n{measured.endpoint.name}")
        for pair in measured.comparison.pairs if measured.comparison else ():
            print(f"  {pair.short()}")
        if measured.missing:
            print(f"  {measured.missing}")
    print(f"report: {files[0]}")
    return files


def _clean(graph: Graph, args: argparse.Namespace) -> int:
    from lightning_vlm.studies.record import is_locked
    from lightning_vlm.studies.state import REPLACED, state_of

    spec = graph.spec
    if not spec.run_dir.is_dir():
        raise FileNotFoundError(f"{spec.run_dir} is not there: nothing to clean")
    if busy := [run.name for run in graph.runs if is_locked(run.folder)]:
        raise ValueError(f"{busy[0]} is running: stop the study first")
    targets = [spec.run_dir / REPLACED]
    if args.checkpoints:
        picked = {run.pick.of.name for run in graph.runs if run.pick is not None and state_of(run) != "done"}
        targets += [
            run.folder / "checkpoints" for run in graph.runs if state_of(run) == "done" and run.name not in picked
        ]
    if args.all:
        targets = [run.folder for run in graph.runs]
        targets += [spec.run_dir / name for name in (REPLACED, "report", "logs", CHECKED)]
    targets = [path for path in targets if path.exists()]
    freed = sum(_size(path) for path in targets)
    for path in targets:
        print(f"{'removed' if args.yes else 'would remove'} {path}")
        if args.yes:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    more = "" if args.yes or not targets else "; add --yes to remove"
    print(f"{len(targets)} folders, {freed / 2**30:.2f} GiB{more}")
    return 0


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
