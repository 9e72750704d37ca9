"""The log-prob kernel: per-token quantities from hidden states and the head, in chunks.

Shapes: N scored positions, D hidden size, V vocabulary, C rows of a chunk. Everything is computed in float32 (float64
for float64 inputs) and in nats. `[N, V]` is never held: forward and backward walk over chunks of C rows with a fixed
number of reused `[C, V]` buffers, and the backward recomputes a chunk's logits instead of keeping them. Ours.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # of one [C, V] buffer: large enough for full GEMM speed, small beside any model


class TokenScores(NamedTuple):
    """Per-token quantities at N positions.

    Attributes:
        logprobs: [N] log π(label), nats, differentiable.
        entropies: [N] entropy of the full next-token distribution, nats, differentiable.
        top_logprobs: [N] log-probability of the most likely token, nats, no gradient.
        top_ids: [N] int64, the most likely token.
    """

    logprobs: Tensor
    entropies: Tensor
    top_logprobs: Tensor
    top_ids: Tensor


def token_scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float = 1.0, chunk_rows: int | None = None
) -> TokenScores:
    """Score labels under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: [N, D] hidden states at the positions that predict `labels`.
        weight: [V, D] head weight.
        labels: [N] int64 ids in [0, V).
        temperature: divides the logits; log-probs and entropies are those of the tempered distribution.
        chunk_rows: rows per chunk; chosen from V by default. Any value gives the same result.

    Raises:
        ValueError: mismatched shapes or a temperature that is not positive.
    """
    _check(hidden, weight, labels, temperature)
    with _full_precision(hidden):
        return TokenScores(*_Score.apply(hidden, weight, labels, float(temperature), chunk_rows or _rows(weight)))


class Divergences(NamedTuple):
    """Per-token divergences between two next-token distributions p and q, nats (TV without unit).

    Attributes:
        kl: [N] KL(p‖q) = Σ p (log p − log q).
        reverse_kl: [N] KL(q‖p).
        js: [N] Jensen–Shannon, β KL(p‖m) + (1 − β) KL(q‖m), m = βp + (1 − β)q.
        tv: [N] total variation ½ Σ |p − q|.
    """

    kl: Tensor
    reverse_kl: Tensor
    js: Tensor
    tv: Tensor


def divergences(
    p_hidden: Tensor,
    p_weight: Tensor,
    q_hidden: Tensor,
    q_weight: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> Divergences:
    """Divergences of p = softmax(p_hidden @ p_weight.T) from q (likewise), differentiable in all four inputs.

    Vocabularies of different padded size are restricted to the ids both have and renormalised.

    Args:
        p_hidden: [N, D]; p_weight: [V, D]; q_hidden: [N, D']; q_weight: [V', D'].
        beta: mixture weight of p in the Jensen–Shannon form, in (0, 1).
        temperature: divides both sides' logits.
        chunk_rows: rows per chunk; any value gives the same result.

    Raises:
        ValueError: different N, beta outside (0, 1), a temperature that is not positive.
    """
    if p_hidden.shape[0] != q_hidden.shape[0]:
        raise ValueError(
            f"p scores {p_hidden.shape[0]} positions and q {q_hidden.shape[0]}; they must be the same tokens"
        )
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie in (0, 1), got {beta}; for the limits use kl and reverse_kl")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    vocabulary = min(p_weight.shape[0], q_weight.shape[0])
    rows = chunk_rows or max(1, _rows(p_weight[:vocabulary]) // 4)  # about four times the temporaries of `token_scores`
    with _full_precision(p_hidden):
        out = _Divergence.apply(
            p_hidden, p_weight[:vocabulary], q_hidden, q_weight[:vocabulary], float(beta), float(temperature), rows
        )
    return Divergences(*out.unbind(0))


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or labels.ndim != 1 or hidden.shape[0] != labels.shape[0]:
        raise ValueError(
            f"expected hidden [N, D], weight [V, D], labels [N]; got {tuple(hidden.shape)}, {tuple(weight.shape)}, "
            f"{tuple(labels.shape)}"
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden size {hidden.shape[1]} does not fit the head's {weight.shape[1]}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; for greedy decoding score at temperature 1")


def _rows(weight: Tensor) -> int:
    size = 8 if weight.dtype == torch.float64 else 4
    return max(16, min(4096, CHUNK_BYTES // (size * weight.shape[0])))


def _math_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _full_precision(x: Tensor) -> torch.autocast:
    """Autocast would round the logits to the very precision this kernel exists to avoid."""
    return torch.autocast(x.device.type, enabled=False)


def _head(weight: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The head as the GEMM wants it: on CUDA in the hidden states' precision (accumulated and returned in float32)."""
    return weight.to(hidden.dtype if hidden.is_cuda and dtype == torch.float32 else dtype)


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b in `dtype`; `b` decides the GEMM's input precision."""
    if b.dtype == dtype:
        return torch.mm(a.to(dtype), b, out=out)
    return torch.mm(a.to(b.dtype), b, out_dtype=dtype)


def _logits(rows: Tensor, head: Tensor, dtype: torch.dtype, scale: float, out: Tensor | None = None) -> Tensor:
    logits = _matmul(rows, head.t(), dtype, out)
    return logits.mul_(scale) if scale != 1.0 else logits


class _HeadGrad:
    """Collects d/d hidden and d/d weight from chunks of d/d logits."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool, dtype: torch.dtype
    ) -> None:
        self.hidden, self.dtype = hidden, dtype
        self.head = _head(weight, hidden, dtype) if needs_hidden else None
        self.d_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if needs_hidden else None
        self.d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_weight else None
        self.like = hidden.dtype, weight.dtype

    def add(self, start: int, d_logits: Tensor) -> None:
        stop = start + d_logits.shape[0]
        if self.d_hidden is not None:
            self.d_hidden[start:stop] = _matmul(d_logits, self.head, self.dtype)
        if self.d_weight is not None:
            self.d_weight.addmm_(d_logits.t(), self.hidden[start:stop].to(self.dtype))

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        d_hidden = None if self.d_hidden is None else self.d_hidden.to(self.like[0])
        d_weight = None if self.d_weight is None else self.d_weight.to(self.like[1])
        return d_hidden, d_weight


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, chunk):
        dtype, scale = _math_dtype(hidden, weight), 1.0 / temperature
        n, vocabulary = hidden.shape[0], weight.shape[0]
        head = _head(weight, hidden, dtype)
        logprobs, entropies, tops, lse = (torch.empty(n, dtype=dtype, device=hidden.device) for _ in range(4))
        top_ids = torch.empty(n, dtype=torch.int64, device=hidden.device)
        buffers = torch.empty(2, min(chunk, n), vocabulary, dtype=dtype, device=hidden.device)
        for start in range(0, n, chunk):
            stop = min(start + chunk, n)
            logits, probs = buffers[0, : stop - start], buffers[1, : stop - start]
            computed = _logits(hidden[start:stop], head, dtype, scale, out=logits if head.dtype == dtype else None)
            peak, top_ids[start:stop] = computed.max(-1)
            shifted = computed.sub_(peak[:, None])
            torch.exp(shifted, out=probs)
            total = probs.sum(-1)
            log_total = total.log()
            logprobs[start:stop] = shifted.gather(1, labels[start:stop, None])[:, 0] - log_total
            entropies[start:stop] = log_total - probs.mul_(shifted).sum(-1) / total
            tops[start:stop] = -log_total
            lse[start:stop] = peak + log_total
        ctx.save_for_backward(hidden, weight, labels, lse, entropies)
        ctx.settings = dtype, scale, chunk
        ctx.mark_non_differentiable(tops, top_ids)
        ctx.set_materialize_grads(False)
        return logprobs, entropies, tops, top_ids

    @staticmethod
    def backward(ctx, g_logprobs, g_entropies, *_):
        with _full_precision(ctx.saved_tensors[0]):
            return *_Score._gradients(ctx, g_logprobs, g_entropies), None, None, None

    @staticmethod
    def _gradients(ctx, g_logprobs, g_entropies):
        hidden, weight, labels, lse, entropies = ctx.saved_tensors
        dtype, scale, chunk = ctx.settings
        grad = _HeadGrad(hidden, weight, ctx.needs_input_grad[0], ctx.needs_input_grad[1], dtype)
        n, head = hidden.shape[0], _head(weight, hidden, dtype)
        if g_logprobs is not None or g_entropies is not None:
            zero = torch.zeros(n, dtype=dtype, device=hidden.device)
            g_label = zero if g_logprobs is None else g_logprobs.to(dtype)
            for start in range(0, n, chunk):
                stop = min(start + chunk, n)
                logp = _logits(hidden[start:stop], head, dtype, scale).sub_(lse[start:stop, None])
                g = g_label[start:stop, None]
                if g_entropies is None:  # d logp_y / d z = 1[y] − p
                    d_logits = logp.exp_().mul_(-g)
                else:  # d H / d z = −p (log p + H)
                    probs = logp.exp()
                    g_entropy = g_entropies[start:stop, None].to(dtype)
                    d_logits = logp.add_(entropies[start:stop, None]).mul_(-g_entropy).sub_(g).mul_(probs)
                d_logits.scatter_add_(1, labels[start:stop, None], g)
                grad.add(start, d_logits.mul_(scale) if scale != 1.0 else d_logits)
        return grad.result()


def _chunk_divergences(p_logits: Tensor, q_logits: Tensor, beta: float) -> Tensor:
    """[4, C]: kl, reverse kl, generalised Jensen–Shannon, total variation."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    gap = log_p - log_q
    kl, reverse = (p * gap).sum(-1), -(q * gap).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    js = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)
    return torch.stack([kl, reverse, js, 0.5 * (p - q).abs().sum(-1)])


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p_hidden, p_weight, q_hidden, q_weight, beta, temperature, chunk):
        dtype, scale = _math_dtype(p_hidden, p_weight, q_hidden, q_weight), 1.0 / temperature
        p_head, q_head = _head(p_weight, p_hidden, dtype), _head(q_weight, q_hidden, dtype)
        out = torch.empty(4, p_hidden.shape[0], dtype=dtype, device=p_hidden.device)
        for start in range(0, p_hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            p_logits = _logits(p_hidden[rows], p_head, dtype, scale)
            q_logits = _logits(q_hidden[rows], q_head, dtype, scale)
            out[:, rows] = _chunk_divergences(p_logits, q_logits, beta)
        ctx.save_for_backward(p_hidden, p_weight, q_hidden, q_weight)
        ctx.settings = dtype, scale, beta, chunk
        return out

    @staticmethod
    def backward(ctx, g_out):
        with _full_precision(ctx.saved_tensors[0]):
            return *_Divergence._gradients(ctx, g_out), None, None, None

    @staticmethod
    def _gradients(ctx, g_out):
        p_hidden, p_weight, q_hidden, q_weight = ctx.saved_tensors
        dtype, scale, beta, chunk = ctx.settings
        needs = ctx.needs_input_grad
        p_grad = _HeadGrad(p_hidden, p_weight, needs[0], needs[1], dtype)
        q_grad = _HeadGrad(q_hidden, q_weight, needs[2], needs[3], dtype)
        p_head, q_head = _head(p_weight, p_hidden, dtype), _head(q_weight, q_hidden, dtype)
        for start in range(0, p_hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            p_logits = _logits(p_hidden[rows], p_head, dtype, scale).requires_grad_(needs[0] or needs[1])
            q_logits = _logits(q_hidden[rows], q_head, dtype, scale).requires_grad_(needs[2] or needs[3])
            sides = [(g, z) for g, z in ((p_grad, p_logits), (q_grad, q_logits)) if z.requires_grad]
            with torch.enable_grad():
                value = _chunk_divergences(p_logits, q_logits, beta)
            for (grad, _), d in zip(
                sides, torch.autograd.grad(value, [z for _, z in sides], g_out[:, rows]), strict=True
            ):
                grad.add(start, d.mul_(scale) if scale != 1.0 else d)
        return *p_grad.result(), *q_grad.result()
