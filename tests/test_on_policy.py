"""Rollouts and what becomes of them: several steps from one, groups replaced, completions cut, engines that differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lightning_vlm.rollouts.decode as decode
from lightning_vlm.algorithms import GRPO
from lightning_vlm.algorithms.rollout import ADVANTAGES, CORRECTION, ENGINE, OLD, SAMPLING
from lightning_vlm.models.spec import Backbone
from lightning_vlm.rewards import Reward
from lightning_vlm.rollouts import Sampling

from .grpo_kit import EQUAL, GROUP, PROMPTS, ROLLOUT, SETTINGS, Kept, column, drawn, fit
from .test_dpo import LORA, other  # noqa: F401
from .test_sft_c import MODEL
from .test_step import gap, write_data

SEVERAL = {"steps_per_rollout": 2, "epochs": 2}

# --- several steps from one rollout -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Four updates from one rollout of two steps' prompts, by where the old log-probs come from."""
    folder = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        draw = decode.draw_tokens

        def draw_exactly(logits, *args):
            """The engine draws in float32; here its log-probs are those of its float64 logits."""
            exact = logits.double().log_softmax(-1)
            found = draw(logits, *args)
            return found._replace(logprobs=exact.gather(1, found.tokens[:, None])[:, 0])

        patch.setattr(decode, "draw_tokens", draw_exactly)
        records = {how: fit(folder / how, SEVERAL | {"old_logprobs": how}, steps=4) for how in ("engine", "recompute")}
    return records | {"default": fit(folder / "default", SEVERAL, steps=4)}


def test_old_log_probs_of_the_engine_and_of_the_trainer_are_the_same(several):
    """To 1e-8; as the engine draws them, in float32, to what that leaves."""
    mine, again, rounded = several["engine"], several["recompute"], several["default"]
    for name in ("gradients", "last_gradients"):
        assert gap(mine[name], again[name]) < 1e-8
        assert gap(rounded[name], again[name]) < 1e-5
    assert mine["losses"] == pytest.approx(again["losses"], rel=1e-8)
    assert rounded["losses"] == pytest.approx(again["losses"], rel=1e-5)


def test_each_completion_is_learned_from_in_every_epoch(several):
    first, second, *again = drawn(several["engine"])
    assert [first, second] == again and first != second
    assert {row[0] for row in first}.isdisjoint(row[0] for row in second)


def test_the_ratio_is_one_in_the_first_update_and_not_in_later_ones(several):
    ratios = column(several["engine"], "ratio")
    assert ratios[0] == pytest.approx(1, abs=1e-12)
    assert all(abs(ratio - 1) > 1e-3 for ratio in ratios[1:])
    assert "train/logprob_gap" in several["engine"]["steps"][0]
    assert not any("train/logprob_gap" in step for step in several["engine"]["steps"][1:])


def test_steps_beyond_the_end_are_not_done(tmp_path, several):
    record = fit(tmp_path, SEVERAL, steps=3)
    assert len(record["losses"]) == 3 and record["module"].clock == 3
    assert drawn(record) == drawn(several["default"])[:3]
    assert record["losses"][:2] == several["default"]["losses"][:2]


def test_an_epochs_last_batch_may_feed_fewer_steps(tmp_path):
    """Fifteen prompts, five a step, two steps a rollout: two steps, one, two …"""
    record = fit(tmp_path, {"steps_per_rollout": 2}, steps=4)
    asked = [{row[0] for row in step} for step in drawn(record)]
    assert len(asked[0] | asked[1] | asked[2]) > 2 * PROMPTS and not asked[0] & asked[1] and not asked[1] & asked[2]
    assert asked[3] & asked[0]
    assert [len(rollouts) for rollouts in record["module"].drawn] == [10, 5, 10]
    ratios = [abs(ratio - 1) for ratio in column(record, "ratio")]
    assert max(ratios[0], ratios[2], ratios[3]) < 1e-6 < ratios[1]


# --- groups replaced --------------------------------------------------------------------------------------------------

PAIRS = {"group_size": 2}


def spreads(rollouts) -> list[bool]:
    return [bool(rollout.totals[0] != rollout.totals[1]) for rollout in rollouts]


def test_groups_without_spread_are_replaced_by_the_first_that_have_one(tmp_path):
    record = fit(tmp_path, PAIRS | {"dynamic_sampling": 5})
    module = record["module"]
    first, *more = module.drawn
    assert not all(spreads(first)) and more
    usable = [r for attempt in module.drawn for r, good in zip(attempt, spreads(attempt), strict=True) if good]
    assert [r.place for r in module.last_rollouts] == [r.place for r in usable[:PROMPTS]]
    assert len(drawn(record)[0]) == 2 * PROMPTS
    assert column(record, "groups") == [PROMPTS] and column(record, "refills") == [len(more)] == [module.refills]
    assert column(record, "groups_usable") == [sum(spreads(first)) / PROMPTS]
    # What is reported of the rollout is what the first attempt has found.
    assert column(record, "zero_spread") == [1 - sum(spreads(first)) / PROMPTS]
    assert column(record, "reward")[0] == pytest.approx(sum(float(r.totals.sum()) for r in first) / 2 / PROMPTS)


def test_as_many_tries_as_allowed(tmp_path):
    """Without any spread nothing is learned, and the further prompts go on where the last step's stopped."""
    record = fit(tmp_path, PAIRS | EQUAL | {"dynamic_sampling": 2}, steps=2)
    module = record["module"]
    assert len(module.drawn) == 6 and module.refills == 4 and column(record, "refills") == [2.0, 2.0]
    assert column(record, "groups") == [0.0, 0.0] and record["losses"] == [0.0, 0.0] and drawn(record) == [[], []]
    ids = [[r.sample.id for r in attempt] for attempt in module.drawn]
    again = [*ids[1], *ids[2], *ids[4]]  # fifteen prompts: a whole second walk
    assert len(set(again)) == 15 and again != sorted(again)


def test_a_prompt_that_comes_again_is_answered_anew(tmp_path):
    module = fit(tmp_path, PAIRS | EQUAL | {"dynamic_sampling": 3})["module"]
    answers = {}
    for rollout in (r for attempt in module.drawn for r in attempt):
        answers.setdefault(rollout.sample.id, []).append([c.ids for c in rollout.completions])
    twice = [found for found in answers.values() if len(found) > 1]
    assert twice and all(one != two for one, two, *_ in twice)


def test_groups_are_filtered_on_one_part_of_the_reward(tmp_path):
    """`form` is the same for all; by default it is looked at, for it comes first."""
    own = PAIRS | {"dynamic_sampling": 1, "rewards": EQUAL["rewards"] | SETTINGS["rewards"]}
    assert column(fit(tmp_path / "form", own), "groups") == [0.0]
    record = fit(tmp_path / "length", own | {"filter_on": "length"})
    assert column(record, "groups")[0] > 0
    assert all(row.info[ADVANTAGES].all() for rollout in record["module"].last_rollouts for row in rollout.rows)


def test_refilled_steps_are_of_equal_size(tmp_path):
    record = fit(tmp_path, PAIRS | {"dynamic_sampling": 9, "steps_per_rollout": 2}, steps=2)
    assert [len(rows) for rows in drawn(record)] == [2 * PROMPTS] * 2
    places = [rollout.place for rollout in record["module"].last_rollouts]
    assert len(places) == 2 * PROMPTS and places[:PROMPTS] == sorted(places)[:PROMPTS]


# --- completions that were cut ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_truncated_completions_are_left_out_of_the_count(tmp_path, aggregation):
    """At most three tokens; advantages still know those that were cut. With the ratio at 1 the loss is −ΣA/count."""
    short = {"mask_truncated": True, "rollout": ROLLOUT | {"max_new_tokens": 3}, "aggregation": aggregation}
    record = fit(tmp_path, short)
    total, kept, tokens = 0.0, 0, 0
    for rollout in record["module"].last_rollouts:
        spread = rollout.totals.std() + 1e-4
        for reward, completion in zip(rollout.totals, rollout.completions, strict=True):
            if completion.finished:
                share = 1 if aggregation == "sequence" else len(completion.ids)
                total -= float((reward - rollout.totals.mean()) / spread) * share
                kept, tokens = kept + 1, tokens + len(completion.ids)
    assert 0 < kept < PROMPTS * GROUP and column(record, "truncated")[0] == 1 - kept / (PROMPTS * GROUP)
    count = {"token": tokens, "sequence": kept, "constant": kept * 3}[aggregation]
    assert record["losses"][0] == pytest.approx(total / count, rel=1e-6)


class Endless(Kept):
    """Never comes to an end."""

    def generate(self, rows, keys):
        return [[replace(c, finished=False) for c in group] for group in super().generate(rows, keys)]


@pytest.mark.parametrize("more", [{}, {"entropy_coef": 0.1}, {"aggregation": "sequence"}, SEVERAL], ids=str)
def test_with_all_truncated_a_step_does_nothing(tmp_path, more):
    record = fit(tmp_path, {"mask_truncated": True} | more, algorithm=Endless, steps=2)
    assert record["steps"][0]["train/truncated"] == 1.0 and record["losses"] == [0.0, 0.0]
    assert column(record, "tokens") == [0.0, 0.0]
    assert all(not g.any() for g in (record["gradients"] | record["last_gradients"]).values())


# --- engines that differ from the trainer -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_what_top_k_draws_otherwise_is_corrected(tmp_path, how):
    """Each token, or completion, by the mass that was kept of its distributions; at a ratio of 1 the loss is −ΣAc/N."""
    cap = 1.39  # what is kept is .69 to .73
    record = fit(tmp_path, {"correction": how, "correction_cap": cap, "rollout": ROLLOUT | {"top_k": 40}})
    rows = [row for rollout in record["module"].last_rollouts for row in rollout.rows]
    total, factors, run = 0.0, [], 0
    for row in rows:
        ratios = (row.info[OLD] - row.info[SAMPLING]).exp()
        assert torch.equal(row.info[OLD], row.info[ENGINE]) and (ratios <= 1 + 1e-6).all()
        want = ratios.clamp(max=cap)
        if how == "mask":
            inside = 1 / cap <= float(ratios.log().mean().exp()) <= cap
            want = torch.full_like(ratios, float(inside))
        assert row.info[CORRECTION].tolist() == pytest.approx(want.tolist(), rel=1e-12)
        total -= float((row.info[ADVANTAGES] * want).sum())
        if row.info[ADVANTAGES].any():
            factors, run = factors + want.tolist(), run + row.scored
    assert record["losses"][0] == pytest.approx(total / sum(row.scored for row in rows), rel=1e-6)
    assert column(record, "correction")[0] == pytest.approx(sum(factors) / run, rel=1e-9)
    assert 0 < sum(factors) < run


def test_a_copy_in_bfloat16_generates_with_the_present_weights(tmp_path):
    """Gap of rounding only, in every step; old log-probs are the trainer's, so that ratios are 1 before an update."""
    own = {"rollout_dtype": "bfloat16", "correction": "truncate"}
    record = fit(tmp_path, own, steps=3, dtype="float32")
    for step in record["steps"]:
        assert 1e-4 < step["train/logprob_gap"] < 0.03
        assert step["train/ratio"] == pytest.approx(1, abs=1e-4)
        assert 0.5 < step["train/correction"] < 2 and step["train/correction"] != 1
    assert column(fit(tmp_path / "own", dtype="float32"), "logprob_gap")[0] < 1e-5


class Wrong(Kept):
    """From a given step on, its engine says .01 nats too little of every token."""

    since = 0

    def generate(self, rows, keys):
        groups = super().generate(rows, keys)
        if self.clock < self.since:
            return groups
        return [[replace(c, logprobs=[x - 0.01 for x in c.logprobs]) for c in group] for group in groups]


def test_an_engine_that_differs_before_the_first_step_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"differ by 0\.01 nats per token at optimizer step 0, more than 1e-06"):
        fit(tmp_path / "first", algorithm=Wrong)
    with pytest.raises(ValueError, match=r"differ by 0\.01 nats .* more than 0\.001"):
        fit(tmp_path / "single", algorithm=Wrong, dtype="float32")
    record = fit(tmp_path / "allowed", {"max_gap": 0.02}, algorithm=Wrong)
    assert column(record, "logprob_gap")[0] == pytest.approx(0.01, abs=1e-6)


def test_an_engine_that_differs_later_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Wrong, "since", 1)
    with pytest.warns(UserWarning, match=r"differ by 0\.01 nats per token at optimizer step 1"):
        record = fit(tmp_path, algorithm=Wrong, steps=2)
    assert len(record["losses"]) == 2


# --- the start of the run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [{}, LORA], ids=["online", "adapters_off"])
def test_the_kl_to_the_start_is_0_at_first_and_measured_every_so_often(tmp_path, own):
    record = fit(tmp_path, own | {"kl_every": 2}, steps=4)
    measured = ["train/kl_start" in step for step in record["steps"]]
    assert measured == [True, False, True, False]
    assert abs(column({"steps": record["steps"][:1]}, "kl_start")[0]) < 1e-10
    assert record["steps"][2]["train/kl_start"] > 1e-5
    # What is only measured teaches nothing.
    assert record["losses"] == pytest.approx(fit(tmp_path / "without", own, steps=4)["losses"], rel=1e-12)


def test_entropies_of_all_sampled_tokens_reach_the_monitors(tmp_path):
    module = fit(tmp_path)["module"]
    want = [x for rollout in module.last_rollouts for c in rollout.completions for x in c.entropies]
    assert sorted(module.last_step["entropies"].tolist()) == pytest.approx(sorted(want), rel=1e-6)


def test_without_rewards_what_grades_the_data_does(tmp_path):
    """Questions of the world by `world/exact`; plain conversations have nothing of the kind."""
    record = fit(tmp_path, {"rewards": {}, "dynamic_sampling": 1})
    assert record["module"].rewards == {"accuracy": Reward(kind="accuracy", rule="world/exact")}
    assert column(record, "reward") == column(record, "reward/accuracy")
    with pytest.raises(ValueError, match=r"model.rewards.accuracy: no rule says by itself .*; set its rule"):
        fit(tmp_path, {"rewards": {}}, worlds={}, data=write_data(tmp_path / "data", "text", lambda i: False))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        *(({name: 0}, f"model.{name} must be at least 1, got 0") for name in ("group_size", "steps_per_rollout")),
        *(({name: 0}, f"model.{name} must be at least 1") for name in ("epochs", "rollout_batch_size")),
        *(({name: 0}, f"model.{name} must be at least 1") for name in ("reward_workers", "correction_cap")),
        ({"max_gap": 0.0}, "model.max_gap must be positive, got 0.0"),
        ({"rollout": Sampling()}, "model.rollout.temperature is 0"),
        ({"correction": "clip"}, "model.correction is 'clip'; choose none, truncate or mask"),
        ({"old_logprobs": "trainer"}, "model.old_logprobs is 'trainer'; choose engine or recompute"),
        ({"server": "http://x", "rollout_dtype": "float16"}, "model.rollout_dtype has no effect with model.server"),
        ({"old_logprobs": "engine"}, "model.old_logprobs has no effect where a rollout feeds one optimizer step"),
        ({"aggregation": "mean"}, "model.aggregation is 'mean'; choose token, sequence, constant"),
        ({"surrogate": "ppo"}, "model.surrogate is 'ppo'; choose clip, cispo, sapo"),
        ({"importance": "group"}, "model.importance is 'group'; choose token, sequence"),
        *(({name: -0.1}, f"model.{name} cannot be negative") for name in ("clip_low", "clip_high", "kl_beta")),
        *(({name: -1}, f"model.{name} cannot be negative") for name in ("kl_every", "dynamic_sampling")),
        ({"entropy_coef": -0.1}, "model.entropy_coef cannot be negative"),
        ({"dual_clip": 1.2}, "model.dual_clip must lie above 1 \\+ clip_high = 1.2, got 1.2"),
        ({"surrogate": "sapo", "clip_high": 0.28}, "no effect with model.surrogate sapo"),
        ({"surrogate": "cispo", "importance": "sequence"}, "does not go with model.surrogate cispo"),
        ({"reference": "online"}, "model.reference has no effect without model.kl_beta or model.kl_every"),
        ({"reference_model": "x"}, "model.reference has no effect without"),
        ({"reference": "cache", "kl_beta": 0.1}, "model.reference cannot be cache"),
        ({"group_size": 1}, "model.group_size must be at least 2 to compare completions, got 1"),
        ({"filter_on": "lenght"}, "model.filter_on names no part of the reward: 'lenght'.*length"),
    ],
)
def test_settings_out_of_range_or_without_effect(settings, said):
    rewards = {"length": Reward(kind="length", target=6)}
    with pytest.raises(ValueError, match=said) as refused:
        GRPO(**({"backbone": Backbone(path=MODEL), "rewards": rewards} | settings))
    assert "\n" not in str(refused.value)
