"""The DPO family through the whole path: one gradient however the step is cut, references that agree, running means."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_vlm.algorithms import DPO
from lightning_vlm.losses.preference import PreferenceLoss
from lightning_vlm.models.embedded import build_model, build_processor_parts
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.spec import Backbone

from .conftest import run_scenarios
from .test_sft_c import BATCH, MODEL, SETTINGS, SIZE, full_logprobs, start, world_pairs
from .test_step import gap

CW = {"weighting": "cooling", "tau": 0.5, "ell_floor": -4.4}
MPO = {"dpo_weight": 0.8, "bco_weight": 0.2, "nll_weight": 1.0}
OBJECTIVES = {
    "dpo": {},
    "cw": CW,
    "undetached": CW | {"detach_weight": False},
    "focal": {"weighting": "focal"},
    "mpo": MPO,
    "mean": {"weighting": "cooling", "ell_floor": "mean"},
}
LORA = {"parts": {part: {"freeze": True} for part in ("vision", "projector")} | {"language": {"lora_rank": 4}}}
WORLDS = {"captions": ["caption"], "questions": ["bars", "angle"]}


def save_model(folder, model) -> str:
    """A model directory of an embedded model with these weights."""
    tokenizer, images, template = build_processor_parts(MODEL.removeprefix("embedded:"))
    tokenizer.chat_template = template
    for part in (model, tokenizer, images):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """A model directory with other weights of the same architecture and tokenizer."""
    return save_model(tmp_path_factory.mktemp("other"), build_model(MODEL.removeprefix("embedded:"), seed=7))


def ells(policy) -> list[float]:
    """ℓ̄(y_l) of the first step's pairs, nats per token."""
    with torch.no_grad():
        rows = [full_logprobs(policy, rejected) for _, rejected in world_pairs()]
    return [logprobs.gather(1, ids[:, None]).mean().item() for logprobs, ids in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, other):
    """Records of the scenarios on one process and on two."""
    folder = tmp_path_factory.mktemp("dpo")
    base = {"model": MODEL, "world": {"size": SIZE, "pairs": True}, "batch_size": BATCH, "shuffle": False, "steps": 2}
    base |= {"algorithm": "DPO", "cache": str(folder / "cache")}
    settings = SETTINGS | {"beta": 0.3, "reference": "online"}

    def spec(name, own, **changes):
        return base | {"name": name, "run_dir": str(folder / name), "settings": settings | own} | changes

    worlds = {name: {"size": SIZE, "pairs": True, "families": families} for name, families in WORLDS.items()}
    bound = sorted(ells(start()))[3] - 1e-6
    hopeless = OBJECTIVES["cw"] | {"hopeless_below": bound}
    one = [
        *(spec(name, own | {"reference_model": other}, steps=3) for name, own in OBJECTIVES.items()),
        *(spec(f"cw_{b}", CW | {"reference_model": other, "micro_batch_tokens": b}) for b in (1, 300)),
        spec("cw_alone", CW | {"reference_model": other, "share_prompts": False}),
        spec("online", {}, steps=4),
        spec("default", {"reference": None}, steps=4),
        spec("lora_online", LORA, steps=4),
        spec("lora_cache", LORA | {"reference": "cache"}, steps=4),
        spec("lora_default", LORA | {"reference": None}, steps=4),
        spec("hopeless", hopeless),
        spec("hopeless_all", {"hopeless_below": -0.1}),
        spec("sources", CW, worlds=worlds, shuffle=True, steps=4),
    ]
    two = [
        *(
            spec(f"{s}_{name}", OBJECTIVES[name] | cut | {"reference_model": other}, strategy=s, steps=3)
            for s, cut in (("ddp", {}), ("fsdp2", {"micro_batch_tokens": 300}))
            for name in ("cw", "mpo", "mean")
        ),
        *(
            spec(f"{s}_{kind}", ({} if kind == "cache" else LORA) | {"reference": kind}, strategy=s, steps=4)
            for s in ("ddp", "fsdp2")
            for kind in ("cache", "adapters_off")
        ),
        *(spec(f"{s}_hopeless", hopeless, strategy=s) for s in ("ddp", "fsdp2")),
        spec("ddp_sources", CW, worlds=worlds, shuffle=True, steps=4, strategy="ddp"),
    ]
    records = {"bound": bound}
    for processes, specs in ((1, one), (2, two)):
        done = run_scenarios(specs, folder / f"p{processes}", processes=processes)
        assert done.returncode == 0, done.stderr
        records |= torch.load(folder / f"p{processes}" / "records.pt")
    return records


def column(record, name):
    """A metric over the steps."""
    return [step[f"train/{name}"] for step in record["steps"]]


def side_logprobs(policy, items) -> list[torch.Tensor]:
    """[P] log π of the chosen and of the rejected answers."""
    out = []
    for side in (0, 1):
        rows = [full_logprobs(policy, item[side]) for item in items]
        out.append(torch.stack([logprobs.gather(1, ids[:, None]).sum() for logprobs, ids in rows]))
    return out


def oracle(objective, reference_path, items):
    """(loss, gradient) of the first step, written out: mean over pairs of what the formulas say."""
    policy = start()
    model = load_model(Backbone(path=reference_path, dtype="float64"))
    with torch.no_grad():
        ref_w, ref_l = side_logprobs(Policy(model, family_of(model)), items)
    chosen, rejected = side_logprobs(policy, items)
    lengths = [torch.tensor([float(item[side].scored) for item in items]) for side in (0, 1)]
    s = {
        "weighting": "none",
        "tau": 1.0,
        "detach_weight": True,
        "dpo_weight": 1.0,
        "bco_weight": 0.0,
        "nll_weight": 0.0,
    }
    s |= objective
    delta_w, delta_l, weight = chosen - ref_w, rejected - ref_l, 1.0
    if s["weighting"] == "cooling":
        mean = rejected / lengths[1]
        floor = mean.detach() if s["ell_floor"] == "mean" else s["ell_floor"]
        weight = 1 / (1 + torch.exp(-(mean - floor) / s["tau"]))
        weight = weight.detach() if s["detach_weight"] else weight
    p = 1 / (1 + torch.exp(-0.3 * (delta_w - weight * delta_l)))
    loss = -p.log() * ((1 - p.detach()) ** 2 if s["weighting"] == "focal" else 1.0) * s["dpo_weight"]
    sides = [1 / (1 + torch.exp(-0.3 * d)) for d in (delta_w, -delta_l)]
    loss = loss - s["bco_weight"] * (sides[0].log() + sides[1].log()) - s["nll_weight"] * chosen / lengths[0]
    loss.mean().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in policy.model.named_parameters()}
    return loss.mean().item(), grads


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_first_step_against_a_slow_oracle(runs, other, name):
    """Reference and policy differ here, so that every part of the formulas acts."""
    loss, grads = oracle(OBJECTIVES[name], other, world_pairs())
    assert runs[name]["losses"][0] == pytest.approx(loss, rel=1e-10)
    assert gap(runs[name]["gradients"], grads) < 1e-9


@pytest.mark.parametrize("how", ["cw_1", "cw_300", "cw_alone"])
def test_the_gradient_does_not_depend_on_how_the_step_is_cut(runs, how):
    assert gap(runs[how]["gradients"], runs["cw"]["gradients"]) < 1e-9
    assert gap(runs[how]["last_gradients"], runs[how.split("_")[0] + "_1"]["last_gradients"]) < 1e-9
    assert column(runs["cw_1"], "micro_batches")[0] == BATCH > column(runs["cw_300"], "micro_batches")[0] > 1


def test_a_shared_prompt_is_computed_once(runs):
    padded = [column(runs[name], "padded_tokens")[0] for name in ("cw", "cw_alone")]
    assert padded[0] < 0.75 * padded[1] and column(runs["cw"], "rows")[0] == 2 * BATCH


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["cw", "mpo", "mean"])
def test_two_processes(runs, strategy, name):
    """Running means (`mean`, MPO's δ) are over all ranks: losses stay equal over the steps."""
    two, one = runs[f"{strategy}_{name}"], runs[name]
    assert gap(two["gradients"], one["gradients"]) < 1e-9
    assert gap(two["last_gradients"], one["last_gradients"]) < 1e-8
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-9)
    for metric in ("accuracy", "reward_margin", "logprob_rejected", "vulnerable", "reward_chosen"):
        assert column(two, metric) == pytest.approx(column(one, metric), rel=1e-8)


@pytest.mark.parametrize("name", ["online", "default", "lora_online", "lora_cache", "lora_default"])
def test_the_first_loss_is_ln_2(runs, name):
    record = runs[name]
    assert record["losses"][0] == pytest.approx(math.log(2), abs=1e-12)
    for metric in ("reward_chosen", "reward_rejected", "reward_margin"):
        assert abs(column(record, metric)[0]) < 1e-12
    assert all(abs(loss - math.log(2)) > 1e-5 for loss in record["losses"][1:])


def test_the_three_references_give_the_same_losses(runs):
    for name, others in {
        "online": ("default", "ddp_cache", "fsdp2_cache"),
        "lora_online": ("lora_default", "lora_cache", "ddp_adapters_off", "fsdp2_adapters_off"),
    }.items():
        for other_name in others:
            assert runs[other_name]["losses"] == pytest.approx(runs[name]["losses"], rel=1e-9), other_name
    # None is the cache, and under LoRA the model without its adapters.
    assert runs["default"]["computed"] == 2 * SIZE and runs["lora_default"]["computed"] == 0
    assert runs["lora_cache"]["computed"] == 2 * SIZE  # with adapters it is another model


def test_the_floor_is_a_cumulative_mean_updated_after_the_step(runs):
    """First no floor, w_c = ½; then the mean of ℓ̄(y_l) of the first step's pairs, then of both steps'."""
    floors, weights = column(runs["mean"], "ell_floor"), column(runs["mean"], "w_c")
    assert weights[0] == 0.5 != weights[1]
    first = ells(start())
    assert floors[0] == pytest.approx(sum(first) / BATCH, rel=1e-10)
    for two in ("ddp_mean", "fsdp2_mean"):
        assert column(runs[two], "ell_floor") == pytest.approx(floors, rel=1e-9)
    # The third step has one pair, of which the reports tell ℓ̄(y_l): it counts as one of fifteen.
    last = column(runs["mean"], "logprob_rejected")[2]
    assert floors[2] == pytest.approx((floors[1] * 2 * BATCH + last) / SIZE, rel=1e-10)


def test_bco_measures_from_the_running_mean_of_the_rewards(runs):
    """δ is 0 in the first step; the third step's loss, of one pair, is recomputed from the reports of the steps."""
    steps = runs["mpo"]["steps"]
    sides = [[step[f"train/reward_{side}"] for step in steps] for side in ("chosen", "rejected")]
    shift = sum(sum(side[:2]) for side in sides) / 4
    chosen, rejected = sides[0][2], sides[1][2]
    want = -0.2 * (log_sigma(chosen - shift) + log_sigma(shift - rejected))
    assert steps[2]["train/bco"] == pytest.approx(want, rel=1e-10)
    want += -0.8 * log_sigma(chosen - rejected) - column(runs["mpo"], "logprob_chosen")[2]
    assert steps[2]["train/loss"] == pytest.approx(want, rel=1e-10)


def log_sigma(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("name", ["hopeless", "ddp_hopeless", "fsdp2_hopeless"])
def test_hopeless_pairs_are_left_out(runs, name):
    """Exactly those whose rejected answer is below the bound under the reference; the others are the whole step."""
    found = ells(start())
    kept = [item for item, ell in zip(world_pairs(), found, strict=True) if ell >= runs["bound"]]
    assert 0 < len(kept) < BATCH
    ids = {row[0] for rank in runs[name]["rows"] for row in rank[0]}
    assert {i.removeprefix("train/") for i in ids} == {item[0].id for item in kept}
    assert column(runs[name], "hopeless")[0] == pytest.approx(1 - len(kept) / BATCH)
    assert column(runs[name], "rows")[0] == 2 * len(kept)
    _, grads = oracle(OBJECTIVES["cw"], MODEL, kept)
    assert gap(runs[name]["gradients"], grads) < 1e-9


def test_a_step_whose_pairs_are_all_hopeless_is_empty(runs):
    record = runs["hopeless_all"]
    assert column(record, "hopeless") == [1.0, 1.0] and record["losses"] == [0.0, 0.0]
    assert all(not g.any() for g in record["gradients"].values())


@pytest.mark.parametrize("name", ["sources", "ddp_sources"])
def test_reports_by_source(runs, name):
    """Shares as drawn; losses, weighted by the shares, add up to the loss; loss shares to one."""
    for step, rows in zip(runs[name]["steps"], zip(*runs[name]["rows"], strict=True), strict=True):
        ids = [row[0].split("/")[0] for rank in rows for row in rank if row[1] == "chosen"]
        total = 0.0
        for source in WORLDS:
            share = step[f"train/share/source/{source}"]
            assert share == pytest.approx(ids.count(source) / len(ids))
            part = share * step[f"train/loss/source/{source}"]
            assert step[f"train/loss_share/source/{source}"] == pytest.approx(part / step["train/loss"])
            assert 0 < step[f"train/w_c/source/{source}"] < 1 or not share
            total += part
        assert total == pytest.approx(step["train/loss"])
    assert runs[name]["losses"] == pytest.approx(runs["sources"]["losses"], rel=1e-9)


def test_reports_are_of_the_chosen_texts_and_of_the_pairs(runs):
    """Rewards, their margin and how often it is positive, from the step's own numbers."""
    for step in runs["cw"]["steps"]:
        margin = step["train/reward_chosen"] - step["train/reward_rejected"]
        assert step["train/reward_margin"] == pytest.approx(margin)
        assert 0 <= step["train/accuracy"] <= 1 and 0 <= step["train/vulnerable"] <= 1
        assert not any(name.startswith("train/_") for name in step)
    tokens = sum(item[0].scored for item in world_pairs())
    assert column(runs["cw"], "tokens")[0] == tokens  # entropies are of the chosen texts


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"beta": 0.0}, "model.beta"),
        ({"beta": math.nan}, "model.beta"),
        ({"tau": 0.0}, "tau"),
        ({"gamma": -1.0}, "gamma"),
        ({"weighting": "hot"}, "model.weighting is 'hot'"),
        ({"dpo_weight": -1.0}, "cannot be negative"),
        ({"dpo_weight": 0.0}, "one must be positive"),
        ({"ell_floor": 3.0, "weighting": "cooling"}, "ell_floor is 3.0; log-probabilities per token are negative"),
        ({"hopeless_below": 5.0}, "hopeless_below is 5.0"),
        ({"gamma": 1.0}, "gamma 1.0 has an effect with model.weighting focal only"),
        ({"dpo_weight": 0.0, "bco_weight": 1.0, "weighting": "cooling"}, "no effect with model.dpo_weight 0"),
        ({"ell_floor": "median"}, "`mean`"),
        ({"detach_weight": False}, "cooling only"),
        ({"reference": "none"}, "choose cache, online or adapters_off"),
    ],
)
def test_settings_out_of_range_or_without_effect(settings, said):
    with pytest.raises(ValueError, match=said):
        DPO(backbone=Backbone(path=MODEL), **settings)


def test_settings_become_the_loss():
    module = DPO(backbone=Backbone(path=MODEL), **MPO, beta=0.2)
    assert module.loss == PreferenceLoss(beta=0.2, **MPO) and module.encoding == "pair"
