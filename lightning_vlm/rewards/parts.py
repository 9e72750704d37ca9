"""The parts that are computed in this process: grading rules, format, length, CIDEr-D."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from lightning_vlm.benchmarks.grading import grade_all
from lightning_vlm.benchmarks.rules import RULES
from lightning_vlm.metrics.captions import DocumentFrequencies, cider_d, require_java
from lightning_vlm.metrics.captions.inputs import is_group
from lightning_vlm.rewards.settings import THINK_ANSWER, Reward
from lightning_vlm.rewards.table import Group, reward_error

Tick = Callable[[int], object]


class Scored(NamedTuple):
    """A part's values of all completions, in order, and how many of them were cut off."""

    values: list[float]
    timed_out: int = 0


class Part(Protocol):
    """One part of the reward."""

    def score(self, groups: Sequence[Group], tick: Tick) -> Scored:
        """Values of all completions of all groups, in order; `tick(n)` tells that n more are done.

        Raises:
            RewardError: one cannot be scored.
        """
        ...


class Accuracy:
    """A grading rule's score. Symbolic rules have worker processes of their own, which are killed when they hang.

    Args:
        name: of the part. rule: by name.
    """

    def __init__(self, name: str, rule: str) -> None:
        self.name, self.rule = name, RULES[rule]

    def score(self, groups: Sequence[Group], tick: Tick) -> Scored:
        """See `Part.score`; an answer whose grading was cut off has 0 and is counted."""
        answers = [(completion.text, group.sample) for group in groups for completion in group.completions]
        values: list[float] = []
        cut = 0
        records = iter(grade_all(self.rule, answers))
        while len(values) < len(answers):
            text, sample = answers[len(values)]
            try:
                record = next(records)
            except Exception as error:
                problem = f"raised {type(error).__name__}: {error}"
                raise reward_error(self.name, f"rule {self.rule.name}", problem, sample, text) from error
            values.append(float(record["score"]))
            cut += "timed_out" in record
            tick(1)
        return Scored(values, cut)


class Format:
    """1 where the whole completion matches `THINK_ANSWER`, else 0. Other patterns are matched in worker processes."""

    def score(self, groups: Sequence[Group], tick: Tick) -> Scored:
        """See `Part.score`."""
        pattern = re.compile(THINK_ANSWER, re.DOTALL)
        return _each(groups, tick, lambda _, completion: float(pattern.fullmatch(completion.text) is not None))


class Overlong:
    """DAPO's soft punishment (Yu et al. 2025, eq. 13) of a completion of n tokens, the end of turn among them.

    0 up to `limit` − `ramp`, (`limit` − `ramp` − n) / `ramp` from there to −1 at `limit`, −1 beyond.
    """

    def __init__(self, ramp: int, limit: int) -> None:
        self.ramp, self.limit = ramp, limit

    def score(self, groups: Sequence[Group], tick: Tick) -> Scored:
        """See `Part.score`."""
        free = self.limit - self.ramp
        return _each(groups, tick, lambda _, completion: 0.0 - min(1.0, max(0, len(completion.ids) - free) / self.ramp))


class Length:
    """−|n − `target`| / `target` of a completion of n tokens, at least −1; ours."""

    def __init__(self, target: int) -> None:
        self.target = target

    def score(self, groups: Sequence[Group], tick: Tick) -> Scored:
        """See `Part.score`."""
        return _each(
            groups, tick, lambda _, completion: 0.0 - min(1.0, abs(len(completion.ids) - self.target) / self.target)
        )


class Cider:
    """CIDEr-D, 0 to 10, of the completion against `info["references"]`, with fixed document frequencies."""

    def __init__(self, name: str, frequencies: DocumentFrequencies) -> None:
        self.name, self.frequencies = name, frequencies

    def score(self, groups: Sequence[Group], tick: Tick) -> Scored:
        """See `Part.score`."""
        captions, references = [], []
        for group in groups:
            own = group.sample.info.get("references")
            if not is_group(own):
                problem = f"needs a list of reference captions in info['references'], got {own!r}"
                raise reward_error(self.name, "kind cider", problem, group.sample, None)
            captions += [completion.text for completion in group.completions]
            references += [own] * len(group.completions)
        values = cider_d(captions, references, self.frequencies).tolist()
        tick(len(values))
        return Scored(values)


def make_part(name: str, reward: Reward, *, max_new_tokens: int | None, device: str) -> Part:
    """The part of a setting that is not `apart`.

    Raises:
        ValueError: a file is missing or not what it must be, a punishment that no completion can reach.
    """
    where = f"model.rewards.{name}"
    if reward.kind == "accuracy":
        return Accuracy(name, reward.rule)
    if reward.kind == "format":
        return Format()
    if reward.kind == "length":
        return Length(reward.target)
    if reward.kind == "overlong":
        return _overlong(where, reward, max_new_tokens)
    if reward.kind == "cider":
        return Cider(name, _frequencies(where, reward))
    from lightning_vlm.rewards.judge import Judge

    try:
        return Judge(name, reward.path, batch_size=reward.batch_size, device=device)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _overlong(where: str, reward: Reward, max_new_tokens: int | None) -> Overlong:
    limit = reward.limit or max_new_tokens
    if limit is None:
        raise ValueError(f"{where}: needs limit, in tokens: nothing tells the longest completion")
    if reward.ramp > limit:
        raise ValueError(f"{where}: ramp {reward.ramp} is longer than the longest completion, {limit}: lower ramp")
    if max_new_tokens is not None and limit - reward.ramp >= max_new_tokens:
        raise ValueError(
            f"{where}: punishes from {limit - reward.ramp} tokens (limit {limit} − ramp {reward.ramp}), which no "
            f"completion of at most {max_new_tokens} exceeds: lower limit or leave it out"
        )
    return Overlong(reward.ramp, limit)


def _frequencies(where: str, reward: Reward) -> DocumentFrequencies:
    path = Path(reward.document_frequencies).expanduser()
    if not path.is_file():
        raise ValueError(
            f"{where}: there is no file {reward.document_frequencies}; write it with "
            "DocumentFrequencies.from_references(…).save(FILE)"
        )
    try:
        if reward.tokenizer == "ptb":
            require_java()
        frequencies = DocumentFrequencies.load(path, tokenizer=reward.tokenizer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if frequencies.images < 2:
        raise ValueError(f"{where}: {path} counts {frequencies.images} images, which makes every CIDEr 0: count a set")
    return frequencies


def _each(groups: Sequence[Group], tick: Tick, value: Callable[..., float]) -> Scored:
    """`value(sample, completion)` of every completion."""

    def values() -> Iterator[float]:
        for group in groups:
            yield from (value(group.sample, completion) for completion in group.completions)
            tick(len(group.completions))

    return Scored(list(values()))
