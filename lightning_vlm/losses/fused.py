"""Scores and gradient in one pass over the head, for losses that look at each token by itself.

`token_scores` recomputes a chunk's logits in the backward pass, because only then is the gradient of the loss known.
Where a token's loss is a function of its own log-prob alone, and its weight is known beforehand, that gradient can be
had at once: three matrix products per chunk instead of four, and a chunk's logits are never needed again. Ours.

Shapes: N scored positions, D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_vlm.losses.kernel import _check, _full_precision, _head, _HeadGrad, _logits, _math_dtype, _rows

TokenLoss = Callable[[Tensor, slice], Tensor]


class FusedScores(NamedTuple):
    """What one pass gives.

    Attributes:
        total: scalar, sum of the tokens' losses, differentiable once.
        logprobs, entropies, top_logprobs, top_ids: [N] as in `kernel.TokenScores`, without gradient.
    """

    total: Tensor
    logprobs: Tensor
    entropies: Tensor
    top_logprobs: Tensor
    top_ids: Tensor


def fused_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_loss: TokenLoss,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> FusedScores:
    """Sum of a per-token loss of log-probs under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: [N, D] hidden states at the positions that predict `labels`.
        weight: [V, D] head weight.
        labels: [N] int64 ids in [0, V).
        token_loss: (log-probs [C] of a chunk, which of the N tokens they are) → [C] losses, weights included. Each must
            depend on its own log-prob alone.
        temperature: divides the logits.
        chunk_rows: rows per chunk; chosen from V by default. Any value gives the same result.

    Raises:
        ValueError: mismatched shapes or a temperature that is not positive.
    """
    _check(hidden, weight, labels, temperature)
    with _full_precision(hidden):
        rows = chunk_rows or _rows(weight)
        return FusedScores(*_Fused.apply(hidden, weight, labels, token_loss, float(temperature), rows))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_loss, temperature, chunk):
        dtype, scale = _math_dtype(hidden, weight), 1.0 / temperature
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        n, head = hidden.shape[0], _head(weight, hidden, dtype)
        grad = _HeadGrad(hidden, weight, needs_hidden, needs_weight, dtype)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        logprobs, entropies, tops = (torch.empty(n, dtype=dtype, device=hidden.device) for _ in range(3))
        top_ids = torch.empty(n, dtype=torch.int64, device=hidden.device)
        buffers = torch.empty(2, min(chunk, n), weight.shape[0], dtype=dtype, device=hidden.device)
        for start in range(0, n, chunk):
            where = slice(start, min(start + chunk, n))
            logits, probs = (buffer[: where.stop - start] for buffer in buffers)
            computed = _logits(hidden[where], head, dtype, scale, out=logits if head.dtype == dtype else None)
            peak, top_ids[where] = computed.max(-1)
            shifted = computed.sub_(peak[:, None])
            torch.exp(shifted, out=probs)
            sums = probs.sum(-1)
            log_sums = sums.log()
            logprobs[where] = shifted.gather(1, labels[where, None])[:, 0] - log_sums
            entropies[where] = log_sums - shifted.mul_(probs).sum(-1) / sums
            tops[where] = -log_sums
            with torch.enable_grad():
                leaf = logprobs[where].detach().requires_grad_(needs_hidden or needs_weight)
                losses = token_loss(leaf, where)
            total += losses.detach().sum()
            if leaf.requires_grad:
                (g,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))
                # d logp_y / d z = 1[y] − p
                d_logits = probs.mul_((-g / sums)[:, None]).scatter_add_(1, labels[where, None], g[:, None])
                grad.add(start, d_logits.mul_(scale) if scale != 1.0 else d_logits)
        ctx.gradients = grad.result()
        ctx.mark_non_differentiable(logprobs, entropies, tops, top_ids)
        ctx.set_materialize_grads(False)
        return total, logprobs, entropies, tops, top_ids

    @staticmethod
    def backward(ctx, g_total, *_):
        if ctx.gradients is None:
            raise RuntimeError("a fused loss can be differentiated once")
        gradients, ctx.gradients = ctx.gradients, None
        found = [None if d is None or g_total is None else d.mul_(g_total.to(d.dtype)) for d in gradients]
        return *found, None, None, None, None
