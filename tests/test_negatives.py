"""Negatives that the policy writes: who gets which, what counts as wrong, how often they are made anew."""

from __future__ import annotations

import pytest
import torch

from lightning_vlm.algorithms.negatives import Negatives, generate
from lightning_vlm.benchmarks.rules import RULES
from lightning_vlm.data.world import WorldSource
from lightning_vlm.models.embedded import build_model
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.rollouts import Completion, prompt_of

from .conftest import run_scenarios
from .test_dpo import save_model
from .test_sft_c import BATCH, MODEL, SETTINGS, SIZE, world_pairs
from .test_step import gap

RULE = "world/exact"


def test_kinds_are_drawn_by_key_in_proportion():
    """Shares 1, 2, 1 of 4000: each within four standard deviations; another step draws others."""
    negatives = Negatives(data=1.0, on_policy=2.0, beam=1.0, rule=RULE)
    kinds = [negatives.kind_of(3, 8, f"s{i}") for i in range(4000)]
    for kind, share in (("data", 0.25), ("on_policy", 0.5), ("beam", 0.25)):
        assert abs(kinds.count(kind) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert [negatives.kind_of(3, 8, f"s{i}") for i in range(4000)] == kinds
    moved = [negatives.kind_of(3, 9, f"s{i}") != kind for i, kind in enumerate(kinds)]
    assert 2300 < sum(moved) < 2700  # 1 − (¼² + ½² + ¼²) = ⅝ of them
    assert {Negatives(data=0, beam=1.0, rule=RULE).kind_of(0, 0, f"s{i}") for i in range(99)} == {"beam"}
    assert {Negatives().kind_of(0, 0, f"s{i}") for i in range(99)} == {"data"}


class Scripted:
    """An engine that answers what it was told to, and keeps what it was asked."""

    def __init__(self, answers) -> None:
        self.answers, self.asked = answers, []

    def generate(self, prompts, *, n, sampling, keys):
        self.asked.append((prompts, n, sampling, keys))
        return [self.answers] * len(prompts)

    def beams(self, prompts, *, beams, n, max_new_tokens):
        self.asked.append((prompts, beams, n, max_new_tokens))
        return [self.answers] * len(prompts)


def answer(text: str, finished: bool = True) -> Completion:
    ids = load_processor(Backbone(path=MODEL)).tokenizer(text + "<|im_end|>" * finished).input_ids
    return Completion(ids, text, finished, [-1.0] * len(ids), [-1.0] * len(ids))


def made(answers, items=None, **settings):
    """`generate` on the first step's samples of the world."""
    source = WorldSource(size=SIZE, pairs=True)
    samples = [source[i] for i in range(BATCH)]
    engine = Scripted(answers)
    negatives = Negatives(rule=RULE, **settings)
    items = items or world_pairs()
    out, counts = generate(negatives, engine, items, samples, seed=1, step=4)
    return engine, samples, items, out, counts


@pytest.mark.parametrize("kind", ["on_policy", "beam"])
def test_the_first_wrong_answer_that_ends_is_taken(kind):
    """Not one cut off, not an empty one, not a right one."""
    wrong = answer("\\boxed{9999}")
    answers = [answer("\\boxed{", finished=False), answer(" "), wrong, answer("\\boxed{8888}")]
    settings = {"data": 0.0, kind: 1.0, "max_new_tokens": 7}
    settings |= {"beams": 5} if kind == "beam" else {"draws": 5, "temperature": 0.5}
    engine, _, items, out, counts = made(answers, **settings)
    assert counts == {f"wanted/{kind}": BATCH, f"found/{kind}": BATCH, "missing": 0.0}
    for item, (chosen, rejected) in zip(items, out, strict=True):
        assert chosen is item[0] and (rejected.name, rejected.id) == ("rejected", chosen.id)
        assert rejected.input_ids[rejected.loss_mask].tolist() == wrong.ids
        prompt = prompt_of(chosen)
        assert torch.equal(rejected.input_ids[: len(prompt)], prompt.input_ids)
        assert not prompt.loss_mask.any() and rejected.images == chosen.images
        assert rejected.info == {"negative": kind, "generated": True, "source": "world"}
    ((prompts, *asked),) = engine.asked
    assert len(prompts) == BATCH
    if kind == "beam":
        assert asked == [5, 5, 7]
    else:
        assert asked[0] == 5 and asked[2] == (1, 4)
        assert (asked[1].temperature, asked[1].max_new_tokens) == (0.5, 7)


def test_right_answers_are_no_negatives():
    """The gold answer of sample 3 is wrong for the others; where nothing is wrong the data set's stands in."""
    source = WorldSource(size=SIZE, pairs=True)
    gold = next(i for i in range(BATCH) if source[i].answer is not None)
    right = answer(f"\\boxed{{{source[gold].answer}}}")
    _, samples, items, out, counts = made([right], data=1e-9, on_policy=1.0)
    same = [i for i, sample in enumerate(samples) if sample.answer == samples[gold].answer]
    assert [i for i, item in enumerate(out) if item[1] is items[i][1]] == same
    assert counts["found/on_policy"] == BATCH - len(same) and counts["missing"] == 0.0
    alone = [item[:1] for item in items]
    _, _, _, out, counts = made([right], items=alone, data=0.0, on_policy=1.0)
    assert [i for i, item in enumerate(out) if len(item) == 1] == same and counts["missing"] == len(same)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Records of the scenarios on one process and on two; they start from a model that has learned to end."""
    folder = tmp_path_factory.mktemp("negatives")
    world = {"size": SIZE, "pairs": True, "direct_fraction": 1.0}
    warm = {"name": "warm", "run_dir": str(folder / "warm"), "model": MODEL, "world": world | {"size": 64}, "steps": 25}
    warm |= {"settings": {"lr": 1e-2}, "dtype": "float32"}
    done = run_scenarios([warm], folder / "p0")
    assert done.returncode == 0, done.stderr
    model = build_model(MODEL.removeprefix("embedded:"))
    model.load_state_dict(torch.load(folder / "p0" / "records.pt")["warm"]["weights"], strict=False)
    warmed = save_model(folder / "model", model)
    base = {"model": warmed, "world": world, "batch_size": 6, "shuffle": False, "steps": 4, "algorithm": "DPO"}
    mixed = {"data": 0.2, "on_policy": 0.5, "beam": 0.3, "rule": RULE, "draws": 3, "beams": 2, "max_new_tokens": 16}
    settings = SETTINGS | {"lr": 1e-3}

    def spec(name, own, negatives, **changes):
        own = settings | own | {"negatives": negatives}
        return base | {"name": name, "run_dir": str(folder / name), "settings": own} | changes

    one = [
        spec("mixed", {}, mixed),
        spec("refreshed", {}, mixed | {"refresh": 2}),
        spec("cached", {"reference": "cache"}, mixed | {"refresh": 2}, cache=str(folder / "cache")),
        spec("alone", {}, mixed | {"data": 0.0, "beam": 0.0, "beams": 4, "draws": 1, "max_new_tokens": 6}),
        spec(
            "sft_c",
            {"threshold": 1e3},
            mixed | {"data": 0.0, "beam": 0.0, "beams": 4, "draws": 1, "max_new_tokens": 6},
            algorithm="SFTC",
        ),
    ]
    at_end = {"size": 3, "every": 1000}
    one.append(spec("watched", {}, {"on_policy": 1.0, "rule": RULE, "refresh": 2}, benchmark=at_end))
    two = [
        spec("ddp_refreshed", {}, mixed | {"refresh": 2}, strategy="ddp"),
        spec("fsdp2_refreshed", {"micro_batch_tokens": 200}, mixed | {"refresh": 2}, strategy="fsdp2"),
        spec("ddp_cached", {"reference": "cache"}, mixed, strategy="ddp", cache=str(folder / "cache2")),
    ]
    records = {}
    for processes, specs in ((1, one), (2, two)):
        done = run_scenarios(specs, folder / f"p{processes}", processes=processes)
        assert done.returncode == 0, done.stderr
        records |= torch.load(folder / f"p{processes}" / "records.pt")
    return records


def rejected(record) -> list[dict]:
    """Per optimizer step, over ranks: id → (kind, scored ids) of the rejected rows."""
    steps = zip(*record["rows"], strict=True)
    return [{r[0]: r[2:4] for rank in step for r in rank if r[1] == "rejected"} for step in steps]


@pytest.mark.parametrize("name", ["mixed", "refreshed", "ddp_refreshed", "fsdp2_refreshed", "ddp_cached"])
def test_what_the_policy_wrote_is_wrong_and_counted(runs, name):
    """Every generated negative is graded anew; wanted and found are what the draws say, the rest are the data set's."""
    tokenizer = load_processor(Backbone(path=MODEL)).tokenizer
    source = WorldSource(size=SIZE, pairs=True, direct_fraction=1.0)
    samples = {f"train/{s.id}": s for s in (source[i] for i in range(SIZE))}
    found = {"on_policy": 0, "beam": 0}
    for step, rows in zip(runs[name]["steps"], rejected(runs[name]), strict=True):
        for id, (kind, ids) in rows.items():
            if kind is None:
                continue
            assert RULES[RULE].grade(tokenizer.decode(ids[:-1]), samples[id])["score"] == 0.0
            assert ids[-1] == tokenizer.eos_token_id and 1 < len(ids) <= 16
            found[kind] += 1
        assert step["train/negatives/missing"] == 0.0
        for kind in found:
            assert 0 <= step[f"train/negatives/found/{kind}"] <= step[f"train/negatives/wanted/{kind}"]
            here = sum(row[0] == kind for row in rows.values())
            assert step[f"train/share/negative/{kind}"] == pytest.approx(here / len(rows))
    assert all(found.values()), found


def test_negatives_are_made_anew_every_refresh_steps(runs):
    """Steps 0 and 1 draw by key 0; the epoch ends with step 2, so step 3 draws anew."""
    negatives = Negatives(data=0.2, on_policy=0.5, beam=0.3, rule=RULE)
    for name, keys in (("mixed", (0, 1, 2, 3)), ("refreshed", (0, 0, 2, 3))):
        assert len(runs[name]["losses"]) == 4
        for step, rows in enumerate(rejected(runs[name])):
            drawn = {id: negatives.kind_of(0, keys[step], id) for id in rows}
            assert all(kind in (None, drawn[id]) for id, (kind, _) in rows.items())
            wanted = [sum(k == kind for k in drawn.values()) for kind in ("on_policy", "beam")]
            if name == "mixed":
                said = [runs[name]["steps"][step][f"train/negatives/wanted/{kind}"] for kind in ("on_policy", "beam")]
                assert said == wanted
    first = runs["refreshed"]["steps"]
    for kind in ("on_policy", "beam"):  # one generation feeds both steps
        for name in (f"train/negatives/wanted/{kind}", f"train/negatives/found/{kind}"):
            assert first[0][name] == first[1][name]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_learn_from_the_same_negatives(runs, strategy):
    two, one = runs[f"{strategy}_refreshed"], runs["refreshed"]
    assert rejected(two) == rejected(one)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-9)
    assert gap(two["gradients"], one["gradients"]) < 1e-9


def test_a_cached_reference_knows_what_was_just_written(runs):
    """Loaded anew for texts that no cache can hold; on two ranks also where only one has such a text."""
    assert rejected(runs["cached"]) == rejected(runs["refreshed"])
    assert runs["cached"]["losses"] == pytest.approx(runs["refreshed"]["losses"], rel=1e-9)
    assert runs["ddp_cached"]["losses"] == pytest.approx(runs["mixed"]["losses"], rel=1e-9)
    assert runs["refreshed"]["computed"] == 0 < runs["cached"]["computed"]


def test_without_a_wrong_answer_dpo_leaves_the_pair_out_and_sft_c_the_negative(runs):
    """One draw each and nothing to stand in: SFT-C learns the chosen texts all the same."""
    for name in ("alone", "sft_c"):
        step, rows = runs[name]["steps"][0], runs[name]["rows"][0][0]
        missing = step["train/negatives/missing"]
        chosen = [row for row in rows if row[1] == "chosen"]
        negative = [row for row in rows if row[1] == "rejected"]
        assert 0 < missing < 6 and len(negative) == 6 - missing
        assert len(chosen) == (6 if name == "sft_c" else 6 - missing)


def test_an_evaluation_at_the_end_runs_though_batches_feed_several_steps(runs):
    """Four steps of three batches: no batch's number is a multiple of any interval."""
    assert len(runs["watched"]["losses"]) == 4 and "val/world/accuracy" in runs["watched"]["evaluated"][0]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"data": -1.0}, "cannot be negative"),
        ({"data": 0.0}, "one must be positive"),
        ({"on_policy": 1.0}, "must be judged"),
        ({"beam": 1.0, "rule": "world/exakt"}, "did you mean 'world/exact'"),
        ({"refresh": 2}, "refresh has no effect where on_policy and beam has no share"),
        ({"on_policy": 1.0, "rule": RULE, "beams": 2}, "beams has no effect where beam has no share"),
        ({"rule": RULE}, "rule has no effect"),
        ({"on_policy": 1.0, "rule": "coco/python"}, "scores a set of captions"),
        ({"on_policy": 1.0, "rule": RULE, "draws": 0}, "at least 1"),
        ({"on_policy": 1.0, "rule": RULE, "temperature": 0.0}, "temperature positive"),
    ],
)
def test_settings_out_of_range_or_without_effect(settings, said):
    with pytest.raises(ValueError, match=said):
        Negatives(**settings)
