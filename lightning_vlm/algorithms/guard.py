"""What stops a run: numbers that are not finite, frozen weights that move, trainable parts nothing reaches."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning_vlm.models.guard import check_frozen, check_gradients, snapshot_frozen
from lightning_vlm.models.policy import Policy

GUARD_STEPS = 3


class PartGuard:
    """Watches the first steps of a run: nothing frozen may move, everything trainable must get gradient.

    Args:
        policy: the policy, ready to train.
        clock: optimizer steps done so far.
    """

    def __init__(self, policy: Policy, clock: int) -> None:
        self.policy, self.until, self.done = policy, clock + GUARD_STEPS, False
        self.frozen = snapshot_frozen(policy)
        self.largest: dict[str, float] = {}
        self.saw_images = False

    def observe(self, clock: int, norms: Mapping[str, float], images: bool) -> None:
        """Take note of a step; at the last watched one, check. Off the hot path from then on.

        Args:
            clock: optimizer steps done, this one included. norms: gradient norm of each trainable part.
            images: whether the step showed images; data without pictures cannot tell whether vision learns.

        Raises:
            ValueError: names the part and the setting to change.
        """
        if self.done:
            return
        self.saw_images = self.saw_images or images
        for part, norm in norms.items():
            self.largest[part] = max(norm, self.largest.get(part, 0.0))
        if clock >= self.until:
            self.done = True
            check_frozen(self.policy, self.frozen, self.policy.family)
            needs_image = () if self.saw_images else ("vision", "projector")
            check_gradients({part: norm for part, norm in self.largest.items() if part not in needs_image})


def require_finite(values: Mapping[str, float], *, step: int, ids: Iterable[str], path: Path) -> None:
    """Stop at the first number that is not finite, and leave the batch's sample ids behind.

    Args:
        values: name → value. step: optimizer steps done. ids: samples of the batch. path: JSON file to write them to.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    broken = {name: value for name, value in values.items() if not math.isfinite(value)}
    if not broken:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"step": step, "values": {name: str(value) for name, value in broken.items()}, "ids": sorted(set(ids))}
    path.write_text(json.dumps(record, indent=1))
    name, value = next(iter(broken.items()))
    raise ValueError(
        f"{name} is {value} at optimizer step {step}; the batch's sample ids are in {path}. Lower model.lr, raise "
        "model.warmup_steps, set model.clip_norm, or look at those samples"
    )
