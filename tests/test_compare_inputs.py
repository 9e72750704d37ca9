"""`lightning-vlm compare`: which files an argument means, what they are named, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_vlm.studies.per_example import short_names

from .compare_kit import compared, folder_of_its_own, refused, run, share, write  # noqa: F401

# -------------------------------------------------------------------------------------- inputs and their names


def test_run_folders_give_the_last_step_of_a_benchmark(capsys):
    for name, right in (("sft", 5), ("dpo", 15)):
        run(f"runs/{name}", share(right), step=200)
        run(f"runs/{name}", share(20), step=90)
    found, text = compared(capsys, "runs/sft", "runs/dpo")
    assert [(arm["name"], arm["mean"]) for arm in found["arms"]] == [("sft", 0.25), ("dpo", 0.75)]
    assert "rule geo/exact, prompt geo/plain" in text and "steps" not in text and "known" not in text
    run("runs/dpo", share(10), benchmark="world/test")
    line = refused(capsys, "runs/sft", "runs/dpo")
    assert "'runs/dpo' was evaluated on several benchmarks: choose one by --benchmark: geo, world/test" in line
    assert compared(capsys, "runs/sft", "runs/dpo", "--benchmark", "geo")[0]["arms"] == found["arms"]
    line = refused(capsys, "runs/sft", "runs/dpo", "--benchmark", "world/test")
    assert "'runs/sft' has no evaluation on 'world/test'; it has: geo" in line
    run("runs/dpo", share(15), step=300)
    _, text = compared(capsys, "runs/sft", "runs/dpo", "--benchmark", "geo")
    assert "different optimizer steps: 200, 300" in text


def test_a_file_and_its_folder_are_the_same_input(capsys):
    write("x/per_example.jsonl", share(5)), write("y/per_example.jsonl", share(15))
    found, _ = compared(capsys, "x", "y/per_example.jsonl")
    assert [arm["name"] for arm in found["arms"]] == ["x", "y"]
    assert "x/per_example.jsonl is given twice" in refused(capsys, "x", "x/per_example.jsonl")


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["/r/a.jsonl", "/r/b.jsonl"], ["a", "b"]),
        (["/r/a/e/g/step-1/per_example.jsonl", "/r/b/e/g/step-1/per_example.jsonl"], ["a", "b"]),
        (["/r/a/e/g/step-1/per_example.jsonl", "/r/b/e/g/step-2/per_example.jsonl"], ["a/step-1", "b/step-2"]),
        (["/r/a/per_example.jsonl", "/r/x/b.jsonl"], ["a", "x/b"]),
        (["/r/per_example.jsonl", "/r/x/per_example.jsonl"], ["/r/per_example.jsonl", "/r/x/per_example.jsonl"]),
        (["/r/a/x.jsonl", "/r/b/c/x.jsonl"], ["a", "b/c"]),
    ],
)
def test_names_are_what_tells_paths_apart(files, names):
    assert short_names([Path(file) for file in files]) == names


def test_common_problems_on_request(capsys):
    files = write("a.jsonl", share(12, 25)), write("b.jsonl", share(3, 20))
    line = refused(capsys, *files)
    assert "a.jsonl and b.jsonl are not of the same problems: 5 only in the first ('q20', 'q21', 'q22' and 2" in line
    assert "0 only in the second; --common" in line
    found, text = compared(capsys, *files, "--common")
    assert (found["problems"], found["problems_left_out"], found["arms"][0]["mean"]) == (20, 5, 0.6)
    assert "20 problems are in all files and compared; 5 are left out." in text
    write("b.jsonl", share(3), prefix="other")
    assert "share 0 problems" in refused(capsys, *files, "--common")


def test_conditions_must_be_the_same(capsys):
    runs = [run("a", share(10)), run("b", share(15), prompt_id="geo/think")]
    line = refused(capsys, *runs)
    assert "different prompts: geo/plain (a/" in line and "geo/think (b/" in line and "--across_conditions" in line
    _, text = compared(capsys, *runs, "--across_conditions")
    assert "The files have different prompts, and differences may come from there: geo/plain" in text
    run("b", share(15), sampling={"temperature": 0.7, "max_new_tokens": 64})
    line = refused(capsys, *runs)
    assert "different sampling settings: temperature 0.0 (a/" in line and "max_new_tokens" not in line
    run("b", share(15), rule="geo/letter")
    line = refused(capsys, *runs, "--across_conditions")
    assert "different grading rules: geo/exact (a/" in line and "geo/letter (b/" in line
    Path("b/evaluations/geo/step-00000100/conditions.json").unlink()
    assert "geo/exact (a/" in (line := refused(capsys, *runs)) and "none (b/" in line
    write("b/evaluations/geo/step-00000100/per_example.jsonl", share(15), rule="geo/exact")
    _, text = compared(capsys, *runs)
    assert "not known whether they agree: prompts and sampling settings" in text


def test_the_same_id_with_another_gold_is_another_problem(capsys):
    files = write("a.jsonl", share(10), gold="65"), write("b.jsonl", share(10), gold="66")
    assert 'id \'q0\' has gold answer "65" in a.jsonl and "66" in b.jsonl' in refused(capsys, *files)


# ---------------------------------------------------------------------------------------------------- refusals


def test_arms_and_seeds_that_are_not_clear_are_refused(capsys):
    a = [run(f"a-{s}", share(10 + s), arm="a", seed=s) for s in range(2)]
    b = [run(f"b-{s}", share(14 + s), arm="b", seed=s) for s in range(2)]
    plain = run("plain", share(10))
    line = refused(capsys, *a, plain)
    assert "some files tell their arm and others do not: plain/" in line and "--arms" in line
    assert compared(capsys, *a, plain, "--arms", "a", "a", "c")
    unknown = run("a-x", share(9), arm="a")
    line = refused(capsys, *a, unknown, *b)
    assert "arm 'a' has 3 files, but a-x/" in line and "tells no training seed; give --seeds" in line
    again = run("a-again", share(9), arm="a", seed=1)
    line = refused(capsys, *a, again, *b)
    assert "arm 'a', seed 1 comes twice: a-1/" in line and "a-again/" in line
    assert "--arms names 3, but 4 inputs are given" in refused(capsys, *a, *b, "--arms", *"aab")
    assert "--seeds names 1, but 4 inputs are given" in refused(capsys, *a, *b, "--seeds", "0")
    assert "--seeds without arms" in refused(capsys, plain, run("other", share(3)), "--seeds", "0", "1")
    assert "all inputs belong to arm 'a'" in refused(capsys, *a)
    assert "give at least two" in refused(capsys, a[0])
    assert "--alpha must lie between 0 and 1, got 5.0" in refused(capsys, *a, *b, "--alpha", "5")
    assert "not allowed with argument --paired" in refused(capsys, *a, *b, "--paired", "--unpaired")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"id": "q1", "score": NaN}', "bad.jsonl:2: `score` must be a finite number, got NaN"),
        ('{"id": "q1", "score": null}', "bad.jsonl:2: `score` must be a finite number, got null"),
        ('{"id": "q1"}', "bad.jsonl:2: `score` must be a finite number, got null"),
        ('{"id": "q1", "score": "1"}', 'bad.jsonl:2: `score` must be a finite number, got "1"'),
        ('{"id": "q1", "score": true}', "bad.jsonl:2: `score` must be a finite number, got true"),
        ('{"id": "q1", "score": -Infinity}', "bad.jsonl:2: `score` must be a finite number, got -Infinity"),
        ('{"score": 1}', "bad.jsonl:2: `id` must be a text, got null"),
        ('{"id": "q1", "score": 1, "sample": "a"}', "bad.jsonl:2: `sample` must be a whole number"),
        ('{"id": "q0", "score": 1}', "bad.jsonl:2: id 'q0', sample 0 comes a second time"),
        ('{"id": "q0", "score": 1, "sample": 1}\n{"id": "q1", "score": 1}', "id 'q1' has 1 draws, 'q0' has 2"),
        ('{"id": "q1", "sc', "bad.jsonl:2: not JSON"),
        ("[1]", "bad.jsonl:2: expected a JSON object, got [1]"),
    ],
)
def test_bad_lines_are_named(capsys, line, text):
    Path("bad.jsonl").write_text('{"id": "q0", "score": 1}\n' + line + "\n")
    assert text in refused(capsys, "bad.jsonl", write("good.jsonl", share(1, 2)))


def test_bad_files_are_named(capsys):
    good = write("good.jsonl", share(3))
    Path("empty.jsonl").write_text("\n")
    assert "empty.jsonl is empty" in refused(capsys, good, "empty.jsonl")
    Path("image.jsonl").write_bytes(b"\x89PNG\xff\n")
    assert "image.jsonl is not UTF-8 text" in refused(capsys, good, "image.jsonl")
    assert "no file or folder 'nope'" in refused(capsys, good, "nope")
    Path("run").mkdir()
    assert "'run' has no per_example.jsonl, nor evaluations/BENCHMARK/step-N/" in refused(capsys, good, "run")
    write("one.jsonl", [1.0]), write("two.jsonl", [0.0])
    assert "at least 2 are needed" in refused(capsys, "one.jsonl", "two.jsonl")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "conditions.json: not JSON"),
        ('{"provenance": {"arm": "a", "seed": "0"}}', 'provenance: `seed` must be of type int, got "0"'),
        ('{"provenance": {"start": "model"}}', "provenance: `start` must be of type dict"),
        ('{"provenance": {"start": {"hash": 1}}}', "provenance.start: `hash` must be of type str"),
        ('{"sampling": 3}', "conditions.json: `sampling` must be of type dict, got 3"),
    ],
)
def test_bad_conditions_are_named(capsys, content, text):
    write("a/per_example.jsonl", share(3))
    Path("a/conditions.json").write_text(content)
    assert text in refused(capsys, "a", write("b.jsonl", share(5)))


def test_groups_are_compared_apart(capsys):
    """Of 20 problems 5 are `hard`; a group may be a list; both must be there when two are asked for."""
    for name, right in (("a", 5), ("b", 15)):
        write(f"{name}1.jsonl", share(right, 15), prefix="e", groups={"level": "easy", "skills": ["x", "y"]})
        write(f"{name}2.jsonl", share(2, 5), prefix="h", groups={"level": "hard", "skills": ["y"]})
        lines = "".join(Path(f"{name}{n}.jsonl").read_text() for n in (1, 2))
        Path(f"{name}.jsonl").write_text(lines)
    found, text = compared(capsys, "a.jsonl", "b.jsonl", "--where", "level=easy", "skills=y")
    assert [arm["mean"] for arm in found["arms"]] == [pytest.approx(1 / 3), 1.0] and found["problems"] == 15
    assert "15 problems, level=easy, skills=y," in text
    found, _ = compared(capsys, "a.jsonl", "b.jsonl", "--where", "level=hard")
    assert found["problems"] == 5 and found["pairs"][0]["verdict"] == "not distinguishable"
    line = refused(capsys, "a.jsonl", "b.jsonl", "--where", "level=medium")
    assert "--where level=medium: a.jsonl has no such example (it has: easy, hard)" in line
    assert "no example has that key" in refused(capsys, "a.jsonl", "b.jsonl", "--where", "topic=x")
    assert "all groups asked for" in refused(capsys, "a.jsonl", "b.jsonl", "--where", "level=hard", "skills=x")
    assert "takes KEY=VALUE" in refused(capsys, "a.jsonl", "b.jsonl", "--where", "level")
