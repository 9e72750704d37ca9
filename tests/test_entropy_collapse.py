"""Collapse of the rollouts' entropy: when the alarm rings, which cause it names, how the coefficient adapts."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import lightning as L
import pytest

from callbacks import Checkpoint, EntropyCollapse
from callbacks.checkpoint import last_checkpoint
from callbacks.entropy_collapse import CollapseLimits, Evidence, diagnose
from lightning_vlm.algorithms import GRPO, SFT
from lightning_vlm.data.module import VLMData
from lightning_vlm.data.sources import SourceSpec
from lightning_vlm.models.spec import Backbone
from lightning_vlm.rewards import Reward
from lightning_vlm.rollouts import Sampling

# A healthy rollout step, as GRPO reports it.
HEALTHY = {
    "entropy": 0.8, "entropy_thinking": 0.9, "entropy_answer": 0.3, "zero_spread": 0.2, "pass_at_1": 0.5, "reward": 0.6,
    "completion_length": 40.0, "duplicates": 0.1, "clip_low": 0.001, "clip_high": 0.001, "kl_start": 0.0,
    "tokens": 99.0, "lr/language": 1e-5, "lr/projector": 1e-4,
}  # fmt: skip


class Module:
    """What the alarm sees of GRPO."""

    def __init__(self, entropy_coef=0.0):
        self.clock = self.clock_before = 0
        self.last_step, self.last_rollouts, self.logged = {}, [], {}
        self.entropy_coef = entropy_coef

    @property
    def terms(self):
        return ("policy", "entropy_bonus") if self.entropy_coef else ("policy",)

    def log(self, name, value, batch_size):
        self.logged[name] = value


class Run:
    """A run whose steps report what they are told to."""

    def __init__(self, alarm, module=None):
        self.alarm, self.module = alarm, module or Module()
        self.trainer = SimpleNamespace(should_stop=False)
        alarm.on_fit_start(self.trainer, self.module)
        alarm.on_train_start(self.trainer, self.module)

    def batch(self, *steps, **values):
        """One batch that feeds these optimizer steps, or one step of a healthy rollout but for `values`; the alarm."""
        self.module.clock_before = self.module.clock
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for report in steps or [HEALTHY | values]:
                self.alarm.on_before_optimizer_step(self.trainer, self.module, None)
                self.module.clock += 1
                report = {f"train/{name}": value for name, value in report.items() if value is not None}
                self.module.last_step = {"metrics": report}
            self.alarm.on_train_batch_end(self.trainer, self.module, None, None, 0)
        return " ".join(str(w.message) for w in caught) or None


def collapsed(*, slowly=True, **values):
    """The message of a run that starts healthy, and ends with three looks at `values` below a floor of .1."""
    run = Run(EntropyCollapse(floor=0.1))
    run.batch()
    for step in range(25 if slowly else 0):
        run.batch(entropy=0.6 - 0.02 * step)
    messages = [run.batch(**{"entropy": 0.05} | values) for _ in range(3)]
    assert messages[:2] == [None, None]
    return messages[2], run.alarm.cause


# --- causes ----------------------------------------------------------------------------------------------------------


def test_data_too_easy():
    message, cause = collapsed(zero_spread=0.9, pass_at_1=0.97, reward=1.1)
    assert cause == "data"
    assert (
        "entropy collapse at optimizer step 29: rollout entropy 0.05 (0.8 at the start) nats per token, below"
        in message
    )
    assert (
        "Cause: the data is too easy: share of groups without spread 0.9 (0.2 at the start), pass_at_1 0.97" in message
    )
    assert "reward 1.1 (0.6 at the start)" in message and "harder prompts, or set model.dynamic_sampling" in message


def test_data_too_hard():
    message, cause = collapsed(zero_spread=0.8, pass_at_1=0.04)
    assert cause == "data" and "the data is too hard" in message and "pass_at_1 0.04 (0.5 at the start)" in message
    assert "easier prompts or train with SFT first, raise model.group_size, or set model.dynamic_sampling" in message


def test_data_that_is_easy_in_part_and_hard_in_part():
    message, cause = collapsed(zero_spread=0.8, pass_at_1=0.6)
    assert cause == "data" and "too easy in part and too hard in part" in message and "model.group_size" in message


def test_groups_of_copies_have_no_spread_whatever_the_data():
    """Unless everything is solved: then the data is too easy, and that they are copies is said besides."""
    message, cause = collapsed(zero_spread=0.8, pass_at_1=0.6, duplicates=0.75)
    assert cause == "copies" and "share of duplicates 0.75 (0.1 at the start)" in message and "the data" not in message
    assert "Remedy: raise model.rollout.temperature or model.group_size" in message
    message, cause = collapsed(zero_spread=0.8, pass_at_1=1.0, duplicates=0.75)
    assert cause == "data" and "Also: the completions of a group are copies" in message


def test_steps_that_clip_many_tokens():
    message, cause = collapsed(clip_low=0.08, clip_high=0.07)
    assert cause == "steps"
    assert "Cause: the steps are too large at learning rate 0.0001: 15.0% of tokens are clipped." in message
    assert "lower model.lr, add model.kl_beta, or take fewer model.epochs" in message


def test_steps_that_went_far_from_the_start():
    """Farther than the start's entropy of .8 nats, which preferring its own likely tokens could explain."""
    message, cause = collapsed(kl_start=0.9)
    assert cause == "steps" and "the KL to the start is 0.9 nats per token" in message
    assert collapsed(kl_start=0.7)[1] == "concentration"


def test_a_fall_within_few_steps():
    """From step 1 to step 2. The slow runs above fall over 25 steps."""
    message, cause = collapsed(slowly=False)
    assert (
        cause == "steps" and "the entropy fell from 0.8 to 0.05 in 1 optimizer step(s), 0.75 nats per step" in message
    )


def test_short_answers():
    message, cause = collapsed(completion_length=12.0, entropy_thinking=None, entropy_answer=0.02)
    assert cause == "length"
    assert (
        "tokens per completion 12 (40 at the start), entropy_thinking none (0.9), entropy_answer 0.02 (0.3" in message
    )
    assert "kind format or length" in message


def test_the_upper_clip_bound_binds():
    message, cause = collapsed(clip_low=0.004, clip_high=0.03)
    assert cause == "clip" and "3.00% of tokens against 0.40% at the lower one" in message
    assert "raise model.clip_high" in message
    assert collapsed(clip_low=0.02, clip_high=0.03)[1] == "concentration"


def test_nothing_but_concentration():
    message, cause = collapsed()
    assert cause == "concentration" and "from 0.8 to 0.05 nats in 26 optimizer steps; no other sign" in message
    assert "raise model.entropy_coef (or set EntropyCollapse.action: adapt), lower model.lr" in message
    without = diagnose(Evidence({"entropy": 0.1}, {"entropy": 1.0}, 0.2, bonus=False))
    assert list(without) == ["concentration"] and "entropy_coef" not in without["concentration"][1]


def test_a_model_that_was_collapsed_before():
    run = Run(EntropyCollapse(floor=0.1, patience=1))
    message = run.batch(entropy=0.06, zero_spread=0.9, pass_at_1=1.0)
    assert run.alarm.cause == "start" and "collapsed before this run: its entropy was 0.06 at the start" in message
    assert "trained less" in message and "Also: the data is too easy" in message


def test_causes_are_named_in_a_fixed_order():
    everything = {
        "entropy": 0.01, "clip_low": 0.02, "clip_high": 0.4, "zero_spread": 1.0, "pass_at_1": 0.0, "reward": 0.0,
        "completion_length": 1.0, "duplicates": 0.9,
    }  # fmt: skip
    start = {"entropy": 0.04, "completion_length": 9.0}
    names = ["start", "steps", "data", "length", "clip", "copies"]
    assert list(diagnose(Evidence(everything, start, 0.05))) == names
    patient = CollapseLimits(clipped=2, zero_spread=2, duplicates=2, shrunk=0.01, binding=2)
    assert list(diagnose(Evidence(everything, start, 0.03, limits=patient))) == ["concentration"]


# --- when it rings ---------------------------------------------------------------------------------------------------


def test_a_look_is_the_mean_since_the_one_before():
    """Looks at steps 2, 4, 6 see .8, .095 and .095; single steps lie above the floor."""
    run = Run(EntropyCollapse(floor=0.1, patience=2, every=2))
    assert not any(run.batch(entropy=e) for e in (0.7, 0.9, 0.13, 0.06, 0.12))
    assert "rollout entropy 0.095 (0.8 at the start)" in run.batch(entropy=0.07)


def test_a_look_above_the_floor_starts_the_count_again():
    run = Run(EntropyCollapse(floor=0.1, patience=2))
    assert not any(run.batch(entropy=e) for e in (0.5, 0.05, 0.2, 0.05, 0.2))
    run.batch(entropy=0.05)
    assert run.batch(entropy=0.05)


def test_the_start_is_the_mean_of_the_first_looks():
    run = Run(EntropyCollapse(floor=0.1, patience=1, baseline=2))
    run.batch(entropy=0.4, completion_length=60.0)
    run.batch(entropy=0.6, completion_length=20.0)
    assert "0.05 (0.5 at the start)" in run.batch(entropy=0.05)
    assert run.alarm.first["completion_length"] == [80.0, 2]


def test_steps_of_one_batch_are_all_read():
    """Clipping begins with the second update; the entropy of the rollout comes with the first."""
    run = Run(EntropyCollapse(floor=0.1, patience=1))
    later = {"entropy": 0.02, "clip_low": 0.3, "clip_high": 0.03, "tokens": 50.0}
    run.batch()
    for rest in (HEALTHY, HEALTHY | {"entropy": 0.2}):
        assert run.batch(rest, later, later) is None
    message = run.batch(HEALTHY | {"entropy": 0.09}, later, later)
    assert "rollout entropy 0.09 " in message
    # (.001 + .001 + 2 · .33) / 3 = 22.07 %
    assert "22.1% of tokens are clipped" in message


def test_an_engine_that_tells_no_entropies():
    """The report is of the tokens that are learned from; where there are none, it is 0 and nothing is known."""
    server = {"entropy_thinking": None, "entropy_answer": None}
    run = Run(EntropyCollapse(floor=0.1, patience=1))
    run.batch(**server)
    assert run.batch(**server, entropy=0.0, tokens=0.0) is None
    assert "rollout entropy 0.04" in run.batch(**server, entropy=0.04)


def test_warn_says_so_once_and_stop_stops():
    run = Run(EntropyCollapse(floor=0.1, patience=1))
    assert [bool(run.batch(entropy=e)) for e in (0.5, 0.05, 0.5, 0.05)] == [False, True, False, False]
    assert not run.trainer.should_stop
    run = Run(EntropyCollapse(floor=0.1, patience=2, action="stop"))
    run.batch(entropy=0.05)
    assert not run.trainer.should_stop
    assert "; stopping. Cause: " in run.batch(entropy=0.05) and run.trainer.should_stop


def test_a_resumed_run_goes_on():
    """Interrupted within a look, one look before the alarm: the same words as without interruption."""

    def message(interrupt):
        run = Run(EntropyCollapse(floor=0.1, patience=2, every=2))
        for entropy in (0.8, 0.6, 0.04, 0.06, 0.01):
            run.batch(entropy=entropy)
        if interrupt:
            resumed = EntropyCollapse(floor=0.1, patience=2, every=2)
            resumed.load_state_dict(run.alarm.state_dict())
            module = Module()
            module.clock = run.module.clock
            run = Run(resumed, module)
        return run.batch(entropy=0.05)

    assert message(True) == message(False) and "rollout entropy 0.03 (0.7 at the start)" in message(True)


# --- the coefficient -------------------------------------------------------------------------------------------------


def adapting(**settings):
    return EntropyCollapse(floor=0.1, action="adapt", target=0.3, step_size=0.01, coef_max=0.025, **settings)


def test_the_coefficient_follows_the_entropy():
    """Up by .01 below .3, no further than .025; down by .01 above, no lower than configured; as it is at .3."""
    run, coefs = Run(adapting()), []
    for entropy in (0.4, 0.2, 0.2, 0.2, 0.2, 0.3, 0.4, 0.4, 0.4):
        run.batch(entropy=entropy)
        coefs.append(run.module.entropy_coef)
        assert run.module.logged["train/entropy_coef"] == coefs[-1]
    assert coefs == pytest.approx([0.0, 0.01, 0.02, 0.025, 0.025, 0.025, 0.015, 0.005, 0.0])
    run = Run(adapting(), Module(entropy_coef=0.02))
    for entropy, coef in ((0.4, 0.02), (0.2, 0.025), (0.4, 0.02), (0.4, 0.02)):
        run.batch(entropy=entropy)
        assert run.module.entropy_coef == pytest.approx(coef)


def test_adapting_still_rings_and_the_target_is_the_floor_if_none_is_given():
    assert EntropyCollapse(floor=0.1, action="adapt").target == 0.1
    run = Run(adapting(patience=2))
    run.batch(entropy=0.5)
    run.batch(entropy=0.05)
    assert "going on with model.entropy_coef 0.02 (at most 0.025)" in run.batch(entropy=0.05)
    assert not run.trainer.should_stop


def test_the_coefficient_comes_back_with_a_checkpoint():
    run = Run(adapting())
    for _ in range(2):
        run.batch(entropy=0.2)
    resumed = adapting()
    resumed.load_state_dict(run.alarm.state_dict())
    module = Module()
    module.clock = 2
    again = Run(resumed, module)
    assert again.module.entropy_coef == pytest.approx(0.02)
    again.batch(entropy=0.4)
    assert again.module.entropy_coef == pytest.approx(0.01)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"floor": 0.0}, "floor and target must be positive"),
        ({"floor": 0.1, "patience": 0}, "patience must be at least 1, got 0"),
        ({"floor": 0.1, "every": 0}, "every must be at least 1"),
        ({"floor": 0.1, "action": "halt"}, "'halt'; choose stop, warn or adapt"),
        ({"floor": 0.1, "target": 0.3}, "no effect with action 'warn'"),
        ({"floor": 0.1, "action": "adapt", "step_size": 0.2, "coef_max": 0.1}, "at most coef_max, got 0.2, 0.1"),
        ({"floor": 0.1, "action": "adapt", "target": -1.0}, "got 0.1, -1.0"),
    ],
)
def test_impossible_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        EntropyCollapse(**settings)
    with pytest.raises(ValueError, match=r"limits\.clipped must be positive, got 0"):
        CollapseLimits(clipped=0)


def test_what_cannot_be_adapted_is_refused():
    module = Module(entropy_coef=0.1)
    with pytest.raises(ValueError, match=r"model\.entropy_coef 0\.1 is above coef_max 0\.025"):
        adapting().on_fit_start(None, module)

    class Distillation(Module):  # has the setting of its base class, without effect
        terms = ("distill",)

    with pytest.raises(ValueError, match=r"an entropy bonus \(model\.entropy_coef\), which Distillation as configured"):
        adapting().on_fit_start(None, Distillation())


# --- real runs -------------------------------------------------------------------------------------------------------

BACKBONE = Backbone(path="embedded:qwen2_5_vl-tiny")


def fit(module, alarm, folder, *, steps, more=(), resume=None):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, callbacks=[alarm, *more], default_root_dir=folder,
        enable_checkpointing=bool(more), enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    train = {"world": SourceSpec(kind="world", split="train", options={"size": 16, "families": ["count"]})}
    trainer.fit(module, VLMData(backbone=BACKBONE, train=train, batch_size=2, workers=0), ckpt_path=resume)
    return trainer


def grpo(**settings):
    rewards = {"accuracy": Reward(kind="accuracy", rule="world/exact"), "length": Reward(kind="length", target=4)}
    sampling = Sampling(temperature=1.0, max_new_tokens=5)
    return GRPO(backbone=BACKBONE, rewards=rewards, group_size=2, rollout=sampling, lr=1e-3, **settings)


@pytest.mark.parametrize("action", ["adapt", "warn"])
def test_algorithms_without_rollouts_are_refused_before_training(action, tmp_path):
    module = SFT(backbone=BACKBONE)
    match = {"adapt": "needs an entropy bonus .*SFT", "warn": "SFT has no rollouts to watch; take EntropyMonitor"}
    with pytest.raises(ValueError, match=match[action]):
        fit(module, EntropyCollapse(floor=0.1, action=action), tmp_path, steps=1)
    assert module.clock == 0


def test_a_run_with_several_steps_per_rollout(tmp_path):
    """Two batches of two prompts, learned from twice: four steps, two rollouts, their entropies as reported."""
    alarm, seen = EntropyCollapse(floor=99.0, patience=2, action="stop"), []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            entropies = [e for r in module.last_rollouts for c in r.completions for e in c.entropies]
            seen.append(sum(entropies) / len(entropies))

    with pytest.warns(UserWarning, match=r"collapse at optimizer step 4: .* 2 looks in a row; stopping\. Cause"):
        trainer = fit(grpo(epochs=2), alarm, tmp_path, steps=10, more=[Note()])
    assert trainer.global_step == 4 and alarm.cause == "start" and alarm.seen == 4
    assert alarm.first["entropy"][0] == pytest.approx(seen[0], rel=1e-6)
    assert alarm.low == [2, pytest.approx(seen[0], rel=1e-6)]
    assert {"zero_spread", "pass_at_1", "clip_low", "lr"} <= set(alarm.first)


def test_an_adapted_run_resumes_where_it_was(tmp_path):
    """Whole, and from the checkpoint of its second step: the same coefficients. Above 0 the bonus is a loss term."""
    coefs, bonus = {}, {}

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            coefs[module.clock] = module.entropy_coef
            bonus[module.clock] = module.last_step["metrics"].get("train/entropy_bonus")

    def run(folder, steps, resume=None):
        alarm = EntropyCollapse(floor=99.0, patience=9, action="adapt", step_size=0.01)
        fit(grpo(), alarm, folder, steps=steps, more=[Note(), Checkpoint()], resume=resume)

    run(tmp_path / "whole", 4)
    whole = dict(coefs)
    assert whole == {1: 0.01, 2: 0.02, 3: pytest.approx(0.03), 4: pytest.approx(0.04)}
    assert bonus[1] is None and all(bonus[step] < 0 for step in (2, 3, 4))
    run(tmp_path / "cut", 2)
    coefs.clear()
    run(tmp_path / "cut", 4, resume=last_checkpoint(tmp_path / "cut"))
    assert coefs == {3: whole[3], 4: whole[4]}
