"""What a comparison is made of: arms, pairs of them, and all that a reader needs to judge the numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lightning_vlm.metrics.statistics import Difference, McNemar
from lightning_vlm.studies.per_example import Run
from lightning_vlm.studies.wording import Unit, notes_on

LEVEL = 0.95
POWER = 0.8
Pairing = Literal["auto", "paired", "unpaired"]
Higher = Literal["better", "worse", "neither"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A recipe, or the one checkpoint there is of it.

    Attributes:
        name: of the arm. runs: one per training seed, in the order given.
        values: [seeds, problems] the metric per problem; [seeds, 1] where it is one number per seed (`whole`).
        mean: over problems and seeds. low, high: its interval, over problems if there is one seed, else over seeds; NaN
            where the seeds have no spread, and of one seed without problems.
        seed_sd: standard deviation of the seed means; NaN for one seed.
        whole: whether the metric is of a run as a whole, without scores per problem.
    """

    name: str
    runs: list[Run]
    values: np.ndarray = field(repr=False)
    mean: float
    low: float
    high: float
    seed_sd: float
    whole: bool = False

    @property
    def single(self) -> bool:
        """Whether there is only one training seed."""
        return len(self.runs) == 1

    @property
    def seed_means(self) -> np.ndarray:
        """[seeds] mean over problems."""
        return self.values.mean(axis=1)

    @property
    def seeds(self) -> list[int | None]:
        """The training seeds; None where unknown."""
        return [run.seed for run in self.runs]

    @property
    def interval_over(self) -> str | None:
        """What the interval is over; None where there is none to have."""
        return "seeds" if not self.single else None if self.whole else "problems"

    def to_json(self) -> dict[str, Any]:
        """Plain facts."""
        return {
            "name": self.name,
            "files": [str(run.evaluation.path) for run in self.runs],
            "seeds": self.seeds,
            "starts": [run.evaluation.start for run in self.runs],
            "steps": [run.evaluation.step for run in self.runs],
            "seed_means": self.seed_means.tolist(),
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
            "interval_over": self.interval_over,
            "seed_sd": self.seed_sd,
        }


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What a pair of arms shows.

    Attributes:
        a: name of an arm. b: name of the other.
        about: what the test speaks of.
        test: its name; None where none was made. reason: why this one, or why none.
        result: a − b, its interval and p; of checkpoints with 0/1 scores the interval is the bootstrap's and p
            McNemar's. NaN where it does not exist.
        mcnemar: problems that only one of two checkpoints solves; None for other scores.
        p_adjusted: p after Holm over all pairs tested.
        required: problems (checkpoints) or seeds per arm (recipes) at which a difference of this size would be found.
        verdict: in one word; "different" where the metric says nothing of better and worse. better: the better arm, if
            there is one. sentence: the verdict in words. brief: the same in a few, see `short`.
    """

    a: str
    b: str
    about: Literal["checkpoints", "recipes"] | None
    test: str | None
    reason: str
    result: Difference
    mcnemar: McNemar | None = None
    p_adjusted: float = math.nan
    required: int | None = None
    verdict: Literal["better", "different", "not distinguishable", "no verdict"] = "no verdict"
    better: str | None = None
    sentence: str = ""
    brief: str = ""

    @property
    def found(self) -> bool:
        """Whether the arms differ for certain: Holm-adjusted p at most alpha."""
        return self.verdict in ("better", "different")

    @property
    def greater(self) -> str | None:
        """The arm with the greater number, if they differ for certain; None otherwise."""
        return (self.a if self.result.diff > 0 else self.b) if self.found else None

    def short(self) -> str:
        """The verdict in a few words; says which number is greater, not whether that is good.

        "A > B by 2.3 points [0.9, 3.8], 5 seeds", "A − B: not distinguishable (0.4 points [−1.0, 1.8], 5 seeds); needs
        about 14 seeds", "A − B: no verdict (...)".
        """
        return self.brief

    def to_json(self) -> dict[str, Any]:
        """Plain facts."""
        return {
            "a": self.a,
            "b": self.b,
            "verdict": self.verdict,
            "better": self.better,
            "greater": self.greater,
            "short": self.brief,
            "sentence": self.sentence,
            "about": self.about,
            "test": self.test,
            "reason": self.reason,
            **self.result._asdict(),
            "p_adjusted": self.p_adjusted,
            "mcnemar": self.mcnemar and self.mcnemar._asdict(),
            "required": self.required,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of a comparison; `to_json` has everything.

    Attributes:
        rules: grading rules. prompts: prompt ids. metric: `score`, `pass@K` or the name of a number per seed. unit: how
            scores are shown.
        problems: compared ones; 0 where the metric is one number per seed. left_out: ids that are not in all files.
        alpha: of the verdicts. draws, seed: of the bootstrap. tested: pairs with a p, which Holm's adjustment is over.
        arms: in the order given. pairs: those asked for, or each arm with all after it.
        conditions: sentences on what differs between the files, or is unknown.
        higher: what a greater number means. pairing: as asked for.
    """

    rules: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    metric: str
    unit: Unit
    problems: int
    left_out: int = 0
    alpha: float
    draws: int
    seed: int
    tested: int
    arms: list[Arm]
    pairs: list[Pair]
    conditions: list[str] = field(default_factory=list)
    higher: Higher = "better"
    pairing: Pairing = "auto"

    @property
    def notes(self) -> list[str]:
        """What a reader must know to read the numbers."""
        return [*notes_on(self), *self.conditions]

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            KeyError: there is none.
        """
        return {arm.name: arm for arm in self.arms}[name]

    def to_json(self) -> dict[str, Any]:
        """A plain dict: scores and differences in the files' own unit (fractions), NaN as None.

        `p` is of the one pair, `p_adjusted` after Holm; intervals are not adjusted.
        """
        content = {
            "rules": list(self.rules),
            "prompts": list(self.prompts),
            "metric": self.metric,
            "higher": self.higher,
            "unit": "fraction" if self.unit.fractions else self.unit.name or "score",
            "shown_times": self.unit.scale,
            "problems": self.problems,
            "problems_left_out": self.left_out,
            "level": LEVEL,
            "alpha": self.alpha,
            "power": POWER,
            "pairs_tested": self.tested,
            "bootstrap": {"draws": self.draws, "seed": self.seed},
            "arms": [arm.to_json() for arm in self.arms],
            "pairs": [pair.to_json() for pair in self.pairs],
            "notes": self.notes,
        }
        return _without_nan(content)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
