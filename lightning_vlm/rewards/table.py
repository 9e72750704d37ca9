"""What goes into a reward and what comes out, and how the two are said in errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_vlm.data.schema import Message, Sample
from lightning_vlm.rollouts import Completion

_LONGEST = 600  # characters of a text that an error shows


class Group(NamedTuple):
    """One prompt's completions.

    Attributes:
        sample: the prompt, its gold answer, its columns.
        completions: what was generated for it.
    """

    sample: Sample
    completions: Sequence[Completion]


class RewardTable(NamedTuple):
    """The rewards of N completions, those of all groups in order, by K parts.

    Attributes:
        names: of the parts.
        values: [N, K] float64, unweighted; NaN where a part does not apply (its function returned None).
        totals: [N] float64, weighted sums over the parts that apply.
        timed_out: part → how many of its completions were cut off; every part is there.
        details: `part/sub` → [N] float64 of what a function returned beside its reward; NaN where it did not.
    """

    names: tuple[str, ...]
    values: Tensor
    totals: Tensor
    timed_out: dict[str, int]
    details: dict[str, Tensor]


class RewardError(ValueError):
    """A reward that could not be computed. The run must stop: a 0 in its place would be trained on."""


def text_of(message: Message) -> str:
    """The text parts of a message."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def prompt_text(sample: Sample) -> str:
    """The text of a sample's prompt, a line or more per message."""
    return "\n".join(text_of(message) for message in sample.prompt())


def reward_error(
    part: str, what: str, problem: str, sample: Sample, completion: str | None, trace: str = ""
) -> RewardError:
    """The error that shows all that is needed to see why.

    Args:
        part: its name. what: what computes it. problem: what happened.
        sample: whose completion it is. completion: the text, if it is known which.
        trace: the original traceback.
    """
    lines = [f"model.rewards.{part}: {what}: {problem}", f"sample:     {sample.id}"]
    lines.append(f"prompt:     {shortened(prompt_text(sample))!r}")
    if completion is not None:
        lines.append(f"completion: {shortened(completion)!r}")
    lines.append(f"answer:     {sample.answer!r}")
    return RewardError("\n".join([*lines, trace.rstrip()] if trace else lines))


def shortened(text: str, longest: int = _LONGEST) -> str:
    """Beginning and end of a text that is too long to show."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … [{len(text) - 2 * half} characters] … {text[-half:]}"
