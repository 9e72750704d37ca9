"""What a named part of the reward is made of: `model.rewards` in YAML."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from lightning_vlm.benchmarks.rules import RULES
from lightning_vlm.data.sources.spec import one_of

Kind = Literal["accuracy", "format", "overlong", "length", "cider", "model", "python"]
Style = Literal["auto", "trl", "verl", "easyr1"]

# One <think> block, one <answer> block, none of their tags inside; matched in linear time.
_INSIDE = r"(?:(?!</?(?:think|answer)>).)*"
THINK_ANSWER = rf"\s*<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>\s*"

_LIMITS = ("seconds", "on_timeout")
READS: dict[str, tuple[str, ...]] = {
    "accuracy": ("rule",),
    "format": ("pattern", *_LIMITS),
    "overlong": ("ramp", "limit"),
    "length": ("target",),
    "cider": ("document_frequencies", "tokenizer"),
    "model": ("path", "batch_size"),
    "python": ("function", "options", "columns", "style", "completions", *_LIMITS),
}
_NEEDS = {
    "overlong": ("ramp", "16"),
    "length": ("target", "100"),
    "cider": ("document_frequencies", "frequencies.json"),
    "model": ("path", "a reward model's directory"),
    "python": ("function", "my_rewards.py:score"),
}


@dataclass(kw_only=True)
class Reward:
    """One part of the reward. The options that a kind does not read must be left out.

    Args:
        kind: `accuracy` (a grading rule's score), `format` (1 if the whole completion matches a pattern, else 0),
            `overlong` (DAPO's soft punishment of length), `length` (−|tokens − target| / target, at least −1),
            `cider` (CIDEr-D, 0 to 10), `model` (a reward model's score), `python` (a function of yours).
        weight: the part's factor in the sum of the parts.
        rule: `accuracy`: a grading rule by name, such as `world/exact`, `geometry3k/freeform` or `answer/short`; none
            takes what grades the training data in evaluation.
        pattern: `format`: regular expression that the whole completion must match; `.` matches line breaks. The
            default is one <think>…</think> followed by one <answer>…</answer>.
        ramp: `overlong`: tokens over which the punishment grows from 0, at `limit` − `ramp`, to −1, at `limit`.
        limit: `overlong`: tokens from which the punishment is −1; None takes the rollout's longest completion.
        target: `length`: the wanted number of tokens.
        document_frequencies: `cider`: file of n-gram counts over the training set's references
            (`DocumentFrequencies.save`). The references of a sample are its `info["references"]`.
        tokenizer: `cider`: `python`, or `ptb` (needs Java); the same that the file was counted with.
        path: `model`: directory of a sequence classifier with one label.
        batch_size: `model`: texts scored together; changes speed and memory only.
        function: `python`: `FILE.py:NAME` or `package.module:NAME`.
        options: `python`: further keyword arguments of the function.
        columns: `python`: further names of columns, new name: existing name, such as `solution: answer`.
        style: `python`: whose signature the function has: `trl`, `verl`, `easyr1`; `auto` tells by the names of its
            parameters.
        completions: `python` of TRL's style: completions and prompts as `messages`, lists of role and content, or as
            plain `text`.
        seconds: `python`, `format` with a pattern of yours: longest time that one call may take.
        on_timeout: `python`, `format`: the value of a completion whose call took longer.

    Raises:
        ValueError: an unknown kind, rule or style; an option missing, out of range, or not read by the kind.
    """

    kind: Kind
    weight: float = 1.0
    rule: str | None = None
    pattern: str = THINK_ANSWER
    ramp: int | None = None
    limit: int | None = None
    target: int | None = None
    document_frequencies: str | None = None
    tokenizer: Literal["python", "ptb"] = "python"
    path: str | None = None
    batch_size: int = 16
    function: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    style: Style = "auto"
    completions: Literal["messages", "text"] = "messages"
    seconds: float = 10.0
    on_timeout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in READS:
            raise ValueError(f"model.rewards: unknown kind {self.kind!r}{one_of(str(self.kind), READS)}")
        reads = READS[self.kind]
        for option in fields(self):
            if option.name in ("kind", "weight", *reads):
                continue
            default = option.default_factory() if option.default is MISSING else option.default
            if getattr(self, option.name) != default:
                raise ValueError(
                    f"model.rewards: kind {self.kind!r} does not read {option.name!r}: leave it out "
                    f"(it reads weight, {', '.join(reads)})"
                )
        needed, example = _NEEDS.get(self.kind, ("weight", ""))
        if getattr(self, needed) is None:
            raise ValueError(f"model.rewards: kind {self.kind!r} needs {needed!r}, for example {needed}: {example}")
        for name in ("weight", "on_timeout"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"model.rewards: {name} must be a finite number, got {getattr(self, name)}")
        for name in ("ramp", "limit", "target", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"model.rewards: {name} must be at least 1, got {value}")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"model.rewards: seconds must be positive, got {self.seconds}")
        if self.kind == "accuracy" and self.rule is not None:
            self._check_rule()
        for name, valid in (
            ("tokenizer", ("python", "ptb")),
            ("style", ("auto", "trl", "verl", "easyr1")),
            ("completions", ("messages", "text")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"model.rewards: {name} is {getattr(self, name)!r}; choose {', '.join(valid)}")
        if self.limit is not None and self.ramp > self.limit:
            raise ValueError(f"model.rewards: ramp {self.ramp} is longer than limit {self.limit}: lower ramp")
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"model.rewards: pattern {self.pattern!r} is no regular expression: {error}") from None
        if self.kind == "python" and not all(self.function.rpartition(":")[::2]):
            raise ValueError(
                f"model.rewards: function {self.function!r} names no function; "
                "give FILE.py:NAME or package.module:NAME, for example my_rewards.py:score"
            )

    def _check_rule(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"model.rewards: unknown rule {self.rule!r}{one_of(self.rule, RULES)}")
        if RULES[self.rule].of_a_set:
            raise ValueError(
                f"model.rewards: rule {self.rule!r} scores a set of captions, not single answers; take another, such "
                "as world/exact or answer/short, or kind: cider"
            )

    @property
    def apart(self) -> bool:
        """Whether it is computed in worker processes: code and patterns of the user's may hang."""
        return self.kind == "python" or (self.kind == "format" and self.pattern != THINK_ANSWER)

    @property
    def what(self) -> str:
        """What computes it, for messages."""
        name = {"accuracy": "rule", "model": "path", "python": "function"}.get(self.kind)
        return f"kind {self.kind}" if name is None else f"{name} {getattr(self, name)}"
