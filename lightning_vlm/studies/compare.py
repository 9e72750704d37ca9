"""Compares arms by their per-example files, or by one number per run: a test for every pair, and what it allows to say.

Two arms with one training seed each are two checkpoints: the test is over problems. Two arms with several seeds each
are two recipes: the test is over seed means. One seed against several is refused, and so is one seed without problems.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lightning_vlm.config.tree import nearest
from lightning_vlm.metrics import statistics
from lightning_vlm.metrics.pass_at_k import pass_at_k
from lightning_vlm.metrics.statistics import DRAWS, Difference
from lightning_vlm.studies.comparison import LEVEL, POWER, Arm, Comparison, Higher, Pair, Pairing
from lightning_vlm.studies.per_example import Evaluation, Run, check_conditions, common_ids
from lightning_vlm.studies.wording import Unit, sentence, short

Pairs = Sequence[tuple[str, str]]


def compare(
    runs: Sequence[Run],
    *,
    metric: str = "score",
    pairing: Pairing = "auto",
    pairs: Pairs | None = None,
    common: bool = False,
    across: bool = False,
    alpha: float = 0.05,
    draws: int = DRAWS,
    seed: int = 0,
    higher: Higher = "better",
    unit: Unit | None = None,
    flags: bool = True,
) -> Comparison:
    """Compare arms problem by problem or, with several training seeds, seed mean by seed mean.

    Args:
        runs: evaluations with arm and seed (`per_example.group`). Where they have a `minus`, its metric is subtracted,
            problem by problem.
        metric: `score`, the mean over draws, or `pass@K`.
        pairing: recipes by paired t or by Welch; `auto` pairs where both arms have the same seeds and each seed's runs
            start from the same model.
        pairs: names of the arms to compare; only these are tested, and Holm's adjustment is over them. All by default.
        common: compare the ids that all files share. across: allow different prompts and sampling.
        alpha: Holm-adjusted level of the verdicts.
        draws: bootstrap draws. seed: of the draws.
        higher: whether greater numbers are better.
        unit: how scores are shown; by default as points where all of them lie between 0 and 1.
        flags: whether errors may name the flags of `lightning-vlm compare`.

    Raises:
        ValueError: fewer than two arms and no `pairs`, an alpha outside (0, 1), an unknown metric, pass@K of other
            scores than 0 and 1 or of fewer than K draws, `paired` for arms of different seeds, pairs of unknown arms or
            the same pair twice, or files that cannot be compared.
    """
    evaluations = [run.evaluation for run in runs]
    minus = [run.minus for run in runs if run.minus is not None]
    names = list(dict.fromkeys(run.arm for run in runs))
    if len(runs) < 2 and pairs is None:
        raise ValueError(f"{len(runs)} input: give at least two to compare")
    if len(names) < 2 and pairs is None:
        raise ValueError(f"all inputs belong to arm '{names[0]}': nothing to compare; name arms by --arms")
    conditions: list[str] = []
    ids_of: dict[str, list[str]] = {}
    left_out = 0
    for block in _blocks(names, pairs):  # arms that nothing compares may have answered other problems
        own = [run for run in runs if run.arm in block]
        beside = [run.minus for run in own if run.minus is not None]
        for note in check_conditions([run.evaluation for run in own], across=across, flags=flags):
            conditions += [note] if note not in conditions else []
        check_conditions([*(run.evaluation for run in own), *beside], across=across, flags=flags)
        ids = common_ids([*(run.evaluation for run in own), *beside], common=common, flags=flags)
        left_out += len({name for run in own for name in run.evaluation.scores}) - len(ids)
        ids_of |= dict.fromkeys(block, ids)
    if unit is None:
        scored = [
            (e, name) for run in runs for e in filter(None, (run.evaluation, run.minus)) for name in ids_of[run.arm]
        ]
        within = all(0 <= score <= 1 for e, name in scored for score in e.scores[name])
        unit = (Unit.changes if minus else Unit.points) if within else Unit.plain
    counts = sorted({len(ids) for ids in ids_of.values()})
    if len(counts) > 1:
        conditions.append(f"Arms that are not compared answered different numbers of problems: {counts}.")
    facts = {
        "rules": tuple(dict.fromkeys(rule for e in evaluations for rule in e.rules)),
        "prompts": tuple(sorted({prompt for e in evaluations for prompt in e.prompts})),
        "problems": counts[0],
        "left_out": left_out,
        "conditions": conditions,
    }
    arms = [
        _arm(name, [run for run in runs if run.arm == name], ids_of[name], metric=metric, draws=draws, seed=seed)
        for name in names
    ]
    asked = {"metric": metric, "unit": unit, "alpha": alpha, "higher": higher, "pairing": pairing}
    return _compared(arms, pairs, draws=draws, seed=seed, **asked, **facts)


def compare_values(
    values: Mapping[str, Mapping[int | None, float]],
    starts: Mapping[str, Mapping[int | None, str | None]] | None = None,
    *,
    metric: str,
    unit: Unit = Unit.plain,
    pairing: Pairing = "auto",
    pairs: Pairs | None = None,
    alpha: float = 0.05,
    higher: Higher = "better",
    files: Mapping[str, Mapping[int | None, Path]] | None = None,
) -> Comparison:
    """Compare arms by a number that exists once per training seed: a corpus metric, a point of a curve, a probe.

    With several seeds the tests are those of `compare`; one seed gives no verdict, as there are no problems to judge
    its spread by.

    Args:
        values: arm → training seed → number.
        starts: arm → training seed → hash of the model that training started from, None where unknown.
        metric: name of the number. unit: how it is shown.
        pairing, pairs, alpha, higher: as `compare`.
        files: arm → training seed → where the number is from.

    Raises:
        ValueError: as `compare`; an arm without numbers, or a number that is not finite.
    """
    starts, files = starts or {}, files or {}
    if len(values) < 2 and pairs is None:
        raise ValueError(f"{len(values)} arm: give at least two to compare")
    arms = []
    for name, by_seed in values.items():
        for seed, value in by_seed.items():
            if not math.isfinite(value):
                raise ValueError(f"{metric} of arm '{name}', seed {seed} is {value}; only finite numbers compare")
        runs = [
            Run(name, seed, _of_run(files.get(name, {}).get(seed), name, seed, starts.get(name, {}).get(seed)))
            for seed in by_seed
        ]
        arms.append(_arm_of(name, runs, np.array([[float(value)] for value in by_seed.values()]), whole=True))
    asked = {"metric": metric, "unit": unit, "alpha": alpha, "higher": higher, "pairing": pairing}
    return _compared(arms, pairs, problems=0, draws=DRAWS, seed=0, **asked)


def difference(result: Comparison, a: str, b: str) -> Pair:
    """a − b with its interval: the pair that was compared, or one outside the family, which gets no verdict.

    Args:
        result: a comparison. a: name of an arm of it. b: of another.
    """
    for pair in result.pairs:
        if (pair.a, pair.b) == (a, b):
            return pair
    return _tested(result.arm(a), result.arm(b), result.pairing, result.draws, result.seed)


def _compared(arms: list[Arm], pairs: Pairs | None, *, alpha: float, **facts: Any) -> Comparison:
    if not 0 < alpha < 1:
        raise ValueError(f"--alpha must lie between 0 and 1, got {alpha}")
    by_name = {arm.name: arm for arm in arms}
    chosen = [(by_name[a], by_name[b]) for a, b in _chosen(list(by_name), pairs)]
    drafts = [_tested(a, b, facts["pairing"], facts["draws"], facts["seed"]) for a, b in chosen]
    adjusted = statistics.holm([pair.result.p for pair in drafts])
    tested = sum(not math.isnan(p) for p in adjusted)
    result = Comparison(arms=arms, pairs=drafts, tested=tested, alpha=alpha, **facts)
    judged = [
        _judged(replace(pair, p_adjusted=p), a, b, result)
        for pair, p, (a, b) in zip(drafts, adjusted, chosen, strict=True)
    ]
    return replace(result, pairs=judged)


def _chosen(names: list[str], pairs: Pairs | None) -> list[tuple[str, str]]:
    if pairs is None:
        return list(combinations(names, 2))
    for index, (a, b) in enumerate(pairs):
        for name in (a, b):
            if name not in names:
                raise ValueError(f"the pair of '{a}' and '{b}' names no arm '{name}'{nearest(name, names)}")
        if a == b:
            raise ValueError(f"the pair of '{a}' and '{b}' is an arm and itself; name two arms")
        if {a, b} in [set(pair) for pair in pairs[:index]]:
            raise ValueError(f"the pair of '{a}' and '{b}' is named twice; Holm's adjustment counts each pair once")
    return list(pairs)


def _blocks(names: list[str], pairs: Pairs | None) -> list[list[str]]:
    """Arms that pairs connect, directly or through others; without pairs all of them."""
    if pairs is None:
        return [names]
    block = {name: name for name in names}
    for a, b in _chosen(names, pairs):
        old, new = block[b], block[a]
        block = {name: new if of == old else of for name, of in block.items()}
    return [[name for name in names if block[name] == of] for of in dict.fromkeys(block.values())]


def _of_run(path: Path | None, arm: str, seed: int | None, start: str | None) -> Evaluation:
    """What stands for an evaluation where a number is of a run as a whole."""
    return Evaluation(
        path=path or Path(f"{arm}-{seed}"),
        scores={},
        golds={},
        rules=(),
        prompts=(),
        sampling=None,
        arm=arm,
        seed=seed,
        start=start,
        step=None,
    )


def _arm(name: str, runs: list[Run], ids: list[str], *, metric: str, draws: int, seed: int) -> Arm:
    values = np.array([per_problem(run.evaluation, ids, metric) for run in runs])
    for row, run in enumerate(runs):
        if run.minus is not None:
            values[row] -= per_problem(run.minus, ids, metric)
    return _arm_of(name, runs, values, draws=draws, seed=seed)


def _arm_of(
    name: str, runs: list[Run], values: np.ndarray, *, whole: bool = False, draws: int = DRAWS, seed: int = 0
) -> Arm:
    if not runs:
        raise ValueError(f"arm '{name}' has no runs")
    seeds = [run.seed for run in runs]
    if len(runs) > 1 and (None in seeds or len(set(seeds)) < len(seeds)):
        raise ValueError(f"arm '{name}' has runs of training seeds {', '.join(map(str, seeds))}; each needs its own")
    low = high = spread = math.nan
    seed_means = values.mean(axis=1)
    if len(runs) > 1:
        low, high = statistics.mean_interval(seed_means, level=LEVEL)
        spread = float(seed_means.std(ddof=1))
    elif not whole:
        low, high = statistics.bootstrap_interval(values[0], draws=draws, seed=seed, level=LEVEL)
    mean = float(seed_means.mean())
    return Arm(name=name, runs=runs, values=values, mean=mean, low=low, high=high, seed_sd=spread, whole=whole)


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
    if a.single and b.single and not a.whole:
        return _checkpoints(a, b, draws, seed)
    if not a.single and not b.single:
        return _recipes(a, b, pairing)
    one = a.name if a.single else b.name
    reason = f"{one} has one training seed, which tells nothing of the spread between its seeds"
    if a.single and b.single:
        reason = "one training seed each and one number per seed: no spread to judge by"
    diff = Difference(a.mean - b.mean, math.nan, math.nan, math.nan)
    return Pair(a=a.name, b=b.name, about=None, test=None, reason=reason, result=diff)


def _checkpoints(a: Arm, b: Arm, draws: int, seed: int) -> Pair:
    x, y = a.values[0], b.values[0]
    result = statistics.paired_bootstrap(x, y, draws=draws, seed=seed, level=LEVEL)
    test: str | None = "paired bootstrap"
    reason, found = "one training seed each: compared problem by problem", None
    changes = any(run.minus is not None for run in [*a.runs, *b.runs])  # of which none is solved or not
    if statistics.is_binary(x) and statistics.is_binary(y) and not changes:
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
                f"pairs were asked for, but arm '{a.name}' has training seeds {_listed(a)}, arm '{b.name}' has "
                f"{_listed(b)}; pairs need the same seeds in both"
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
        verdict = "not distinguishable" if not found else "different" if result.higher == "neither" else "better"
        pair = replace(pair, required=required, verdict=verdict)
        if verdict == "better":
            lower = b.name if pair.greater == a.name else a.name
            pair = replace(pair, better=lower if result.higher == "worse" else pair.greater)
    return replace(pair, sentence=sentence(pair, a, b, result), brief=short(pair, a, b, result))
