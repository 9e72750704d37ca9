"""From files and the command line to one configuration: include, merge, override, resolve. Imports nothing heavy.

Rules: included files come first, later files win, the command line wins over files. Mappings merge key by key; lists
are replaced, unless the key ends in `+` (append); a key ending in `-` removes what was inherited. Only when everything
is merged are `${...}` references resolved, so that they reach across files and are the same under every command.
Where each value came from is kept, for error messages.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KeyPath = tuple[str, ...]  # a key path: ("model", "init_args", "lr")
COMMAND_LINE = "command line"


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the choice nearest to `name`, else the choices (empty when there are none)."""
    names = sorted(set(choices))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    if not names:
        return ""
    return f"; valid: {', '.join(names[:20])}" + (", ..." if len(names) > 20 else "")


def dotted(path: KeyPath) -> str:
    """`model.init_args.lr`; list positions as `[0]`."""
    return "".join(f"[{p}]" if p.isdigit() and i else ("." if i else "") + p for i, p in enumerate(path))


@dataclass
class Swap:
    """A class_path that a later file changed, and the arguments it inherited from the earlier class.

    Attributes:
        path: of the mapping that holds class_path.
        old, new: the two class paths.
        inherited: argument name → where it was set.
    """

    path: KeyPath
    old: str
    new: str
    inherited: dict[str, str]


@dataclass
class Config:
    """The merged tree, with the origin (`file:line`) of each value."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    swaps: dict[KeyPath, Swap] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def origin(self, path: KeyPath) -> str:
        """Where the value at `path`, or the nearest thing around it, was set."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return "defaults"

    def error(self, path: KeyPath, message: str) -> ValueError:
        """A one-line error that names the key and where it was set."""
        return ValueError(f"{dotted(path)}: {message} (set in {self.origin(path)})")

    def forget(self, path: KeyPath) -> None:
        """Drop the origins of everything at and below `path`."""
        for key in [k for k in self.origins if k[: len(path)] == path]:
            del self.origins[key]

    def merge(self, layer: dict[str, Any], origins: dict[KeyPath, str]) -> None:
        """Merge `layer` over the tree; `origins` says where each of the layer's paths was written."""
        self._merge(self.tree, layer, origins, (), ())

    def _merge(self, into: dict, layer: dict, origins: dict[KeyPath, str], at: KeyPath, src: KeyPath) -> None:
        for key in sorted(layer, key=lambda k: not k.endswith("-")):  # removals first, else as written
            value, name = layer[key], key[:-1] if key[-1:] in "+-" else key
            path, source = (*at, name), (*src, key)
            where = origins.get(source, "defaults")
            if key.endswith("-"):
                if value not in (None, {}, [], ""):
                    raise ValueError(f"{dotted((*at, key))}: a removal takes no value, got {value!r} ({where})")
                if name not in into:
                    raise ValueError(f"{dotted((*at, key))}: nothing to remove{nearest(name, into)} ({where})")
                del into[name]
                self.forget(path)
            elif key.endswith("+"):
                old = into.get(name, [])
                if not isinstance(value, list) or not isinstance(old, list):
                    raise ValueError(f"{dotted((*at, key))}: `+` appends a list to a list ({where})")
                into[name] = old + value
                self._adopt(path, source, origins, shift=len(old))
            elif isinstance(value, dict) and isinstance(into.get(name), dict):
                self._note_swap(path, into[name], value, origins, source)
                self._merge(into[name], value, origins, path, source)
            else:
                self.forget(path)
                if isinstance(value, dict):
                    into[name] = {}
                    self.origins[path] = where
                    self._merge(into[name], value, origins, path, source)
                else:
                    into[name] = value
                    self._adopt(path, source, origins)

    def _adopt(self, path: KeyPath, source: KeyPath, origins: dict[KeyPath, str], shift: int = 0) -> None:
        for key, where in origins.items():
            if key[: len(source)] == source:
                rest = key[len(source) :]
                if rest and shift:
                    rest = (str(int(rest[0]) + shift), *rest[1:])
                self.origins[(*path, *rest)] = where

    def _note_swap(self, path: KeyPath, old: dict, new: dict, origins: dict[KeyPath, str], source: KeyPath) -> None:
        before, after = old.get("class_path"), new.get("class_path")
        if not isinstance(before, str) or not isinstance(after, str) or _same_class(before, after):
            return
        if "init_args-" in new:
            return
        inherited = old.get("init_args") or {}
        where = {k: self.origin((*path, "init_args", k)) for k in inherited}
        self.swaps[path] = Swap(path, before, after, where)

    def leaked(self, swap: Swap) -> dict[str, str]:
        """The swap's inherited arguments that nobody has set again or removed since: name → where set."""
        args = self.at((*swap.path, "init_args")) or {}
        now = {k: self.origin((*swap.path, "init_args", k)) for k in args}
        return {k: where for k, where in swap.inherited.items() if now.get(k) == where}

    def at(self, path: KeyPath) -> Any:
        """The value at `path`, or None."""
        node: Any = self.tree
        for key in path:
            if isinstance(node, dict):
                node = node.get(key)
            elif isinstance(node, list) and key.isdigit() and int(key) < len(node):
                node = node[int(key)]
            else:
                return None
        return node

    def override(self, key: str, value: Any) -> None:
        """Set one dotted key from the command line: `model.lr` means model.init_args.lr, `model` its class_path."""
        path = self._override_path(key.split("."))
        layer: Any = value
        origins: dict[KeyPath, str] = {}
        for name in reversed(path):
            layer = {name: layer}
        for end in range(1, len(path) + 1):
            origins[path[:end]] = COMMAND_LINE
        for sub in _paths(value):
            origins[path + sub] = COMMAND_LINE
        parent = next((path[:i] for i in range(1, len(path)) if isinstance(self.at(path[:i]), list)), None)
        if parent is None:
            self.merge(layer, origins)
        else:
            self._override_in_list(parent, path[len(parent) :], value)

    def _override_in_list(self, parent: KeyPath, rest: KeyPath, value: Any) -> None:
        items = self.at(parent)
        if not rest[0].isdigit() or int(rest[0]) >= len(items):
            raise ValueError(
                f"--{'.'.join(parent + rest)}: {dotted(parent)} is a list of {len(items)}; give a position"
            )
        sub = Config(tree={rest[0]: items[int(rest[0])]})
        sub.override(".".join(rest), value)
        items[int(rest[0])] = sub.tree[rest[0]]
        self.origins[parent + rest] = COMMAND_LINE

    def _override_path(self, parts: list[str]) -> KeyPath:
        if parts[0] in ("model", "data"):
            if len(parts) == 1:
                parts = [*parts, "class_path"]
            elif parts[1].rstrip("+-") not in ("class_path", "init_args"):
                parts = [parts[0], "init_args", *parts[1:]]
        if parts[0] == "callbacks":  # names of callbacks may hold dots: the longest that is there already
            for end in range(len(parts), 2, -1):
                if ".".join(parts[1:end]) in (self.tree.get("callbacks") or {}):
                    parts = ["callbacks", ".".join(parts[1:end]), *parts[end:]]
                    break
        return tuple(parts)

    def resolve(self) -> None:
        """Resolve every `${...}` in the merged tree.

        Raises:
            ValueError: a reference that names nothing, a cycle, or a value still `???`.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

        def quoted(message: str) -> str:
            return message.split("'")[1] if "'" in message else message

        try:
            self.tree = OmegaConf.to_container(OmegaConf.create(self.tree), resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as err:
            path = tuple((err.full_key or "").replace("[", ".").replace("]", "").split("."))
            text = str(err).splitlines()[0]
            if isinstance(err, MissingMandatoryValue):
                text = "must be set"
            elif "Environment variable" in text:
                text = f"environment variable {quoted(text)} is not set"
            elif isinstance(err, InterpolationKeyError):
                known = [".".join(p) for p in _paths(self.tree) if not isinstance(self.at(p), dict)]
                wanted = quoted(text)
                text = f"{self.at(path)!r} refers to '{wanted}', which is not there{nearest_only(wanted, known)}"
            raise self.error(path, text) from err
        except RecursionError as err:
            raise ValueError("the configuration's ${...} references form a cycle") from err


def nearest_only(name: str, choices: Iterable[str]) -> str:
    hint = nearest(name, choices)
    return hint if "did you mean" in hint else ""


def _same_class(a: str, b: str) -> bool:
    if "." in a and "." in b:
        return a == b
    return a.rsplit(".", 1)[-1] == b.rsplit(".", 1)[-1]


def _paths(value: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key path below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, sub in items:
        yield (*at, str(key))
        yield from _paths(sub, (*at, str(key)))
