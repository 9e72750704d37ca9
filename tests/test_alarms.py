"""Alarms on probes: when they ring, what they do and say, and that a resumed run goes on counting. Hand-made probes."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from callbacks import LearningDynamics
from callbacks.alarms import DeltaLogprobStop, EntropyFloor, SqueezingStop
from lightning_vlm.data.sources import SourceSpec

METRICS = {"chosen", "chosen_since_start", "argmax", "argmax_since_start", "entropy", "entropy_since_start"}


class Run:
    """What alarms see of a run: one optimizer with two groups, and a probe every ten steps."""

    def __init__(self, *, metrics=frozenset(METRICS | {"reward_margin"}), fn="fit"):
        groups = [{"base_lr": 1.0, "part": "language"}, {"base_lr": 0.1, "part": "head"}]
        evaluation = SimpleNamespace(metric_names=metrics)
        self.trainer = SimpleNamespace(
            should_stop=False,
            sanity_checking=False,
            state=SimpleNamespace(fn=fn),
            callback_metrics={},
            optimizers=[SimpleNamespace(param_groups=groups)],
            datamodule=SimpleNamespace(evaluations={"probe": evaluation}),
        )
        self.module = SimpleNamespace(clock=0, fresh_metrics=set())
        self.start: dict[str, float] = {}

    def probe(self, alarm, **values):
        """A probe with these values; changes since the first one are worked out."""
        self.start = self.start or values
        values |= {f"{name}_since_start": value - self.start[name] for name, value in values.items()}
        named = {f"val/probe/{name}": torch.tensor(value) for name, value in values.items()}
        self.module.fresh_metrics = set(named)
        self.trainer.callback_metrics |= named
        alarm.on_validation_end(self.trainer, self.module)
        self.module.clock += 10
        return self.trainer.should_stop

    @property
    def rates(self):
        return [group["base_lr"] for group in self.trainer.optimizers[0].param_groups]


# Chosen and most likely tokens, nats per token, at steps 0, 20, … 200 of two runs on captions of the embedded world.
DPO = {
    "chosen": (-0.221, -0.353, -0.447, -0.454, -0.696, -0.641, -0.837, -0.857, -0.965, -0.974, -1.3),
    "argmax": (-0.173, -0.176, -0.172, -0.179, -0.168, -0.156, -0.128, -0.129, -0.131, -0.113, -0.109),
}
CW_DPO = {
    "chosen": (-0.221, -0.325, -0.339, -0.34, -0.366, -0.329, -0.427, -0.332, -0.316, -0.323, -0.33),
    "argmax": (-0.173, -0.171, -0.165, -0.156, -0.157, -0.136, -0.146, -0.138, -0.131, -0.128, -0.132),
}


def ring(alarm, curves):
    """At which probe the alarm first stops the run; None if never."""
    run = Run()
    alarm.on_fit_start(run.trainer, run.module)
    for number, values in enumerate(zip(*curves.values(), strict=True)):
        if run.probe(alarm, **dict(zip(curves, values, strict=True))):
            return number
    return None


def test_squeezing_rings_for_dpo_and_not_for_cw_dpo():
    """The chosen of DPO are down by more than .3 from the fifth probe on; the second of these in a row stops it."""
    with pytest.warns(
        UserWarning, match=r"SqueezingStop at optimizer step 50.*fallen by 0\.42 .*to -0\.641.*model\.lr"
    ):
        assert ring(SqueezingStop(), DPO) == 5
    assert ring(SqueezingStop(), CW_DPO) is None


def test_falling_together_is_no_squeezing():
    """A model that forgets loses its most likely tokens, too: its distributions flatten."""
    flat = {"chosen": (-0.2, -0.9, -1.5, -2.0), "argmax": (-0.1, -0.4, -0.8, -1.0)}
    assert ring(SqueezingStop(), flat) is None
    with pytest.warns(UserWarning, match="squeezing"):
        assert ring(SqueezingStop(rise=-2.0), flat) == 2


def test_a_good_probe_starts_the_count_again():
    dip = {"chosen": (-0.2, -0.6, -0.3, -0.6, -0.3), "argmax": (-0.1,) * 5}
    assert ring(SqueezingStop(patience=2), dip) is None
    with pytest.warns(UserWarning):
        assert ring(SqueezingStop(patience=1), dip) == 1


def test_a_resumed_run_goes_on_counting():
    first, run = SqueezingStop(patience=3), Run()
    for chosen in (-0.2, -0.6, -0.6):
        assert not run.probe(first, chosen=chosen, argmax=-0.1)
    resumed = SqueezingStop(patience=3)
    resumed.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="3 in a row"):
        assert run.probe(resumed, chosen=-0.6, argmax=-0.1)
    delta, other = DeltaLogprobStop(patience=1), DeltaLogprobStop(patience=1)
    run.probe(delta, chosen=-0.5)
    other.load_state_dict(delta.state_dict())
    with pytest.warns(UserWarning, match=r"changed by -0\.25"):
        run.probe(other, chosen=-0.75)


def test_lower_lr_acts_once_on_every_group():
    alarm, run = EntropyFloor(floor=0.1, patience=1, action="lower_lr", factor=0.5), Run()
    run.probe(alarm, entropy=0.4)
    with pytest.warns(
        UserWarning, match=r"below the floor of 0\.1 \(-0\.35 since the start\); learning rates multiplied"
    ):
        run.probe(alarm, entropy=0.05)
    assert run.rates == [0.5, 0.05]
    resumed = EntropyFloor(floor=0.1, patience=1, action="lower_lr", factor=0.5)
    resumed.load_state_dict(alarm.state_dict())
    run.probe(resumed, entropy=0.05)
    assert run.rates == [0.5, 0.05] and not run.trainer.should_stop


def test_warn_says_so_once(recwarn):
    alarm, run = EntropyFloor(floor=0.1, patience=1, action="warn"), Run()
    for _ in range(3):
        run.probe(alarm, entropy=0.05)
    assert len([w for w in recwarn if "EntropyFloor" in str(w.message)]) == 1
    assert run.rates == [1.0, 0.1] and not run.trainer.should_stop


def test_delta_logprob_stops_when_the_gains_end():
    """Gains of .2 and .1 count, one of .004 does not; two in a row without gain ring."""
    curve = {"chosen": (-2.0, -1.8, -1.7, -1.696, -1.6, -1.599, -1.62)}
    with pytest.warns(UserWarning, match=r"chosen changed by -0\.021 nats.*a gain of more than 0\.01 was wanted"):
        assert ring(DeltaLogprobStop(patience=2, min_delta=0.01), curve) == 6
    assert ring(DeltaLogprobStop(patience=3, min_delta=0.01), curve) is None
    margins = {"reward_margin": (0.0, 0.5, 0.4, 0.3)}
    with pytest.warns(UserWarning, match="reward_margin"):
        assert ring(DeltaLogprobStop(quantity="reward_margin", patience=2), margins) == 3


def test_only_fresh_probes_of_a_training_count():
    alarm, run = EntropyFloor(floor=1.0, patience=1, action="stop"), Run(fn="validate")
    assert not run.probe(alarm, entropy=0.5)
    run.trainer.state.fn = "fit"
    run.module.fresh_metrics = {"val/world/accuracy"}
    alarm.on_validation_end(run.trainer, run.module)
    run.trainer.sanity_checking = True
    assert not run.probe(alarm, entropy=0.5) and alarm.bad == 0


def test_alarms_need_their_probe():
    run = Run(metrics={"chosen"})
    with pytest.raises(ValueError, match=r"val/other/chosen.*needs a LearningDynamics probe of name 'other'"):
        SqueezingStop(probe="other").on_fit_start(run.trainer, run.module)
    with pytest.raises(ValueError, match="nothing will log monitor 'val/probe/reward_margin'"):
        DeltaLogprobStop(quantity="reward_margin").on_fit_start(run.trainer, run.module)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (SqueezingStop, {"fall": 0.0}),
        (SqueezingStop, {"patience": 0}),
        (SqueezingStop, {"action": "halt"}),
        (SqueezingStop, {"factor": 1.0}),
        (EntropyFloor, {"floor": 0.0}),
        (DeltaLogprobStop, {"quantity": "rejected"}),
        (DeltaLogprobStop, {"min_delta": -1.0}),
    ],
)
def test_impossible_alarm_settings(make, wrong):
    with pytest.raises(ValueError, match=make.__name__):
        make(**wrong)


def test_alarms_in_a_real_run(tmp_path):
    """One halves the rates at the first probe, one ends the run at the second, far from its last step."""
    from lightning_vlm.algorithms import SFT
    from lightning_vlm.data.module import VLMData
    from lightning_vlm.models.spec import Backbone

    backbone = Backbone(path="embedded:qwen2_5_vl-tiny")
    source = SourceSpec(kind="world", split="val", options={"size": 3, "families": ["caption"]})
    callbacks = [
        LearningDynamics(source=source, every=2, distributions=False),
        EntropyFloor(floor=100.0, patience=1, action="lower_lr", factor=0.5),
        DeltaLogprobStop(patience=1, min_delta=100.0),
    ]
    trainer = L.Trainer(
        accelerator="cpu", max_steps=50, logger=False, callbacks=callbacks, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    module = SFT(backbone=backbone, lr=1e-3, schedule="constant")
    train = {"world": SourceSpec(kind="world", split="train", options={"size": 8})}
    with pytest.warns(UserWarning, match="DeltaLogprobStop at optimizer step 2"):
        trainer.fit(module, VLMData(backbone=backbone, train=train, batch_size=2, workers=0))
    assert module.clock == 2 and module.last_step["metrics"]["train/lr/language"] == pytest.approx(5e-4)
