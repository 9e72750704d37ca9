"""A study file becomes runs: which there are, what they use, what their fingerprints depend on, what is refused."""

from pathlib import Path

import pytest
import yaml

from lightning_vlm.studies.graph import Graph
from lightning_vlm.studies.spec import read_spec

STUDY = """
question: Which?
vars: {steps: 7}
axes:
  arm:
    plain: {start: base, lr: 1.0e-3}
    longer: {start: more, lr: 1.0e-3}
  seed: [0, 1]
stages:
  base: {config: [run.yaml], set: {trainer.max_steps: "${vars.steps}"}}
  more: {config: [run.yaml], uses: {backbone.path: base}, set: {seed_everything: "${seed}"}}
  end:
    config: [run.yaml]
    uses: {backbone.path: "${arm.start}"}
    set: {model.lr: "${arm.lr}", seed_everything: "${seed}"}
  test: {run: test, config: [run.yaml], uses: {backbone.path: end}}
endpoints:
  accuracy: {stage: test, benchmark: world}
"""
RUN = "model: {class_path: SFT, init_args: {lr: 1.0}}\nbackbone: {path: x}\ntrainer: {max_steps: 1}\n"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Builds the graph of STUDY with changes: a function from a changed tree, or from text in place of another."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)

    def build(change=None, *texts: tuple[str, str]) -> Graph:
        text = STUDY
        for old, new in texts:
            assert old in text
            text = text.replace(old, new)
        tree = yaml.safe_load(text)
        if change is not None:
            change(tree)
        Path("study.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return Graph(read_spec("study.yaml"))

    return build


def names(graph: Graph) -> list[str]:
    return [run.name for run in graph.runs]


def prints(graph: Graph) -> dict[str, str]:
    return {run.name: run.fingerprint for run in graph.runs}


def test_runs_depend_on_the_axes_they_mention_and_on_those_of_what_they_use(study):
    graph = study()
    # base mentions no axis; more the seed; end arm and seed; test what end depends on. Each stands behind what it uses.
    ends = [f"{stage}-{arm}-{seed}" for arm in ("plain", "longer") for seed in (0, 1) for stage in ("end", "test")]
    assert sorted(names(graph)) == sorted(["base", "more-0", "more-1", *ends])
    order = {name: index for index, name in enumerate(names(graph))}
    assert all(order[use.run.name] < order[run.name] for run in graph.runs for use in run.uses)
    (end,) = [run for run in graph.runs if run.name == "end-longer-1"]
    assert [use.run.name for use in end.uses] == ["more-1"]
    assert end.seed == 1
    assert end.label(["arm"]) == "longer"
    assert end.words() == [
        *("fit", "-c", "run.yaml", "--run_dir", "runs/study/end-longer-1", "--model.lr", "0.001"),
        *("--seed_everything", "1", "--backbone.path", "runs/study/more-1/model"),
    ]


def test_a_changed_stage_changes_exactly_what_depends_on_it(study):
    before = prints(study())
    after = prints(
        study(None, ('seed_everything: "${seed}"}}\n  end', 'seed_everything: "${seed}", model.lr: 2}}\n  end'))
    )
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{stage}-{seed}" for seed in (0, 1) for stage in ("more", "end-longer", "test-longer")}


def test_a_variable_and_an_arm_s_value_reach_only_who_mentions_them(study):
    before = prints(study())
    assert {n for n, p in prints(study(None, ("steps: 7", "steps: 8"))).items() if p != before[n]} == set(before)

    def one_arm(tree):
        tree["axes"]["arm"]["plain"]["lr"] = 5.0

    changed = {n for n, p in prints(study(one_arm)).items() if p != before[n]}
    assert changed == {f"{stage}-plain-{seed}" for stage in ("end", "test") for seed in (0, 1)}


def test_a_file_named_in_a_configuration_counts_by_its_content(study):
    Path("data.jsonl").write_text("{}\n")

    def with_data(tree):
        tree["stages"]["more"]["set"]["data.train.x.path"] = "data.jsonl"

    before = prints(study(with_data))
    assert prints(study(with_data)) == before
    Path("data.jsonl").write_text('{"a": 1}\n')
    after = prints(study(with_data))
    assert before["base"] == after["base"]
    assert before["more-0"] != after["more-0"]
    assert before["end-longer-0"] != after["end-longer-0"]
    assert before["end-plain-0"] == after["end-plain-0"]


def test_what_shapes_no_result_is_no_input(study):
    before = prints(study())

    def moved(tree):
        tree["run_dir"] = "elsewhere"
        tree["common"] = {"set": {"logger.MLFlow": None}}
        tree["question"] = "What else?"

    assert prints(study(moved)) == before


def test_a_checkpoint_of_a_step_or_the_best_becomes_a_model_once(study):
    def picked(tree):
        tree["axes"]["arm"]["plain"]["start"] = {"stage": "more", "model": 5}
        best = {"stage": "more", "model": "best", "metric": "val/world/accuracy"}
        tree["axes"]["arm"]["longer"]["start"] = best
        tree["axes"]["arm"]["longest"] = {"start": {"stage": "more", "model": 5}, "lr": 2.0}

    graph = study(picked)
    exports = [run for run in graph.runs if run.command == "export"]
    assert [run.name for run in exports] == [
        f"more-{seed}@{which}" for which in ("step-5", "best-val-world-accuracy-max") for seed in (0, 1)
    ]
    assert {run.uses[0].run.name for run in exports} == {"more-0", "more-1"}
    (end,) = [run for run in graph.runs if run.name == "end-longest-1"]
    assert end.words()[-1] == "runs/study/more-1@step-5/model"

    folder = Path("runs/study/more-1")
    (folder / "checkpoints").mkdir(parents=True)
    for step, score in ((2, 0.25), (5, 0.5), (9, 0.5)):
        (folder / "checkpoints" / f"step-{step:08d}.ckpt").touch()
        scores = folder / "evaluations" / "world" / f"step-{step:08d}"
        scores.mkdir(parents=True)
        (scores / "scores.json").write_text(f'{{"accuracy": {score}}}')
    fixed, best = (next(r for r in exports if r.name.startswith(f"more-1@{which}")) for which in ("step", "best"))
    assert fixed.words()[:2] == ["export", "runs/study/more-1/checkpoints/step-00000005.ckpt"]
    assert best.words()[:2] == ["export", "runs/study/more-1/checkpoints/step-00000005.ckpt"]  # the earlier of two


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("uses: {backbone.path: end}", "uses: {backbone.path: ende}", "no stage is named 'ende'; did you mean 'end'?"),
        (
            "base: {config: [run.yaml],",
            "base: {config: [run.yaml], uses: {backbone.path: more},",
            "stages use each other in a cycle: ",
        ),
        ("longer: {start: more", "plain!: {start: more", "two stages would write into one directory"),
        ("stage: test, bench", "stage: text, bench", "endpoints.accuracy: no stage is named 'text'; did you mean"),
        ("start: more", "star: more", "stages.end: Interpolation key 'arm.start' not found"),
        ("run: test,", "run: tset,", "unknown command 'tset'; did you mean 'test'?"),
        ("set: {trainer.max_steps", "sets: {trainer.max_steps", "unknown key; did you mean 'set'?"),
        ("seed: [0, 1]", "seed: [a]", "seeds are whole numbers, got ['a']"),
        ("seed: [0, 1]", "seed: [0, 0]", "must be a list of different values"),
        ('model.lr: "${arm.lr}"', "run_dir: here", "the study gives every stage its folder"),
        (
            "config: [run.yaml], set: {tr",
            "config: [runs.yaml], set: {tr",
            "stage 'base': no configuration file 'runs.yaml'",
        ),
        (
            "start: more",
            "start: {stage: more, file: x, model: 3}",
            "`file` or `model`",
        ),
    ],
)
def test_refused_before_anything_runs(study, old, new, error):
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        study(None, (old, new))
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


def test_errors_name_file_and_line(study):
    with pytest.raises(ValueError, match=r"\(set in study\.yaml:\d+\)$"):
        study(None, ("run: test,", "run: tset,"))


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        ({"stages": ["end"], "unit": "seconds"}, "say exact: false"),
        ({"stages": ["end"], "unit": "hours"}, "must be steps, tokens or seconds, got 'hours'"),
        ({"stages": ["ends"]}, "no stage is named 'ends'"),
        ({"stages": ["end"], "exact": False}, "steps are counted exactly"),
    ],
)
def test_budgets(study, budget, error):
    with pytest.raises(ValueError, match=error):
        study(lambda tree: tree.update(budget=budget))
