"""From a study file to the runs it means: stages times the axes they depend on, in an order in which they can run.

A run depends on the axes that its stage's keys mention (`${arm.start}`, `${seed}`) and on those of everything it uses;
what depends on no axis exists once. Its fingerprint covers its command, its whole configuration, the files named in it
and the fingerprints of what it uses: as long as that stays, what was done need not be done again.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_vlm.config.files import load
from lightning_vlm.config.tree import nearest
from lightning_vlm.studies.inputs import Files, digest
from lightning_vlm.studies.runs import Pick, Run, Use
from lightning_vlm.studies.spec import CONFIGURED, MODEL, OUTPUTS, POSITIONAL, SEED, Spec, check_use

Binding = Mapping[str, str]  # axis → value name
_REFERENCE = re.compile(r"\$\{\s*([A-Za-z_]\w*)(?:\.([\w-]+))?")
_NOT_AN_INPUT = frozenset({"run_dir", "logger", "include", "vars", "threads"})  # change no result, or stand elsewhere


class Graph:
    """All runs of a study, in an order in which they can run.

    Args:
        spec: the study.

    Raises:
        ValueError: a stage that does not exist, a cycle, two runs with one folder, a reference to nothing, a stage that
            gives nothing to use, or a configuration that cannot be read; in one line, with its place.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._runs: dict[tuple[str, tuple[tuple[str, str], ...]], Run] = {}
        self._built: dict[tuple[str, tuple[str, ...]], Run] = {}  # at full places, most of which share runs
        self._open: list[str] = []
        self._files = Files()
        names = list(spec.axes)
        self.bindings: list[dict[str, str]] = [
            dict(zip(names, values, strict=True)) for values in itertools.product(*spec.axes.values())
        ]
        used: set[str] = set()
        for stage, node in spec.stages.items():
            for binding in self.bindings:
                uses = self._resolve(node.get("uses") or {}, binding, stage).values()
                used |= {_stage_of(use) for use in uses if use is not None}
                for name in used - spec.stages.keys():
                    raise spec.config.error(
                        ("stages", stage, "uses"), f"no stage is named '{name}'{nearest(name, spec.stages)}"
                    )
        measured = {e.stage for e in spec.endpoints} | {e.minus for e in spec.endpoints if e.minus}
        wanted = [s for s in spec.stages if s not in used or s in measured or s in self._shown()]
        for stage in wanted or spec.stages:  # without an end there is a cycle, which `run` finds
            for binding in self.bindings:
                self.run(stage, binding)
        self._refuse_shared_folders()

    @property
    def runs(self) -> list[Run]:
        """Each behind all it uses."""
        return list(self._runs.values())

    def run(self, stage: str, binding: Binding) -> Run:
        """The run of a stage at a place of the axes."""
        place = (stage, tuple(binding[axis] for axis in self.spec.axes))
        if place in self._built:
            return self._built[place]
        if stage in self._open:
            cycle = " -> ".join([*self._open[self._open.index(stage) :], stage])
            raise self.spec.config.error(("stages", stage), f"stages use each other in a cycle: {cycle}")
        self._open.append(stage)
        try:
            self._built[place] = self._build(stage, binding)
            return self._built[place]
        finally:
            self._open.pop()

    def at(self, stage: str) -> list[Run]:
        """The runs of a stage."""
        return [run for run in self._runs.values() if run.stage == stage]

    def _shown(self) -> set[str]:
        """Stages that the report or the budget looks at."""
        report = self.spec.report
        parts = [*report.get("curves", []), *report.get("probes", []), report.get("samples", {})]
        names = {part.get("stage") for part in parts} | set(report.get("pass_at_k", {}).values())
        return {n for n in names | set(self.spec.budget.stages if self.spec.budget else ()) if n in self.spec.stages}

    def _build(self, stage: str, binding: Binding) -> Run:
        spec, node = self.spec, self.spec.stages[stage]
        command = node.get("run", "fit")
        whole = {**node, "common": spec.common} if command in CONFIGURED else node
        uses = self._uses(stage, self._resolve(node.get("uses") or {}, binding, stage), binding)
        depends = self._mentions(whole, binding) | {axis for use in uses for axis in use.run.at}
        at = {axis: binding[axis] for axis in spec.axes if axis in depends}
        key = (stage, tuple(at.items()))
        if key in self._runs:
            return self._runs[key]
        name = node.get("dir") or "-".join([stage, *(_slug(spec.axes[a], v) for a, v in at.items())])
        name = self._resolve({"dir": name}, binding, stage)["dir"]
        folder = spec.run_dir / name
        plain = self._resolve(whole, binding, stage, str(folder))
        of_folder = any("${dir" in text.replace(" ", "") for text in _texts(whole))
        hidden = self._resolve(whole, binding, stage, "<dir>") if of_folder else plain
        where = {use.key: str(use.path) for use in uses}
        options = self._options(stage, command, plain, where, str(folder))
        marks = {use.key: f"<{use.run.fingerprint}>{use.path.name}" for use in uses}
        facts = {
            "command": command,
            "content": self._content(stage, command, hidden, marks),
            "write": hidden.get("write"),
            "processes": plain.get("processes", 1),
            "threads": plain.get("threads", spec.threads),
        }
        seed = spec.axes.get(SEED, {}).get(at.get(SEED, ""))
        run = Run(
            stage=stage,
            at=at,
            name=name,
            folder=folder,
            command=command,
            options=tuple(options),
            writes=plain.get("write") or {},
            uses=tuple(uses),
            fingerprint=digest(facts),
            output=OUTPUTS[command],
            threads=plain.get("threads", spec.threads),
            processes=plain.get("processes", 1),
            devices=plain.get("devices", 0),
            seed=seed,
        )
        self._runs[key] = run
        return run

    def _uses(self, stage: str, uses: Mapping[str, Any], binding: Binding) -> list[Use]:
        found = []
        for key, use in uses.items():
            if use is None:  # an arm that takes nothing from another stage here
                continue
            use = {"stage": use} if isinstance(use, str) else use
            check_use(self.spec.config, ("stages", stage, "uses", key), use)
            name = use["stage"]
            if name not in self.spec.stages:
                raise self.spec.config.error(
                    ("stages", stage, "uses", key), f"no stage is named '{name}'{nearest(name, self.spec.stages)}"
                )
            run = self.run(name, binding)
            if use.get("model", "last") != "last":
                run = self._pick(run, use, (stage, key))
            path = use.get("file") or run.output
            if path is None:
                raise self.spec.config.error(
                    ("stages", stage, "uses", key), f"`{run.command}` of stage '{name}' leaves no model: name a `file`"
                )
            found.append(Use(key, run, run.folder / path))
        return found

    def _pick(self, run: Run, use: Mapping[str, Any], place: tuple[str, str]) -> Run:
        """The run that makes a checkpoint a model directory."""
        path = ("stages", place[0], "uses", place[1])
        if run.command != "fit":
            raise self.spec.config.error(path, f"`{run.command}` of stage '{run.stage}' keeps no checkpoints")
        step = None if use["model"] == "best" else use["model"]
        if step is not None and (not isinstance(step, int) or step < 1):
            raise self.spec.config.error((*path, "model"), f"must be last, best or a step, got {use['model']!r}")
        metric, mode = use.get("metric"), use.get("mode", "max")
        if step is None and not re.fullmatch(r"val/[^/]+/.+", metric or ""):
            raise self.spec.config.error((*path, "metric"), f"must be val/BENCHMARK/METRIC, got {metric!r}")
        which = f"step-{step}" if step is not None else "best-" + re.sub(r"[^A-Za-z0-9]+", "-", f"{metric}-{mode}")
        key = (f"{run.stage}@{which}", tuple(run.at.items()))
        if key not in self._runs:
            folder = run.folder.with_name(f"{run.folder.name}@{which}")
            self._runs[key] = Run(
                stage=key[0],
                at=run.at,
                name=f"{run.name}@{which}",
                folder=folder,
                command="export",
                options=("--out", str(folder / MODEL)),
                uses=(Use("", run, run.folder),),
                fingerprint=digest({"of": run.fingerprint, "which": which}),
                output=MODEL,
                pick=Pick(of=run, step=step, metric=metric, mode=mode),
                threads=self.spec.threads,
                seed=run.seed,
            )
        return self._runs[key]

    def _options(
        self, stage: str, command: str, node: Mapping[str, Any], uses: Mapping[str, str], folder: str
    ) -> list[str]:
        """The words of a resolved stage."""
        if command in CONFIGURED:
            words = [word for name in self._config_files(node) for word in ("-c", name)]
            words += ["--run_dir", folder]
            for key, value in self._settings(node, uses).items():
                words += [f"--{key}", _as_yaml(value)]
            return words + [str(word) for word in node.get("args") or []]
        words = [uses[MODEL]] if command in POSITIONAL and MODEL in uses else []
        words += [str(word) for word in node.get("args") or []]
        for key, value in {**(node.get("set") or {}), **uses}.items():
            if not (command in POSITIONAL and key == MODEL):
                words += _as_option(key, value)
        if (out := OUTPUTS[command]) is not None:
            words += ["--out", f"{folder}/{out}"]
        if command == "probe":
            words += ["--image", f"{folder}/probe.png"]
        return words

    def _config_files(self, node: Mapping[str, Any]) -> list[str]:
        files: list[str] = []
        for given in (node.get("config"), node["common"].get("config")):
            files += [given] if isinstance(given, str) else given or []
        return files

    def _settings(self, node: Mapping[str, Any], uses: Mapping[str, str]) -> dict[str, Any]:
        """Overrides: the study's, then the stage's, then what it uses."""
        return {**(node["common"].get("set") or {}), **(node.get("set") or {}), **uses}

    def _content(self, stage: str, command: str, node: Mapping[str, Any], uses: Mapping[str, str]) -> Any:
        """Everything that shapes a run's result, paths replaced by what stands there."""
        if command not in CONFIGURED:
            return self._files.content([node.get("args"), node.get("set"), uses])
        try:
            config = load(self._config_files(node), self._settings(node, uses).items())
        except (ValueError, FileNotFoundError) as err:
            raise type(err)(f"stage '{stage}': {err}") from err
        return self._files.content({key: value for key, value in config.tree.items() if key not in _NOT_AN_INPUT})

    def _mentions(self, value: Any, binding: Binding, seen: frozenset[str] = frozenset()) -> set[str]:
        """Axes that a value depends on, through variables and through the axes' own values."""
        found: set[str] = set()
        for text in _texts(value):
            for head, rest in _REFERENCE.findall(text):
                if head == "vars" and rest in self.spec.variables and f"vars.{rest}" not in seen:
                    found |= self._mentions(self.spec.variables[rest], binding, seen | {f"vars.{rest}"})
                elif head in self.spec.axes and head not in seen:
                    found |= {head} | self._mentions(self.spec.axes[head][binding[head]], binding, seen | {head})
        return found

    def _resolve(self, node: Mapping[str, Any], binding: Binding, stage: str, folder: str = "") -> dict[str, Any]:
        """A stage's keys with every `${...}` replaced."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        if not any("${" in text for text in _texts(node)):
            return copy.deepcopy(dict(node))
        root: dict[str, Any] = {"vars": self.spec.variables, "dir": folder, "node": dict(node)}
        for axis in self._mentions(node, binding):
            name, value = binding[axis], self.spec.axes[axis][binding[axis]]
            root[axis] = {**value, "name": name} if isinstance(value, dict) else value
        try:
            return OmegaConf.to_container(OmegaConf.create(root).node, resolve=True)  # type: ignore[return-value]
        except OmegaConfBaseException as err:
            reason = str(err).splitlines()[0]
            raise self.spec.config.error(
                ("stages", stage), f"{reason}; known: vars, dir, {', '.join(self.spec.axes)}"
            ) from err

    def _refuse_shared_folders(self) -> None:
        seen: dict[Path, Run] = {}
        for run in self.runs:
            folder = Path(os.path.abspath(run.folder))
            for other in (folder, *folder.parents):
                if other in seen:
                    raise ValueError(
                        f"two stages would write into one directory, {run.folder}: '{seen[other].stage}' "
                        f"{seen[other].at} and '{run.stage}' {run.at}; name them apart by `dir`, or by the axes' values"
                    )
            seen[folder] = run
        for folder in seen:
            if any(folder in other.parents for other in seen):
                raise ValueError(
                    f"one stage would write inside another's directory, {folder}: name them apart by `dir`"
                )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, sub in value.items():
            yield from _texts(key)
            yield from _texts(sub)
    elif isinstance(value, list | tuple):
        for sub in value:
            yield from _texts(sub)


def _stage_of(use: Any) -> str:
    return use["stage"] if isinstance(use, dict) else use


def _slug(values: Mapping[str, Any], name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") or str(list(values).index(name))


def _as_yaml(value: Any) -> str:
    """A value as one word that a configuration reads as the same value."""
    if isinstance(value, str):
        from lightning_vlm.config.files import parse_yaml

        try:
            return value if parse_yaml(value, "")[0] == value else json.dumps(value)
        except ValueError:
            return value  # read as text, for it is no YAML
    return json.dumps(value)


def _as_option(key: str, value: Any) -> list[str]:
    """An option of a command that takes no configuration; false and null leave it out."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{key}"]
    return [f"--{key}", *(map(str, value) if isinstance(value, list) else (str(value),))]
