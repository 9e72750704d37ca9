"""One optimizer for all parts: AdamW and Muon side by side, optional float32 master weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Schedule = Literal["constant", "linear", "cosine", "wsd"]


def lr_factor(
    step: int, *, total: int, warmup: int, schedule: Schedule, decay_fraction: float, min_ratio: float
) -> float:
    """Factor on the learning rate for optimizer step `step` (0-based).

    Args:
        step: optimizer steps done before this one.
        total: optimizer steps of the run.
        warmup: steps of linear warm-up; step 0 already gets 1/warmup.
        schedule: after the warm-up `constant`; `linear` or `cosine` down to `min_ratio` at `total`; `wsd` constant,
            then linear over the last `decay_fraction` of the run.
        decay_fraction: share of the run that `wsd` decays over.
        min_ratio: floor of the decayed factor.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    start = max(warmup, round(total * (1 - decay_fraction))) if schedule == "wsd" else warmup
    done = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return min_ratio + (1 - min_ratio) * shape


class PartOptimizer(torch.optim.Optimizer):
    """AdamW (`torch.optim.AdamW`, fused where it exists) and Muon (`torch.optim.Muon`) behind one `step()`.

    State is keyed by the model's own parameters, so that ordinary and distributed checkpoints see one optimizer. With
    `master_weights`, every low-precision parameter has a float32 master: gradients are accumulated into the master's
    float32 gradient as soon as autograd makes them, the update runs on the master, the parameter is its rounded copy.

    Args:
        groups: dicts with `params`, `lr`, `weight_decay`, `kind` (`adamw` | `muon`) and any labels (`part`, `warmup`).
        betas: AdamW moments. eps: AdamW denominator. momentum: Muon's.
        master_weights: keep float32 masters for bfloat16/float16 parameters.

    Raises:
        ValueError: an unknown `kind`, or a Muon parameter that is not a matrix.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        master_weights: bool = False,
    ) -> None:
        super().__init__(list(groups), {"lr": 0.0, "weight_decay": 0.0, "kind": "adamw"})
        self.work: dict[nn.Parameter, Tensor] = {}
        self._hooks = []
        for group in self.param_groups:
            for p in group["params"]:
                low = p.dtype in (torch.bfloat16, torch.float16)
                self.work[p] = self._make_master(p) if master_weights and low else p
        self._inner: dict[str, torch.optim.Optimizer] = {}
        for kind in ("adamw", "muon"):
            mine = [g for g in self.param_groups if g["kind"] == kind]
            if mine:
                inner_groups = [{"params": [self.work[p] for p in g["params"]], "lr": g["lr"]} for g in mine]
                self._inner[kind] = self._build(kind, inner_groups, betas, eps, momentum)
        if unknown := {g["kind"] for g in self.param_groups} - {"adamw", "muon"}:
            raise ValueError(f"unknown optimizer kind {sorted(unknown)}; choose adamw or muon")

    @staticmethod
    def _build(kind, groups, betas, eps, momentum) -> torch.optim.Optimizer:
        if kind == "muon":
            return torch.optim.Muon(groups, momentum=momentum, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        floating = {p.dtype for g in groups for p in g["params"]}
        fused = floating <= {torch.float32, torch.float64, torch.bfloat16, torch.float16}
        return torch.optim.AdamW(groups, betas=betas, eps=eps, weight_decay=0.0, fused=fused)

    def _make_master(self, p: nn.Parameter) -> Tensor:
        master = p.detach().float().requires_grad_(True)

        self._hooks.append(p.register_post_accumulate_grad_hook(lambda param: self._move_grad(param, master)))
        self.state[p]["master"] = master
        return master

    @staticmethod
    def _move_grad(p: Tensor, master: Tensor) -> None:
        if p.grad is not None:
            gradient = p.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            p.grad = None

    @torch.no_grad()
    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """This step's gradient of every parameter (the masters' where there are masters); a missing one becomes 0.

        Filling with zeros makes a step without images the same on one rank, on many, and under sharding.
        """
        for p, work in self.work.items():
            if work is not p:
                self._move_grad(p, work)  # sharded parameters get theirs without the autograd hook
            if work.grad is None:
                work.grad = torch.zeros_like(work)
        return {p: work.grad for p, work in self.work.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=set_to_none)
        for work in self.work.values():
            work.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        """Update every group with its own `lr` and `weight_decay`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.gradients()
        for kind, inner in self._inner.items():
            for ours, theirs in zip(
                (g for g in self.param_groups if g["kind"] == kind), inner.param_groups, strict=True
            ):
                theirs["lr"], theirs["weight_decay"] = ours["lr"], ours["weight_decay"]
            inner.step()
            for p, work in self.work.items():
                if work in inner.state and self.state[p] is not inner.state[work]:
                    inner.state[work].update({k: v for k, v in self.state[p].items() if k not in inner.state[work]})
                    self.state[p] = inner.state[work]  # shared from now on: one state, seen by both
        for p, work in self.work.items():
            if work is not p:
                p.copy_(work)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and per-parameter state without changing any dtype (the base class would round masters)."""
        params = [p for g in self.param_groups for p in g["params"]]
        saved_groups, saved = state_dict["param_groups"], state_dict["state"]
        ids = [i for g in saved_groups for i in g["params"]]
        if len(ids) != len(params):
            raise ValueError(
                f"the checkpoint's optimizer holds {len(ids)} parameters, this run trains {len(params)}; "
                "resume with the same parts trainable, or start from the exported model instead"
            )
        for group, other in zip(self.param_groups, saved_groups, strict=True):
            group.update({k: v for k, v in other.items() if k != "params"})
        where = {work: inner for inner in self._inner.values() for g in inner.param_groups for work in g["params"]}
        for p, index in zip(params, ids, strict=True):
            if index not in saved:
                continue
            entry = {k: _like(v, p) for k, v in saved[index].items()}
            work = self.work[p]
            if work is not p:
                work.copy_(entry["master"])
                entry["master"] = work
            self.state[p] = where[work].state[work] = entry


def _like(value: Any, p: Tensor) -> Any:
    """A saved state value on the parameter's device; `step` counters stay where fused kernels want them."""
    if isinstance(value, DTensor) or not isinstance(value, Tensor):
        return value
    return value.detach().clone().to(p.device)
