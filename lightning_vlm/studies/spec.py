"""A study file: read, merged like any configuration, and checked key by key before anything runs.

Keys: `question`, `about`, `run_dir`, `vars`, `axes`, `compare`, `common`, `stages`, `endpoints`, `claims`, `budget`,
`report`, `threads`, `slurm`; docs/studies.md explains them. `graph` makes the stages that run out of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_vlm.config.files import merged
from lightning_vlm.config.tree import Config, nearest
from lightning_vlm.studies.endpoints import Claim, Endpoint, parse_claim, parse_endpoint

SEED = "seed"  # the axis that repeats a recipe; every other axis makes arms
CONFIGURED = ("fit", "validate", "test", "predict")  # commands that take a configuration and a run_dir
MODEL = "model"
# What each command leaves in the stage's folder for others to use; None: nothing that has one name.
OUTPUTS: dict[str, str | None] = {
    "fit": MODEL,
    "validate": None,
    "test": None,
    "predict": "predictions.jsonl",
    "export": MODEL,
    "compose": MODEL,
    "swap-language": MODEL,
    "put-encoder": MODEL,
    "take-encoder": MODEL,
    "take-language": MODEL,
    "distill": "chains.jsonl",
    "select": "selected.jsonl",
    "pairs": "pairs.jsonl",
    "probe": "probe.json",
    "influence": "influence.json",
}
POSITIONAL = ("export", "swap-language", "put-encoder", "take-encoder", "take-language", "probe", "influence")
TOP = {
    "question": str,
    "about": str,
    "run_dir": str,
    "vars": dict,
    "axes": dict,
    "compare": dict,
    "common": dict,
    "stages": dict,
    "endpoints": dict,
    "claims": list,
    "budget": dict,
    "report": dict,
    "threads": int,
    "slurm": dict,
}
STAGE = {
    "run": str,
    "config": (str, list),
    "uses": dict,
    "set": dict,
    "args": list,
    "write": dict,
    "dir": str,
    "processes": int,
    "devices": int,
    "threads": int,
}
USE = {"stage": str, "model": (str, int), "metric": str, "mode": str, "file": str}
COMPARE = {"within": list, "baseline": str, "alpha": (int, float), "pairing": str}
BUDGET = {"stages": list, "unit": str, "tolerance": (int, float), "exact": bool}
REPORT = {
    "curves": ({"stage": str, "metric": str, "title": str},),
    "pass_at_k": {"before": str, "after": str, "benchmark": str},
    "samples": {"stage": str, "benchmark": str, "count": int},
    "probes": ({"stage": str, "probe": str, "metric": str, "title": str},),
}


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Which arms are tested against each other.

    Attributes:
        within: axes whose values are worlds of their own: arms are compared inside one only.
        baseline: value of an axis; only pairs with one of its arms are tested. None tests all pairs.
        alpha: level after Holm. pairing: as `compare`.
    """

    within: tuple[str, ...] = ()
    baseline: str | None = None
    alpha: float = 0.05
    pairing: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What arms must have spent equally.

    Attributes:
        stages: whose costs are added up. unit: steps, tokens or seconds. tolerance: relative spread that still counts
            as equal. exact: False where `unit` is seconds, which no machine repeats.
    """

    stages: tuple[str, ...]
    unit: str = "steps"
    tolerance: float = 0.0
    exact: bool = True


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A study file's content, checked.

    Attributes:
        name: the file's. file: the file. run_dir: where everything goes.
        axes: axis → value name → value, a scalar or a mapping.
        stages: name → keys as written, not yet resolved. common: `config` and `set` of all configured stages.
        config: the merged file, for errors that name a place.
    """

    name: str
    file: Path
    run_dir: Path
    question: str
    about: str
    variables: dict[str, Any]
    axes: dict[str, dict[str, Any]]
    compare: Compare
    common: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    endpoints: list[Endpoint]
    claims: list[Claim]
    budget: Budget | None
    report: dict[str, Any]
    threads: int
    slurm: dict[str, Any]
    config: Config = field(repr=False)

    @property
    def arm_axes(self) -> list[str]:
        """Axes other than the seed's."""
        return [name for name in self.axes if name != SEED]


def read_spec(file: str, overrides: Iterable[tuple[str, Any]] = ()) -> Spec:
    """Read a study file.

    Args:
        file: path, or short name such as `study/demo`.
        overrides: (dotted key, value) pairs that win over the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: in one line, with file and line: a key that does not exist or has the wrong type, no stages, an
            endpoint, claim, budget or report of a stage, axis or arm that does not exist.
    """
    config = merged([file], overrides)
    tree = config.tree
    _check_keys(config, tree, TOP, ())
    if not tree.get("stages"):
        raise ValueError(f"{config.files[-1].name}: no stages: a study needs at least one under `stages:`")
    axes = {name: _axis(config, name, values) for name, values in (tree.get("axes") or {}).items()}
    stages = {name: _stage(config, name, node) for name, node in tree["stages"].items()}
    common = tree.get("common") or {}
    _check_keys(config, common, {"config": (str, list), "set": dict}, ("common",))
    endpoints = []
    for name, node in (tree.get("endpoints") or {}).items():
        endpoints.append(_placed(config, ("endpoints", name), parse_endpoint, name, node))
    claims = []
    for index, node in enumerate(tree.get("claims") or []):
        claims.append(_placed(config, ("claims", str(index)), parse_claim, node, endpoints))
    path = config.files[-1]
    spec = Spec(
        name=path.stem,
        file=path,
        run_dir=Path(tree.get("run_dir") or Path("runs") / path.stem),
        question=tree.get("question") or f"What comes out of {path.stem}?",
        about=tree.get("about") or "",
        variables=tree.get("vars") or {},
        axes=axes,
        compare=_compare(config, axes),
        common=common,
        stages=stages,
        endpoints=endpoints,
        claims=claims,
        budget=_budget(config, stages),
        report=_report(config, stages),
        threads=_at_least_1(config, ("threads",), tree.get("threads", 1)),
        slurm=tree.get("slurm") or {},
        config=config,
    )
    for endpoint in endpoints:
        for stage in (endpoint.stage, endpoint.minus):
            _known(config, ("endpoints", endpoint.name), "stage", stage, stages)
    for index, claim in enumerate(claims):
        for axis, value in claim.where.items():
            _known(config, ("claims", str(index), "where"), "axis", axis, axes)
            _known(config, ("claims", str(index), "where"), f"value of {axis}", value, axes[axis])
    return spec


def _placed(config: Config, path: tuple[str, ...], parse: Any, *args: Any) -> Any:
    """What `parse` makes; its errors get the place in the file."""
    try:
        return parse(*args)
    except ValueError as err:
        raise config.error(path, str(err)) from err


def _known(config: Config, path: tuple[str, ...], what: str, name: str | None, known: Iterable[str]) -> None:
    if name is not None and name not in known:
        raise config.error(path, f"no {what} is named '{name}'{nearest(str(name), known)}")


def _check_keys(config: Config, node: Any, allowed: Mapping[str, Any], path: tuple[str, ...]) -> None:
    if not isinstance(node, dict):
        raise config.error(path, f"expected a mapping, got {node!r}")
    for key, value in node.items():
        if key not in allowed:
            raise config.error((*path, key), f"unknown key{nearest(key, allowed)}")
        kinds = allowed[key]
        if value is not None and not _is_a(value, kinds):
            names = " or ".join(k.__name__ for k in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise config.error((*path, key), f"must be {names}, got {value!r}")


def _is_a(value: Any, kinds: Any) -> bool:
    if isinstance(value, str) and "${" in value:
        return True  # known when an axis has its value
    bools = kinds is bool or (isinstance(kinds, tuple) and bool in kinds)
    return isinstance(value, kinds) and (bools or not isinstance(value, bool))


def _at_least_1(config: Config, path: tuple[str, ...], value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise config.error(path, f"must be a whole number of at least 1, got {value!r}")
    return value


def _axis(config: Config, name: str, values: Any) -> dict[str, Any]:
    """Value name → value."""
    path = ("axes", name)
    if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in ("vars", "dir"):
        raise config.error(path, f"'{name}' cannot name an axis: use letters, digits and _, not vars or dir")
    if isinstance(values, list):
        if any(isinstance(v, list | dict) or v is None for v in values):
            raise config.error(path, "a list of values holds texts and numbers; give mappings a name each")
        values = {str(v): v for v in values} if len({str(v) for v in values}) == len(values) else {}
    if not isinstance(values, dict) or not values:
        raise config.error(path, "must be a list of different values, or a mapping of names to values")
    if name == SEED and any(not isinstance(v, int) or isinstance(v, bool) for v in values.values()):
        raise config.error(path, f"seeds are whole numbers, got {list(values.values())!r}")
    return {str(key): value for key, value in values.items()}


def _stage(config: Config, name: str, node: Any) -> dict[str, Any]:
    path = ("stages", name)
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name):
        raise config.error(path, f"'{name}' cannot name a stage: use letters, digits, - and _")
    _check_keys(config, node, STAGE, path)
    command = node.get("run", "fit")
    if command not in OUTPUTS:
        raise config.error((*path, "run"), f"unknown command '{command}'{nearest(command, OUTPUTS)}")
    if command in CONFIGURED and not node.get("config"):
        raise config.error(path, f"no config: `{command}` needs one, for example config: experiment/world-sft")
    if command not in CONFIGURED and node.get("config") is not None:
        raise config.error((*path, "config"), f"`{command}` takes no configuration; its options go under set")
    for key in ("run_dir", "out"):
        if key in (node.get("set") or {}):
            raise config.error((*path, "set", key), "the study gives every stage its folder; name it by `dir`")
    for key, use in (node.get("uses") or {}).items():
        if isinstance(use, dict):
            check_use(config, (*path, "uses", key), use)
        elif use is not None and not isinstance(use, str):
            raise config.error((*path, "uses", key), f"must name a stage, got {use!r}")
    for key in ("processes", "threads"):
        if node.get(key) is not None and not isinstance(node[key], str):
            _at_least_1(config, (*path, key), node[key])
    return node


def check_use(config: Config, path: tuple[str, ...], use: dict[str, Any]) -> None:
    """See that what a stage takes from another is said once and whole.

    Raises:
        ValueError: an unknown key, or keys that contradict each other.
    """
    _check_keys(config, use, USE, path)
    if "stage" not in use:
        raise config.error(path, "no stage: say which one's model or file")
    if "file" in use and ("model" in use or "metric" in use):
        raise config.error(path, "give `file` or `model`, not both")
    if use.get("model") == "best" and "metric" not in use:
        raise config.error(path, "best by which metric? add metric: val/BENCHMARK/METRIC")
    if "metric" in use and use.get("model") != "best":
        raise config.error((*path, "metric"), "has no effect without model: best")
    if use.get("mode", "max") not in ("max", "min"):
        raise config.error((*path, "mode"), f"must be max or min, got {use['mode']!r}")


def _compare(config: Config, axes: dict[str, dict[str, Any]]) -> Compare:
    node = config.tree.get("compare") or {}
    _check_keys(config, node, COMPARE, ("compare",))
    for name in node.get("within", []):
        _known(config, ("compare", "within"), "axis", name, [a for a in axes if a != SEED])
    if node.get("baseline") is not None:
        known = [value for name in axes if name != SEED for value in axes[name]]
        _known(config, ("compare", "baseline"), "arm", node["baseline"], known)
    if node.get("pairing", "auto") not in ("auto", "paired", "unpaired"):
        raise config.error(("compare", "pairing"), f"must be auto, paired or unpaired, got {node['pairing']!r}")
    if not 0 < node.get("alpha", 0.05) < 1:
        raise config.error(("compare", "alpha"), f"must lie between 0 and 1, got {node['alpha']!r}")
    return Compare(**{key: tuple(value) if key == "within" else value for key, value in node.items()})


def _budget(config: Config, stages: Mapping[str, Any]) -> Budget | None:
    node = config.tree.get("budget")
    if node is None:
        return None
    _check_keys(config, node, BUDGET, ("budget",))
    if not node.get("stages"):
        raise config.error(("budget",), "no stages: say whose steps, tokens or seconds must be equal")
    for name in node["stages"]:
        _known(config, ("budget", "stages"), "stage", name, stages)
    unit, exact = node.get("unit", "steps"), node.get("exact", True)
    if unit not in ("steps", "tokens", "seconds"):
        raise config.error(("budget", "unit"), f"must be steps, tokens or seconds, got {unit!r}")
    if unit == "seconds" and exact:
        raise config.error(("budget", "unit"), "seconds are never repeated exactly: say exact: false, or use tokens")
    if unit != "seconds" and not exact:
        raise config.error(("budget", "exact"), f"{unit} are counted exactly: leave it out")
    default = 0.1 if unit == "seconds" else 0.0
    return Budget(stages=tuple(node["stages"]), unit=unit, tolerance=node.get("tolerance", default), exact=exact)


def _report(config: Config, stages: Mapping[str, Any]) -> dict[str, Any]:
    """Curves, pass@k, samples and probes to show."""
    node = config.tree.get("report") or {}
    _check_keys(config, node, dict.fromkeys(REPORT, (list, dict)), ("report",))
    for key, form in REPORT.items():
        if key not in node:
            continue
        many = isinstance(form, tuple)
        if isinstance(node[key], list) != many:
            raise config.error(("report", key), f"must be a {'list of mappings' if many else 'mapping'}")
        for index, part in enumerate(node[key] if many else [node[key]]):
            path = ("report", key, *((str(index),) if many else ()))
            _check_keys(config, part, form[0] if many else form, path)
            for name in ("stage", "before", "after"):
                _known(config, path, "stage", part.get(name), stages)
    return node
