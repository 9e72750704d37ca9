"""Scores and gradient in one pass over the head, against the two passes of the kernel."""

from __future__ import annotations

import pytest
import torch

from lightning_vlm.losses.fused import fused_token_loss
from lightning_vlm.losses.kernel import token_scores
from lightning_vlm.losses.policy_gradient import PolicyLoss, Tokens

N, D, V = 13, 6, 29


def data(dtype=torch.float64):
    """Hidden states and head with gradient, labels, and what a surrogate knows of the tokens."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for n in (N, V))
    labels = torch.randint(V, (N,), generator=g)
    old, advantages, reference, weights = (torch.randn(N, generator=g, dtype=torch.float64) for _ in range(4))
    start = torch.log_softmax(hidden.detach() @ weight.detach().T, -1).gather(1, labels[:, None])[:, 0]
    known = Tokens(advantages, weights.abs(), torch.arange(N), N, start + 0.3 * old, start + reference)
    return hidden, weight, labels, known


def per_token(known, surrogate="clip"):
    loss = PolicyLoss(surrogate=surrogate, kl_beta=0.1, dual_clip=3.0)
    return lambda logprobs, where: loss(logprobs, known.part(where))


def two_passes(hidden, weight, labels, token_loss, temperature=1.0):
    scores = token_scores(hidden, weight, labels, temperature=temperature)
    total = token_loss(scores.logprobs, slice(0, len(labels))).sum()
    return total, scores, torch.autograd.grad(total, (hidden, weight))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 4, 13, 100, None])
def test_values_and_gradients_are_those_of_two_passes(chunk, temperature, dtype, tolerance):
    hidden, weight, labels, known = data(dtype)
    out = fused_token_loss(hidden, weight, labels, per_token(known), temperature=temperature, chunk_rows=chunk)
    total, scores, want = two_passes(hidden, weight, labels, per_token(known), temperature)
    torch.testing.assert_close(out.total, total.to(dtype), rtol=tolerance, atol=tolerance)
    for one, other in zip(out[1:], scores, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=tolerance, atol=tolerance)
        assert not one.requires_grad
    for one, other in zip(torch.autograd.grad(out.total, (hidden, weight)), want, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
def test_what_comes_behind_scales_the_gradient(surrogate):
    """A power of the total upstream: d/dx (½·total²) = total · d total/dx."""
    hidden, weight, labels, known = data()
    out = fused_token_loss(hidden, weight, labels, per_token(known, surrogate), chunk_rows=5)
    got = torch.autograd.grad(0.5 * out.total.square(), (hidden, weight))
    total, _, want = two_passes(hidden, weight, labels, per_token(known, surrogate))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other * total.detach(), rtol=0, atol=1e-11)


def test_finite_differences():
    hidden, weight, labels, known = data()
    out = fused_token_loss(hidden, weight, labels, per_token(known), chunk_rows=4)
    got = torch.autograd.grad(out.total, (hidden, weight))
    g = torch.Generator().manual_seed(1)
    along = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in (hidden, weight)]
    totals = []
    for step in (1e-6, -1e-6):
        moved = [x.detach() + step * d for x, d in zip((hidden, weight), along, strict=True)]
        totals.append(fused_token_loss(*moved, labels, per_token(known)).total)
    slope = sum((x * d).sum() for x, d in zip(got, along, strict=True))
    assert float(slope) == pytest.approx(float(totals[0] - totals[1]) / 2e-6, rel=1e-7)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient(frozen):
    """Frozen hidden states, or a frozen head."""
    hidden, weight, labels, known = data()
    _, _, want = two_passes(hidden, weight, labels, per_token(known))
    sides = [hidden, weight]
    sides[frozen] = sides[frozen].detach()
    out = fused_token_loss(*sides, labels, per_token(known), chunk_rows=5)
    out.total.backward()
    assert sides[frozen].grad is None
    torch.testing.assert_close(sides[1 - frozen].grad, want[1 - frozen], rtol=0, atol=1e-12)


def test_without_gradient_the_values_are_the_same():
    hidden, weight, labels, known = data()
    want = fused_token_loss(hidden, weight, labels, per_token(known))
    with torch.no_grad():
        got = fused_token_loss(hidden, weight, labels, per_token(known))
    detached = fused_token_loss(hidden.detach(), weight.detach(), labels, per_token(known))
    for out in (got, detached):
        assert not out.total.requires_grad
        assert all(torch.equal(one, other) for one, other in zip(out, want, strict=True))


def test_a_second_backward_is_refused():
    hidden, weight, labels, known = data()
    out = fused_token_loss(hidden, weight, labels, per_token(known))
    out.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        out.total.backward()


def test_no_token_at_all():
    """A rank without completions: zero, with a graph whose gradients are zero."""
    hidden, weight, labels, known = data()
    out = fused_token_loss(hidden[:0], weight, labels[:0], per_token(known))
    out.total.backward()
    assert out.total == 0 and not weight.grad.any() and not hidden.grad.any()


def test_inputs_that_do_not_fit_are_refused():
    hidden, weight, labels, known = data()
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        fused_token_loss(hidden, weight, labels, per_token(known), temperature=0)
    with pytest.raises(ValueError, match="does not fit the head's"):
        fused_token_loss(hidden, weight[:, :3], labels, per_token(known))
    with pytest.raises(ValueError, match=r"expected hidden \[N, D\]"):
        fused_token_loss(hidden, weight, labels[:3], per_token(known))
