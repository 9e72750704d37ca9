"""Per-example files: found, read, checked against each other, grouped into arms and training seeds.

A file has one JSON object per line: `id`, `score`, and optionally `sample` (index of the draw, 0 if missing), `rule`,
`prompt_id`, `gold`; other fields are ignored. A `conditions.json` beside it may tell `rule`, `prompt_id`, `sampling`
and `provenance` (`arm`, `seed`, `start`, `step`).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning_vlm.benchmarks.report import CONDITIONS, EVALUATIONS, PER_EXAMPLE


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint's scores on one benchmark.

    Attributes:
        path: the file.
        scores: id → one score per draw.
        golds: id → gold answer, where the file has it.
        rules: the grading rules in it. prompts: the prompt ids. Empty where it does not say.
        sampling: how answers were drawn; None where unknown.
        arm: recipe, by provenance. seed: training seed. start: hash of the model that training started from. step:
            optimizer steps done. None where unknown.
    """

    path: Path
    scores: dict[str, list[float]]
    golds: dict[str, Any]
    rules: tuple[str, ...]
    prompts: tuple[str, ...]
    sampling: dict[str, Any] | None
    arm: str | None
    seed: int | None
    start: str | None
    step: int | None


@dataclass(frozen=True)
class Run:
    """An evaluation with its place in the comparison; `minus`: one whose metric is subtracted."""

    arm: str
    seed: int | None
    evaluation: Evaluation
    minus: Evaluation | None = None


def find_file(given: str, benchmark: str | None = None) -> Path:
    """The per-example file that an argument means: a file, a folder that has one, or a run's last step.

    Args:
        given: the argument. benchmark: of a run folder; its only one by default.

    Raises:
        FileNotFoundError: nothing of that name.
        ValueError: a folder without such a file, an unknown benchmark, or several and none chosen.
    """
    path = Path(given)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder '{given}' to compare")
    if (path / PER_EXAMPLE).is_file():
        return path / PER_EXAMPLE
    found = last_evaluations(path)
    if not found:
        raise ValueError(
            f"'{given}' has no {PER_EXAMPLE}, nor {EVALUATIONS}/BENCHMARK/step-N/{PER_EXAMPLE}: has it been evaluated?"
        )
    names = ", ".join(found)
    if benchmark is None and len(found) > 1:
        raise ValueError(f"'{given}' was evaluated on several benchmarks: choose one by --benchmark: {names}")
    if benchmark is not None and benchmark not in found:
        raise ValueError(f"'{given}' has no evaluation on '{benchmark}'; it has: {names}")
    return found[benchmark or names]


def last_evaluations(folder: Path) -> dict[str, Path]:
    """Benchmark, in order of name → the per-example file of a run's last step on it."""
    steps: dict[str, dict[int, Path]] = {}
    for file in sorted((folder / EVALUATIONS).rglob(f"step-*/{PER_EXAMPLE}")):
        step = _step(file.parent)
        if step is not None:
            name = file.parents[1].relative_to(folder / EVALUATIONS).as_posix()
            steps.setdefault(name, {})[step] = file
    return {name: steps[name][max(steps[name])] for name in sorted(steps)}


def _step(folder: Path) -> int | None:
    number = re.fullmatch(r"step-(\d+)", folder.name)
    return int(number[1]) if number else None


def read_evaluation(path: Path, where: Mapping[str, str] | None = None) -> Evaluation:
    """Read a per-example file and what stands beside it.

    Args:
        path: the file. where: group → value; only examples that have all of them (`{"task": "geometry"}`).

    Raises:
        ValueError: with file and line: not JSON, an id or score that is missing or of another type, a score that is not
            finite, a draw that comes twice; an empty file; different numbers of draws per id; a malformed
            conditions.json; no example of the group asked for.
    """
    draws: dict[str, dict[int, float]] = {}
    golds: dict[str, Any] = {}
    said: dict[str, set[str]] = {"rule": set(), "prompt_id": set()}
    for place, record in _in_groups(path, where or {}):
        name, draw, score = record.get("id"), record.get("sample", 0), record.get("score")
        if not _is_a(name, str, int):
            raise ValueError(f"{place}: `id` must be a text, got {_shown(name)}")
        if not _is_a(draw, int):
            raise ValueError(f"{place}: `sample` must be a whole number, got {_shown(draw)}")
        if not _is_a(score, int, float) or not math.isfinite(score):
            raise ValueError(f"{place}: `score` must be a finite number, got {_shown(score)}; evaluate it again")
        scores = draws.setdefault(str(name), {})
        if draw in scores:
            raise ValueError(f"{place}: id '{name}', sample {draw} comes a second time; every draw stands once")
        scores[draw] = float(score)
        golds.setdefault(str(name), record.get("gold"))
        for field, values in said.items():
            if record.get(field) is not None:
                values.add(str(record[field]))
    if not draws:
        raise ValueError(f"{path} is empty: no scores to compare")
    first = next(iter(draws))
    for name, scores in draws.items():
        if len(scores) != len(draws[first]):
            raise ValueError(
                f"{path}: id '{name}' has {len(scores)} draws, '{first}' has {len(draws[first])}; every problem needs "
                "equally many"
            )
    conditions = _conditions(path.parent / CONDITIONS)
    for field, values in said.items():
        if not values and conditions.get(field) is not None:
            values.add(str(conditions[field]))
    provenance = conditions.get("provenance") or {"step": _step(path.parent)}
    return Evaluation(
        path=path,
        scores={name: list(scores.values()) for name, scores in draws.items()},
        golds=golds,
        rules=tuple(sorted(said["rule"])),
        prompts=tuple(sorted(said["prompt_id"])),
        sampling=conditions.get("sampling"),
        arm=provenance.get("arm"),
        seed=provenance.get("seed"),
        start=(provenance.get("start") or {}).get("hash"),
        step=provenance.get("step"),
    )


def _in_groups(path: Path, where: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of all groups asked for.

    Raises:
        ValueError: there are none; says which values there are.
    """
    seen: dict[str, set[str]] = {key: set() for key in where}
    found = False
    for place, record in _records(path):
        groups = record.get("groups") or {}
        values = {key: _texts(groups.get(key, [])) for key in where}
        for key, given in values.items():
            seen[key] |= given
        if all(where[key] in given for key, given in values.items()):
            found = True
            yield place, record
    for key, given in seen.items():
        if where[key] not in given:
            known = f"it has: {', '.join(sorted(given))}" if given else "no example has that key"
            raise ValueError(f"--where {key}={where[key]}: {path} has no such example ({known})")
    if where and not found:
        raise ValueError(f"--where: {path} has no example that is of all groups asked for")


def _texts(value: Any) -> set[str]:
    return {str(entry) for entry in (value if isinstance(value, list) else [value])}


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    place = f"{path}:{number}"
                    yield place, _json_object(line, place)
    except UnicodeDecodeError as err:
        raise ValueError(f"{path} is not UTF-8 text ({err.reason}): is it a per-example file?") from None


def _json_object(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as err:
        raise ValueError(f"{place}: not JSON ({err.msg}); a file that was cut off must be written again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected a JSON object, got {_shown(value)}")
    return value


def _conditions(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = _json_object(path.read_text(encoding="utf-8"), str(path))
    _check_types(found, {"sampling": dict, "provenance": dict}, str(path))
    provenance = found.get("provenance") or {}
    _check_types(provenance, {"arm": str, "seed": int, "step": int, "start": dict}, f"{path}: provenance")
    _check_types(provenance.get("start") or {}, {"hash": str}, f"{path}: provenance.start")
    return found


def _check_types(fields: dict[str, Any], types: dict[str, type], place: str) -> None:
    for name, kind in types.items():
        value = fields.get(name)
        if value is not None and not _is_a(value, kind):
            raise ValueError(f"{place}: `{name}` must be of type {kind.__name__}, got {_shown(value)}")


def _is_a(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def group(evaluations: Sequence[Evaluation], arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
    """Give each evaluation its arm and training seed: as said, else by provenance, else each file is its own arm.

    Args:
        evaluations: in the order given. arms: one per evaluation, or none. seeds: the same.

    Raises:
        ValueError: a file given twice, lists of another length, an arm known of some files only, several files of an
            arm without a seed, or the same arm and seed twice.
    """
    files = [Path(os.path.abspath(e.path)) for e in evaluations]
    for file in files:
        if files.count(file) > 1:
            raise ValueError(f"{file} is given twice; a file cannot be compared with itself")
    for flag, values in (("--arms", arms), ("--seeds", seeds)):
        if values and len(values) != len(files):
            raise ValueError(f"{flag} names {len(values)}, but {len(files)} inputs are given; one per input, in order")
    names = list(arms) or [e.arm for e in evaluations]
    without = [str(e.path) for e, name in zip(evaluations, names, strict=True) if name is None]
    if 0 < len(without) < len(files):
        raise ValueError(f"some files tell their arm and others do not: {_some(without)}; name all by --arms")
    if without:
        if seeds:
            raise ValueError("--seeds without arms: no file tells its arm; give --arms, too, one per input, in order")
        names = short_names(files)
    numbers = list(seeds) or [e.seed for e in evaluations]
    runs = [Run(str(n), s, e) for n, s, e in zip(names, numbers, evaluations, strict=True)]
    seen: dict[tuple[str, int | None], Run] = {}
    for run in runs:
        files_of_arm = names.count(run.arm)
        if run.seed is None and files_of_arm > 1:
            raise ValueError(
                f"arm '{run.arm}' has {files_of_arm} files, but {run.evaluation.path} tells no training seed; give "
                "--seeds, one per input, in order"
            )
        other = seen.setdefault((run.arm, run.seed), run)
        if other is not run:
            raise ValueError(
                f"arm '{run.arm}', seed {run.seed} comes twice: {other.evaluation.path} and {run.evaluation.path}; "
                "leave one out, or tell them apart by --arms and --seeds"
            )
    return runs


def short_names(files: Sequence[Path]) -> list[str]:
    """What tells files apart: the parts of their paths in which they differ."""
    paths = [f.parent.parts if f.name == PER_EXAMPLE else f.with_suffix("").parts for f in files]
    if len({len(path) for path in paths}) == 1:
        kept = [i for i, column in enumerate(zip(*paths, strict=True)) if len(set(column)) > 1]
        names = ["/".join(path[i] for i in kept) for path in paths]
    else:
        front = _shared(paths)
        paths = [path[front:] for path in paths]
        back = _shared([path[::-1] for path in paths])
        names = ["/".join(path[: len(path) - back]) for path in paths]
    return names if all(names) and len(set(names)) == len(names) else [str(f) for f in files]


def _shared(paths: Sequence[tuple[str, ...]]) -> int:
    """Leading parts that all paths share."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def common_ids(evaluations: Sequence[Evaluation], *, common: bool = False, flags: bool = True) -> list[str]:
    """The ids of all files, sorted: results do not depend on the order of lines.

    Args:
        evaluations: at least one. common: whether ids may be left out. flags: whether errors may name `--common`.

    Raises:
        ValueError: files of other ids, fewer than two shared ones, or an id that has another gold answer elsewhere.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        missing = [name for name in first.scores if name not in other.scores]
        extra = [name for name in other.scores if name not in first.scores]
        if (missing or extra) and not common:
            raise ValueError(
                f"{first.path} and {other.path} are not of the same problems: {len(missing)} only in the first"
                f"{_listed(missing)}, {len(extra)} only in the second{_listed(extra)}"
                + ("; --common compares those in all files" if flags else "")
            )
    ids = [name for name in sorted(first.scores) if all(name in e.scores for e in evaluations)]
    if len(ids) < 2:
        raise ValueError(f"the files share {len(ids)} problems; at least 2 are needed to compare")
    for other in evaluations[1:]:
        for name in ids:
            a, b = first.golds[name], other.golds[name]
            if a is not None and b is not None and a != b:
                raise ValueError(
                    f"id '{name}' has gold answer {_shown(a)} in {first.path} and {_shown(b)} in {other.path}: these "
                    "are not the same problems"
                )
    return ids


def check_conditions(evaluations: Sequence[Evaluation], *, across: bool = False, flags: bool = True) -> list[str]:
    """See that numbers may be compared: one grading rule, one prompt, one way of drawing answers.

    Args:
        evaluations: at least one. across: whether prompt and sampling may differ. flags: whether an error may name
            `--across_conditions`.

    Returns:
        Sentences for the reader: what differs, and what could not be checked.

    Raises:
        ValueError: different rules; different prompts or sampling, unless `across`.
    """
    rules = _differing([(e, ", ".join(e.rules) or "none") for e in evaluations])
    if rules:
        raise ValueError(f"the files have different grading rules: {rules}; their scores cannot be compared")
    notes, unchecked = [], []
    prompts = [(e, ", ".join(e.prompts)) for e in evaluations]
    for what, said in (("prompts", prompts), ("sampling settings", _sampling(evaluations))):
        known = [(e, text) for e, text in said if text]
        differing = _differing(known)
        if differing and not across:
            raise ValueError(
                f"the files have different {what}: {differing}; that is another experiment"
                + (", --across_conditions compares nevertheless" if flags else "")
            )
        if differing:
            notes.append(f"The files have different {what}, and differences may come from there: {differing}.")
        if len(known) < len(said):
            unchecked.append(what)
    if unchecked:
        notes.append(f"Not told by every file, so it is not known whether they agree: {' and '.join(unchecked)}.")
    steps = {e.step for e in evaluations}
    if len(steps) > 1:
        listed = ", ".join("unknown" if s is None else f"{s:,}" for s in sorted(steps, key=lambda s: (s is None, s)))
        notes.append(f"The checkpoints are of different optimizer steps: {listed}.")
    return notes


def _sampling(evaluations: Sequence[Evaluation]) -> list[tuple[Evaluation, str]]:
    """The settings that are not the same everywhere; empty where unknown."""
    known = [e.sampling for e in evaluations if e.sampling is not None]
    keys = sorted({key for sampling in known for key in sampling})
    keys = [key for key in keys if any(s.get(key) != known[0].get(key) for s in known)]
    texts = [
        "" if e.sampling is None else ", ".join(f"{key} {_shown(e.sampling.get(key))}" for key in keys) or "the same"
        for e in evaluations
    ]
    return list(zip(evaluations, texts, strict=True))


def _differing(said: Sequence[tuple[Evaluation, str]]) -> str | None:
    """Each distinct text with the first file that says it; None where all say the same."""
    first: dict[str, Path] = {}
    for evaluation, text in said:
        first.setdefault(text, evaluation.path)
    return ", ".join(f"{text} ({path})" for text, path in first.items()) if len(first) > 1 else None


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _listed(items: Sequence[str]) -> str:
    return f" ({_some([repr(item) for item in items])})" if items else ""
