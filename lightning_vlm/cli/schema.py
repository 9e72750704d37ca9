"""Checks a configuration against the signatures of the classes it names, so that errors say key, value and place."""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import inspect
import os
import types
import typing
from typing import Any

from lightning_vlm.config.tree import Config, KeyPath, dotted, nearest

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclasses.dataclass(frozen=True)
class Signature:
    """Arguments a class takes by name: type hints, which of them are required, and whether any other is taken too."""

    hints: dict[str, Any]
    required: frozenset[str]
    open: bool = False


def signature(cls: type) -> Signature:
    """The keyword arguments of `cls`; `**kwargs` is followed up the method resolution order."""
    hints: dict[str, Any] = {}
    required: set[str] = set()
    open_ended = False
    constructors = [base for base in cls.__mro__ if "__init__" in vars(base) and base is not object]
    for base in constructors:
        init = base.__init__
        types_ = _type_hints(init)
        open_ended = False
        for name, parameter in list(inspect.signature(init).parameters.items())[1:]:
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                open_ended = True
            elif parameter.kind in _BY_NAME and name not in hints:
                hints[name] = types_.get(name, Any)
                if parameter.default is inspect.Parameter.empty and base is constructors[0]:
                    required.add(name)  # what a base class requires, the subclass may give itself
        if not open_ended:
            break
    return Signature(hints, frozenset(required), open_ended)


def _type_hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # a hint imported for type checkers only: left to jsonargparse
        return {}


def import_class(path: str, place: str) -> type:
    """The class at a dotted import path.

    Args:
        path: `package.module.Class`.
        place: key and origin, for the error.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as err:
        if err.name and (module == err.name or module.startswith(err.name + ".")):
            raise ValueError(f"{place}: no module '{err.name}' for '{path}'") from err
        raise
    except AttributeError as err:
        names = public_classes(importlib.import_module(module))
        raise ValueError(f"{place}: '{module}' has no '{name}'{nearest(name, names)}") from err


def public_classes(module: Any, base: type = object) -> list[str]:
    """Names a module exports: `__all__`, else its public classes that are a `base`."""
    listed = getattr(module, "__all__", None)
    if listed:
        return list(listed)
    return [n for n, v in vars(module).items() if inspect.isclass(v) and issubclass(v, base) and n[0] != "_"]


def resolve_class(name: Any, package: str, base: type, place: str) -> type:
    """The class called `name`: exported by `package`, or a dotted import path.

    Raises:
        ValueError: no such class, or not a `base`; names the nearest.
    """
    if not isinstance(name, str):
        raise ValueError(f"{place}: expected a class name, got {name!r}")
    if "." in name:
        cls = import_class(name, place)
    else:
        module = importlib.import_module(package)
        cls = getattr(module, name, None)
        if cls is None:
            raise ValueError(f"{place}: no class '{name}' in {package}{nearest(name, public_classes(module, base))}")
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise ValueError(f"{place}: '{name}' is not a {base.__name__}")
    return cls


def check_arguments(cls: type, kwargs: dict[str, Any], path: KeyPath, config: Config) -> None:
    """Check `kwargs` against what `cls` takes: names, required ones, types, nested ones too.

    Raises:
        ValueError: one line with the key, its value, what is expected, and the file and line.
    """
    known = signature(cls)
    for name, value in kwargs.items():
        if name in known.hints:
            check_value(value, known.hints[name], (*path, name), config)
        elif not known.open:
            raise config.error((*path, name), f"{cls.__name__} takes no such argument{nearest(name, known.hints)}")
    for name in sorted(known.required - set(kwargs)):
        raise config.error(path, f"{cls.__name__} needs '{name}': set {dotted((*path, name))}")


def check_value(value: Any, hint: Any, path: KeyPath, config: Config) -> None:
    """Check one value against a type hint; hints this cannot judge pass (jsonargparse judges them later)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty or isinstance(hint, typing.TypeVar):
        return
    if origin is typing.Annotated:
        return check_value(value, args[0], path, config)
    if isinstance(value, dict) and "class_path" in value:
        return check_class_dict(value, path, config)
    if origin in (typing.Union, types.UnionType):
        return _check_union(value, args, hint, path, config)
    if inspect.isclass(hint) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return check_arguments(hint, value, path, config)
    if not _fits(value, hint, origin, args):
        raise config.error(path, f"expected {pretty(hint)}, got {value!r}")
    if origin is tuple and Ellipsis not in args and len(value) != len(args):
        raise config.error(path, f"expected a list of {len(args)} values, got {value!r}")
    if origin in (list, collections.abc.Sequence, collections.abc.Iterable, set, tuple) and isinstance(value, list):
        for i, item in enumerate(value):
            inner = args[0] if len(args) == 1 or args[-1] is Ellipsis else args[i] if i < len(args) else Any
            check_value(item, inner if args else Any, (*path, str(i)), config)
    if origin in (dict, collections.abc.Mapping) and isinstance(value, dict):
        for key, item in value.items():
            check_value(item, args[1], (*path, key), config)
    return None


def check_class_dict(value: dict[str, Any], path: KeyPath, config: Config) -> None:
    """Check a nested `{class_path: ..., init_args: {...}}`."""
    for key in value:
        if key not in ("class_path", "init_args"):
            raise config.error((*path, key), f"unknown key{nearest(key, ['class_path', 'init_args'])}")
    place = (*path, "class_path")
    cls = import_class(value["class_path"], f"{dotted(place)} (set in {config.origin(place)})")
    check_arguments(cls, value.get("init_args") or {}, (*path, "init_args"), config)


def _check_union(value: Any, members: tuple, hint: Any, path: KeyPath, config: Config) -> None:
    structured = [m for m in members if _is_structured(m)]
    if isinstance(value, dict | list) and len(structured) == 1:
        return check_value(value, structured[0], path, config)  # its own error says more than "none of these"
    for member in members:
        try:
            return check_value(value, member, path, config)
        except ValueError:
            continue
    raise config.error(path, f"expected {pretty(hint)}, got {value!r}")


def _is_structured(hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    containers = (list, dict, tuple, set, collections.abc.Sequence, collections.abc.Mapping)
    return origin in containers or dataclasses.is_dataclass(hint)


def _fits(value: Any, hint: Any, origin: Any, args: tuple) -> bool:
    if hint is None or hint is type(None):
        return value is None
    if origin is typing.Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    plain = origin or hint
    if plain in (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable):
        return isinstance(value, list)
    if plain in (dict, collections.abc.Mapping):
        return isinstance(value, dict)
    if inspect.isclass(plain) and issubclass(plain, os.PathLike):
        return isinstance(value, str)
    if inspect.isclass(plain) and dataclasses.is_dataclass(plain):
        return isinstance(value, dict)
    return True


def pretty(hint: Any) -> str:
    """A type hint as a person says it: `int`, `float or None`, `one of 'max', 'min'`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is type(None):
        return "null"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(pretty(a) for a in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (list, collections.abc.Sequence) and args:
        return f"a list of {pretty(args[0])}"
    if origin in (dict, collections.abc.Mapping) and args:
        return f"a mapping to {pretty(args[1])}"
    return getattr(hint, "__name__", str(hint))


def settle_swaps(config: Config, classes: dict[KeyPath, type]) -> list[str]:
    """Judge arguments inherited over a changed class_path: refused where the new class lacks them, else reported.

    Args:
        classes: already resolved classes by the path of the mapping that names them.

    Returns:
        One line per changed class that kept arguments.
    """
    lines = []
    for path, swap in config.swaps.items():
        leaked = config.leaked(swap)
        cls = classes.get(path) or import_class(swap.new, dotted(path))
        known = signature(cls)
        for name, where in leaked.items():
            if name not in known.hints and not known.open:
                key = dotted((*path, "init_args", name))
                raise ValueError(
                    f"{key}: set for {swap.old} in {where}, but {cls.__name__} takes no such argument"
                    f"{nearest(name, known.hints)}; remove it by `{name}-:` under {dotted((*path, 'init_args'))}"
                )
        if leaked:
            kept = ", ".join(f"{name} ({where})" for name, where in leaked.items())
            lines.append(f"{dotted(path)}: {swap.new} keeps what was set for {swap.old}: {kept}")
    return lines
