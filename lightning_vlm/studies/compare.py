"""Compares arms by their per-example files: a test for every pair, and what may be said by it.

Two arms with one training seed each are two checkpoints: the test is over problems. Two arms with several seeds each
are two recipes: the test is over seed means. One seed against several is refused. Higher scores are better.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import fmean
from typing import Any, Literal

import numpy as np

from lightning_vlm.metrics import statistics
from lightning_vlm.metrics.pass_at_k import pass_at_k
from lightning_vlm.metrics.statistics import DRAWS, Difference, McNemar
from lightning_vlm.studies.per_example import Evaluation, Run, check_conditions, common_ids
from lightning_vlm.studies.wording import Unit, notes_on, sentence

LEVEL = 0.95
POWER = 0.8
Pairing = Literal["auto", "paired", "unpaired"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A recipe, or the one checkpoint there is of it.

    Attributes:
        name: of the arm. runs: one per training seed, in the order given.
        values: [seeds, problems] the metric per problem.
        mean: over problems and seeds. low, high: its interval, over problems if there is one seed, else over seeds; NaN
            where the seeds have no spread.
        seed_sd: standard deviation of the seed means; NaN for one seed.
    """

    name: str
    runs: list[Run]
    values: np.ndarray = field(repr=False)
    mean: float
    low: float
    high: float
    seed_sd: float

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
            "interval_over": "problems" if self.single else "seeds",
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
        verdict: in one word. better: the better arm, if there is one. sentence: the verdict in words.
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
    verdict: Literal["better", "not distinguishable", "no verdict"] = "no verdict"
    better: str | None = None
    sentence: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain facts."""
        return {
            "a": self.a,
            "b": self.b,
            "verdict": self.verdict,
            "better": self.better,
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
        rules: grading rules. prompts: prompt ids. metric: `score` or `pass@K`. unit: how scores are shown.
        problems: compared ones. left_out: ids that are not in all files.
        alpha: of the verdicts. draws, seed: of the bootstrap. tested: pairs with a p, which Holm's adjustment is over.
        arms: in the order given. pairs: each arm with all after it.
        conditions: sentences on what differs between the files, or is unknown.
    """

    rules: tuple[str, ...]
    prompts: tuple[str, ...]
    metric: str
    unit: Unit
    problems: int
    left_out: int
    alpha: float
    draws: int
    seed: int
    tested: int
    arms: list[Arm]
    pairs: list[Pair]
    conditions: list[str]

    @property
    def notes(self) -> list[str]:
        """What a reader must know to read the numbers."""
        return [*notes_on(self), *self.conditions]

    def to_json(self) -> dict[str, Any]:
        """A plain dict: scores and differences in the files' own unit (fractions), NaN as None.

        `p` is of the one pair, `p_adjusted` after Holm; intervals are not adjusted.
        """
        content = {
            "rules": list(self.rules),
            "prompts": list(self.prompts),
            "metric": self.metric,
            "unit": "fraction" if self.unit is Unit.points else "score",
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


def compare(
    runs: Sequence[Run],
    *,
    metric: str = "score",
    pairing: Pairing = "auto",
    common: bool = False,
    across: bool = False,
    alpha: float = 0.05,
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Compare every pair of arms.

    Args:
        runs: evaluations with arm and seed (`per_example.group`).
        metric: `score`, the mean over draws, or `pass@K`.
        pairing: recipes by paired t or by Welch; `auto` pairs where both arms have the same seeds and each seed's runs
            start from the same model.
        common: compare the ids that all files share. across: allow different prompts and sampling.
        alpha: Holm-adjusted level of the verdicts.
        draws: bootstrap draws. seed: of the draws.

    Raises:
        ValueError: fewer than two arms, an alpha outside (0, 1), an unknown metric, pass@K of other scores than 0 and 1
            or of fewer than K draws, `paired` for arms of different seeds, or files that cannot be compared.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"--alpha must lie between 0 and 1, got {alpha}")
    evaluations = [run.evaluation for run in runs]
    names = list(dict.fromkeys(run.arm for run in runs))
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} input: give at least two to compare")
    if len(names) < 2:
        raise ValueError(f"all inputs belong to arm '{names[0]}': nothing to compare; name arms by --arms")
    conditions = check_conditions(evaluations, across=across)
    ids = common_ids(evaluations, common=common)
    scores = [score for e in evaluations for name in ids for score in e.scores[name]]
    arms = [_arm(name, [run for run in runs if run.arm == name], ids, metric, draws, seed) for name in names]

    drafts = [_tested(a, b, pairing, draws, seed) for a, b in combinations(arms, 2)]
    adjusted = statistics.holm([pair.result.p for pair in drafts])
    tested = sum(not math.isnan(p) for p in adjusted)
    drafted = Comparison(
        rules=evaluations[0].rules,
        prompts=tuple(sorted({prompt for e in evaluations for prompt in e.prompts})),
        metric=metric,
        unit=Unit.points if all(0 <= score <= 1 for score in scores) else Unit.plain,
        problems=len(ids),
        left_out=len({name for e in evaluations for name in e.scores}) - len(ids),
        alpha=alpha,
        draws=draws,
        seed=seed,
        tested=tested,
        arms=arms,
        pairs=drafts,
        conditions=conditions,
    )
    pairs = [
        _judged(replace(pair, p_adjusted=p), a, b, drafted)
        for pair, p, (a, b) in zip(drafts, adjusted, combinations(arms, 2), strict=True)
    ]
    return replace(drafted, pairs=pairs)


def _arm(name: str, runs: list[Run], ids: list[str], metric: str, draws: int, seed: int) -> Arm:
    values = np.array([per_problem(run.evaluation, ids, metric) for run in runs])
    seed_means = values.mean(axis=1)
    if len(runs) == 1:
        low, high = statistics.bootstrap_interval(values[0], draws=draws, seed=seed, level=LEVEL)
        spread = math.nan
    else:
        low, high = statistics.mean_interval(seed_means, level=LEVEL)
        spread = float(seed_means.std(ddof=1))
    mean = float(seed_means.mean())
    return Arm(name=name, runs=runs, values=values, mean=mean, low=low, high=high, seed_sd=spread)


def per_problem(evaluation: Evaluation, ids: Sequence[str], metric: str) -> list[float]:
    """The metric of each problem: the mean over its draws, or pass@K.

    Raises:
        ValueError: an unknown metric, pass@K of other scores than 0 and 1 or of fewer than K draws.
    """
    scores = [evaluation.scores[name] for name in ids]
    if metric == "score":
        return [fmean(draws) for draws in scores]
    number = re.fullmatch(r"pass@([1-9]\d*)", metric)
    if number is None:
        raise ValueError(f"unknown metric '{metric}': use score, or pass@K with a whole number K such as pass@8")
    k, n = int(number[1]), len(scores[0])
    if n < k:
        raise ValueError(f"{metric} needs at least {k} draws per problem, {evaluation.path} has {n}; use a smaller K")
    for name, draws in zip(ids, scores, strict=True):
        if not statistics.is_binary(draws):
            raise ValueError(f"{metric} needs scores of 0 and 1; id '{name}' of {evaluation.path} has {max(draws)}")
    return [pass_at_k(n, int(sum(draws)), k) for draws in scores]


def _tested(a: Arm, b: Arm, pairing: Pairing, draws: int, seed: int) -> Pair:
    if a.single and b.single:
        return _checkpoints(a, b, draws, seed)
    if not a.single and not b.single:
        return _recipes(a, b, pairing)
    one = a.name if a.single else b.name
    reason = f"{one} has one training seed, which tells nothing of the spread between its seeds"
    diff = Difference(a.mean - b.mean, math.nan, math.nan, math.nan)
    return Pair(a=a.name, b=b.name, about=None, test=None, reason=reason, result=diff)


def _checkpoints(a: Arm, b: Arm, draws: int, seed: int) -> Pair:
    x, y = a.values[0], b.values[0]
    result = statistics.paired_bootstrap(x, y, draws=draws, seed=seed, level=LEVEL)
    test: str | None = "paired bootstrap"
    reason, found = "one training seed each: compared problem by problem", None
    if statistics.is_binary(x) and statistics.is_binary(y):
        found = statistics.mcnemar_exact(x, y)
        result, test = result._replace(p=found.p), "McNemar's exact test"
    elif math.isnan(result.p):
        test, reason = None, "the difference is the same on every problem: no spread to judge by"
    return Pair(a=a.name, b=b.name, about="checkpoints", test=test, reason=reason, result=result, mcnemar=found)


def _recipes(a: Arm, b: Arm, pairing: Pairing) -> Pair:
    paired, reason = _paired(a, b, pairing)
    x, y = _seed_means(a, b, paired)
    result = (statistics.paired_t if paired else statistics.welch)(x, y, level=LEVEL)
    test: str | None = "paired t" if paired else "Welch's t"
    if math.isnan(result.p):
        test, reason = None, "the seeds of each arm gave the same score: no spread to judge by"
        if np.ptp(x) > 0:
            reason = "the difference is the same for every seed: no spread to judge by"
    return Pair(a=a.name, b=b.name, about="recipes", test=test, reason=reason, result=result)


def _paired(a: Arm, b: Arm, pairing: Pairing) -> tuple[bool, str]:
    """Whether runs are compared seed by seed, and why."""
    starts_a, starts_b = ({run.seed: run.evaluation.start for run in arm.runs} for arm in (a, b))
    same = starts_a.keys() == starts_b.keys()
    if pairing == "unpaired":
        return False, "unpaired was asked for"
    if pairing == "paired":
        if not same:
            raise ValueError(
                f"--paired: arm '{a.name}' has training seeds {_listed(a)}, arm '{b.name}' has {_listed(b)}; pairs "
                "need the same seeds in both"
            )
        return True, "paired was asked for"
    if not same:
        return False, "the arms have different training seeds"
    if None in [*starts_a.values(), *starts_b.values()]:
        return False, "the models that training started from are not all known"
    if starts_a != starts_b:
        return False, "the runs of a seed start from different models"
    return True, "the runs of each seed start from the same model"


def _listed(arm: Arm) -> str:
    return ", ".join(map(str, sorted(arm.seeds)))  # type: ignore[type-var]


def _seed_means(a: Arm, b: Arm, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """Seed means; if paired, in the same order of seeds."""
    if not paired:
        return a.seed_means, b.seed_means
    order = [b.seeds.index(seed) for seed in a.seeds]
    return a.seed_means, b.seed_means[order]


def _judged(pair: Pair, a: Arm, b: Arm, result: Comparison) -> Pair:
    """The pair with its verdict; `required` is for level α/m, the strictest that Holm may ask for."""
    if pair.test:
        at = {"power": POWER, "alpha": result.alpha / result.tested}
        if pair.about == "checkpoints":
            required = statistics.required_problems(a.values[0], b.values[0], **at)
        else:
            paired = pair.test == "paired t"
            required = statistics.required_seeds(*_seed_means(a, b, paired), paired=paired, **at)
        found = pair.p_adjusted <= result.alpha and pair.result.diff != 0
        better = (a.name if pair.result.diff > 0 else b.name) if found else None
        verdict = "better" if found else "not distinguishable"
        pair = replace(pair, required=required, verdict=verdict, better=better)
    return replace(pair, sentence=sentence(pair, a, b, result))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
