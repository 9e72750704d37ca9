"""Endpoints: parsed with errors that help, and read from the folders that stages leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from lightning_vlm.studies.endpoints import Endpoint, RunAt, evaluation_of, measure, parse_endpoint
from lightning_vlm.studies.numbers import number_of, read_curve
from lightning_vlm.studies.wording import Unit

from .compare_kit import folder_of_its_own, run, share, write  # noqa: F401

A, B = (10, 12, 11), (15, 18, 16)  # of 20, by seed


def stage(name: str, scores, *, start="s", benchmark="greedy", numbers=None, step=100, **more) -> Path:
    """An evaluated stage's folder; `numbers`: of its scores.json."""
    run(name, scores, arm="x", seed=0, start=start, benchmark=benchmark, step=step, **more)
    folder = Path(name) / "evaluations" / benchmark / f"step-{step:08d}"
    (folder / "scores.json").write_text(json.dumps({"rule": "geo/exact", "n": 20, **(numbers or {})}))
    return Path(name)


def at(arm: str, seed: int | None, folder: Path | str, minus: Path | str | None = None) -> RunAt:
    return RunAt(arm, {"arm": arm, "seed": str(seed)}, seed, Path(folder), None if minus is None else Path(minus))


def two_arms(start="{}-{}") -> list[RunAt]:
    """Arms old and new with three seeds each."""
    return [
        at(arm, seed, stage(f"runs/after-{arm}-{seed}", share(right), start=start.format(arm, seed)))
        for arm, counts in (("old", A), ("new", B))
        for seed, right in enumerate(counts)
    ]


# ---------------------------------------------------------------------------------------------------- parsing


def test_endpoints_as_a_study_says_them():
    assert parse_endpoint("x", {"stage": "after"}) == Endpoint(name="x", stage="after")
    full = {"stage": "rl", "curve": "train/entropy", "at": "start", "higher": "neither", "unit": "nats", "scale": 2}
    assert parse_endpoint("x", full) == Endpoint(name="x", **full)
    for minus in ("before", {"stage": "before"}):
        assert parse_endpoint("x", {"stage": "after", "metric": "pass@16", "minus": minus}).minus == "before"
    measured = [Endpoint(name="x", stage="s", metric=metric).per_problem for metric in ("score", "pass@16", "CIDEr")]
    assert measured == [True, True, False]


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ({"stage": "a", "metrc": "x"}, "unknown key 'metrc'; did you mean 'metric'"),
        ({"metric": "x"}, "has no `stage`"),
        ("after", "must be a mapping with stage; got 'after'"),
        ({"stage": 3}, "`stage` must be a text, got 3"),
        ({"stage": "a", "curve": "x", "file": "y.json", "key": "z"}, "has `curve` and `file`: choose one of"),
        ({"stage": "a", "curve": "x", "metric": "score"}, "has `curve` and `benchmark`: choose one of"),
        ({"stage": "a", "at": "end"}, "`at` without `curve`"),
        ({"stage": "a", "key": "x"}, "`key` without `file`"),
        ({"stage": "a", "file": "x.json"}, "`file` without `key`"),
        ({"stage": "a", "curve": "x", "at": "middle"}, "`at` must be one of start, end; got 'middle'"),
        ({"stage": "a", "higher": "good"}, "`higher` must be one of better, worse, neither; got 'good'"),
        ({"stage": "a", "metric": "pass@many"}, "write pass@K with a whole number"),
        ({"stage": "a", "scale": 0}, "`scale` must be a number above 0, got 0"),
        ({"stage": "a", "scale": True}, "`scale` must be a number above 0, got True"),
        ({"stage": "a", "minus": "a"}, "is stage 'a' minus itself"),
        ({"stage": "a", "minus": {"stag": "b"}}, "unknown key 'stag'; did you mean 'stage'"),
        ({"stage": "a", "minus": 4}, "`minus` must be a text, got 4"),
    ],
)
def test_endpoints_that_are_refused(mapping, text):
    with pytest.raises(ValueError) as refused:
        parse_endpoint("accuracy", mapping)
    line = str(refused.value)
    assert line.startswith("endpoint 'accuracy'") and text in line and "\n" not in line


# ------------------------------------------------------------------------------------------------ per problem


def test_scores_of_recipes_are_compared_over_seeds():
    found = measure(Endpoint(name="acc", stage="after"), two_arms())
    (pair,) = found.pairs
    oracle = stats.ttest_ind([x / 20 for x in A], [x / 20 for x in B], equal_var=False)
    assert pair.result.p == pytest.approx(oracle.pvalue) and found.problems == 20 and found.unit is Unit.points
    assert pair.reason == "the runs of a seed start from different models"
    assert pair.short() == "new > old by 26.7 points [11.1, 42.3], 3 seeds"


def test_arms_are_paired_where_seeds_start_from_the_same_model_or_on_request():
    endpoint = Endpoint(name="acc", stage="after")
    assert measure(endpoint, two_arms(start="base-{1}")).pairs[0].test == "paired t"
    runs = two_arms()  # none starts from the base model, OPD from its own warm start of that seed
    assert measure(endpoint, runs).pairs[0].test == "Welch's t"
    assert measure(endpoint, runs, pairing="paired").pairs[0].test == "paired t"
    with pytest.raises(
        ValueError, match="endpoint 'acc': pairs were asked for, but arm 'old' has training seeds 0, 1, 2"
    ):
        measure(endpoint, runs[:5], pairing="paired")


def test_only_some_pairs_and_one_arm_alone():
    runs = [*two_arms(), at("once", None, stage("runs/once", share(3)))]
    found = measure(Endpoint(name="acc", stage="after"), runs, pairs=[("old", "new")], alpha=0.001)
    assert [(pair.a, pair.b, pair.verdict) for pair in found.pairs] == [("old", "new", "not distinguishable")]
    assert len(found.arms) == 3 and found.alpha == 0.001
    alone = measure(Endpoint(name="acc", stage="after"), runs[:3])
    assert alone.pairs == [] and alone.arms[0].mean == pytest.approx(0.55) and alone.arms[0].low > 0


def test_the_last_step_and_the_named_benchmark_count():
    folder = stage("rl", share(5), step=50)
    stage("rl", share(15), step=1000)
    stage("rl", share(1), benchmark="ood", step=1000)
    assert evaluation_of(folder, "greedy").parent.name == "step-00001000"
    found = measure(Endpoint(name="acc", stage="rl", benchmark="greedy"), [at("a", 0, folder)])
    assert found.arms[0].mean == 0.75
    for benchmark, text in ((None, "several benchmarks; name one of greedy, ood"), ("gredy", "did you mean 'greedy'")):
        with pytest.raises((ValueError, FileNotFoundError), match=f"endpoint 'acc': rl .*{text}"):
            measure(Endpoint(name="acc", stage="rl", benchmark=benchmark), [at("a", 0, folder)])


def test_pass_at_k_lost_in_training():
    """pass@2 of 4 draws, after minus before: (1 + 1/2)/2 − (5/6 + 1)/2 = −1/6, in points, and no share of all."""
    after, before = [[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 1, 0, 0], [1, 1, 1, 0]]
    runs = [
        at(arm, 0, stage(f"after-{arm}", scores), stage(f"before-{arm}", before))
        for arm, scores in (("a", after), ("b", before))
    ]
    found = measure(Endpoint(name="lost", stage="after", metric="pass@2", minus="before", higher="neither"), runs)
    assert [arm.mean for arm in found.arms] == pytest.approx([-1 / 6, 0]) and found.unit is Unit.changes
    assert found.arms[0].values.tolist() == [pytest.approx([1 - 5 / 6, 1 / 2 - 1])]
    with pytest.raises(ValueError, match="after-a has no run of stage 'before' to subtract"):
        measure(Endpoint(name="lost", stage="after", minus="before"), [at("a", 0, "after-a")])
    stage("before-a", [[1, 1, 0, 0]])
    with pytest.raises(ValueError, match=r"endpoint 'lost': .* are not of the same problems") as refused:
        measure(Endpoint(name="lost", stage="after", minus="before"), runs)
    assert "--common" not in str(refused.value)


def test_other_conditions_are_refused_without_naming_flags():
    runs = [at("a", 0, stage("a", share(5))), at("b", 0, stage("b", share(5), prompt_id="other"))]
    with pytest.raises(ValueError, match="endpoint 'acc': the files have different prompts") as refused:
        measure(Endpoint(name="acc", stage="s"), runs)
    assert "--" not in str(refused.value)


def test_what_is_missing_is_named():
    endpoint = Endpoint(name="acc", stage="after")
    with pytest.raises(FileNotFoundError, match="endpoint 'acc': runs/gone has no evaluation"):
        measure(endpoint, [at("a", 0, "runs/gone")])
    with pytest.raises(ValueError, match="endpoint 'acc': no run of stage 'after'"):
        measure(endpoint, [])
    runs = two_arms()
    with pytest.raises(ValueError, match="arm 'old', seed 0 comes twice"):
        measure(endpoint, [*runs, runs[0]])
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1, got 5"):
        measure(endpoint, runs, alpha=5)
    with pytest.raises(ValueError, match="names no arm 'nwe'; did you mean 'new'"):
        measure(endpoint, runs, pairs=[("old", "nwe")])
    with pytest.raises(ValueError, match="pass@4 needs at least 4 draws"):
        measure(Endpoint(name="acc", stage="after", metric="pass@4"), runs)


# ---------------------------------------------------------------------------------------------- once per seed


def test_numbers_of_scores_json_are_compared_over_seeds():
    values = {"a": (0.80, 0.84, 1.02), "b": (1.30, 1.35, 1.31)}
    runs = [
        at(arm, seed, stage(f"{arm}-{seed}", share(5), start=f"s{seed}", numbers={"CIDEr": value, "empty": 0.1}))
        for arm, of_arm in values.items()
        for seed, value in enumerate(of_arm)
    ]
    found = measure(Endpoint(name="captions", stage="s", metric="CIDEr"), runs)
    (pair,) = found.pairs
    assert (found.problems, found.metric, pair.test) == (0, "CIDEr", "paired t")  # by the conditions.json beside it
    assert pair.result.p == pytest.approx(stats.ttest_rel(*values.values()).pvalue)
    assert pair.short().startswith("b > a by 0.433 [")
    assert found.arms[0].runs[0].evaluation.path.as_posix().endswith("step-00000100/scores.json")
    shares = measure(Endpoint(name="x", stage="s", metric="empty"), runs)
    assert shares.unit is Unit.points and shares.pairs[0].verdict == "no verdict"
    with pytest.raises(
        ValueError, match=r"a-0/.*has no 'cider'; it has score and pass@K \(per example\), CIDEr, empty"
    ):
        measure(Endpoint(name="x", stage="s", metric="cider"), runs)
    with pytest.raises(ValueError, match=r"has no 'CIDErD'; did you mean 'CIDEr'.; it has"):
        measure(Endpoint(name="x", stage="s", metric="CIDErD"), runs)
    (Path("a-0/evaluations/greedy/step-00000100") / "scores.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"a-0/.* has no scores.json"):
        measure(Endpoint(name="x", stage="s", metric="CIDEr"), runs)


def logged(folder: str, name: str, rows: dict[int, dict[str, object]]) -> Path:
    """A CSV logger's file: step → column → value, and a row of another metric after each."""
    columns = sorted({column for row in rows.values() for column in row})
    lines = [",".join(["step", *columns, "other"])]
    for step, row in rows.items():
        lines += [",".join([str(step), *(str(row.get(column, "")) for column in columns), ""])]
        lines += [",".join([str(step), *("" for _ in columns), "1.5"])]
    path = Path(folder) / name / "metrics.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return Path(folder)


def test_curves_of_a_resumed_run_are_joined_by_step():
    """csv-10 is later than csv-2; steps 3 and 4 were logged twice."""
    logged("rl", "csv", {step: {"loss": step} for step in (1, 2, 3, 4)})
    logged("rl", "csv-2", {step: {"loss": 10 * step} for step in (3, 4)})
    folder = logged("rl", "csv-10", {step: {"loss": 100 * step, "new": 7} for step in (4, 5)})
    assert read_curve(folder, "loss") == {1: 1, 2: 2, 3: 30, 4: 400, 5: 500}
    assert read_curve(folder, "new") == {4: 7, 5: 7} and read_curve(folder, "other")[1] == 1.5
    with pytest.raises(ValueError, match=r"rl logged no metric 'los': its column is not there; did you mean 'loss'"):
        read_curve(folder, "los")
    logged("rl", "csv", {1: {"loss": "much"}})
    with pytest.raises(ValueError, match=r"rl/csv/metrics.csv:2: no number of a step for 'loss': 'much'"):
        read_curve(folder, "loss")
    with pytest.raises(FileNotFoundError, match=r"gone has no csv/metrics.csv; log to CSV"):
        read_curve(Path("gone"), "loss")


@pytest.mark.parametrize(("count", "start", "end"), [(25, 1.5, 24.5), (9, 1, 9), (1, 1, 1)])
def test_ends_of_a_curve_are_the_mean_of_a_tenth(count, start, end):
    """Of 25 values the first two and the last two; of fewer than 20 one."""
    folder = logged("rl", "csv", {step: {"train/entropy": step} for step in range(1, count + 1)})
    for place, expected in (("start", start), ("end", end)):
        endpoint = Endpoint(name="h", stage="rl", curve="train/entropy", at=place, unit="nats")
        found = measure(endpoint, [at("a", 0, folder)])
        assert found.arms[0].mean == expected and found.metric == f"train/entropy at the {place}"
        assert found.unit.word == " nats"


def test_curves_are_paired_by_what_the_stage_was_given():
    def runs(start: str) -> list[RunAt]:
        made = []
        for arm, values in (("a", (0.2, 0.25, 0.3)), ("b", (0.5, 0.56, 0.62))):
            for seed, value in enumerate(values):
                folder = logged(f"rl-{arm}-{seed}", "csv", {1: {"h": value}})
                given = {"backbone.path": {"instance": "x", "path": "y", "fingerprint": start.format(arm, seed)}}
                (folder / "stage.json").write_text(json.dumps({"inputs": given}))
                made.append(at(arm, seed, folder))
        return made

    endpoint = Endpoint(name="h", stage="rl", curve="h", unit="nats", higher="neither")
    (pair,) = measure(endpoint, runs("warm-{1}")).pairs
    assert (pair.test, pair.verdict) == ("paired t", "different")
    assert pair.result.p == pytest.approx(stats.ttest_rel((0.2, 0.25, 0.3), (0.5, 0.56, 0.62)).pvalue)
    assert measure(endpoint, runs("warm-{0}-{1}")).pairs[0].test == "Welch's t"
    broken = [*runs("x")[1:], at("a", 0, logged("rl-a-0", "csv", {1: {"h": "nan"}}))]
    with pytest.raises(ValueError, match="endpoint 'h': rl-a-0 logged nan for 'h' at step 1"):
        measure(endpoint, broken)


def test_numbers_of_any_json_file():
    folder = Path("probe-a-0")
    folder.mkdir()
    content = {"summary": {"pointing": 0.34, "by.layer": [0.1, {"x/y": 0.2}], "name": "n", "bad": float("inf")}}
    (folder / "probe.json").write_text(json.dumps(content))
    file = folder / "probe.json"
    assert number_of(file, "summary.pointing") == 0.34
    assert number_of(file, "summary.by.layer.0") == 0.1 and number_of(file, "summary.by.layer.1.x/y") == 0.2
    endpoint = parse_endpoint(
        "p", {"stage": "probe", "file": "probe.json", "key": "summary.pointing", "unit": "points", "scale": 100}
    )
    found = measure(endpoint, [at("a", 0, folder)])
    assert found.unit.numbers(found.arms[0].mean) == ["34.0"] and found.metric == "summary.pointing"
    for key, text in (
        ("summary.pointin", "has no 'pointin' within 'summary'; did you mean 'pointing'"),
        ("sumary.pointing", "has no 'sumary.pointing'; did you mean 'summary'"),
        ("summary.by.layer.7", r"has no '7' within 'summary.by.layer'; it is \[0.1"),
        ("summary.name", "'summary.name' is \"n\", not a number"),
        ("summary.bad", "'summary.bad' is inf"),
    ):
        with pytest.raises(ValueError, match=text):
            number_of(file, key)
    with pytest.raises(FileNotFoundError, match=r"endpoint 'p': probe-b has no probe.json"):
        measure(endpoint, [at("b", 0, "probe-b")])
    file.write_text("{")
    with pytest.raises(ValueError, match=r"probe-a-0/probe.json is not JSON"):
        number_of(file, "x")


def test_numbers_are_subtracted_seed_by_seed():
    def probed(name: str, value: float) -> Path:
        Path(name).mkdir(exist_ok=True)
        (Path(name) / "p.json").write_text(json.dumps({"v": value}))
        return Path(name)

    runs = [
        at(arm, seed, probed(f"y-{arm}-{seed}", y), probed(f"x-{arm}-{seed}", x))
        for arm, both in (("a", ((3, 1), (5, 2))), ("b", ((9, 1), (9, 3))))
        for seed, (y, x) in enumerate(both)
    ]
    found = measure(Endpoint(name="p", stage="y", file="p.json", key="v", minus="x", unit="steps"), runs)
    assert [arm.seed_means.tolist() for arm in found.arms] == [[2, 3], [8, 6]]
    assert found.pairs[0].result.diff == -4.5 and found.pairs[0].short().endswith("2 seeds); needs about 3 seeds")


def test_units_may_be_said_of_evaluations_too():
    runs = [at(arm, 0, stage(arm, [0.5 * n] * 19 + [0.0])) for arm, n in (("a", 1), ("b", 2))]
    found = measure(Endpoint(name="x", stage="s", unit="marks", scale=10), runs)
    assert found.unit.numbers(found.arms[0].mean)[0] == "4.75" and found.unit.word == " marks"
    assert write("unused.jsonl", share(1)) and found.to_json()["unit"] == "marks"
