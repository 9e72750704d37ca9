"""Studies whose truth is known: how often are the intervals and verdicts of `compare` right?

    python -m tools.simulate_studies [--studies 1000] [--seed 20]

prints the coverage of the 95 % intervals, how often a study says anything false, how often it finds what is there, and
what a bootstrap over problems would have said instead.

What is simulated. A study has arms with several training seeds each. All runs of a study answer the same problems,
whose difficulty is drawn once per study and differs between studies. A run answers problem j rightly with probability
p_j + effect of the arm + shift of the run, every answer being drawn independently. The shifts are normal with the
spread given; of runs that start from the same model, half of the shift's variance belongs to that model and is the same
for all arms of a seed. The truth of a difference is the difference of the effects: what the arms would differ by on
these problems, over all the seeds there could be. At spread 0 all runs of an arm are equally good and their means still
vary, by 2.9 points, because every run has answers of its own: two models of the same accuracy do not err on the same
problems. (Runs that gave the very same answers would have no spread at all, and get no verdict.)
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats

from lightning_vlm.metrics.statistics import required_seeds, resample_counts
from lightning_vlm.studies.compare import compare
from lightning_vlm.studies.per_example import Evaluation, Run

SEED = 20
SPREADS = (0.0, 0.017, 0.034)
EFFECTS = {"no differences": (0.0, 0.0, 0.0, 0.0), "differences": (0.0, 0.0, 0.04, 0.10)}
KINDS = {"Welch's t": (False, "auto"), "paired t": (True, "auto"), "Welch's t, shared starts": (True, "unpaired")}
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Studies of one kind.

    Attributes:
        effects: of each arm, in accuracy. spread: standard deviation of the runs' shifts. shared: whether runs of a
            seed start from the same model. seeds: per arm. problems: of the benchmark. studies: how many.
    """

    effects: tuple[float, ...] = EFFECTS["no differences"]
    spread: float = 0.0
    shared: bool = False
    seeds: int = 5
    problems: int = 256
    studies: int = 1000

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Of arms."""
        return list(combinations(range(len(self.effects)), 2))

    @property
    def truth(self) -> np.ndarray:
        """[pairs] differences of the effects, a − b."""
        return np.array([self.effects[a] - self.effects[b] for a, b in self.pairs])

    def simulate(self, seed: int = SEED) -> np.ndarray:
        """[studies, arms, seeds, problems] right answers."""
        rng = np.random.default_rng(seed)
        arms = len(self.effects)
        difficulty = rng.uniform(0.15, 0.8, (self.studies, 1, 1, self.problems)).astype(np.float32)
        part = np.sqrt(0.5) if self.shared else 1.0
        shift = part * rng.standard_normal((self.studies, arms, self.seeds, 1))
        if self.shared:
            shift += part * rng.standard_normal((self.studies, 1, self.seeds, 1))
        shift = np.array(self.effects)[:, None, None] + self.spread * shift
        drawn = rng.random((self.studies, arms, self.seeds, self.problems), dtype=np.float32)
        return drawn < difficulty + shift.astype(np.float32)

    def run_sd(self) -> float:
        """Standard deviation of a run's accuracy about its arm's, with difficulties uniform from .15 to .8 (no effect).

        Answers give the mean of p(1 − p) over the difficulties, a share 1/problems of it.
        """
        low, high = 0.15, 0.8
        answers = (high**2 - low**2) / 2 - (high**3 - low**3) / 3
        return float(np.sqrt(self.spread**2 + answers / (high - low) / self.problems))


@dataclass(frozen=True)
class Verdicts:
    """[studies, pairs] difference, interval and Holm-adjusted p."""

    diff: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray

    def coverage(self, truth: np.ndarray) -> float:
        """Share of intervals that hold the truth."""
        return float(np.mean((self.low <= truth) & (truth <= self.high)))

    def false_alarms(self, truth: np.ndarray) -> float:
        """Share of studies that call any two arms different that are not, or the lesser one of two the greater."""
        wrong = (self.p <= ALPHA) & (np.sign(self.diff) != np.sign(truth))
        return float(np.mean(wrong.any(axis=1)))

    def found(self, truth: np.ndarray) -> float:
        """Share of the true differences that are found; NaN if there are none."""
        right = (self.p <= ALPHA) & (np.sign(self.diff) == np.sign(truth))
        return float(np.mean(right[:, truth != 0])) if (truth != 0).any() else float("nan")


def verdicts(scores: np.ndarray, *, paired: bool) -> Verdicts:
    """What `compare` says of studies, for all of them at once, by scipy's tests and a Holm of its own.

    Args:
        scores: [studies, arms, seeds, problems]. paired: by paired t, else Welch's.
    """
    means = scores.mean(axis=3, dtype=np.float64)
    columns = []
    for a, b in combinations(range(means.shape[1]), 2):
        x, y = means[:, a], means[:, b]
        test = stats.ttest_rel(x, y, axis=1) if paired else stats.ttest_ind(x, y, axis=1, equal_var=False)
        interval = test.confidence_interval(0.95)
        columns.append((x.mean(axis=1) - y.mean(axis=1), interval.low, interval.high, test.pvalue))
    diff, low, high, p = (np.stack(column, axis=1) for column in zip(*columns, strict=True))
    return Verdicts(diff, low, high, holm_rows(p))


def holm_rows(p: np.ndarray) -> np.ndarray:
    """[studies, pairs] p adjusted over the pairs of each study."""
    order = p.argsort(axis=1)
    factors = np.arange(p.shape[1], 0, -1)
    adjusted = np.minimum(1, np.maximum.accumulate(np.take_along_axis(p, order, axis=1) * factors, axis=1))
    back = np.empty_like(adjusted)
    np.put_along_axis(back, order, adjusted, axis=1)
    return back


def by_compare(scores: np.ndarray, *, shared: bool, pairing: str = "auto") -> Verdicts:
    """The same by `compare` itself, study by study.

    Args:
        scores: [studies, arms, seeds, problems]. shared: whether runs of a seed start from the same model. pairing: as
            `compare`.
    """
    rows = []
    for study in scores:
        runs = [
            _run(arm, seed, answers, f"start-{seed}" if shared else f"start-{arm}-{seed}")
            for arm, seeds in enumerate(study)
            for seed, answers in enumerate(seeds)
        ]
        pairs = compare(runs, pairing=pairing).pairs  # type: ignore[arg-type]
        rows.append([(*pair.result[:3], pair.p_adjusted) for pair in pairs])
    return Verdicts(*np.moveaxis(np.array(rows), 2, 0))


def _run(arm: int, seed: int, answers: np.ndarray, start: str) -> Run:
    scores = {f"{index:04d}": [float(answer)] for index, answer in enumerate(answers)}
    evaluation = Evaluation(
        path=Path(f"arm-{arm}-{seed}"),
        scores=scores,
        golds=dict.fromkeys(scores),
        rules=("simulated",),
        prompts=("simulated",),
        sampling={},
        arm=f"arm-{arm}",
        seed=seed,
        start=start,
        step=1,
    )
    return Run(f"arm-{arm}", seed, evaluation)


def over_problems(scores: np.ndarray, *, draws: int = 1000) -> Verdicts:
    """The mistake: a paired bootstrap over problems of each arm's mean over seeds, as if the seeds were all there are.

    Args:
        scores: [studies, arms, seeds, problems]. draws: of the bootstrap; the same ones for every study.
    """
    per_problem = scores.mean(axis=2, dtype=np.float64)
    studies, arms, problems = per_problem.shape
    differences = [per_problem[:, a] - per_problem[:, b] for a, b in combinations(range(arms), 2)]
    table = np.stack(differences, axis=1).reshape(-1, problems)  # [studies · pairs, problems]
    drawn = np.concatenate([counts @ table.T for counts in resample_counts(problems, draws=draws)]) / problems
    drawn[np.abs(drawn) <= 1e-12] = 0
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    p = 2 * (np.minimum((drawn <= 0).sum(axis=0), (drawn >= 0).sum(axis=0)) + 1) / (draws + 1)
    shape = (studies, len(differences))
    rows = (column.reshape(shape) for column in (table.mean(axis=1), low, high, np.minimum(1, p)))
    diff, low, high, p = rows
    return Verdicts(diff, low, high, holm_rows(p))


def seeds_needed(effect: float, setting: Setting, *, alpha: float = ALPHA) -> int:
    """Seeds per arm by the power formula of `compare`, where difference and variances are known.

    Args:
        effect: true difference. setting: gives the spread of runs. alpha: of the one test.
    """
    sd = setting.run_sd()
    if not setting.shared:
        half = sd / np.sqrt(2)  # two values with the variance sd²
        a, b = [effect - half, effect + half], [-half, half]
    else:  # what the start model shares falls out of the differences
        half = np.sqrt(2 * (sd**2 - setting.spread**2 / 2)) / np.sqrt(2)
        a, b = [effect - half, effect + half], [0.0, 0.0]
    n = required_seeds(a, b, paired=setting.shared, alpha=alpha)
    if n is None:
        raise ValueError(f"no number of seeds finds an effect of {effect}")
    return n


def found_with(n: int, effect: float, setting: Setting, *, alpha: float = ALPHA, seed: int = SEED) -> float:
    """Share of simulated studies of two arms with n seeds each whose test finds the difference, at level alpha."""
    two = replace(setting, effects=(0.0, effect), seeds=n)
    said = verdicts(two.simulate(seed), paired=setting.shared)
    return float(np.mean((said.p <= alpha) & (said.diff < 0)))


def named(effect: float, setting: Setting, *, seed: int = SEED) -> np.ndarray:
    """Seeds per arm that studies of two arms name which do not find the difference.

    Args:
        effect: true difference. setting: gives the spread, and the seeds that these studies have.
    """
    two = replace(setting, effects=(0.0, effect))
    scores = two.simulate(seed)
    missed = verdicts(scores, paired=setting.shared).p[:, 0] > ALPHA
    means = scores.mean(axis=3, dtype=np.float64)[missed]
    found = [required_seeds(a, b, paired=setting.shared, alpha=ALPHA) for a, b in means]
    return np.array([n for n in found if n is not None])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=1000, help="simulated studies per line (default 1000)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the simulation (default {SEED})")
    args = parser.parse_args()
    print(f"{args.studies:,} studies per line, simulation seed {args.seed}: 4 arms, 5 seeds, 256 problems, in %\n")
    print(
        "| spread, points | differences | test | coverage | false alarms | found | bootstrap: coverage | false alarms |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for spread in SPREADS:
        for name, effects in EFFECTS.items():
            for test, (shared, pairing) in KINDS.items():
                setting = Setting(effects=effects, spread=spread, shared=shared, studies=args.studies)
                scores, truth = setting.simulate(args.seed), setting.truth
                said = verdicts(scores, paired=shared and pairing == "auto")
                wrong = over_problems(scores)
                rates = [said.coverage(truth), said.false_alarms(truth), said.found(truth)]
                rates += [wrong.coverage(truth), wrong.false_alarms(truth)]
                cells = ["–" if np.isnan(rate) else f"{100 * rate:.1f}" for rate in rates]
                print(f"| {100 * spread:.1f} | {name} | {test} | {' | '.join(cells)} |", flush=True)
    print("\nseeds by the power formula for 80 %, and the share of studies that then find the difference:\n")
    print("| spread, points | difference, points | level | test | seeds | found |")
    print("|---|---|---|---|---|---|")
    for spread in SPREADS:
        for effect in (0.03, 0.06):
            for alpha, level in ((ALPHA, ".05"), (ALPHA / 6, ".05/6")):
                for shared in (False, True):
                    setting = Setting(spread=spread, shared=shared, studies=args.studies)
                    n = seeds_needed(effect, setting, alpha=alpha)
                    found = found_with(n, effect, setting, alpha=alpha, seed=args.seed)
                    test = "paired t" if shared else "Welch's t"
                    print(f"| {100 * spread:.1f} | {100 * effect:.0f} | {level} | {test} | {n} | {100 * found:.1f} |")
    print("\nwhat studies of 5 seeds name that miss a difference of 3 points: seeds that would be needed\n")
    print("| spread, points | needed indeed | named: lowest tenth | median | highest tenth |")
    print("|---|---|---|---|---|")
    for spread in SPREADS:
        setting = Setting(spread=spread, studies=args.studies)
        low, middle, high = np.quantile(named(0.03, setting, seed=args.seed), [0.1, 0.5, 0.9])
        needed = seeds_needed(0.03, setting)
        print(f"| {100 * spread:.1f} | {needed} | {low:.0f} | {middle:.0f} | {high:.0f} |")


if __name__ == "__main__":
    main()
