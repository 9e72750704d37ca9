"""Checkpoints of adapter-only runs: the projector alone, and what the frozen rest is told by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_vlm.models.adapters import check_beside

if TYPE_CHECKING:
    from lightning_vlm.algorithms.base import Algorithm

PREFIX = "policy.model."


def trained_state(module: Algorithm, state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a module's state that train."""
    trains = {name for name, param in module.named_parameters() if param.requires_grad}
    return {name: value for name, value in state.items() if name in trains}


def check_resumed(module: Algorithm, facts: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
    """Refuse a checkpoint of another form than this run's, or a projector that does not fit.

    Args:
        module: of the run. facts: the checkpoint's own. state: its weights; None where they are read apart.

    Raises:
        ValueError: says what differs.
    """
    form = bool(facts.get("adapter_only"))
    if form != module.adapter_only:
        there, here = ("the projector alone", "all weights") if form else ("all weights", "the projector alone")
        raise ValueError(
            f"the checkpoint holds {there}, this run keeps {here}: set model.adapter_only to {str(form).lower()}, as "
            "it was trained"
        )
    if not form:
        return
    if state is not None:
        own = {name for name, param in module.named_parameters() if param.requires_grad}
        if odd := sorted(own ^ set(state)):
            where = "the checkpoint lacks it" if odd[0] in own else "this model has no such layer"
            raise ValueError(
                f"the checkpoint's projector has another depth than the model's: {odd[0].removeprefix(PREFIX)!r} "
                f"({where}); give backbone.path the model it was trained in"
            )
    check_beside(module.policy.model, facts.get("beside", {}), "the checkpoint")
