"""A child process that loads users' reward functions and calls them; the other end of `worker.Worker`.

Run as a plain script: it imports nothing of this package, so it starts fast, and whatever a function does to its
process (prints, signals, hangs, a crash) stays here. Frames are a length and a pickle. First comes `load`, with the
functions; then `call`s, each answered by "begun", when the arguments have arrived, and by the result.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import pickle
import re
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple


class Form(NamedTuple):
    """A signature: `style` of a function whose parameters include `marks`, called for a whole group or for one."""

    style: str
    marks: tuple[str, ...]
    group: bool
    names: tuple[str, ...]


_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
_TRL = ("prompts", "completions", "completion_ids", "log_extra", "log_metric")
_TAKEN = ("data_source", "ground_truth", "extra_info")  # found in columns of that name, where there are any
_RESPONSE = ("response", "response_length")  # keys of a reward input
FORMS = (
    Form("trl", ("completions",), True, _TRL),
    Form("trl", ("completion_ids",), True, _TRL),
    Form("verl", ("solution_str",), False, _VERL),
    Form("verl", ("solution_strs",), True, tuple(f"{name}s" for name in _VERL)),
    Form("easyr1", ("reward_inputs",), True, ("reward_inputs",)),
    Form("easyr1", ("reward_input",), False, ("reward_input",)),
    Form("easyr1", ("predicts", "ground_truths"), True, ("predicts", "ground_truths")),
    Form("easyr1", ("predict", "ground_truth"), False, ("predict", "ground_truth")),
    Form("easyr1", ("predict_str", "ground_truth"), False, ("predict_str", "ground_truth")),
)
KNOWN = (
    "f(completions, **columns) as in TRL (also prompts, completion_ids); "
    "f(data_source, solution_str, ground_truth, extra_info=None) as in verl; "
    "f(reward_inputs), f(reward_input), f(predicts, ground_truths) or f(predict, ground_truth) as in EasyR1"
)
_LOOP = asyncio.Runner()  # one loop for all calls, so that a function may keep its client open
_MAIN = {"trl": None, "verl": "score", "easyr1": "overall"}  # key of the reward itself in a dict


class Unusable(Exception):
    """Why a function cannot be used, or its result cannot; `at` is the completion's index where that is known."""

    def __init__(self, problem: str, at: int | None = None) -> None:
        super().__init__(problem)
        self.at = at


class Function:
    """A reward function of a known form.

    Args:
        function: the user's.
        style: `auto` or the one to assume.
        options: further keyword arguments. columns: new names of columns.

    Raises:
        Unusable: unknown signature, or options that it does not take.
    """

    def __init__(self, function: Callable, style: str, options: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        if not callable(function):
            raise Unusable(f"is no function but {function!r}")
        self.function, self.options, self.columns = function, dict(options), dict(columns)
        parameters = inspect.signature(function).parameters.values()
        self.anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.accepted = {p.name for p in named}
        self.required = [p.name for p in named if p.default is p.empty]
        self.form = self._form(style, inspect.signature(function))
        call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
        self.asynchronous = inspect.iscoroutinefunction(call)
        # EasyR1's dicts take further columns as further keys.
        self.in_dicts = self.form.names[0].startswith("reward_input")
        self._check_names()
        if self.form.style != "trl":  # TRL's get columns, which differ between samples
            self._require([*self.form.names, *self.options, *(() if self.in_dicts else self.columns)])

    def _check_names(self) -> None:
        """Refuses options and columns that would be without effect."""
        whole = self.in_dicts or "extra_info" in self.accepted or "extra_infos" in self.accepted
        filled = {*self.form.names, *(_RESPONSE if self.in_dicts else ())}
        for what, given in (("options", self.options), ("columns", self.columns)):
            for name in given:
                replaced = what == "columns" and self.form.style != "trl" and name in _TAKEN
                if name in filled and not replaced:
                    raise Unusable(f"{what}: {name!r} is an argument that every call fills: leave it out")
                if not (self.anything or name in self.accepted or replaced or (what == "columns" and whole)):
                    takes = f"its parameters are {', '.join(sorted(self.accepted))}"
                    raise Unusable(f"{what}: it takes no {name!r}; {takes}")
        if both := sorted({*self.options} & {*self.columns}):
            raise Unusable(f"{both[0]!r} is in options and in columns: leave one out")

    def _form(self, style: str, signature: inspect.Signature) -> Form:
        for form in FORMS:
            if style in ("auto", form.style) and all(mark in self.accepted for mark in form.marks):
                return form
        if style == "trl" and (self.anything or "prompts" in self.accepted):
            return FORMS[0]
        named = "no known signature" if style == "auto" else f"no signature of style {style}"
        raise Unusable(f"{signature} is {named}; known are {KNOWN}")

    def _require(self, given: list[str]) -> None:
        if missing := [name for name in self.required if name not in given]:
            raise Unusable(
                f"it needs {', '.join(missing)}, which nothing gives; there is {', '.join(sorted(given))}; give a "
                f"value by `options`, or a column another name by `columns`, as in columns: {{{missing[0]}: answer}}"
            )

    def __call__(self, call: Mapping[str, Any]) -> list[tuple[float | None, dict[str, float]]]:
        """(reward, sub-scores) of each completion of a call.

        Raises:
            Unusable: the result is none of what the form returns.
        """
        texts, columns = call["texts"], call["columns"]
        if unknown := [name for name in self.columns.values() if name not in columns]:
            raise Unusable(f"columns: the sample has no {unknown[0]!r}; it has {', '.join(sorted(columns))}")
        renamed = {new: columns[name] for new, name in self.columns.items()}
        logged: list[dict[str, float]] = [{} for _ in texts]
        if self.form.group:
            results = self._run([self._arguments(call, columns, renamed, logged)])[0]
            if isinstance(results, str | bytes | Mapping) or not hasattr(results, "__len__"):
                raise Unusable(f"returned {_shown(results)}; expected a list of {len(texts)}, one per completion")
            if len(results) != len(texts):
                raise Unusable(f"returned {len(results)} results for {len(texts)} completions")
            results = list(results)
        else:
            results = self._run([self._single(call, columns, renamed, index) for index in range(len(texts))])
        found = [self._read(result, index) for index, result in enumerate(results)]
        return [(value, more | subs) for (value, subs), more in zip(found, logged, strict=True)]

    def _run(self, calls: list[dict[str, Any]]) -> list[Any]:
        if not self.asynchronous:
            return [self.function(**arguments) for arguments in calls]

        async def together() -> list[Any]:
            return await asyncio.gather(*(self.function(**arguments) for arguments in calls))

        return _LOOP.run(together())

    def _arguments(self, call: Mapping, columns: Mapping, renamed: Mapping, logged: list[dict]) -> dict[str, Any]:
        """Keyword arguments for a whole group."""
        texts, n = call["texts"], len(call["texts"])
        if self.form.style == "trl":
            completions: list[Any] = texts
            if call["messages"]:
                completions = [[{"role": "assistant", "content": text}] for text in texts]
            given = {name: [value] * n for name, value in (columns | renamed).items()} | {
                "prompts": [call["prompt"]] * n,
                "completions": completions,
                "completion_ids": call["ids"],
                "log_extra": lambda name, values: _log(logged, name, values),
                "log_metric": lambda name, value: _log(logged, name, [value] * n),
            }
        else:  # the names of one completion's arguments, in the plural
            singles = [self._parts(call, columns, renamed, index) for index in range(n)]
            given = {name: [single[name[:-1]] for single in singles] for name in self.form.names}
            if not self.in_dicts:
                given = {name: [value] * n for name, value in renamed.items()} | given
        return self._kept(given)

    def _single(self, call: Mapping, columns: Mapping, renamed: Mapping, index: int) -> dict[str, Any]:
        """Keyword arguments for one completion."""
        parts = self._parts(call, columns, renamed, index)
        own = {name: parts[name] for name in self.form.names}
        return self._kept(own if self.in_dicts else dict(renamed) | own)

    def _parts(self, call: Mapping, columns: Mapping, renamed: Mapping, index: int) -> dict[str, Any]:
        """All that verl's and EasyR1's functions are given of one completion, by their names."""
        text = call["texts"][index]
        everything = dict(columns) | dict(renamed)
        truth = everything.get("ground_truth", columns.get("answer"))
        reward_input = {"response": text, "response_length": len(call["ids"][index]), "ground_truth": truth}
        return {
            "data_source": everything.get("data_source", columns.get("source")),
            "solution_str": text,
            "ground_truth": truth,
            "extra_info": everything.get("extra_info", everything),
            "reward_input": dict(renamed) | reward_input,
            "predict": text,
            "predict_str": text,
        }

    def _kept(self, given: dict[str, Any]) -> dict[str, Any]:
        given = given | self.options
        self._require(list(given))
        return given if self.anything else {name: value for name, value in given.items() if name in self.accepted}

    def _read(self, result: Any, index: int) -> tuple[float | None, dict[str, float]]:
        main, subs = _MAIN[self.form.style], {}
        if isinstance(result, Mapping) and main is not None:
            if main not in result:
                raise Unusable(f"returned {_shown(result)}, a dict without {main!r}", index)
            subs = {str(name): number for name, v in result.items() if (number := _number(v)) is not None}
            subs.pop(main, None)
            result = result[main]
        if result is None:
            return None, subs
        value = _number(result)
        if value is None:
            raise Unusable(f"returned {_shown(result)}, which is no number", index)
        if not math.isfinite(value):
            raise Unusable(f"returned {value}", index)
        return value, subs


def _number(value: Any) -> float | None:
    """A number of any kind (also a 0-dimensional tensor) as a float, None for all else."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # an array of several
        return None


def _log(logged: list[dict[str, float]], name: str, values: Any) -> None:
    for entry, value in zip(logged, values, strict=False):
        if (number := _number(value)) is not None:
            entry[str(name)] = number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


class _Pattern:
    """The `format` reward with a pattern of the user's, in TRL's form."""

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern, re.DOTALL)

    def __call__(self, completions: list[str]) -> list[float]:
        return [float(self.pattern.fullmatch(text) is not None) for text in completions]


_FILES: dict[Path, Any] = {}  # parts that name the same file share its module


def load(spec: Mapping[str, Any]) -> tuple[Function, str]:
    """A function and the digest of the file that defines it.

    Raises:
        Exception: whatever importing it raises.
        Unusable: no such file or function, or an unknown signature.
    """
    if spec["function"] is None:
        return Function(_Pattern(spec["pattern"]), "trl", {}, {}), ""
    place, _, name = spec["function"].rpartition(":")
    module = _of_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    found: Any = module
    for attribute in name.split("."):
        if not hasattr(found, attribute):
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise Unusable(f"{place} has no {name!r}; it has {', '.join(names) or 'no functions'}")
        found = getattr(found, attribute)
    file = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return Function(found, spec["style"], spec["options"], spec["columns"]), digest


def _of_file(path: Path) -> Any:
    path = path.resolve()
    if not path.is_file():
        raise Unusable(f"there is no file {path}")
    if path not in _FILES:
        spec = importlib.util.spec_from_file_location(f"_reward_file_{len(_FILES)}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        sys.path.insert(0, str(path.parent))  # as for a script: its neighbours can be imported
        spec.loader.exec_module(module)
        _FILES[path] = module
    return _FILES[path]


def send(stream: BinaryIO, message: Any) -> None:
    """Writes one frame."""
    frame = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack("!Q", len(frame)) + frame)
    stream.flush()


def receive(stream: BinaryIO) -> bytes | None:
    """The next frame, still pickled; None at the end of the stream."""
    header = _exactly(stream, 8)
    return None if header is None else _exactly(stream, *struct.unpack("!Q", header))


def _exactly(stream: BinaryIO, length: int) -> bytes | None:
    """So many bytes of a stream that may give fewer at a time; None where it ends before."""
    pieces = []
    while length > 0:
        piece = stream.read(length)
        if not piece:
            return None
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def _failure(error: BaseException) -> dict[str, Any]:
    """What is told of an error: its line, its traceback without this file's frames."""
    if isinstance(error, Unusable):
        return {"error": str(error), "at": error.at, "trace": ""}
    here = error.__traceback__
    while here is not None and here.tb_frame.f_code.co_filename == __file__:
        here = here.tb_next
    lines = traceback.format_exception(type(error), error, here)
    line = traceback.format_exception_only(type(error), error)[-1].strip()
    return {"error": f"raised {line}", "at": None, "trace": "".join(lines)}


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone, also from within a call that hangs."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def serve(parent: int) -> None:
    """The loop. What functions print goes to standard error, and they read an empty standard input."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    functions: dict[str, Function] = {}
    while (frame := receive(requests)) is not None:
        try:
            kind, content = pickle.loads(frame)
            if kind == "load":
                sys.path[:] = content["path"]
                result: Any = {}
                for part, spec in content["functions"].items():
                    try:
                        functions[part], digest = load(spec)
                        together = functions[part].form.group or functions[part].asynchronous
                        result[part] = {"together": together, "digest": digest}
                    except BaseException as error:
                        result[part] = _failure(error)
            else:
                send(replies, "begun")
                result = {"result": functions[content["part"]](content)}
        except BaseException as error:  # also SystemExit: nothing that a function does ends the loop
            result = _failure(error)
        send(replies, result)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
