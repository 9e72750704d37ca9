"""Watches the entropy of rollouts, says why it collapses, and may hold it up."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks._clock import crossed

WATCHED = (
    "entropy", "entropy_thinking", "entropy_answer", "zero_spread", "pass_at_1", "reward", "completion_length",
    "duplicates", "clip_low", "clip_high", "kl_start",
)  # fmt: skip
_NEAR_START = 0.9  # a fall begins at the last look that had this share of the entropy at the start
_STEP_SIZE, _COEF_MAX = 0.005, 0.05


@dataclass(frozen=True, kw_only=True)
class CollapseLimits:
    """From where on something counts as evidence. All values are ours.

    Args:
        zero_spread: share of groups whose completions all got the same reward.
        extreme: pass_at_1 this near to 1 or 0 says that the data is too easy or too hard.
        duplicates: 1 − distinct texts / completions of a group.
        clipped: share of tokens clipped at either bound. GSPO clips far more by design: set it above 1 there.
        fast: optimizer steps within which a fall from near the start to below the floor is too fast.
        drift: KL to the start of the run, as a multiple of the entropy at the start. Up to about 1 can come from
            preferring what the start found likely itself; more is movement to what it found unlikely.
        shrunk: completion length against that at the start.
        binding: share of tokens clipped at the upper bound, from which it binds.
        lopsided: how many times the share at the lower bound that must be.

    Raises:
        ValueError: a limit that is not positive.
    """

    zero_spread: float = 0.5
    extreme: float = 0.1
    duplicates: float = 0.5
    clipped: float = 0.1
    fast: int = 20
    drift: float = 1.0
    shrunk: float = 0.5
    binding: float = 0.01
    lopsided: float = 3.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"EntropyCollapse: limits.{name} must be positive, got {value}")


Finding = tuple[str, str]  # what was seen, in words with its values; which knobs to turn


@dataclass(frozen=True)
class Evidence:
    """What a run shows when the alarm rings.

    Attributes:
        now, start: means of what `WATCHED` names and of `lr`, over the last look and the first ones; what a run does
            not measure is absent.
        floor: nats per token.
        fall: (optimizer steps, entropy before, entropy after) of the way from near the start to below the floor; None
            where it was never near the start before.
        bonus: whether the algorithm has an entropy bonus.
        limits: what counts as evidence.
    """

    now: Mapping[str, float]
    start: Mapping[str, float]
    floor: float
    fall: tuple[int, float, float] | None = None
    bonus: bool = True
    limits: CollapseLimits = CollapseLimits()

    def both(self, name: str, label: str) -> str:
        """`label 0.1 (0.9 at the start)`."""
        then = f"{self.start[name]:.3g}" if name in self.start else "none"
        return f"{label} {self.now[name]:.3g} ({then} at the start)" if name in self.now else f"{label} none ({then})"


def _start(e: Evidence) -> Finding | None:
    if e.start["entropy"] >= e.floor:
        return None
    return (
        f"the model was collapsed before this run: its entropy was {e.start['entropy']:.3g} at the start",
        "begin with a model that was trained less, raise model.rollout.temperature, or lower the floor",
    )


def _steps(e: Evidence) -> Finding | None:
    signs = []
    clipped = e.now.get("clip_low", 0.0) + e.now.get("clip_high", 0.0)
    if clipped >= e.limits.clipped:
        signs.append(f"{clipped:.1%} of tokens are clipped")
    if e.now.get("kl_start", 0.0) > e.limits.drift * e.start["entropy"]:
        signs.append(f"the KL to the start is {e.now['kl_start']:.3g} nats per token")
    if e.fall is not None and e.fall[0] <= e.limits.fast:
        steps, before, after = e.fall
        fell = f"the entropy fell from {before:.3g} to {after:.3g} in {steps} optimizer step(s)"
        signs.append(f"{fell}, {(before - after) / steps:.2g} nats per step")
    if not signs:
        return None
    at = f" at learning rate {e.now['lr']:.2g}" if "lr" in e.now else ""
    return (
        f"the steps are too large{at}: {', '.join(signs)}",
        "lower model.lr, add model.kl_beta, or take fewer model.epochs and model.steps_per_rollout",
    )


def _data(e: Evidence) -> Finding | None:
    if e.now.get("zero_spread", 0.0) < e.limits.zero_spread:
        return None
    solved = e.now.get("pass_at_1", 0.5)
    if solved >= 1 - e.limits.extreme:
        what, cure = "the data is too easy", "take harder prompts"
    elif solved <= e.limits.extreme:
        what, cure = "the data is too hard", "take easier prompts or train with SFT first, raise model.group_size"
    elif _copies(e):
        return None
    else:
        what, cure = "the data is too easy in part and too hard in part", "raise model.group_size"
    measured = [e.both(name, name) for name in ("pass_at_1", "reward") if name in e.now]
    share = e.both("zero_spread", "share of groups without spread")
    return f"{what}: {', '.join([share, *measured])}", f"{cure}, or set model.dynamic_sampling"


def _length(e: Evidence) -> Finding | None:
    length, before = e.now.get("completion_length"), e.start.get("completion_length")
    if length is None or before is None or length > e.limits.shrunk * before:
        return None
    split = [name for name in ("entropy_thinking", "entropy_answer") if name in e.start or name in e.now]
    parts = [e.both("completion_length", "tokens per completion"), *(e.both(name, name) for name in split)]
    return (
        f"the completions have become short and direct: {', '.join(parts)}",
        "reward the form you want (model.rewards of kind format or length), or punish length less",
    )


def _clip(e: Evidence) -> Finding | None:
    low, high = e.now.get("clip_low", 0.0), e.now.get("clip_high", 0.0)
    if high < e.limits.binding or high < e.limits.lopsided * low:
        return None
    return (
        f"the upper clip bound holds unlikely tokens down: {high:.2%} of tokens against {low:.2%} at the lower one",
        "raise model.clip_high (DAPO's clip-higher is 0.28)",
    )


def _copies(e: Evidence) -> Finding | None:
    if e.now.get("duplicates", 0.0) < e.limits.duplicates:
        return None
    return (
        f"the completions of a group are copies: {e.both('duplicates', 'share of duplicates')}",
        "raise model.rollout.temperature or model.group_size",
    )


def _concentration(e: Evidence) -> Finding:
    knobs = "raise model.entropy_coef (or set EntropyCollapse.action: adapt), " if e.bonus else ""
    over = f", from {e.fall[1]:.3g} to {e.fall[2]:.3g} nats in {e.fall[0]} optimizer steps" if e.fall else ""
    return (
        f"the policy concentrates on what is rewarded, step by step{over}; no other sign",
        f"{knobs}lower model.lr, or train fewer steps",
    )


def diagnose(evidence: Evidence) -> dict[str, Finding]:
    """The causes that a run's own metrics show, the one to name first.

    The order is fixed. What was there before training comes first, then what explains the rest: too large steps also
    shorten answers, copy completions and empty groups, and groups of copies have no spread, whatever the data.

    1. `start`: the entropy lay below the floor in the first looks already.
    2. `steps`: many clipped tokens, a KL to the start beyond the entropy it had, or a fall within few steps.
    3. `data`: most groups have no spread, and pass_at_1 says too easy or too hard; or neither, and the groups are not
       copies: some prompts are always, others never solved.
    4. `length`: completions have become short.
    5. `clip`: the upper clip bound binds far more often than the lower one, so that unlikely tokens cannot rise.
    6. `copies`: the completions of a group are mostly the same.
    7. `concentration`: nothing of that; the policy gradient moves mass to what is rewarded, step by step.

    Returns:
        At least one cause by name, with what was seen and which knobs to turn; `concentration` only alone.
    """
    tests = {"start": _start, "steps": _steps, "data": _data, "length": _length, "clip": _clip, "copies": _copies}
    found = {name: finding for name, test in tests.items() if (finding := test(evidence))}
    return found or {"concentration": _concentration(evidence)}


class EntropyCollapse(Callback):
    """Raises an alarm that names its cause when the entropy of rollouts stays low; `adapt` holds the entropy up.

    Looked at is the exact entropy of the tokens the policy has sampled (`train/entropy`, nats per token, all ranks), as
    the mean over the rollouts since the look before. Where the engine reports none (a server), it is the entropy of the
    completions that are learned from. See `diagnose` for causes and the order in which they are named.

    `adapt` raises `model.entropy_coef`, the weight of the entropy bonus, by `step_size` at each look below `target` and
    takes it back by as much, to no less than its configured value, at each look above. After the adaptive entropy
    control of Skywork-OR1 (He et al. 2025), which also leaves the bonus out while the entropy is above. Above 0,
    completions without advantage are run through the model, too. Logged: `train/entropy_coef`.

    Args:
        floor: nats per token below which the policy counts as collapsed.
        patience: looks in a row below the floor before the alarm.
        every: optimizer steps between looks.
        baseline: looks at the start of the run whose mean the later ones are compared with.
        action: at the alarm `stop` ends the run (the last checkpoint is saved); `warn` says so once and goes on;
            `adapt` does so, too, and adapts the coefficient from the first look on.
        target: of `adapt`, nats per token; None takes the floor.
        step_size: of `adapt`.
        coef_max: of `adapt`: the largest coefficient.
        limits: from where on something counts as evidence for a cause.

    Raises:
        ValueError: a number out of range, an unknown action, a setting without effect, an algorithm without rollouts.
    """

    def __init__(
        self,
        *,
        floor: float,
        patience: int = 3,
        every: int = 1,
        baseline: int = 1,
        action: Literal["stop", "warn", "adapt"] = "warn",
        target: float | None = None,
        step_size: float = _STEP_SIZE,
        coef_max: float = _COEF_MAX,
        limits: CollapseLimits | None = None,
    ) -> None:
        for name, value in (("patience", patience), ("every", every), ("baseline", baseline)):
            if value < 1:
                raise ValueError(f"EntropyCollapse: {name} must be at least 1, got {value}")
        if action not in ("stop", "warn", "adapt"):
            raise ValueError(f"EntropyCollapse: action is {action!r}; choose stop, warn or adapt")
        if action != "adapt" and (target, step_size, coef_max) != (None, _STEP_SIZE, _COEF_MAX):
            raise ValueError(
                f"EntropyCollapse: target, step_size and coef_max have no effect with action {action!r}: leave them "
                "out, or set action: adapt"
            )
        self.target = floor if target is None else target
        if not min(floor, self.target) > 0:
            raise ValueError(f"EntropyCollapse: floor and target must be positive nats, got {floor}, {self.target}")
        if not 0 < step_size <= coef_max:
            raise ValueError(
                f"EntropyCollapse: step_size must be positive and at most coef_max, got {step_size}, {coef_max}"
            )
        self.floor, self.patience, self.every, self.baseline = floor, patience, every, baseline
        self.action, self.step_size, self.coef_max = action, step_size, coef_max
        self.limits = limits or CollapseLimits()
        self.cause: str | None = None  # named by the last alarm
        self.below = self.seen = 0
        self.warned = False
        self.coef: float | None = None
        self.window: dict[str, list[float]] = {}  # since the last look: name → [sum, count]
        self.first: dict[str, list[float]] = {}  # over the first looks, likewise
        self.high: list[float] | None = None  # (clock, entropy) of the last look near the start
        self.low: list[float] | None = None  # and of the first of those that are now below the floor
        self._configured, self._bonus = 0.0, False

    _STATE = ("cause", "below", "seen", "warned", "coef", "window", "first", "high", "low")

    def state_dict(self) -> dict[str, Any]:
        """Counts, means and coefficient, so that a resumed run goes on as if it had not been interrupted."""
        return {name: deepcopy(getattr(self, name)) for name in self._STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        for name in self._STATE:
            setattr(self, name, state_dict[name])

    # --- life -------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before anything is trained, what can have no effect."""
        algorithm = type(pl_module).__name__
        self._bonus = _has_bonus(pl_module)
        if self.action == "adapt":
            if not self._bonus:
                raise ValueError(
                    f"EntropyCollapse: action adapt needs an entropy bonus (model.entropy_coef), which {algorithm} as "
                    "configured has not; set action to warn or stop"
                )
            self._configured = pl_module.entropy_coef
            if self._configured > self.coef_max:
                raise ValueError(
                    f"EntropyCollapse: model.entropy_coef {self._configured:g} is above coef_max {self.coef_max:g}"
                )
        if not hasattr(pl_module, "last_rollouts"):
            raise ValueError(
                f"EntropyCollapse: {algorithm} has no rollouts to watch; take EntropyMonitor, which watches the batch "
                "that is learned from"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The coefficient of a resumed run comes back; later than `on_fit_start`, when sharded states are loaded."""
        if self.action == "adapt" and self.coef is not None:
            self.coef = pl_module.entropy_coef = max(self.coef, self._configured)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """A batch may feed several optimizer steps; each is read before the next one replaces its report."""
        self._read(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, where it is time to."""
        self._read(pl_module)
        if not crossed(pl_module.clock_before, pl_module.clock, self.every) or "entropy" not in self.window:
            return
        look = _means(self.window)
        self.window = {}
        if self.first.get("entropy", [0.0, 0])[1] < self.baseline:
            _add(self.first, look)
        self._follow(pl_module.clock, look["entropy"])
        if self.action == "adapt":
            self._adapt(pl_module, look["entropy"])
        if self.below >= self.patience and (self.action == "stop" or not self.warned):
            self._alarm(trainer, pl_module.clock, look)

    def _read(self, pl_module: LightningModule) -> None:
        """Add what the last optimizer step reported, once."""
        if pl_module.clock <= self.seen or "metrics" not in pl_module.last_step:
            return
        self.seen = pl_module.clock
        metrics = pl_module.last_step["metrics"]
        values = {name: metrics[f"train/{name}"] for name in WATCHED if f"train/{name}" in metrics}
        # Later updates report the entropy of the tokens they learn from. So do rollouts of an engine that tells none,
        # and where nothing was learned from there is none.
        told = "entropy_thinking" in values or "entropy_answer" in values
        if "completion_length" not in values or not (told or metrics.get("train/tokens", 0)):
            values.pop("entropy", None)
        rates = [value for name, value in metrics.items() if name.startswith("train/lr/")]
        _add(self.window, values | ({"lr": max(rates)} if rates else {}))

    def _follow(self, step: int, entropy: float) -> None:
        """Count looks below the floor; remember where the fall began and ended."""
        if entropy >= _NEAR_START * _means(self.first)["entropy"] and entropy >= self.floor:
            self.high = [step, entropy]
        self.below = self.below + 1 if entropy < self.floor else 0
        if self.below == 1:
            self.low = [step, entropy]

    def _adapt(self, pl_module: LightningModule, entropy: float) -> None:
        coef = self._configured if self.coef is None else self.coef
        if entropy < self.target:
            coef = min(coef + self.step_size, self.coef_max)
        elif entropy > self.target:
            coef = max(coef - self.step_size, self._configured)
        self.coef = pl_module.entropy_coef = coef
        pl_module.log("train/entropy_coef", coef, batch_size=1)

    def _alarm(self, trainer: Trainer, step: int, look: Mapping[str, float]) -> None:
        fall = None if self.high is None else (self.low[0] - self.high[0], self.high[1], self.low[1])
        evidence = Evidence(look, _means(self.first), self.floor, fall, self._bonus, self.limits)
        found = diagnose(evidence)
        self.cause, self.warned = next(iter(found)), True
        (cause, remedy), *others = found.values()
        did = "going on"
        if self.action == "stop":
            trainer.should_stop = True
            did = "stopping"
        elif self.action == "adapt":
            did = f"going on with model.entropy_coef {self.coef:g} (at most {self.coef_max:g})"
        also = f". Also: {'; '.join(seen for seen, _ in others)}" if others else ""
        rank_zero_warn(
            f"entropy collapse at optimizer step {step}: {evidence.both('entropy', 'rollout entropy')} nats per token, "
            f"below the floor of {self.floor:g} for {self.below} looks in a row; {did}. Cause: {cause}. "
            f"Remedy: {remedy}{also}. EntropyCollapse.floor, patience, limits and action set this alarm"
        )


def _has_bonus(pl_module: LightningModule) -> bool:
    """Whether a coefficient above 0 would give the objective an entropy term."""
    configured = getattr(pl_module, "entropy_coef", None)
    if configured is None:
        return False
    pl_module.entropy_coef = 1.0
    try:
        return "entropy_bonus" in getattr(pl_module, "terms", ())
    finally:
        pl_module.entropy_coef = configured


def _add(sums: dict[str, list[float]], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        total, count = sums.get(name, (0.0, 0))
        sums[name] = [total + float(value), count + 1]


def _means(sums: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items()}
