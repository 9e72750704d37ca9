"""On-policy distillation: per-token divergence of a student from a fixed teacher, with its gradient in the same pass.

Shapes: N scored positions, D and D' hidden sizes, V and V' head rows, S = min(V, V') ids that both have, C rows of a
chunk. p is the student's next-token distribution, q the teacher's, both restricted to the S shared ids and
renormalised. Float32 (float64 for float64 inputs), nats; `[N, V]` is never held.

A step knows the weight of each token before its first backward, so the derivative of Σ_t w_t·D_t with respect to the
logits is at hand once D_t is: every chunk is walked once, with four GEMMs (both logits, d hidden, d weight), and the
backward only scales what the forward found. Within a chunk the softmaxes go over few rows at a time, which stay in the
processor's cache. The fused gradient is a known technique (Liger's fused linear losses); this form of it is ours.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_vlm.losses.kernel import _full_precision, _head, _HeadGrad, _logits, _math_dtype, _matmul, _rows

Objective = Literal["full", "jsd", "topk"]
BLOCK = 2**18  # elements of the buffers that go through the softmaxes together on a CPU: 1 MiB each in float32
END = 1e-12  # nearer than this to 0 or 1 a β is that end


class Distilled(NamedTuple):
    """What `distill` gives.

    Attributes:
        total: scalar Σ_t w_t·D_t, nats; differentiable once, in the student's hidden states and head weight.
        values: [N] D_t, nats, no gradient.
        entropies: [N] entropy of the student's distribution over all its V ids, nats, no gradient.
        logprobs: [N] the student's log-prob of `labels` over all its V ids, nats, no gradient; None without labels.
    """

    total: Tensor
    values: Tensor
    entropies: Tensor
    logprobs: Tensor | None


def distill(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    token_weights: Tensor | None = None,
    labels: Tensor | None = None,
    objective: Objective = "full",
    beta: float = 0.5,
    k: int = 64,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    chunk_rows: int | None = None,
) -> Distilled:
    """Σ_t w_t·D(p_t, q_t) over tokens, p the student, q the teacher.

    Objectives:

    - `full`: reverse KL, KL(p‖q) = Σ_v p (log p − log q).
    - `jsd`: generalised Jensen–Shannon divided by β(1−β):
      [β·KL(q‖m) + (1−β)·KL(p‖m)] / (β(1−β)), m = βq + (1−β)p. What is in brackets is GKD's form (Agarwal et al. 2024,
      eq. 1; TRL's `generalized_jsd_loss`), which tends to 0 as β → 0 or 1, where implementations jump to a KL. The
      division (ours) makes it continuous: β → 0 tends to the forward KL(q‖p), β → 1 to the reverse KL(p‖q), and these
      are computed at β = 0 and β = 1 (and within 1e-12 of them). Near p = q all β agree to second order, so that a
      learning rate holds for all of them. At β = .5 it is four times the Jensen–Shannon divergence.
    - `topk`: reverse KL between the distributions over the teacher's k likeliest ids and one outcome "anything else".
      It is exactly 0 for p = q, never more than `full`, grows with k, and is `full` for k ≥ S − 1. Ours are both
      choices: the teacher's ids, for these can be computed once and kept; the tail, for without it (renormalised over
      k ids) probability that the student puts elsewhere would cost nothing. Tails below the smallest normal number of
      the dtype count as that number.

    For equal hidden states and heads all are exactly 0, and so is the gradient.

    Args:
        hidden: [N, D] student's hidden states. weight: [V, D] its head.
        teacher_hidden: [N, D'] at the same tokens. teacher_weight: [V', D'] its head. No gradient goes to either.
        token_weights: [N] weights w_t, constants; 1 by default.
        labels: [N] int64 ids whose log-probs are wanted, too; they change nothing else.
        objective: see above. beta: weight of the teacher in `jsd`'s mixture, in [0, 1]. k: ids of `topk`.
        temperature: divides the logits of both sides; D is not multiplied by its square.
        teacher_temperature: divides the teacher's logits, where it should be another.
        chunk_rows: rows per chunk; any value gives the same result.

    Raises:
        ValueError: shapes that do not fit, or a setting out of its range.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    _check(hidden, weight, teacher_hidden, teacher_weight, token_weights, labels)
    if objective not in get_args(Objective):
        raise ValueError(f"objective is {objective!r}; choose one of {', '.join(get_args(Objective))}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}: 0 is the forward KL, 1 the reverse KL")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not min(temperature, teacher_temperature) > 0:
        raise ValueError(f"temperatures must be positive, got {temperature} and {teacher_temperature}")
    rows = chunk_rows or max(_rows(weight), 1)
    settings = objective, float(beta), int(k), 1.0 / temperature, 1.0 / teacher_temperature, rows
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    shared = min(weight.shape[0], teacher_weight.shape[0])
    teacher = teacher_hidden.detach(), teacher_weight[:shared].detach()
    with _full_precision(hidden):
        total, values, entropies, logprobs = _Distill.apply(hidden, weight, *teacher, token_weights, labels, settings)
    return Distilled(total, values, entropies, None if labels is None else logprobs)


def sampled_advantages(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """[N] advantages −(log p − log q) of sampled tokens, nats, constants: objective `sampled`.

    Used in a policy gradient with discount 0 and no baseline: E_{y~p}[−A·∇log p(y)] is the gradient of `full`.

    Args:
        logprobs: [N] the student's log-probs of the tokens it sampled. teacher_logprobs: [N] the teacher's of the same.

    Raises:
        ValueError: they differ in shape.
    """
    if logprobs.shape != teacher_logprobs.shape:
        raise ValueError(
            f"the student scored {tuple(logprobs.shape)} tokens and the teacher {tuple(teacher_logprobs.shape)}; they "
            "must be the same tokens"
        )
    return (teacher_logprobs - logprobs).detach()


@torch.no_grad()
def top_logprobs(
    hidden: Tensor, weight: Tensor, k: int, *, temperature: float = 1.0, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k likeliest ids and their log-probs under softmax(hidden @ weight.T / temperature), likeliest first.

    Args:
        hidden: [N, D]. weight: [V, D]. k: ids per position, at most V. temperature, chunk_rows: as for `distill`.

    Returns:
        [N, k] int64 ids and [N, k] log-probs, nats.

    Raises:
        ValueError: k outside 1…V, or a temperature that is not positive.
    """
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k must lie between 1 and the {weight.shape[0]} ids of the head, got {k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    dtype, n, chunk = _math_dtype(hidden, weight), hidden.shape[0], chunk_rows or _rows(weight)
    ids = torch.empty(n, k, dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(n, k, dtype=dtype, device=hidden.device)
    with _full_precision(hidden):
        head = _head(weight, hidden, dtype)
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            logits = _logits(hidden[rows], head, dtype, 1.0 / temperature)
            top, ids[rows] = logits.topk(k, -1)
            logprobs[rows] = top - logits.logsumexp(-1, keepdim=True)
    return ids, logprobs


def _check(hidden, weight, teacher_hidden, teacher_weight, token_weights, labels) -> None:
    for who, h, w in (("student", hidden, weight), ("teacher", teacher_hidden, teacher_weight)):
        if h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1]:
            raise ValueError(
                f"expected hidden [N, D] and weight [V, D] of the {who}, got {tuple(h.shape)}, {tuple(w.shape)}"
            )
    n = hidden.shape[0]
    if teacher_hidden.shape[0] != n:
        raise ValueError(
            f"the student scores {n} positions and the teacher {teacher_hidden.shape[0]}; they must be the same tokens"
        )
    for name, given in (("token_weights", token_weights), ("labels", labels)):
        if given is not None and given.shape != (n,):
            raise ValueError(f"{name} has shape {tuple(given.shape)}, expected [{n}], one per position")


# --- objectives on rows -----------------------------------------------------------------------------------------------
# Each takes log p, log q and p [c, S], which it may overwrite, and a buffer [c, S] for the derivative with respect to
# the student's logits (None where none is wanted), and returns D [c].


def _reverse_kl(log_p: Tensor, log_q: Tensor, p: Tensor, out: Tensor | None) -> Tensor:
    """∂/∂z = p (log p − log q − D)."""
    gap = log_p.sub_(log_q)
    value = torch.mul(p, gap, out=log_q).sum(-1)
    if out is not None:
        torch.mul(gap.sub_(value[:, None]), p, out=out)
    return value


def _forward_kl(log_p: Tensor, log_q: Tensor, p: Tensor, out: Tensor | None) -> Tensor:
    """∂/∂z = p − q."""
    q = log_q.exp()
    value = log_q.sub_(log_p).mul_(q).sum(-1)
    if out is not None:
        torch.sub(p, q, out=out)
    return value


def _jsd(log_p: Tensor, log_q: Tensor, p: Tensor, out: Tensor | None, beta: float) -> Tensor:
    """∂/∂z = p (log p/m − KL(p‖m)) / β.

    Of the two log-ratios to m, that of the side with the larger weight is −log(1 + small·(e^gap − 1)): exact for equal
    sides, and without the cancellation that log m would bring when it is divided by a small β(1−β).
    """
    q, near_p = log_q.exp(), beta <= 0.5  # m is nearer to p
    gap = log_q.sub_(log_p) if near_p else log_p.sub_(log_q)
    gap.clamp_(max=0.9 * math.log(torch.finfo(gap.dtype).max))  # beyond it the side with the larger weight is 0
    near = torch.expm1(gap).mul_(beta if near_p else 1 - beta).log1p_().neg_()
    far = gap.add_(near)
    log_pm, log_qm = (near, far) if near_p else (far, near)
    kl_p, kl_q = (p * log_pm).sum(-1), q.mul_(log_qm).sum(-1)
    if out is not None:
        torch.mul(log_pm.sub_(kl_p[:, None]), p.div_(beta), out=out)
    return kl_q / (1 - beta) + kl_p / beta


def _top_k(log_p: Tensor, log_q: Tensor, p: Tensor, out: Tensor | None, k: int) -> Tensor:
    """∂/∂z_v = p_v (log-ratio of v's outcome − D)."""
    ids = _top_ids(log_q, min(k, log_q.shape[1]))
    ratios, top_p = log_p.gather(1, ids) - log_q.gather(1, ids), p.gather(1, ids)
    tails = [side.scatter_(1, ids, 0.0).sum(-1) for side in (p, log_q.exp_())]
    rest = torch.sub(*(tail.clamp(min=torch.finfo(tail.dtype).tiny).log() for tail in tails))
    value = (top_p * ratios).sum(-1) + tails[0] * rest
    if out is not None:
        torch.mul(p, (rest - value)[:, None], out=out).scatter_(1, ids, top_p.mul_(ratios.sub_(value[:, None])))
    return value


def _top_ids(values: Tensor, k: int, width: int = 128) -> Tensor:
    """[c, k] ids of the largest values [c, S] in any order.

    The k largest stand in the k stretches with the largest maxima: only those are searched.
    """
    rows, size = values.shape
    whole = size // width * width
    if size < 2 * k * width:
        return values.topk(k, -1, sorted=False).indices
    stretches = values[:, :whole].unflatten(1, (-1, width)).amax(-1).topk(k, -1, sorted=False).indices
    ids = (stretches[:, :, None] * width + torch.arange(width, device=values.device)).flatten(1)
    ids = torch.cat([ids, torch.arange(whole, size, device=values.device).expand(rows, -1)], 1)
    return ids.gather(1, values.gather(1, ids).topk(k, -1, sorted=False).indices)


def _divergence(log_p, log_q, p, out, objective: Objective, beta: float, k: int) -> Tensor:
    if objective == "topk":
        return _top_k(log_p, log_q, p, out, k)
    if objective == "jsd" and END < beta < 1 - END:
        return _jsd(log_p, log_q, p, out, beta)
    if objective == "jsd" and beta <= END:
        return _forward_kl(log_p, log_q, p, out)
    return _reverse_kl(log_p, log_q, p, out)


def _over_all_ids(
    logits: Tensor, log_p: Tensor, entropy: Tensor, logprob: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Entropy and log-prob of labels over V ids from those over the first S, which `log_p` is normalised over.

    Args:
        logits: [c, V]. log_p: [c, S]. entropy, logprob: [c] of the S ids. labels: [c] or None.
    """
    shared = log_p.shape[1]
    others = logits[:, shared:] - (logits[:, :1] - log_p[:, :1])
    total = torch.logaddexp(others.logsumexp(-1), torch.zeros_like(entropy))  # log of all mass, S ids having mass 1
    beyond = (others - total[:, None]).exp_().mul_(others).sum(-1)
    if labels is not None:
        away = others.gather(1, (labels - shared).clamp(min=0)[:, None])[:, 0]
        logprob = torch.where(labels < shared, logprob, away) - total
    return total + entropy * (-total).exp() - beyond, logprob


# --- the pass over chunks ---------------------------------------------------------------------------------------------


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, other_hidden, other_weight, token_weights, labels, settings):
        objective, beta, k, scale, other_scale, chunk = settings
        dtype, device = _math_dtype(hidden, weight, other_hidden, other_weight), hidden.device
        n, shared = hidden.shape[0], other_weight.shape[0]
        needs = ctx.needs_input_grad[:2]
        head, other_head = _head(weight, hidden, dtype), _head(other_weight, other_hidden, dtype)
        grad = _HeadGrad(hidden, weight, *needs, dtype)
        ones = torch.ones(n, dtype=dtype, device=device)
        token_weights = ones if token_weights is None else token_weights.detach().to(dtype)
        rows = _RowPass(min(chunk, n), weight.shape[0], shared, dtype, device, (objective, beta, k), any(needs))
        values, entropies, logprobs = (torch.empty(n, dtype=dtype, device=device) for _ in range(3))
        for start in range(0, n, chunk):
            at = slice(start, min(start + chunk, n))
            logits, others = (
                _logits(h[at], w, dtype, s, out=buffer[: at.stop - start] if w.dtype == dtype else None)
                for h, w, s, buffer in (
                    (hidden, head, scale, rows.logits),
                    (other_hidden, other_head, other_scale, rows.others),
                )
            )
            own = None if labels is None else labels[at]
            values[at], entropies[at], logprobs[at] = rows.run(logits, others, own)
            if any(needs):
                _collect(grad, at, logits[:, :shared], token_weights[at, None] * scale)
        ctx.grads = grad.result()
        ctx.mark_non_differentiable(values, entropies, logprobs)
        ctx.set_materialize_grads(False)
        return values @ token_weights, values, entropies, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, g_total, *_):
        if ctx.grads is None:
            raise RuntimeError("the gradient of distill was already used: call it again for a second backward")
        grads, ctx.grads = ctx.grads, None
        if g_total is None:
            return (None,) * 7
        return *(None if grad is None else grad.mul_(g_total) for grad in grads), *(None,) * 5


def _collect(grad: _HeadGrad, at: slice, d_logits: Tensor, factor: Tensor) -> None:
    """Add a chunk's d logits [c, S], each row times `factor` [c, 1], which goes to the narrow side of the GEMMs."""
    shared = d_logits.shape[1]
    if grad.d_hidden is not None:
        grad.d_hidden[at] = _matmul(d_logits, grad.head[:shared], grad.dtype).mul_(factor)
    if grad.d_weight is not None:
        grad.d_weight[:shared].addmm_(d_logits.t(), grad.hidden[at].to(grad.dtype) * factor)


class _RowPass:
    """Divergence, entropy, log-probs and d logits of the rows of a chunk, a few rows at a time on a CPU.

    Attributes:
        logits: [C, V] and others: [C, S], buffers for both sides' logits.
    """

    def __init__(
        self,
        chunk: int,
        vocabulary: int,
        shared: int,
        dtype: torch.dtype,
        device: torch.device,
        objective: tuple[Any, ...],
        wants_gradient: bool,
    ) -> None:
        def buffers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.logits, self.others = buffers(chunk, vocabulary), buffers(chunk, shared)
        self.block = max(1, min(chunk, BLOCK // shared if device.type == "cpu" else chunk))
        self.work = buffers(3, self.block, shared)
        self.shared, self.objective, self.wants_gradient = shared, objective, wants_gradient

    def run(self, logits: Tensor, others: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[c] divergences, entropies, log-probs of labels (zeros without); d logits overwrite the shared logits."""
        out = torch.zeros(3, logits.shape[0], dtype=logits.dtype, device=logits.device)
        for start in range(0, logits.shape[0], self.block):
            at = slice(start, start + self.block)
            own = None if labels is None else labels[at]
            out[0, at], out[1, at], out[2, at] = self._block(logits[at], others[at], own)
        return out.unbind(0)

    def _block(self, logits: Tensor, others: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        log_p, log_q, p = self.work[:, : logits.shape[0]]
        mine = logits[:, : self.shared]
        torch.log_softmax(mine, -1, out=log_p)
        torch.exp(log_p, out=p)
        entropy = -torch.mul(p, log_p, out=log_q).sum(-1)
        logprob = torch.zeros_like(entropy)
        if labels is not None:
            logprob = log_p.gather(1, labels.clamp(max=self.shared - 1)[:, None])[:, 0]
        if self.shared < logits.shape[1]:
            entropy, logprob = _over_all_ids(logits, log_p, entropy, logprob, labels)
        torch.log_softmax(others, -1, out=log_q)
        value = _divergence(log_p, log_q, p, mine if self.wants_gradient else None, *self.objective)
        return value, entropy, logprob
