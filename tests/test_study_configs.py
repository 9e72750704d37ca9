"""The study files that come with the package: what they run, with which settings, and two of them from end to end."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from lightning_vlm.config.files import REPOSITORY_CONFIGS, load, parse_yaml
from lightning_vlm.studies.graph import Graph, Run
from lightning_vlm.studies.results import check_claims, collect
from lightning_vlm.studies.spec import read_spec
from lightning_vlm.studies.state import state_of

STUDIES = REPOSITORY_CONFIGS / "study"
# By hand: what exists once, then the stages times the arms and seeds that they depend on.
RUNS = {
    "demo": 3 + 2 * 2 + 3 * 2 + (1 + 2 * 2) + 3 * 2,
    "warm-start": 2 * 3 + 3 + 4 * 3 + (1 + 3 * 3) + 4 * 3,  # SFT, OPD; a checkpoint of SFT; RL; before and after it
    "cw-dpo": 2 + 11 * 3 * 2,  # both stages 1; stage 2 and its test
    "r1v": 10 + 2 + 2 * 16 + 4 + 2 * 5 + 1 + 2,  # before the rounds; two rules; tests; what moved
    "pivot": 3 + 2 * 3 + 7 + 3 * 9 + 9 + 6 * 7,  # stages 1, 2; encoders; new models; their tests; tests and probes
    "world-warm-start": 2 + 2 + 2 * 2 * 5 + 2 * 5 + 2 * 4 * 5 + 2 * (1 + 3 * 5) + 2 * 4 * 5,
    "world-hand-over": 3 + 2 * 3 + 5 * 3 + 8 * 3 + (1 + 7 * 3) + 8 * 3,
    "world-pivot": 9 + 2 * 6 * 3 + 37 + 3 * 39 + 2 * 39 + 6 * 37,
    "world-pivot-small": 9 + 2 * 3 + 7 + 3 * 9 + 2 * 9 + 6 * 7,
    "world-r1v": 8 + 3 * (12 + 2 * 16 + 6 + 2 * 5 + 1 + 2),
}


@cache
def whole(name: str) -> Graph:
    return graph(name)


def graph(name: str, *overrides: tuple[str, object]) -> Graph:
    return Graph(read_spec(f"study/{name}", overrides))


def option(run: Run, name: str) -> str | None:
    words = list(run.options)
    return words[words.index(name) + 1] if name in words else None


def used(run: Run) -> dict[str, str]:
    return {use.key: use.run.name for use in run.uses}


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.yaml")))
def test_every_study_is_a_graph_whose_claims_name_its_arms(name):
    found = whole(name)
    assert len(found.runs) == RUNS.get(name, len(found.runs))
    check_claims(found)
    assert found.spec.question.endswith(("?", ")")) and found.spec.endpoints
    for run in found.runs:  # what is picked is kept
        if run.pick is not None:
            kept = yaml.safe_load(option(run.pick.of, "--callbacks.Checkpoint") or "{}")
            assert kept["keep"] == 0 and run.pick.step % kept["every"] == 0, run.name


@pytest.mark.parametrize("name", ["warm-start", "cw-dpo", "r1v", "pivot"])
def test_studies_of_real_models_say_what_they_cost(name):
    """The file opens with hardware and estimates that are called so; training, tests and writing have their GPUs."""
    text = (STUDIES / f"{name}.yaml").read_text()
    head = text[: text.index("\nquestion:")]
    assert all(line.startswith("#") for line in head.splitlines())
    for said in ("lightning-vlm study run", "Hardware:", "ESTIMATES, not run by us", "Batches:"):
        assert said in head
    assert "# slurm:" in text
    for run in whole(name).runs:
        heavy = run.command in ("fit", "test", "predict", "distill")
        assert run.devices >= 1 if heavy else run.devices in (0, 1), run.name
        assert run.processes in (1, run.devices)


# --- R1V -------------------------------------------------------------------------------------------------------------


def test_the_recipe_is_r1vs():
    """Three passes before the swap, chains written before stage 1 and each round, τ = 2, 3, 4, 5, GRPO on score 5."""
    found = graph("world-r1v", ("axes.combine", ["intersection"]), ("axes.seed", [3]), ("vars.pool", 64))
    runs = {run.stage: run for run in found.runs}
    taught = [run.stage for run in found.runs if run.command in ("fit", "distill", "select", "swap-language")]
    rounds = [part for n in range(1, 5) for part in (f"round-{n}-data", f"round-{n}-selected", f"round-{n}")]
    mine = [s for s in taught if s not in ("warmup", "vlm", "substitute", "reasoning")]
    passes = ["init-1", "init-data", "selected", "init-2", "best", "init-3"]
    assert mine == [*passes, "swap", "stage-1-data", "stage-1", *rounds, "grpo-data", "grpo"]

    writers = [used(runs[s])["model"] for s in mine if s.endswith("-data") and runs[s].command == "distill"]
    assert writers == ["init-1-3", "swap-3", "stage-1-3", *(f"round-{n}-intersection-3" for n in (1, 2, 3))]
    starts = {s: used(runs[s])["backbone.path"] for s in mine if runs[s].command == "fit"}
    assert starts["init-1"] == "composed-3" and starts["stage-1"] == "swap-3" and starts["round-1"] == "stage-1-3"
    assert starts["grpo"] == "round-4-intersection-3"
    assert used(runs["swap"])["language"] == "reasoning-language"
    assert used(runs["composed"])["language"] == "substitute-language"

    chosen = [runs[f"round-{n}-selected"] for n in range(1, 5)]
    assert [option(run, "--threshold") for run in chosen] == ["2", "3", "4", "5"]
    assert {option(run, "--combine") for run in chosen} == {"intersection"}
    assert [option(runs[s], "--min_score") for s in ("selected", "best", "grpo-data")] == ["4", "5", "5"]
    rates = [option(runs[s], "--model.lr") for s in ("stage-1", "round-1", "round-4")]
    assert rates == ["0.005", "0.001", "0.001"]  # 1e-4 and 2e-5, times fifty
    pool = runs["round-2-data"].writes["pool.yaml"]["world"]["options"]
    assert (pool["size"], pool["seed"], pool["direct_fraction"]) == (64, 103, 0.0) and "caption" not in pool["families"]
    seeds = {option(run, "--seed_everything") for run in found.runs if run.seed == 3 and run.command == "fit"}
    assert seeds == {"3"}


def test_both_rules_share_what_comes_before_the_rounds():
    found = graph("world-r1v", ("axes.seed", [0]))
    split = {run.stage for run in found.runs if "combine" in run.at}
    assert {stage.removeprefix("test-").split("-")[0] for stage in split} == {"round", "grpo", "moved"}
    assert {"round-1-data", "round-1-answers"}.isdisjoint(split)


def test_the_real_recipe_has_the_papers_rates():
    """2e-4, 4e-5, 4e-5; 1e-4; four times 2e-5; 1e-6; the adapter alone learns in all of them."""
    runs = [run for run in graph("r1v", ("axes.combine", ["union"])).runs if run.command == "fit"]
    trees = {run.stage: load(files(run), [("trainer.max_steps", 1)]).tree["model"]["init_args"] for run in runs}
    rates = {stage: tree["lr"] for stage, tree in trees.items()}
    rounds = {f"round-{n}": 2e-5 for n in range(1, 5)}
    assert rates == {"init-1": 2e-4, "init-2": 4e-5, "init-3": 4e-5, "stage-1": 1e-4, **rounds, "grpo": 1e-6}
    assert all(tree["adapter_only"] for tree in trees.values())


def files(run: Run) -> list[str]:
    words = list(run.options)
    return [words[i + 1] for i, word in enumerate(words) if word == "-c"]


# --- PIVOT -----------------------------------------------------------------------------------------------------------


def test_triples_are_a_cross_and_add_up():
    """640 at 1x; a share of 40 % of 640 is 256, three kinds of 85 each; what rounding leaves is of the old kind."""
    triples = read_spec("study/world-pivot").axes["triples"]
    amounts = {"1/4x": 160, "1/2x": 320, "1x": 640, "2x": 1280}
    for name, value in triples.items():
        amount, share = name.removesuffix(" new").split(", ")
        total, share = amounts[amount], 0.0 if share == "none" else int(share.rstrip("%")) / 100
        assert (value["near"], value["new"]) == (total - 3 * round(share * total / 3), round(share * total / 3)), name
    assert list(triples)[:3] == ["1x, 40% new", "1x, 80% new", "1x, none new"]
    assert list(triples)[3:] == [f"{amount}, 40% new" for amount in ("2x", "1/2x", "1/4x")]


def test_sft_and_dpo_learn_from_the_same_triples():
    found = graph("world-pivot", ("axes.seed", [2]))
    for sft, dpo in zip(found.at("sft"), found.at("dpo"), strict=True):
        for key in ("--vars.near", "--vars.new", "--seed_everything", "--backbone.path"):
            assert option(sft, key) == option(dpo, key)
        assert option(sft, "--seed_everything") == "102"
        trees = [load(files(run), [("vars.near", 385)]).tree for run in (sft, dpo)]
        for key in ("data", "trainer", "backbone"):
            assert trees[0][key] == trees[1][key]
        sources = trees[0]["data"]["init_args"]["train"]
        assert len(sources) == (1 if sft.at["triples"] == "1x, none new" else 4)


def test_stage_1_is_shared_unless_told_otherwise():
    shared = {run.stage: run for run in graph("world-pivot", ("axes.seed", [1])).runs}
    assert shared["all"].seed is None and option(shared["projector"], "--seed_everything") == "200"
    own = {run.stage: run for run in graph("world-pivot", ("axes.seed", [4]), ("vars.start_seed", "${seed}")).runs}
    assert own["all"].seed == own["warmup"].seed == 4 and own["language"].seed is None
    assert option(own["all"], "--seed_everything") == "4" and option(own["projector"], "--seed_everything") == "204"
    assert [option(own[s], "--seed_everything") for s in ("fresh-projector", "fresh")] == ["304", "404"]


def test_an_untouched_model_is_one_for_all_triples():
    """The new model on its encoder has seeds; arms are compared inside one place of the cross."""
    found = graph("world-pivot", ("axes.seed", [0, 1]))
    assert [run.at for run in found.at("encoder") if run.at["arm"] == "untouched"] == [{"arm": "untouched"}]
    assert len([run for run in found.at("fresh") if run.at["arm"] == "untouched"]) == 2
    assert found.spec.compare.within == ("triples",)


# --- choosing when to stop -------------------------------------------------------------------------------------------


def test_every_hand_over_goes_into_the_same_rl():
    found = graph("world-hand-over", ("axes.seed", [0]))
    starts = {run.at["arm"]: used(run)["backbone.path"] for run in found.at("rl")}
    assert starts == {
        "none": "base",
        **{f"SFT, {n} steps": f"sft-0@step-{n}" for n in (10, 30, 60)},
        "SFT, 150 steps": "sft-0",
        **{f"OPD, {n} steps": f"opd-0@step-{n}" for n in (20, 50)},
        "OPD, 100 steps": "opd-0",
    }
    assert len({tuple(w for w in run.options if not w.startswith("runs/")) for run in found.at("rl")}) == 1
    assert {use.run.name for run in found.at("before") for use in run.uses} == set(starts.values())


# --- from end to end -------------------------------------------------------------------------------------------------


def tiny(folder: Path, name: str, change) -> Graph:
    """Run a changed study in a folder; its graph, all of it done."""
    tree, _ = parse_yaml((STUDIES / f"{name}.yaml").read_text(), name)
    tree["axes"]["seed"] = [0]
    tree["run_dir"] = str(folder / "runs")
    change(tree)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    command = [sys.executable, "-m", "lightning_vlm.cli.main", "study", "run", str(file), "--no_mlflow"]
    ran = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    found = Graph(read_spec(str(file)))
    assert {state_of(run) for run in found.runs} == {"done"}
    return found


def measured(found: Graph) -> dict[str, float]:
    """The one number of every endpoint."""
    results = collect(found)
    assert [m.missing for m in results.measured if m.missing] == []
    return {m.endpoint.name: m.comparison.arms[0].mean for m in results.measured}


@pytest.mark.slow
def test_world_r1v_from_end_to_end(tmp_path):
    """A step a stage: chains pass from model to model, and nothing but the adapter moves."""

    def change(tree):
        tree["axes"]["combine"] = ["union"]
        tree["vars"]["steps"] = dict.fromkeys(tree["vars"]["steps"], 1)
        tree["vars"] |= {"pool": 16, "questions": 8, "out_of_domain": 8}
        for stage in ("vlm", "substitute", "reasoning"):
            tree["stages"][stage]["set"]["callbacks.Benchmarks"] = None
        tree["stages"]["vlm"]["set"]["callbacks.Checkpoint"] = {"every": 0, "monitor": None}

    found = tiny(tmp_path, "world-r1v", change)
    numbers = measured(found)
    for part in ("vision", "language"):
        assert numbers[f"{part} moved by the passes"] == numbers[f"{part} moved after the exchange"] == 0
    runs = {run.stage: run for run in found.runs}
    updates = json.loads((runs["moved"].folder / "probe.json").read_text())["updates"]
    assert [u["part"] for u in updates if u["block"] is None] == ["vision", "projector", "language"]
    assert updates[0]["part"] == "vision" and updates[6]["part"] == "language"  # as the endpoints read them
    pool, chosen = (ids(runs[s]) for s in ("round-4-data", "round-4-selected"))
    assert len(pool) == 16 and set(chosen) <= set(pool)
    assert numbers["rounds together"] == pytest.approx(
        numbers["accuracy after round 4"] - numbers["accuracy after stage 1"]
    )


def ids(run: Run) -> list[str]:
    return [json.loads(line)["id"] for line in (run.folder / run.output).read_text().splitlines()]


@pytest.mark.slow
def test_world_pivot_from_end_to_end(tmp_path):
    """A step a stage: SFT and DPO move the encoder, which goes into a new model as it then is."""
    sizes = {"test": 10, "ood_pairs": 4, "ood_numbers": 4, "ood_two_attributes": 4, "twins": 8}
    few = {name: {"source": {"options": {"size": size}}} for name, size in sizes.items()}

    def change(tree):
        tree["axes"]["triples"] = {"few": {"data": "data/world-pivot-new", "near": 4, "new": 2}}
        tree["vars"]["steps"] = dict.fromkeys(tree["vars"]["steps"], 1)
        tree["vars"]["probed"] = {"pictures": 48, "segmented": 8, "asked": 8, "captions": 24}
        tree["claims"] = []
        tree["common"]["set"]["data.batch_size"] = 4
        for stage in ("language", "fresh-language"):
            tree["stages"][stage]["set"]["callbacks.Benchmarks"] = None
        for stage in ("test-fresh", "test-post"):
            tree["stages"][stage]["set"] = {"callbacks.Benchmarks.benchmarks": few}

    found = tiny(tmp_path, "world-pivot", change)
    results = collect(found)
    assert [m.missing for m in results.measured if m.missing] == []
    moved = next(m for m in results.measured if m.endpoint.name == "vision moved").comparison
    by_arm = {arm.name: arm.mean for arm in moved.arms}
    assert by_arm["untouched"] == 0 and by_arm["SFT · few"] > 0 and by_arm["DPO · few"] > 0
    assert all(row["equal"] for row in results.budget)
    for run in found.at("fresh"):
        encoder = next(e for e in found.at("encoder") if e.at["arm"] == run.at["arm"])
        assert tower(encoder.folder / "model") == tower(run.folder / "model"), run.name


def tower(model: Path) -> dict[str, bytes]:
    """Tensors of the vision tower by the ends of their names, which directories begin in different ways."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, value in load_file(file).items():
            if "language" not in name and "projector" not in name and "lm_head" not in name:
                found[re.split(r"vision_model\.|vision_tower\.", name)[-1].removeprefix("model.")] = (
                    value.numpy().tobytes()
                )
    assert found
    return found
