"""The arms of a study: where each stands on the axes, what it is called inside its group, how it looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_vlm.studies.results import Results

SEED = "seed"


class Arms:
    """Knows every label of a study.

    A label is the values of the axes that something depends on. Inside a group (one value of each `within` axis) arms
    are called by the other axes alone, and arms of the same short name look the same in every group.

    Args:
        results: of the study.
    """

    def __init__(self, results: Results) -> None:
        self.labels = list(results.labels)
        self.groups = [dict(group) for group in results.groups] or [{}]
        self._at: dict[str, dict[str, str]] = {}
        for row in results.stages:
            place = {axis: str(value) for axis, value in row.at.items() if axis != SEED}
            self._at[row.label] = self._at.get(row.label) or place
        shorts = [self.short(label) for label in [*self.labels, *self._at]]
        self._looks = {short: index for index, short in enumerate(dict.fromkeys(shorts))}

    def at(self, label: str) -> dict[str, str]:
        """Axis → value, without the seed; empty for a label of no stage."""
        return self._at.get(label, {})

    def shown(self, label: str) -> str:
        """What an arm is called by itself; what depends on no axis is of all arms."""
        return label if label in self.labels or self.at(label) else "all arms"

    def short(self, label: str) -> str:
        """The label without the values of the `within` axes; the label itself if nothing else is in it."""
        within = {axis for group in self.groups for axis in group}
        kept = [value for axis, value in self.at(label).items() if axis not in within]
        return " · ".join(kept) or label

    def look(self, label: str) -> int:
        """Index of colour, dashes and marker."""
        return self._looks.setdefault(self.short(label), len(self._looks))

    def belongs(self, label: str, group: Mapping[str, str]) -> bool:
        """Whether an arm is of a group; one that does not depend on the group's axes is of all."""
        place = self.at(label)
        return all(place.get(axis, str(value)) == str(value) for axis, value in group.items())

    def ordered(self, labels: Iterable[str]) -> list[str]:
        """Distinct labels in the order of the study; others after."""
        distinct = list(dict.fromkeys(labels))
        return sorted(distinct, key=lambda label: self._place(label))

    def _place(self, label: str) -> int:
        if label in self.labels:
            return self.labels.index(label)
        # A stage that does not depend on the condition stands where its first arm does.
        place = self.at(label).items()
        kin = [i for i, arm in enumerate(self.labels) if place and place <= self.at(arm).items()]
        return kin[0] if kin else len(self.labels)


def group_title(group: Mapping[str, str]) -> str:
    """`condition: few prompts`; empty where there is only one group."""
    return ", ".join(f"{axis}: {value}" for axis, value in group.items())
