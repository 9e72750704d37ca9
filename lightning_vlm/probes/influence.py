"""Influence of one training example on one probe text: exact gradients, for small models.

An SGD step of size η on the loss L_u of an example u moves the weights by −η ∇L_u, so that a probe's log-probability
moves by

    Δ log π(y_o) = −η ⟨∇ log π(y_o), ∇L_u⟩ + O(η²).

The losses here read the model through log π of whole texts (sums over their scored tokens, nats) alone. So an example
is a few texts with the pull of its loss on each, pull_r = −∂L_u/∂ log π(y_r), and the first order is
η Σ_r pull_r ⟨∇ log π(y_o), ∇ log π(y_r)⟩: one gradient per text, and dot products. Nothing is averaged: a training step
of rate lr on the mean over n tokens is η = lr / n here.

Through the logits z of the scored tokens, with A_i = e_{y_i} − π_i the derivative of log π(y_i) by z_i, J_i = ∂z_i/∂θ
and the residual G_j = π_j − e_{y_j}, one supervised step is Δ log π(y_o) = −η Σ_ij A_i K_ij G_j; K_ij = J_i J_jᵀ is the
empirical neural tangent kernel (Learning Dynamics of VLM Finetuning, after Ren & Sutherland, Learning Dynamics of
LLM Finetuning). `token_influence` gives its summands.

Shapes: O probe texts, U examples, R texts, T scored tokens of a text, P trainable weights of a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_vlm.models.batch import ModelBatch, Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.parts import part_parameters
from lightning_vlm.models.policy import Policy, evaluating

Track = Callable[[Sequence[Any], str], Iterable[Any]]


def untracked(items: Sequence[Any], what: str) -> Iterable[Any]:
    """The items, without showing progress."""
    return items


@dataclass(frozen=True)
class Update:
    """One training example as its loss sees it.

    Attributes:
        rows: its texts, each with an image-text prompt.
        pulls: −∂L/∂ log π of each text: how hard a step pushes it up (negative: down).
    """

    rows: tuple[Row, ...]
    pulls: tuple[float, ...]


def sft_update(row: Row) -> Update:
    """L = −log π(y), summed over the scored tokens: its only text is pulled up by 1."""
    return Update((row,), (1.0,))


def dpo_update(
    chosen: Row, rejected: Row, *, beta: float = 0.1, cooling: float = 1.0, deltas: tuple[float, float] = (0.0, 0.0)
) -> Update:
    """L = −log σ(β(Δ_w − w_c·Δ_l)): chosen is pulled up by c = β·σ(−β(Δ_w − w_c·Δ_l)), rejected down by w_c·c.

    Args:
        chosen: the winner y_w. rejected: the loser y_l.
        beta: strength β of the preference loss.
        cooling: CW-DPO's w_c in [0, 1], held constant as the paper derives its gradient; 1 is DPO.
        deltas: Δ_w, Δ_l, log π − log π_ref in nats; 0 where the policy is its own reference, as at a stage's start.

    Raises:
        ValueError: a β that is not positive, or w_c outside [0, 1].
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 <= cooling <= 1:
        raise ValueError(f"cooling must lie in [0, 1], got {cooling}; 1 is DPO, 0 leaves the rejected text out")
    margin = beta * (deltas[0] - cooling * deltas[1])
    pull = beta * (1.0 - math.tanh(margin / 2)) / 2  # σ(−x), which no margin overflows
    return Update((chosen, rejected), (pull, -cooling * pull))


class StepCheck(NamedTuple):
    """First-order predictions beside the real thing.

    Attributes:
        before: [O] log π(y_o) before any step, nats.
        predicted: [O, U] η times the influence, nats.
        real: [O, U] change of log π(y_o) by a real step on each example alone, nats.
        parts: part → [O, U], its share of `predicted`.
    """

    before: Tensor
    predicted: Tensor
    real: Tensor
    parts: dict[str, Tensor]


class TokenInfluence(NamedTuple):
    """−A·K·G by token.

    Attributes:
        contributions: [T_o, T_u] −A_i K_ij G_j; nats per unit of η.
        beliefs: [T_o] ‖A_i‖, how far each probe token is from certain.
        residuals: [T_u] ‖G_j‖, how far each trained token is from learnt.
    """

    contributions: Tensor
    beliefs: Tensor
    residuals: Tensor

    @property
    def coupling(self) -> Tensor:
        """[T_o, T_u] contributions per unit of belief and residual: what the kernel alone says. NaN beside a 0."""
        return self.contributions / (self.beliefs[:, None] * self.residuals)


def log_prob(policy: Policy, row: Row) -> Tensor:
    """log π of a row's scored tokens, summed; nats, differentiable.

    Raises:
        ValueError: a row without scored tokens.
    """
    return policy.score(_batch(policy, row)).logprobs.sum()


def gradients(policy: Policy, rows: Sequence[Row], *, track: Track = untracked) -> dict[str, Tensor]:
    """∇ log π of each row by the trainable weights.

    Args:
        policy: unsharded; runs in eval mode, and is left as it was.
        rows: texts with scored tokens. track: wraps (rows, what is done), to show progress.

    Returns:
        part (vision, projector, language, head) → [R, P]; weights that a row does not reach have 0.

    Raises:
        ValueError: no rows, a row without scored tokens, or nothing that is trained.
    """
    if not rows:
        raise ValueError("no rows to take gradients of")
    owned = _trainable(policy)
    with evaluating(policy):
        found = [_by_part(owned, log_prob(policy, row)) for row in track(rows, "gradients")]
    return {part: torch.stack([gradient.pop(part) for gradient in found]) for part in owned}


def direction(policy: Policy, update: Update) -> dict[str, Tensor]:
    """−∇L of an example, part → [P]: where an SGD step on it alone moves the weights.

    Raises:
        ValueError: as `gradients`.
    """
    found = gradients(policy, update.rows)
    return {part: torch.tensor(update.pulls, dtype=g.dtype, device=g.device) @ g for part, g in found.items()}


def influence(policy: Policy, probes: Sequence[Row], updates: Sequence[Update], *, track: Track = untracked) -> Tensor:
    """−⟨∇ log π(y_o), ∇L_u⟩ of every probe and example: nats of change per unit of η, to first order.

    Args:
        policy: as in `gradients`. probes: texts to watch, whose gradients are all held in memory.
        updates: examples, one step each. track: wraps (items, what is done), to show progress.

    Returns:
        [O, U]; symmetric where probes and examples are the same texts and the loss is supervised.

    Raises:
        ValueError: no probes or examples; else as `gradients`.
    """
    return sum(influence_by_part(policy, probes, updates, track=track).values())


def influence_by_part(
    policy: Policy, probes: Sequence[Row], updates: Sequence[Update], *, track: Track = untracked
) -> dict[str, Tensor]:
    """Each part's summand of `influence`, part → [O, U]: the change if that part alone took the step."""
    _require_some(probes, updates)
    known = gradients(policy, probes, track=track)
    return _columns([_dots(known, direction(policy, update)) for update in track(updates, "examples")])


def token_influence(policy: Policy, probe: Row, trained: Row) -> TokenInfluence:
    """The influence of a supervised step on `trained` on `probe`, by pairs of tokens.

    One backward pass per token: J_iᵀA_i for the probe's tokens, −J_jᵀG_j for the trained ones, and their dot products.
    K itself, [V, V] per pair, is never built.

    Returns:
        Contributions whose sum is `influence(policy, [probe], [sft_update(trained)])`.

    Raises:
        ValueError: as `gradients`.
    """
    owned = _trainable(policy)
    with evaluating(policy):
        residuals, sizes = zip(*_pulled_tokens(policy, owned, trained), strict=True)
        known = {part: torch.stack([r[part] for r in residuals]) for part in owned}
        rows, beliefs = [], []
        for gradient, size in _pulled_tokens(policy, owned, probe):
            rows.append(sum(_dots(known, gradient).values()))
            beliefs.append(size)
    return TokenInfluence(torch.stack(rows), torch.stack(beliefs), torch.stack(sizes))


def check_steps(
    policy: Policy, probes: Sequence[Row], updates: Sequence[Update], *, eta: float, track: Track = untracked
) -> StepCheck:
    """Every first-order prediction against a real SGD step, which is undone bit for bit.

    Args:
        policy: as in `gradients`; float64 weights tell small changes from rounding.
        probes: texts to watch. updates: examples; each step starts from the same weights.
        eta: step size on the example's summed loss. track: wraps (items, what is done), to show progress.

    Raises:
        ValueError: an η that is not positive, no probes or examples; else as `gradients`.
    """
    if not (eta > 0 and math.isfinite(eta)):
        raise ValueError(f"eta must be a positive number, got {eta}")
    _require_some(probes, updates)
    known, before = gradients(policy, probes, track=track), _values(policy, probes)
    predicted, real = [], []
    for update in track(updates, "steps"):
        step = direction(policy, update)
        predicted.append(_dots(known, step))
        with stepped(policy, step, eta):
            real.append(_values(policy, probes) - before)
    parts = {part: eta * dots for part, dots in _columns(predicted).items()}
    return StepCheck(before, sum(parts.values()), torch.stack(real, 1), parts)


def check_step(policy: Policy, probe: Row, update: Update, eta: float) -> tuple[float, float]:
    """(predicted, real) change of log π(probe) in nats by one SGD step on one example; as `check_steps`."""
    found = check_steps(policy, [probe], [update], eta=eta)
    return found.predicted.item(), found.real.item()


@contextmanager
def stepped(policy: Policy, step: dict[str, Tensor], eta: float) -> Iterator[None]:
    """Inside, the trainable weights are θ + η·step; afterwards they are what they were, bit for bit.

    Args:
        policy: changed in place. step: part → [P], as `direction` gives it. eta: its length.
    """
    params = [(param, part) for part, own in _trainable(policy).items() for param in own]
    saved, used = [param.detach().clone() for param, _ in params], dict.fromkeys(step, 0)
    try:
        with torch.no_grad():
            for param, part in params:
                start = used[part]
                used[part] = start + param.numel()
                param.add_(step[part][start : used[part]].view_as(param), alpha=eta)
        yield
    finally:
        with torch.no_grad():
            for (param, _), value in zip(params, saved, strict=True):
                param.copy_(value)


def _trainable(policy: Policy) -> dict[str, list[nn.Parameter]]:
    found = {
        part: [param for _, param in params if param.requires_grad]
        for part, params in part_parameters(policy, policy.family).items()
    }
    found = {part: params for part, params in found.items() if params}
    if not found:
        raise ValueError("no weight of the model is trained: influence needs at least one part that is not frozen")
    return found


def _require_some(probes: Sequence[Row], updates: Sequence[Update]) -> None:
    if not probes or not updates:
        raise ValueError(f"influence needs probes and examples, got {len(probes)} and {len(updates)}")


def _batch(policy: Policy, row: Row) -> ModelBatch:
    if not row.scored:
        raise ValueError(f"row {row.id} ({row.name}) has no scored token: there is nothing to take a gradient of")
    return collate([row], policy.family, pad_id=0).to(next(policy.parameters()).device)  # one row: no padding


def _by_part(
    owned: dict[str, list[nn.Parameter]], value: Tensor, cotangent: Tensor | None = None, *, keep: bool = False
) -> dict[str, Tensor]:
    """part → [P] vector-Jacobian product; ones for the cotangent of a scalar. `keep` keeps the graph."""
    flat = [param for params in owned.values() for param in params]
    found = iter(torch.autograd.grad(value, flat, cotangent, retain_graph=keep, materialize_grads=True))
    joined = {part: torch.cat([next(found).flatten() for _ in params]) for part, params in owned.items()}
    return {part: vector.to(torch.promote_types(torch.float32, vector.dtype)) for part, vector in joined.items()}


def _pulled_tokens(
    policy: Policy, owned: dict[str, list[nn.Parameter]], row: Row
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Of each scored token (part → [P] Jᵀ(e_y − π), ‖e_y − π‖)."""
    batch = _batch(policy, row)
    hidden, weight = policy(batch, raw=True)
    dtype = torch.promote_types(torch.float32, hidden.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    pulls = -logits.detach().softmax(-1)
    labels = batch.labels[:, None]
    pulls.scatter_add_(1, labels, torch.ones_like(labels, dtype=dtype))
    for token, pull in zip(logits, pulls, strict=True):
        yield _by_part(owned, token, pull, keep=True), pull.norm()


def _dots(known: dict[str, Tensor], vector: dict[str, Tensor]) -> dict[str, Tensor]:
    """part → [R] dot products of its gradients [R, P] with a vector [P]."""
    return {part: matrix @ vector[part] for part, matrix in known.items()}


def _columns(dots: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[R] per example and part → part → [R, examples]."""
    return {part: torch.stack([column[part] for column in dots], 1) for part in dots[0]}


@torch.no_grad()
def _values(policy: Policy, rows: Sequence[Row]) -> Tensor:
    """[R] log π of the rows, each scored by itself, so that two calls differ by the weights alone."""
    with evaluating(policy):
        return torch.stack([log_prob(policy, row) for row in rows])
