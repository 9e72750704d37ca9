"""What is compared: the works, and who does them with which settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tools.bench.material import Size

LR = 1e-4  # large enough that losses move away from where they start, so that equal losses mean equal gradients
BETA = 0.1
WARM_UP = 3  # optimizer steps before the timed ones; their losses are compared


@dataclass(frozen=True)
class Contender:
    """One way to do a work, in a process of its own.

    Attributes:
        name: unique, as it stands in tables.
        side: who trains.
        method: what is done: a class of `lightning_vlm.algorithms`, or `Rollout`; the peer has its own for each.
        settings: keyword arguments of that class or of the peer's configuration, beside those every contender shares.
        compact: peer only: score the labelled positions alone, keep all activations, take micro-batches of 8; as good
            as it can be made.
        data: which of the made data it trains on.
        lr: learning rate.
    """

    name: str
    side: Literal["ours", "trl"]
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    compact: bool = False
    data: str = "preference"
    lr: float = LR


@dataclass(frozen=True)
class Work:
    """One comparison: a headline contender of ours, variants of it, and the peer in two forms.

    Attributes:
        name: for `--works` and files.
        title: one line of what an optimizer step does.
        shape: what a step takes, with the names of `Size` in braces.
        ours: the contender that the ratios are about.
        shipped: the peer with its own defaults. compacted: the peer at its best, where
            that is something else.
        variants: further contenders of ours, by a short name.
        check: contender of ours whose losses must equal the peer's; `ours` by default.
        compared: what the two numbers of a warm-up step are that must be equal.
        norms: steps of the warm-up whose second number must be equal too; None: all.
        resized: fields of `Size` that this work changes, from what they are otherwise.
        note: what a reader must know to judge the figures.
    """

    name: str
    title: str
    shape: str
    ours: Contender
    shipped: Contender
    compacted: Contender | None
    variants: Mapping[str, Contender] = field(default_factory=dict)
    check: Contender | None = None
    compared: tuple[str, str] = ("loss", "gradient norm")
    norms: int | None = None
    resized: Mapping[str, Callable[[Size], Any]] = field(default_factory=dict)
    note: str = ""

    def timed(self) -> list[Contender]:
        """Everyone whose steps are timed, ours first."""
        return [self.ours, *self.variants.values(), *self.peers()]

    def peers(self) -> list[Contender]:
        """The peer in its one or two forms."""
        return [self.shipped] if self.compacted is None else [self.shipped, self.compacted]

    def size(self, size: Size) -> Size:
        """Sizes of this work's model and data."""
        return replace(size, **{name: change(size) for name, change in self.resized.items()})


def _ours(name: str, **settings: Any) -> Contender:
    return Contender(name, "ours", "DPO", {"beta": BETA, **settings})


_TRL_DPO = {"beta": BETA, "loss_type": ["sigmoid"]}
_SHIPPED = Contender("TRL DPO", "trl", "DPO", _TRL_DPO)
_COMPACTED = Contender("TRL DPO, compacted", "trl", "DPO", _TRL_DPO, compact=True)
_REFERENCE = (
    "TRL computes the reference anew in every step: its precompute_ref_log_probs refuses vision data. "
    "Like for like, compare our variant online."
)
_PAIRS = "{batch} pairs a step, prompts of {prompt} tokens and {image_tokens} image tokens, completions of {completion}"
_GROUPS = (
    "{prompts} prompts of {prompt} tokens and {image_tokens} image tokens a step, {group} completions of at most "
    "{completion} tokens for each"
)
_ON_POLICY = "Both sides sample at temperature 1 in the timed steps; in the warm-up both train on prepared completions."


def _on_policy(
    name: str, called: str, method: str, data: str, *, compacted: bool = True, lr: float = LR, **more: Any
) -> Work:
    """A work without settings of its own: ours and the peer's differ in nothing that can be set."""
    peer = {"side": "trl", "method": method, "data": data, "lr": lr}
    return Work(
        name=name,
        ours=Contender(called, "ours", method, data=data, lr=lr),
        shipped=Contender(f"TRL {called}", **peer),
        compacted=Contender(f"TRL {called}, compacted", **peer, compact=True) if compacted else None,
        **more,
    )


WORKS: dict[str, Work] = {
    work.name: work
    for work in (
        Work(
            name="dpo",
            title="DPO against TRL's sigmoid DPO",
            shape=_PAIRS,
            ours=_ours("DPO", reference="cache"),
            variants={"online": _ours("DPO, online reference", reference="online")},
            shipped=_SHIPPED,
            compacted=_COMPACTED,
            norms=1,
            note=_REFERENCE,
        ),
        Work(
            name="cw_dpo",
            title="CW-DPO against TRL's sigmoid DPO",
            shape=_PAIRS,
            ours=_ours("CW-DPO", weighting="cooling", reference="cache"),
            variants={"online": _ours("CW-DPO, online reference", weighting="cooling", reference="online")},
            shipped=_SHIPPED,
            compacted=_COMPACTED,
            # With a floor far below every likelihood the cooling weight is 1, and CW-DPO is DPO.
            check=_ours("CW-DPO, weight 1", weighting="cooling", reference="cache", ell_floor=-1e6),
            norms=1,
            note=f"TRL has no CW-DPO: its plain DPO stands in. {_REFERENCE}",
        ),
        _on_policy("grpo", "GRPO", "GRPO", "prompts", title="GRPO, rollout included", shape=_GROUPS, note=_ON_POLICY),
        _on_policy(
            "grpo-varied",
            "GRPO, varied lengths",
            "GRPO",
            "prompts",
            title="GRPO, rollout included, where completions end by themselves after 25 of 64 tokens on average",
            shape=_GROUPS,
            resized={"mean": lambda size: 25 / 64 * size.completion},
            lr=1e-6,  # TRL's default: with more the policy soon writes longer completions
            note=f"{_ON_POLICY} The learning rate is 1e-6, so that lengths stay what they are.",
        ),
        _on_policy(
            "grpo-336",
            "GRPO, large pictures",
            "GRPO",
            "prompts",
            title="GRPO, rollout included, with pictures three times as wide and high",
            shape=_GROUPS,
            resized={"image": lambda size: 3 * size.image},
            note=_ON_POLICY,
        ),
        _on_policy(
            "rollout",
            "Rollout",
            "Rollout",
            "prompts",
            compacted=False,
            title="Sampling alone, with encoded pictures and decoded texts, against generate as TRL's GRPO calls it",
            shape=_GROUPS,
            compared=("checksum of the greedy ids", "number of greedy ids"),
            note="Temperature 1 in the timed steps; in the warm-up both sides must give the same ids greedily.",
        ),
        _on_policy(
            "opd",
            "OPD",
            "OPD",
            "distilled",
            title="On-policy distillation by full reverse KL, rollout included, from a teacher of the same size",
            shape="{distilled} prompts of {prompt} tokens and {image_tokens} image tokens a step, one completion of at "
            "most {completion} tokens for each",
            note=f"TRL's is its DistillationTrainer with beta 1. {_ON_POLICY}",
        ),
    )
}
