"""SFT-C through the whole path: its limits, its gate over the whole step, what it throws away, what it skips."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from lightning_vlm.algorithms import SFTC
from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.world import WorldSource
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone

from .conftest import run_scenarios
from .test_step import gap

BIG = 10**6
MODEL = "embedded:qwen2_5_vl-tiny"
SIZE, BATCH = 15, 7
SETTINGS = {"lr": 1e-3, "clip_norm": 0.0, "micro_batch_tokens": BIG, "schedule": "constant"}


@cache
def world_pairs() -> list:
    """[chosen, rejected] of the first step's samples."""
    encoder, source = Encoder(load_processor(Backbone(path=MODEL))), WorldSource(size=SIZE, pairs=True)
    return [encoder.encode_pair(source[i]) for i in range(BATCH)]


def start() -> Policy:
    """The model that every run here starts from, in float64."""
    model = load_model(Backbone(path=MODEL, dtype="float64"))
    return Policy(model, family_of(model))


def full_logprobs(policy, row) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, V] log π over the vocabulary at the scored places, by the model's own forward of this row alone; [n] ids."""
    inputs = {"input_ids": row.input_ids[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    inputs |= policy.family.merge(row.images)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == policy.model.config.image_token_id).int()
    places = row.loss_mask.nonzero()[:, 0]
    return policy.model(**inputs).logits[0].log_softmax(-1)[places - 1], row.input_ids[places]


@cache
def nll_gradients(smoothing: float = 0.0) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Of either side of the first step: NLL per token, and its gradient; by a slow oracle over the full vocabulary."""
    out = {}
    for side, name in enumerate(("chosen", "rejected")):
        policy, total, tokens = start(), 0.0, 0
        for item in world_pairs():
            logprobs, ids = full_logprobs(policy, item[side])
            alpha = smoothing if name == "rejected" else 0.0
            total = total + torch.nn.functional.nll_loss(logprobs, ids, reduction="sum") * (1 - alpha)
            total = total - alpha * logprobs.mean(-1).sum()
            tokens += len(ids)
        (total / tokens).backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in policy.model.named_parameters()}
        out[name] = (total / tokens).item(), grads
    return out


def mixed(weight: float, smoothing: float = 0.0) -> dict[str, torch.Tensor]:
    """∇(NLL⁺ + weight · NLL⁻)."""
    (_, chosen), (_, rejected) = nll_gradients(smoothing).values()
    return {name: chosen[name] + weight * rejected[name] for name in chosen}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Records of the scenarios on one process and on two."""
    folder = tmp_path_factory.mktemp("sft_c")
    base = {"model": MODEL, "world": {"size": SIZE, "pairs": True}, "batch_size": BATCH, "shuffle": False, "steps": 2}
    found = nll_gradients()["rejected"][0]
    kinds = {
        "asleep": {"threshold": 0.01},
        "awake": {"threshold": 1e3, "constraint_weight": 0.3},
        "just_awake": {"threshold": found + 1e-4, "constraint_weight": 0.3},
        "just_asleep": {"threshold": found - 1e-4, "constraint_weight": 0.3},
        "smooth": {"mode": "smooth", "smooth_weight": 0.2, "label_smoothing": 0.3},
        "fraction": {"threshold": 1e3, "negative_fraction": 0.5},
    }

    def spec(name, settings, **changes):
        changes = {"algorithm": "SFTC", "run_dir": str(folder / name)} | changes
        return base | {"name": name, "settings": SETTINGS | settings} | changes

    one = [
        spec("sft", {}, algorithm="SFT", steps=4),
        spec("zero", {"constraint_weight": 0.0}, steps=4),
        spec("smooth_zero", {"mode": "smooth", "smooth_weight": 0.0}, steps=4),
        spec("asleep_4", kinds["asleep"], steps=4),
        spec("lazy_asleep", kinds["asleep"] | {"lazy": 2}, steps=6),
        spec("lazy_wakes", {"threshold": found - 0.3, "lr": 1e-2, "lazy": 3}, steps=12),
        spec("never_lazy", {"threshold": found - 0.3, "lr": 1e-2}, steps=12),
        spec("few", kinds["fraction"] | {"negative_fraction": 0.01}, steps=2),
        *(spec(name, settings, steps=4 if name == "fraction" else 2) for name, settings in kinds.items()),
        *(
            spec(f"{name}_cut", kinds[name] | {"micro_batch_tokens": 1})
            for name in ("just_awake", "just_asleep", "smooth")
        ),
        spec("alone", kinds["awake"] | {"share_prompts": False, "micro_batch_tokens": 300}),
    ]
    two = [
        spec(f"{strategy}_{name}", settings | cut, strategy=strategy, steps=4 if name == "fraction" else 2)
        for strategy, cut in (("ddp", {"micro_batch_tokens": 300}), ("fsdp2", {}))
        for name, settings in kinds.items()
    ]
    records = {}
    for processes, specs in ((1, one), (2, two)):
        done = run_scenarios(specs, folder / f"p{processes}", processes=processes)
        assert done.returncode == 0, done.stderr
        records |= torch.load(folder / f"p{processes}" / "records.pt")
    return records


def column(record, name):
    """A metric over the steps; None where a step has none."""
    return [step.get(f"train/{name}") for step in record["steps"]]


@pytest.mark.parametrize("name", ["zero", "smooth_zero", "asleep_4"])
def test_without_a_penalty_it_is_sft_to_the_bit(runs, name):
    """λ = 0, ε = 0, and the constraint asleep, whose first step throws a pass over the pairs away."""
    assert runs[name]["losses"] == runs["sft"]["losses"]
    assert all(torch.equal(w, runs["sft"]["weights"][n]) for n, w in runs[name]["weights"].items())


@pytest.mark.parametrize("name", ["ddp_asleep", "fsdp2_asleep", "fsdp2_just_asleep", "ddp_just_asleep"])
def test_asleep_on_two_processes_nothing_of_the_negatives_comes_back(runs, name):
    """Neither in the step that throws their gradient away nor in the next one."""
    sft, asleep = runs["sft"], runs[name]
    assert gap(asleep["gradients"], sft["gradients"]) < 1e-9
    assert asleep["losses"][0] == pytest.approx(sft["losses"][0], rel=1e-12)
    one = runs[name.split("_", 1)[1]]
    assert asleep["losses"] == pytest.approx(one["losses"], rel=1e-9)
    assert gap(asleep["last_gradients"], one["last_gradients"]) < 1e-9
    assert gap(asleep["weights"], one["weights"]) < 1e-8


@pytest.mark.parametrize("name", ["awake", "alone", "ddp_awake", "fsdp2_awake"])
def test_awake_it_raises_the_negatives_nll(runs, name):
    """∇(NLL⁺ − λ·NLL⁻), and the loss is NLL⁺ + λ·(C − NLL⁻)."""
    oracle = nll_gradients()
    assert gap(runs[name]["gradients"], mixed(-0.3)) < 1e-9
    want = oracle["chosen"][0] + 0.3 * (1e3 - oracle["rejected"][0])
    assert runs[name]["losses"][0] == pytest.approx(want, rel=1e-12)
    step = runs[name]["steps"][0]
    assert step["train/nll_rejected"] == pytest.approx(oracle["rejected"][0], rel=1e-12)
    assert step["train/nll"] == pytest.approx(oracle["chosen"][0], rel=1e-12) and step["train/awake"] == 1.0
    assert gap(runs[name]["last_gradients"], runs["awake"]["last_gradients"]) < 1e-9


@pytest.mark.parametrize("how", ["just_awake_cut", "just_asleep_cut", "ddp_just_awake", "fsdp2_just_awake"])
def test_the_gate_is_one_for_the_whole_step(runs, how):
    """Within 1e-4 nats of C; the negatives of single pairs and ranks lie on both sides of it."""
    policy, means = start(), []
    for _, rejected in world_pairs():
        logprobs, ids = full_logprobs(policy, rejected)
        means.append(-logprobs.gather(1, ids[:, None]).mean().item())
    assert min(means) < nll_gradients()["rejected"][0] - 0.01 < nll_gradients()["rejected"][0] + 0.01 < max(means)
    expected = mixed(-0.3 if "awake" in how else 0.0)
    assert gap(runs[how]["gradients"], expected) < 1e-9
    if how.endswith("_cut"):
        assert runs[how]["steps"][0]["train/micro_batches"] == BATCH
        assert gap(runs[how]["gradients"], runs[how.removesuffix("_cut")]["gradients"]) < 1e-9


@pytest.mark.parametrize("name", ["smooth", "smooth_cut", "ddp_smooth", "fsdp2_smooth"])
def test_smooth_adds_gentle_supervision(runs, name):
    """∇(NLL⁺ + ε·smoothed NLL⁻)."""
    assert gap(runs[name]["gradients"], mixed(0.2, 0.3)) < 1e-9
    oracle = nll_gradients(0.3)
    assert runs[name]["losses"][0] == pytest.approx(oracle["chosen"][0] + 0.2 * oracle["rejected"][0], rel=1e-12)


def test_asleep_it_looks_at_the_negatives_every_lazy_steps_only(runs):
    """It starts awake, so it looks at step 0; then at steps 2 and 4. The gradient is SFT's throughout."""
    looked = [value is not None for value in column(runs["lazy_asleep"], "nll_rejected")]
    assert looked == [True, False, True, False, True, False]
    assert column(runs["lazy_asleep"], "awake") == [0.0] * 6
    assert runs["lazy_asleep"]["losses"][:4] == runs["sft"]["losses"]


def test_it_wakes_and_then_looks_every_step(runs):
    """As the model learns the negatives become likely; the lazy run notices at the next multiple of 3."""
    for name, every in (("never_lazy", 1), ("lazy_wakes", 3)):
        awake, found = column(runs[name], "awake"), column(runs[name], "nll_rejected")
        first = awake.index(1.0)
        assert 0 < first < 11 and first % every == 0, (name, awake)
        assert [f is not None for f in found[:first]] == [step % every == 0 for step in range(first)]
        assert all(f is not None for f in found[first : first + 2])
        threshold = nll_gradients()["rejected"][0] - 0.3
        for state, value in zip(awake, found, strict=True):
            assert value is None or state == (value < threshold)
    slept = column(runs["never_lazy"], "awake").index(1.0)
    assert runs["lazy_wakes"]["losses"][:slept] == runs["never_lazy"]["losses"][:slept]


def drawn(record):
    """Per step, the ids whose negative was looked at, over all ranks."""
    ranks = record["rows"]
    return [{row[0] for rank in ranks for row in rank[step] if row[1] == "rejected"} for step in range(len(ranks[0]))]


def test_a_fraction_of_the_negatives_is_drawn_by_id(runs):
    """The same on one and two processes, another in step 3, which has the samples of step 0 again."""
    ids = drawn(runs["fraction"])
    assert 0 < len(ids[0]) < BATCH and 0 < len(ids[3]) < BATCH and ids[3] != ids[0]
    for strategy in ("ddp", "fsdp2"):
        assert drawn(runs[f"{strategy}_fraction"]) == ids
        assert gap(runs[f"{strategy}_fraction"]["gradients"], runs["fraction"]["gradients"]) < 1e-9
        assert runs[f"{strategy}_fraction"]["losses"] == pytest.approx(runs["fraction"]["losses"], rel=1e-9)


def test_a_step_that_draws_no_negative_neither_looks_nor_changes_its_mind(runs):
    """One in a hundred of 14: none. The constraint stays awake, and the step is SFT's."""
    assert drawn(runs["few"]) == [set(), set()]
    assert column(runs["few"], "nll_rejected") == [None, None] and column(runs["few"], "awake") == [1.0, 1.0]
    assert runs["few"]["losses"] == pytest.approx(runs["sft"]["losses"][:2], rel=1e-12)
    assert gap(runs["few"]["last_gradients"], runs["asleep"]["last_gradients"]) < 1e-9


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"mode": "hard"}, "model.mode is 'hard'"),
        ({"threshold": -1.0}, "cannot be negative"),
        ({"constraint_weight": -0.1}, "cannot be negative"),
        ({"label_smoothing": 1.0, "mode": "smooth"}, r"label_smoothing must lie in \[0, 1\)"),
        ({"label_smoothing": 0.1}, "no effect in mode constraint"),
        ({"negative_fraction": 0.0}, "negative_fraction"),
        ({"lazy": 0}, "model.lazy"),
        ({"lazy": 2, "mode": "smooth"}, "no effect in mode smooth"),
        ({"threshold": 1.0, "mode": "smooth"}, "threshold has no effect in mode smooth"),
        ({"smooth_weight": 0.1}, "smooth_weight has no effect in mode constraint"),
    ],
)
def test_settings_out_of_range_or_without_effect(settings, said):
    with pytest.raises(ValueError, match=said):
        SFTC(backbone=Backbone(path=MODEL), **settings)
