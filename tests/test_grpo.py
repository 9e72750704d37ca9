"""GRPO's step: hand arithmetic, a slow oracle, and one gradient however the step is cut up or spread over processes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lightning_vlm.algorithms import GRPO
from lightning_vlm.algorithms.rollout import ADVANTAGES, ENGINE, OLD
from lightning_vlm.losses.terms import objective
from lightning_vlm.models.batch import Row
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.spec import Backbone
from lightning_vlm.rewards import Reward
from lightning_vlm.rollouts import Sampling

from .conftest import run_scenarios
from .grpo_kit import EQUAL, GROUP, PROMPTS, ROLLOUT, Kept, column, drawn, fit, oracle, spec
from .test_dpo import LORA, other  # noqa: F401
from .test_sft_c import MODEL
from .test_step import gap

AGGREGATIONS = ["token", "sequence", "constant"]
# Two updates, the second of them off-policy.
TWICE = {"epochs": 2, "old_logprobs": "recompute", "clip_high": 0.28}


def made(**settings) -> GRPO:
    """The algorithm by itself."""
    rewards = {"length": Reward(kind="length", target=6)}
    return GRPO(**({"backbone": Backbone(path=MODEL), "rewards": rewards} | settings))


# --- by hand ----------------------------------------------------------------------------------------------------------


class TwoTokens:
    """A policy over two tokens, of which it gives token 1 the log-probs [N] it is told."""

    def __init__(self, logprobs: torch.Tensor) -> None:
        self.hidden = torch.log(logprobs.exp() / (1 - logprobs.exp()))[:, None].requires_grad_()

    def __call__(self, batch, *, head_loss):
        return head_loss(self.hidden, torch.tensor([[0.0], [1.0]], dtype=torch.float64), batch.labels)


def completion(info: dict[str, list[float]]) -> Row:
    """A row of token 1 behind a prompt of one token, with what is known of each token."""
    n = len(info[OLD])
    mask = torch.tensor([False] + [True] * n)
    columns = {name: torch.tensor(values, dtype=torch.float64) for name, values in info.items()}
    return Row("q", torch.ones(n + 1, dtype=torch.long), mask, info=columns)


@pytest.mark.parametrize(
    "aggregation, loss, slopes",
    [
        ("token", (-2.4 + 3.3) / 4, [0.0, 0.0, 1 / 4, 1.5 / 4]),
        ("sequence", (-2.4 + 3.3 / 3) / 2, [0.0, 0.0, 1 / 6, 1.5 / 6]),
        ("constant", (-2.4 + 3.3) / 20, [0.0, 0.0, 1 / 20, 1.5 / 20]),
    ],
)
def test_aggregations_by_hand(aggregation, loss, slopes):
    """One token of A = 2 and ratio 1.5, clipped: −2.4. Three of A = −1 and ratios ½, 1, 1.5: .8 (clipped), 1, 1.5."""
    module = made(aggregation=aggregation, rollout=Sampling(temperature=1.0, max_new_tokens=10))
    logprobs = torch.log(torch.tensor([0.5, 0.25, 0.75, 0.6], dtype=torch.float64))
    old = (logprobs - torch.log(torch.tensor([1.5, 0.5, 1.0, 1.5], dtype=torch.float64))).tolist()
    one = completion({OLD: old[:1], ENGINE: old[:1], ADVANTAGES: [2.0]})
    three = completion({OLD: old[1:], ENGINE: old[1:], ADVANTAGES: [-1.0] * 3})
    module.policy = TwoTokens(logprobs)
    labels, rows = torch.ones(4, dtype=torch.long), torch.tensor([0, 1, 1, 1])
    micro = module.losses(SimpleNamespace(rows=[one, three], labels=labels, row_index=rows))
    got = objective(micro.terms, module.counts([[one], [three]]))
    assert got.item() == pytest.approx(loss, rel=1e-12)
    got.backward()
    # d log p/d logit = 1 − p
    want = torch.tensor(slopes, dtype=torch.float64) * (1 - logprobs.exp())
    assert module.policy.hidden.grad[:, 0].tolist() == pytest.approx(want.tolist(), abs=1e-15)
    shares = {name: float(total) / count for name, (total, count) in micro.metrics.items()}
    assert shares == pytest.approx(
        {
            "clip_low": 1 / 4,
            "clip_high": 1 / 4,
            "ratio": 4.5 / 4,
            "logprob_gap": (2 * math.log(1.5) + math.log(2)) / 4,
        }
    )


# --- the first step against the oracle --------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("std", [True, False])
def test_the_first_step_against_a_slow_oracle(tmp_path, aggregation, std):
    record = fit(tmp_path, {"aggregation": aggregation, "advantage_std": std})
    rollouts = record["module"].last_rollouts
    loss, grads = oracle(rollouts, aggregation=aggregation, std=std)
    assert record["losses"][0] == pytest.approx(loss, rel=1e-9)
    assert gap(record["gradients"], grads) < 1e-9
    lengths = {row.scored for rollout in rollouts for row in rollout.rows}
    assert len(lengths) > 3 and all(len(rollout.rows) == GROUP for rollout in rollouts)


def load(path: str) -> Policy:
    model = load_model(Backbone(path=path, dtype="float64"))
    return Policy(model, family_of(model))


@pytest.mark.parametrize(
    "importance, aggregation", [*(("token", name) for name in AGGREGATIONS), ("sequence", "sequence")]
)
def test_entropy_and_kl_against_a_slow_oracle(tmp_path, other, aggregation, importance):  # noqa: F811
    """All at once, at a temperature of its own; then each alone, without any advantage."""
    kl = {"kl_beta": 0.3, "reference": "online", "reference_model": other}
    hot = ROLLOUT | {"temperature": 1.3}
    cases = [kl | {"entropy_coef": 0.2, "rollout": hot}, kl | EQUAL, {"entropy_coef": 0.2} | EQUAL]
    for number, case in enumerate(cases[: 3 if importance == "token" else 1]):
        own = case | {"aggregation": aggregation, "importance": importance}
        record = fit(tmp_path / str(number), own)
        loss, grads = oracle(
            record["module"].last_rollouts,
            aggregation=aggregation,
            entropy_coef=case.get("entropy_coef", 0.0),
            kl_beta=case.get("kl_beta", 0.0),
            reference=load(other),
            temperature=case.get("rollout", ROLLOUT)["temperature"],
        )
        assert record["losses"][0] == pytest.approx(loss, rel=1e-8)
        assert gap(record["gradients"], grads) < 1e-8
        assert abs(loss) > 1e-3


# --- what has no gradient ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_equal_rewards_give_exactly_no_gradient(tmp_path, aggregation):
    """For as many steps as the check of trainable parts looks at, and one more."""
    record = fit(tmp_path, EQUAL | {"aggregation": aggregation}, steps=4)
    assert record["losses"] == [0.0] * 4 and column(record, "zero_spread") == [1.0] * 4
    assert all(not g.any() for g in (record["gradients"] | record["last_gradients"]).values())
    before = dict(load(MODEL).model.named_parameters())
    assert all(torch.equal(w, before[name]) for name, w in record["weights"].items())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_completions_without_advantage_are_not_run_but_counted(tmp_path, monkeypatch, aggregation):
    record = fit(tmp_path / "skipped", {"aggregation": aggregation})
    monkeypatch.setattr(Kept, "learns", lambda module, row: True)
    whole = fit(tmp_path / "whole", {"aggregation": aggregation})
    assert gap(record["gradients"], whole["gradients"]) < 1e-12
    assert record["losses"] == pytest.approx(whole["losses"], rel=1e-12)
    some = [row for rollout in record["module"].last_rollouts for row in rollout.rows if row.info[ADVANTAGES].any()]
    assert column(record, "rows") == [len(some)] and len(some) < PROMPTS * GROUP
    assert column(record, "tokens") == [sum(row.scored for row in some)] < column(whole, "tokens")
    assert column(whole, "rows") == [PROMPTS * GROUP]


@pytest.mark.parametrize("more", [{"kl_beta": 0.1}, {"entropy_coef": 0.1}])
def test_with_kl_or_entropy_every_completion_is_run(tmp_path, more):
    assert column(fit(tmp_path, more), "rows") == [PROMPTS * GROUP]


# --- one gradient -----------------------------------------------------------------------------------------------------

CUTS = {
    "budget 1": {"micro_batch_tokens": 1},
    "budget 120": {"micro_batch_tokens": 120},
    "rows apart": {"share_prompts": False},
    "rows apart, budget 90": {"share_prompts": False, "micro_batch_tokens": 90},
    "images again": {"share_images": False},
    "generated by three": {"rollout_batch_size": 3},
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Records of two updates from one rollout on one process, by aggregation."""
    folder = tmp_path_factory.mktemp("one")
    return {name: fit(folder / name, TWICE | {"aggregation": name}, steps=2) for name in AGGREGATIONS}


def same(record, whole) -> bool:
    """Both updates' gradients, to rounding, and what was learned from."""
    first, last = (gap(record[name], whole[name]) for name in ("gradients", "last_gradients"))
    return first < 1e-9 and last < 1e-8 and drawn(record) == drawn(whole)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("how", CUTS)
def test_the_gradient_does_not_depend_on_how_the_step_is_cut(tmp_path, one, aggregation, how):
    record = fit(tmp_path, TWICE | {"aggregation": aggregation} | CUTS[how], steps=2)
    assert same(record, one[aggregation])
    for name in ("loss", "ratio", "clip_low", "clip_high", "entropy", "tokens"):
        assert column(record, name) == pytest.approx(column(one[aggregation], name), rel=1e-9)
    if "budget" in how:
        assert column(record, "micro_batches")[0] >= 2
    if how == "rows apart":
        assert column(record, "padded_tokens")[0] > 1.5 * column(one[aggregation], "padded_tokens")[0]


def test_the_second_update_is_off_policy(one):
    """Ratios are 1 before it, and move away from it afterwards; some are clipped on either side."""
    for record in one.values():
        ratios = column(record, "ratio")
        assert ratios[0] == pytest.approx(1, abs=1e-12) and abs(ratios[1] - 1) > 1e-3
        assert column(record, "clip_low")[0] == 0 < column(record, "clip_low")[1]
        assert column(record, "clip_high")[0] == 0 < column(record, "clip_high")[1]


# --- two processes ----------------------------------------------------------------------------------------------------

REFILLED = {"group_size": 2, "dynamic_sampling": 3}
KL = {"kl_beta": 0.1, "entropy_coef": 0.05, "importance": "sequence", "aggregation": "sequence"}
# One prompt a step: the other rank has nothing to ask and nothing to run.
LOPSIDED = {"correction": "truncate", "correction_cap": 1.5, "rollout": ROLLOUT | {"top_p": 0.9}}
OTHERS = {
    "refilled": (REFILLED, {"steps": 2}),
    "kl": (KL, {"steps": 2}),
    "lopsided": (LOPSIDED, {"batch_size": 1, "steps": 2}),
    "equal": (EQUAL, {"steps": 4}),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Records on two processes, of three prompts and two."""
    folder = tmp_path_factory.mktemp("two")
    specs = []
    for strategy in ("ddp", "fsdp2"):
        cut = {"micro_batch_tokens": 300} if strategy == "fsdp2" else {}
        for name in AGGREGATIONS:
            own = TWICE | {"aggregation": name} | cut
            specs.append(spec(f"{strategy}_{name}", folder, own, steps=2, strategy=strategy))
        for name, (own, changes) in OTHERS.items():
            specs.append(spec(f"{strategy}_{name}", folder, own | cut, strategy=strategy, **changes))
    for length in (2, 12):
        own = {"rollout": {"temperature": 1.0, "max_new_tokens": length}}
        specs.append(spec(f"gathers_{length}", folder, own, algorithm="CountedExchanges", strategy="fsdp2"))
    done = run_scenarios(specs, folder / "p2", processes=2, timeout=90)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "p2" / "records.pt")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_two_processes(one, two, strategy, aggregation):
    record = two[f"{strategy}_{aggregation}"]
    assert same(record, one[aggregation])
    assert gap(record["weights"], one[aggregation]["weights"]) < 1e-8
    for name in ("loss", "ratio", "clip_low", "entropy", "reward", "completion_length", "zero_spread", "pass_at_2"):
        if name in {key.removeprefix("train/") for key in record["steps"][0]}:
            assert record["steps"][0][f"train/{name}"] == pytest.approx(
                one[aggregation]["steps"][0][f"train/{name}"], rel=1e-9
            )
    lengths = [sum(len(row[3]) for row in rank[0]) for rank in record["rows"]]
    assert lengths[0] != lengths[1] and sum(lengths) == len([i for row in drawn(record)[0] for i in row[1]])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_with_little_to_do_refills_and_a_reference(tmp_path, two, strategy, name):
    own, changes = OTHERS[name]
    record, alone = two[f"{strategy}_{name}"], fit(tmp_path, own, **changes)
    assert drawn(record) == drawn(alone)
    assert record["losses"] == pytest.approx(alone["losses"], rel=1e-8)
    shared = record["gradients"].keys() & alone["gradients"].keys()
    assert shared == alone["gradients"].keys()
    if name == "equal":
        assert all(not g.any() for g in record["gradients"].values())
    else:
        assert gap(record["gradients"], alone["gradients"]) < 1e-8
    if name == "lopsided":
        assert [len(rank[0]) for rank in record["rows"]] == [GROUP, 0]


def test_a_rollout_gathers_weights_once_and_not_per_token(two):
    """Collective calls inside `generate` under FSDP2, of up to two tokens and of up to twelve."""
    short, long = (two[f"gathers_{length}"]["steps"][0] for length in (2, 12))
    assert long["train/completion_length"] > 4 * short["train/completion_length"] >= 4
    assert short["train/exchanges"] == long["train/exchanges"] > 0


# --- LoRA -------------------------------------------------------------------------------------------------------------


def test_the_reference_under_lora_is_the_model_without_adapters(tmp_path):
    """The KL to the start is 0 at first; by adapters off (the default there) as by a second model."""
    own = LORA | {"kl_beta": 0.1, "kl_every": 1}
    records = {
        kind: fit(tmp_path / str(kind), own | {"reference": kind}, steps=3) for kind in (None, "adapters_off", "online")
    }
    for record in records.values():
        assert column(record, "kl_start")[0] == pytest.approx(0, abs=1e-10) and column(record, "kl")[0] < 1e-20
        assert all(kl > 1e-6 for kl in column(record, "kl_start")[1:])
        assert record["losses"] == pytest.approx(records["online"]["losses"], rel=1e-9)
    assert type(records[None]["module"].reference).__name__ == "AdaptersOffReference"
