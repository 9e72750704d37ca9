"""What is compared: the works, and who does them with which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

LR = 1e-4  # large enough that losses move away from where they start, so that equal losses mean equal gradients
BETA = 0.1
WARM_UP = 3  # optimizer steps before the timed ones; their losses are compared


@dataclass(frozen=True)
class Contender:
    """One way to do a work, in a process of its own.

    Attributes:
        name: unique, as it stands in tables.
        side: who trains.
        method: class of `lightning_vlm.algorithms` (ours), or trainer of the peer (`tools.bench.trl_side`).
        settings: keyword arguments of that class, beside those every contender shares.
        compact: peer only: score the labelled positions alone and keep all activations, as fast as it can be made.
        data: which of the made data it trains on.
    """

    name: str
    side: Literal["ours", "trl"]
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    compact: bool = False
    data: str = "preference"


@dataclass(frozen=True)
class Work:
    """One comparison: a headline contender of ours, variants of it, and the peer in two forms.

    Attributes:
        name: for `--works` and files.
        title: one line of what an optimizer step does.
        ours: the contender that the ratios are about.
        shipped: the peer with its own defaults. compacted: the peer at its fastest.
        variants: further contenders of ours, by a short name.
        check: contender of ours whose losses must equal the peer's; `ours` by default.
        note: what a reader must know to judge the figures.
    """

    name: str
    title: str
    ours: Contender
    shipped: Contender
    compacted: Contender
    variants: Mapping[str, Contender] = field(default_factory=dict)
    check: Contender | None = None
    note: str = ""

    def timed(self) -> list[Contender]:
        """Everyone whose steps are timed, ours first."""
        return [self.ours, *self.variants.values(), self.shipped, self.compacted]


def _ours(name: str, **settings: Any) -> Contender:
    return Contender(name, "ours", "DPO", {"beta": BETA, **settings})


_TRL_DPO = {"beta": BETA, "loss_type": ["sigmoid"]}
_SHIPPED = Contender("TRL DPO", "trl", "DPO", _TRL_DPO)
_COMPACTED = Contender("TRL DPO, compacted", "trl", "DPO", _TRL_DPO, compact=True)
_REFERENCE = (
    "TRL computes the reference anew in every step: its precompute_ref_log_probs refuses vision data. "
    "Like for like, compare our variant online."
)

WORKS: dict[str, Work] = {
    work.name: work
    for work in (
        Work(
            name="dpo",
            title="DPO against TRL's sigmoid DPO",
            ours=_ours("DPO", reference="cache"),
            variants={"online": _ours("DPO, online reference", reference="online")},
            shipped=_SHIPPED,
            compacted=_COMPACTED,
            note=_REFERENCE,
        ),
        Work(
            name="cw_dpo",
            title="CW-DPO against TRL's sigmoid DPO",
            ours=_ours("CW-DPO", weighting="cooling", reference="cache"),
            variants={"online": _ours("CW-DPO, online reference", weighting="cooling", reference="online")},
            shipped=_SHIPPED,
            compacted=_COMPACTED,
            # With a floor far below every likelihood the cooling weight is 1, and CW-DPO is DPO.
            check=_ours("CW-DPO, weight 1", weighting="cooling", reference="cache", ell_floor=-1e6),
            note=f"TRL has no CW-DPO: its plain DPO stands in. {_REFERENCE}",
        ),
    )
}
