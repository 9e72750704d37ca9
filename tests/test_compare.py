"""`lightning-vlm compare`: the right test for each pair, and verdicts that say no more than it does."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from lightning_vlm.cli.main import main
from lightning_vlm.metrics.statistics import bootstrap_interval, paired_bootstrap, required_problems
from lightning_vlm.studies.wording import Unit, p_value

from .compare_kit import compared, folder_of_its_own, refused, run, share, write  # noqa: F401

# ------------------------------------------------------------------------------------------------ checkpoints


def test_two_checkpoints_of_right_and_wrong(capsys):
    """a solves 15 of 20, b 7; a alone 9, b alone 1: McNemar p = 2 · (1 + 10)/2¹⁰."""
    a, b = [1.0] * 15 + [0.0] * 5, [0.0] * 9 + [1.0] * 6 + [1.0] + [0.0] * 4
    found, text = compared(capsys, write("a.jsonl", a), write("b.jsonl", b))
    (pair,) = found["pairs"]
    assert (found["problems"], found["unit"], found["bootstrap"]) == (20, "fraction", {"draws": 10_000, "seed": 0})
    assert pair["mcnemar"] == {"only_a": 9, "only_b": 1, "p": pytest.approx(22 / 1024)}
    assert (pair["p"], pair["p_adjusted"]) == pytest.approx((22 / 1024, 22 / 1024))
    assert pair["diff"] == pytest.approx(0.4) and pair["required"] == required_problems(a, b)
    assert (pair["about"], pair["verdict"], pair["better"]) == ("checkpoints", "better", "a")
    order = sorted(range(20), key=lambda i: f"q{i}")  # draws are of the ids in order
    by_hand = paired_bootstrap([a[i] for i in order], [b[i] for i in order])
    assert (pair["low"], pair["high"]) == (by_hand.low, by_hand.high)
    arm = found["arms"][0]
    assert (arm["mean"], arm["low"], arm["high"]) == (0.75, *bootstrap_interval([a[i] for i in order]))
    assert arm["interval_over"] == "problems" and arm["seed_sd"] is None and arm["files"] == ["a.jsonl"]
    assert pair["sentence"] in text
    assert re.fullmatch(
        r"a is better than b by 40\.0 points \[\d+\.\d, \d+\.\d\], p = \.021 \(McNemar's exact test: of 20 problems 9 "
        r"solved only by a, 1 only by b\); these checkpoints, not these recipes\.",
        pair["sentence"],
    )
    assert "10,000 draws, seed 0" in text and "rule not told" in text
    assert not Path("out.json.tmp").exists()


def test_the_better_one_comes_first_whatever_the_order(capsys):
    a, b = write("a.jsonl", share(4)), write("b.jsonl", share(16))
    there, back = compared(capsys, a, b)[0]["pairs"][0], compared(capsys, b, a)[0]["pairs"][0]
    assert there["sentence"].startswith("b is better than a by 60.0 points [")
    assert there["better"] == back["better"] == "b" and there["diff"] == -back["diff"]
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]))
    interval = re.compile(r"\[(.*), (.*)\]")
    assert interval.search(there["sentence"])[0] == interval.search(back["sentence"])[0]


def test_not_distinguishable_says_what_would_be_needed(capsys):
    a, b = share(12), [0.0, 0.0, *share(10, 14), *share(3, 4)]
    found, text = compared(capsys, write("a.jsonl", a), write("b.jsonl", b))
    (pair,) = found["pairs"]
    assert pair["verdict"] == "not distinguishable" and pair["better"] is None and "better" not in pair["sentence"]
    assert pair["sentence"].startswith("not distinguishable: a − b = −5.0 points [")
    assert "problems would be needed for a difference of this size" in pair["sentence"]
    assert pair["required"] == required_problems(a, b) > 20 and pair["sentence"] in text


def test_equal_scores_leave_room_for_a_difference(capsys):
    pair = compared(capsys, write("a.jsonl", share(10)), write("b.jsonl", share(10)))[0]["pairs"][0]
    assert (pair["diff"], pair["p"], pair["required"], pair["verdict"]) == (0, 1, None, "not distinguishable")
    assert pair["sentence"].startswith("not distinguishable: a − b = 0.0 points [−16.8, 16.8], p = 1 (")
    assert "needed" not in pair["sentence"]


def test_an_interval_without_0_is_explained_where_the_test_says_no(capsys):
    """Five problems that only a solves: p = 2/32, while a bootstrap rarely misses all five."""
    pair = compared(capsys, write("a.jsonl", share(10)), write("b.jsonl", share(5)))[0]["pairs"][0]
    assert pair["low"] > 0 and pair["verdict"] == "not distinguishable"
    assert "the interval excludes 0, but the test, which decides, does not reach 0.05" in pair["sentence"]
    pair = compared(capsys, "a.jsonl", "b.jsonl", "--alpha", "0.1")[0]["pairs"][0]
    assert pair["verdict"] == "better" and "p = .062" in pair["sentence"]


def test_scores_on_another_scale_have_no_points(capsys):
    a, b = [0.2 * i for i in range(20)], [0.2 * i + 0.3 + 0.1 * (i % 2) for i in range(20)]
    found, text = compared(capsys, write("a.jsonl", a), write("b.jsonl", b))
    (pair,) = found["pairs"]
    assert found["unit"] == "score" and pair["mcnemar"] is None and pair["test"] == "paired bootstrap"
    assert pair["sentence"].startswith("b is better than a by 0.350 [0.330, 0.370], p < .001 (paired bootstrap over 20")
    assert " points" not in text and "%," not in text
    shifted = [x + 0.5 for x in a]
    pair = compared(capsys, "a.jsonl", write("c.jsonl", shifted))[0]["pairs"][0]
    assert pair["verdict"] == "no verdict" and pair["p"] is None and "same on every problem" in pair["sentence"]


def test_draws_are_averaged_or_make_pass_at_k(capsys):
    """Of 4 draws c are right: mean c/4; pass@2 = 1 − C(4−c, 2)/6."""
    a = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    b = [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    files = write("a.jsonl", a), write("b.jsonl", b)
    found, _ = compared(capsys, *files)
    assert [arm["mean"] for arm in found["arms"]] == pytest.approx([7 / 16, 4 / 16])
    assert found["pairs"][0]["test"] == "paired bootstrap"  # means of draws are not 0 or 1
    found, text = compared(capsys, *files, "--metric", "pass@2")
    assert [arm["mean"] for arm in found["arms"]] == pytest.approx([(3 / 6 + 5 / 6 + 0 + 1) / 4, (3 / 6 + 1) / 4])
    assert "metric pass@2" in text
    assert "pass@5 needs at least 5 draws per problem, a.jsonl has 4" in refused(capsys, *files, "--metric", "pass@5")
    assert "unknown metric 'bleu'" in refused(capsys, *files, "--metric", "bleu")
    assert "unknown metric 'pass@0'" in refused(capsys, *files, "--metric", "pass@0")
    half = write("half.jsonl", [[0.5, 0.5]] * 4)
    assert "scores of 0 and 1; id 'q0' of half.jsonl has 0.5" in refused(capsys, half, files[0], "--metric", "pass@2")


def test_the_order_of_lines_does_not_matter(capsys):
    files = write("a.jsonl", share(13)), write("b.jsonl", share(9)[::-1])
    first, _ = compared(capsys, *files)
    lines = Path("a.jsonl").read_text().splitlines(keepends=True)
    Path("a.jsonl").write_text("".join(reversed(lines)))
    assert compared(capsys, *files)[0] == first
    assert compared(capsys, *files, "--seed", "1")[0] != first


# ---------------------------------------------------------------------------------------------------- recipes

A, B = (10, 12, 11), (15, 18, 16)  # of 20, by seed


def arms_of_three(start_a="s{}", start_b="s{}") -> list[str]:
    runs = [run(f"runs/a-{s}", share(A[s]), arm="old", seed=s, start=start_a and start_a.format(s)) for s in range(3)]
    runs += [run(f"runs/b-{s}", share(B[s]), arm="new", seed=s, start=start_b and start_b.format(s)) for s in range(3)]
    return runs


def test_recipes_are_compared_over_seeds_by_welch(capsys):
    a, b = [x / 20 for x in A], [x / 20 for x in B]
    found, text = compared(capsys, *arms_of_three(start_a="s{}", start_b="t{}"))
    (pair,) = found["pairs"]
    oracle = stats.ttest_ind(a, b, equal_var=False)
    interval = oracle.confidence_interval(0.95)
    assert (pair["p"], pair["low"], pair["high"]) == pytest.approx((oracle.pvalue, interval.low, interval.high))
    assert (pair["a"], pair["b"], pair["test"], pair["about"]) == ("old", "new", "Welch's t", "recipes")
    assert pair["reason"] == "the runs of a seed start from different models"
    arm = found["arms"][1]
    assert (arm["name"], arm["seeds"], arm["seed_means"]) == ("new", [0, 1, 2], b)
    assert arm["seed_sd"] == pytest.approx(stats.tstd(b)) and arm["interval_over"] == "seeds"
    t = stats.t.interval(0.95, 2, loc=sum(b) / 3, scale=stats.sem(b))
    assert (arm["low"], arm["high"]) == pytest.approx(t)
    assert "new is better than old by 26.7 points [11.1, 42.3], p = .011 (Welch's t over 3 + 3 training seeds)." in text
    assert "checkpoints" not in text and "b-0, b-1, b-2" in text
    assert "how other training seeds would do on these 20 problems" in text


def test_recipes_are_paired_where_the_start_model_is_shared(capsys):
    runs = arms_of_three()
    found, text = compared(capsys, *reversed(runs[:3]), *runs[3:])  # seeds in another order
    oracle = stats.ttest_rel([x / 20 for x in A], [x / 20 for x in B])
    assert found["pairs"][0]["p"] == pytest.approx(oracle.pvalue) and found["pairs"][0]["df"] == 2
    assert "(paired t over 3 training seeds)" in text
    assert "Paired t, because the runs of each seed start from the same model" in text
    assert compared(capsys, *runs, "--unpaired")[0]["pairs"][0]["test"] == "Welch's t"


@pytest.mark.parametrize("starts", [(None, None), ("s{}", None), ("s{}", "t{}")])
def test_recipes_are_not_paired_otherwise_unless_asked(capsys, starts):
    runs = arms_of_three(*starts)
    assert compared(capsys, *runs)[0]["pairs"][0]["test"] == "Welch's t"
    assert compared(capsys, *runs, "--paired")[0]["pairs"][0]["test"] == "paired t"
    line = refused(capsys, *runs, "--paired", "--arms", *["o"] * 3, *["n"] * 3, "--seeds", *"012124")
    assert "arm 'o' has training seeds 0, 1, 2, arm 'n' has 1, 2, 4; pairs need the same seeds" in line


def test_flags_say_arms_and_seeds_over_provenance(capsys):
    runs = arms_of_three()
    found, _ = compared(capsys, *runs[:4], "--arms", "x", "x", "y", "y", "--seeds", "0", "1", "0", "1")
    assert [(arm["name"], arm["seeds"]) for arm in found["arms"]] == [("x", [0, 1]), ("y", [0, 1])]
    assert found["pairs"][0]["reason"] == "the runs of a seed start from different models"
    found, _ = compared(capsys, *runs[:4], "--arms", "x", "y", "x", "y", "--seeds", "0", "0", "1", "1")
    assert [arm["files"][1].split("/")[1] for arm in found["arms"]] == ["a-2", "b-0"]


def test_seeds_needed_where_recipes_cannot_be_told_apart(capsys):
    """s = 1 problem of 20 in both arms and a difference of half of it: 64 seeds per arm, by the tables."""
    files = [write(f"{i}.jsonl", share(right, 40)) for i, right in enumerate((18, 20, 22, 19, 21, 23))]
    found, text = compared(capsys, *files, "--arms", *"aaabbb", "--seeds", *"012012")
    assert found["pairs"][0]["required"] == 64
    assert "about 64 seeds per arm would be needed for a difference of this size." in text


def test_holm_over_all_pairs(capsys):
    """Alone p = .031 would do; three pairs want more of the smallest."""
    files = [write("a.jsonl", share(16)), write("b.jsonl", share(10)), write("c.jsonl", share(13))]
    found, text = compared(capsys, *files)
    assert found["pairs_tested"] == 3
    assert [pair["p"] for pair in found["pairs"]] == pytest.approx([2 / 64, 0.25, 0.25])
    assert [pair["p_adjusted"] for pair in found["pairs"]] == pytest.approx([6 / 64, 0.5, 0.5])
    first = found["pairs"][0]
    assert first["verdict"] == "not distinguishable" and first["low"] > 0
    assert "p = .094 (" in first["sentence"] and "Holm over 3 pairs)" in first["sentence"]
    assert "the interval excludes 0, but unlike p it is not adjusted for 3 pairs" in first["sentence"]
    assert first["required"] == required_problems(share(16), share(10), alpha=0.05 / 3) > 20
    assert "p alone" in text and "p (Holm)" in text


def test_one_seed_against_several_gets_no_verdict_and_the_rest_goes_on(capsys):
    runs = [*arms_of_three(), run("runs/c-0", share(20), arm="once", seed=0)]
    found, text = compared(capsys, *runs)
    assert [pair["verdict"] for pair in found["pairs"]] == ["better", "no verdict", "no verdict"]
    pair = found["pairs"][1]
    assert (pair["p"], pair["low"], pair["test"], pair["about"], found["pairs_tested"]) == (None, None, None, None, 1)
    assert pair["diff"] == pytest.approx(0.55 - 1)
    assert "no verdict on old and once (old − once = −45.0 points): once has one training seed" in text
    assert found["arms"][2]["interval_over"] == "problems"


def test_no_spread_between_seeds_gives_no_verdict(capsys):
    files = [write(f"{i}.jsonl", share(right)) for i, right in enumerate((10, 10, 14, 14))]
    found, text = compared(capsys, *files, "--arms", *"aabb", "--seeds", *"0101")
    assert found["pairs"][0]["verdict"] == "no verdict" and found["arms"][0]["low"] is None
    assert "(a − b = −20.0 points): the seeds of each arm gave the same score: no spread to judge by." in text
    files[:2] = [write(f"{i}.jsonl", share(right)) for i, right in enumerate((9, 10))]
    write("3.jsonl", share(15))
    _, text = compared(capsys, *files, "--arms", *"aabb", "--seeds", *"0101", "--paired")
    assert "the difference is the same for every seed: no spread to judge by." in text


# ------------------------------------------------------------------------------------------- output and imports


def test_numbers_as_they_are_read():
    assert Unit.points.numbers(0.032, -0.0041) == ["3.2", "−0.4"]
    assert Unit.points.numbers(0.0003, 0.2) == ["0.03", "20.00"]  # not 0.0, which it is not
    assert Unit.points.interval(math.nan, math.nan) == "–" and Unit.plain.interval(-1.25, 3) == "[−1.250, 3.000]"
    shown = [Unit.of("nats", 1, [value]).numbers(value)[0] for value in (0.1234, 1.2345, 12.342, 1234.6, 0.00021)]
    assert shown == ["0.123", "1.234", "12.34", "1235", "0.000210"]
    assert Unit.of("points", 100, [0.5]).numbers(0.123, -0.05) == ["12.3", "−5.0"] and Unit.of("", 1, []) == Unit.plain
    assert (Unit.points.of_scores, Unit.changes.of_scores, Unit.plain.of_scores) == (", %", ", points", "")
    assert [p_value(p) for p in (1, 0.52, 0.0213, 0.0004, math.nan)] == ["1", ".52", ".021", "< .001", "–"]
    assert p_value(0.0501) == ".0501" and p_value(0.05) == ".050" and p_value(0.999) == "1.00"


def test_lines_are_no_wider_than_120(capsys):
    names = [f"experiment-with-a-long-name/{kind}" for kind in ("direct", "contrastive-weighted", "reference")]
    files = [write(f"{name}.jsonl", share(10 + i)) for i, name in enumerate(names)]
    assert main(["compare", *files, "--arms", *names]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120 and names[1] in out


def test_names_are_shown_as_they_are(capsys):
    found, text = compared(capsys, write("a.jsonl", share(5)), write("b.jsonl", share(15)), "--arms", "[red]x", "[/]")
    assert "[/] is better than [red]x by" in text and found["arms"][0]["name"] == "[red]x"


def test_the_file_is_written_into_new_folders(capsys):
    assert main(["compare", write("a.jsonl", share(5)), write("b.jsonl", share(15)), "--out", "new/er/x.json"]) == 0
    assert "comparison: new/er/x.json" in capsys.readouterr().out
    content = Path("new/er/x.json").read_text()
    assert "NaN" not in content and json.loads(content)["pairs"][0]["better"] == "b"


def test_help_and_imports(capsys):
    """Quick: neither torch nor Lightning is imported."""
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = capsys.readouterr().out
    assert "--arms dpo dpo cw-dpo cw-dpo --seeds 0 1 0 1" in text and "per_example.jsonl" in text
    files = write("a.jsonl", share(5)), write("b.jsonl", share(15))
    code = f"""
import sys
from lightning_vlm.cli.main import main
assert main(["compare", *{files!r}]) == 0
assert not {{"torch", "lightning", "transformers", "mlflow", "datasets"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
