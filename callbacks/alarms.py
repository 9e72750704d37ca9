"""Alarms on a learning-dynamics probe: each names its cause, its values, and the knob to turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks._monitor import refuse_unknown

Action = Literal["stop", "lower_lr", "warn"]


class ProbeAlarm(Callback):
    """Base: counts probes in a row that are bad, and acts when there are `patience` of them.

    Args:
        probe: name of the `LearningDynamics` that is watched.
        patience: bad probes in a row before the alarm.
        action: `stop` ends the run (the last checkpoint is saved); `lower_lr` multiplies the base learning rate of
            every parameter group by `factor`, once; `warn` says so once and goes on.
        factor: of `lower_lr`, between 0 and 1.

    Raises:
        ValueError: a number out of range, an unknown action, or no probe of that name.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, *, probe: str = "probe", patience: int = 2, action: Action = "warn", factor: float = 0.3
    ) -> None:
        if patience < 1:
            raise ValueError(f"{self._name}: patience must be at least 1, got {patience}")
        if action not in ("stop", "lower_lr", "warn"):
            raise ValueError(f"{self._name}: action is {action!r}; choose stop, lower_lr or warn")
        if not 0 < factor < 1:
            raise ValueError(f"{self._name}: factor must lie between 0 and 1, got {factor}")
        self.probe, self.patience, self.action, self.factor = probe, patience, action, factor
        self.bad = 0
        self.done = False

    @property
    def _name(self) -> str:
        return type(self).__name__

    def judge(self, values: Mapping[str, float]) -> str | None:
        """What is wrong with a probe, in words with its values; None if nothing is.

        Args:
            values: what `needs` names, without `val/<probe>/`.
        """
        raise NotImplementedError(f"{self._name} must define judge()")

    def remedy(self) -> str:
        """Which knobs to turn."""
        raise NotImplementedError(f"{self._name} must define remedy()")

    def state_dict(self) -> dict[str, Any]:
        """Bad probes so far and whether the alarm has acted, so that a resumed run goes on counting."""
        return {"bad": self.bad, "done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.bad, self.done = state_dict["bad"], state_dict["done"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an alarm that nothing will ever ring."""
        for name in self.needs:
            try:
                refuse_unknown(self._name, f"val/{self.probe}/{name}", trainer)
            except ValueError as err:
                raise ValueError(
                    f"{err}; {self._name} needs a LearningDynamics probe of name {self.probe!r} that measures it"
                ) from err

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at a fresh probe."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        names = {name: f"val/{self.probe}/{name}" for name in self.needs}
        if not pl_module.fresh_metrics.issuperset(names.values()):
            return
        cause = self.judge({name: float(trainer.callback_metrics[key]) for name, key in names.items()})
        self.bad = 0 if cause is None else self.bad + 1
        if self.bad >= self.patience and not (self.done and self.action != "stop"):
            self._act(trainer, pl_module.clock, cause)

    def _act(self, trainer: Trainer, step: int, cause: str) -> None:
        self.done = True
        did = "going on"
        if self.action == "stop":
            trainer.should_stop = True
            did = "stopping"
        elif self.action == "lower_lr":
            for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
                group["base_lr"] *= self.factor
            did = f"learning rates multiplied by {self.factor:g}"
        rank_zero_warn(
            f"{self._name} at optimizer step {step}, probe {self.probe!r}, {self.bad} in a row: {cause}; {did}. "
            f"{self.remedy()}; {self._name}'s own settings (patience, action, thresholds) set this alarm"
        )


class SqueezingStop(ProbeAlarm):
    """Rings when the chosen answers fall while the most likely tokens keep or gain mass: the squeezing effect.

    Args:
        probe: name of the `LearningDynamics` that is watched.
        fall: nats per token that the chosen must have fallen since the start of the stage.
        rise: nats per token by which the mean log-probability of the most likely tokens must have changed at least
            since then; a little below 0, since it wanders by some hundredths of a nat while the chosen fall.
        patience: probes in a row before the alarm.
        action: `stop`, `lower_lr` or `warn`.
        factor: of `lower_lr`.

    Raises:
        ValueError: a number out of range, an unknown action, or no probe of that name.
    """

    needs = ("chosen", "chosen_since_start", "argmax", "argmax_since_start")

    def __init__(
        self,
        *,
        probe: str = "probe",
        fall: float = 0.3,
        rise: float = -0.05,
        patience: int = 2,
        action: Action = "stop",
        factor: float = 0.3,
    ) -> None:
        super().__init__(probe=probe, patience=patience, action=action, factor=factor)
        if not fall > 0:
            raise ValueError(f"SqueezingStop: fall must be positive nats per token, got {fall}")
        self.fall, self.rise = fall, rise

    def judge(self, values: Mapping[str, float]) -> str | None:
        """Chosen down, most likely tokens not."""
        chosen, top = values["chosen_since_start"], values["argmax_since_start"]
        if chosen >= -self.fall or top < self.rise:
            return None
        return (
            f"squeezing: the chosen answers have fallen by {-chosen:.3g} nats per token since the start (to "
            f"{values['chosen']:.3g}), the most likely tokens have changed by {top:+.3g} (to {values['argmax']:.3g})"
        )

    def remedy(self) -> str:
        """For preference training."""
        return "Lower model.lr, raise model.beta, or take CW-DPO (model.weighting), whose cooling spares easy negatives"


class EntropyFloor(ProbeAlarm):
    """Rings when the entropy along the held-out chosen answers falls below a floor.

    `EntropyMonitor` watches the training batch instead.

    Args:
        floor: nats per token.
        probe: name of the `LearningDynamics` that is watched.
        patience: probes in a row before the alarm.
        action: `stop`, `lower_lr` or `warn`.
        factor: of `lower_lr`.

    Raises:
        ValueError: a number out of range, an unknown action, or no probe of that name.
    """

    needs = ("entropy", "entropy_since_start")

    def __init__(
        self, *, floor: float, probe: str = "probe", patience: int = 2, action: Action = "stop", factor: float = 0.3
    ) -> None:
        super().__init__(probe=probe, patience=patience, action=action, factor=factor)
        if not floor > 0:
            raise ValueError(f"EntropyFloor: floor must be positive nats per token, got {floor}")
        self.floor = floor

    def judge(self, values: Mapping[str, float]) -> str | None:
        """Below the floor."""
        if values["entropy"] >= self.floor:
            return None
        return (
            f"entropy along the held-out answers is {values['entropy']:.3g} nats per token, below the floor of "
            f"{self.floor:g} ({values['entropy_since_start']:+.3g} since the start)"
        )

    def remedy(self) -> str:
        """For any training."""
        return "Lower model.lr or train fewer steps"


class DeltaLogprobStop(ProbeAlarm):
    """Rings when held-out progress from probe to probe has ended: early stopping on Δ log p.

    Args:
        quantity: `chosen`, mean log-probability of the chosen answers in nats per token, or `reward_margin`, how far
            the chosen are preferred to the rejected against the start of the stage.
        min_delta: smallest gain over the probe before that counts, in units of the quantity.
        probe: name of the `LearningDynamics` that is watched.
        patience: probes in a row without such a gain before the alarm.
        action: `stop`, `lower_lr` or `warn`.
        factor: of `lower_lr`.

    Raises:
        ValueError: a number out of range, an unknown quantity or action, or no probe of that name that measures it.
    """

    def __init__(
        self,
        *,
        quantity: Literal["chosen", "reward_margin"] = "chosen",
        min_delta: float = 0.0,
        probe: str = "probe",
        patience: int = 3,
        action: Action = "stop",
        factor: float = 0.3,
    ) -> None:
        super().__init__(probe=probe, patience=patience, action=action, factor=factor)
        if quantity not in ("chosen", "reward_margin"):
            raise ValueError(f"DeltaLogprobStop: quantity is {quantity!r}; choose chosen or reward_margin")
        if min_delta < 0:
            raise ValueError(f"DeltaLogprobStop: min_delta cannot be negative, got {min_delta}")
        self.quantity, self.min_delta = quantity, min_delta
        self.needs = (quantity,)
        self.last: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """As for every alarm, and the last value."""
        return super().state_dict() | {"last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self.last = state_dict["last"]

    def judge(self, values: Mapping[str, float]) -> str | None:
        """No gain over the probe before."""
        value, last = values[self.quantity], self.last
        self.last = value
        if last is None or value - last > self.min_delta:
            return None
        return (
            f"{self.quantity} changed by {value - last:+.3g} nats since the probe before (to {value:.4g}), a gain of "
            f"more than {self.min_delta:g} was wanted"
        )

    def remedy(self) -> str:
        """For any training."""
        return "The best model is some probes old (Checkpoint.monitor keeps it); train fewer steps, or lower model.lr"
