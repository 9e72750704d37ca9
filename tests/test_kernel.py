"""The chunked kernel against full-logits autograd (the slow oracle): values and gradients, any chunk size."""

import math

import pytest
import torch

from lightning_vlm.losses.kernel import divergences, token_scores


def data(n=13, d=6, v=29, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, generator=g, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(v, (n,), generator=g)


def oracle(hidden, weight, labels, temperature=1.0):
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    picked = logp.gather(1, labels[:, None])[:, 0]
    return picked, -(logp.exp() * logp).sum(-1), logp.max(-1).values, logp.argmax(-1)


@pytest.mark.parametrize("chunk", [1, 4, 13, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_full_logits(chunk, temperature):
    hidden, weight, labels = data()
    ours = token_scores(hidden, weight, labels, temperature=temperature, chunk_rows=chunk)
    theirs = oracle(hidden, weight, labels, temperature)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 13, generator=g, dtype=torch.float64)
    got = torch.autograd.grad((ours[0] * a + ours[1] * b).sum(), (hidden, weight))
    want = torch.autograd.grad((theirs[0] * a + theirs[1] * b).sum(), (hidden, weight))
    for x, y in zip(got, want, strict=True):
        assert torch.allclose(x, y, rtol=0, atol=1e-11)


def test_logprob_gradient_alone_and_entropy_gradient_alone():
    for pick in (0, 1):
        hidden, weight, labels = data(seed=3)
        got = torch.autograd.grad(token_scores(hidden, weight, labels, chunk_rows=5)[pick].sum(), (hidden, weight))
        want = torch.autograd.grad(oracle(hidden, weight, labels)[pick].sum(), (hidden, weight))
        for x, y in zip(got, want, strict=True):
            assert torch.allclose(x, y, rtol=0, atol=1e-11)


def test_finite_differences():
    hidden, weight, labels = data(n=3, d=2, v=4)
    torch.autograd.gradcheck(lambda h, w: token_scores(h, w, labels, chunk_rows=2)[:2], (hidden, weight))
    q, r, _ = data(n=3, d=3, v=4, seed=5)
    torch.autograd.gradcheck(lambda *x: divergences(*x, beta=0.3, chunk_rows=2)[:3], (hidden, weight, q, r))


def test_uniform_distribution_by_hand():
    """Zero logits over 8 tokens: log-prob −ln 8 and entropy ln 8, both 2.0794 nats."""
    s = token_scores(torch.zeros(2, 3), torch.zeros(8, 3), torch.tensor([0, 7]))
    assert torch.allclose(s.logprobs, torch.full((2,), -math.log(8)))
    assert torch.allclose(s.entropies, torch.full((2,), math.log(8)))


def test_bfloat16_inputs_are_scored_in_float32():
    hidden, weight, labels = data(dtype=torch.float32)
    h16, w16 = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    s = token_scores(h16, w16, labels)
    assert s.logprobs.dtype == torch.float32
    want = oracle(h16.float(), w16.float(), labels)
    assert torch.allclose(s.logprobs, want[0], atol=1e-5) and torch.allclose(s.entropies, want[1], atol=1e-5)
    s.logprobs.sum().backward()
    assert h16.grad.dtype == torch.bfloat16 and w16.grad.dtype == torch.bfloat16


def test_no_positions_still_touches_the_graph():
    hidden, weight, _ = data(n=1)
    s = token_scores(hidden[:0], weight, torch.zeros(0, dtype=torch.long))
    (s.logprobs.sum() * 0).backward()
    assert weight.grad is not None and not weight.grad.any() and not hidden.grad.any()


def test_frozen_head_gets_no_gradient():
    hidden, weight, labels = data()
    token_scores(hidden, weight.detach(), labels).logprobs.sum().backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None


@pytest.mark.parametrize("chunk", [1, 5, None])
def test_divergences_equal_full_distributions(chunk):
    hp, wp, _ = data(seed=1)
    hq, wq, _ = data(d=4, seed=2)
    got = divergences(hp, wp, hq, wq, beta=0.4, chunk_rows=chunk)
    p, q = (hp @ wp.T).softmax(-1), (hq @ wq.T).softmax(-1)
    m = 0.4 * p + 0.6 * q
    want = [
        (p * (p / q).log()).sum(-1),
        (q * (q / p).log()).sum(-1),
        0.4 * (p * (p / m).log()).sum(-1) + 0.6 * (q * (q / m).log()).sum(-1),
        0.5 * (p - q).abs().sum(-1),
    ]
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    for a, b in zip(got, want, strict=True):
        for x, y in zip(
            torch.autograd.grad(a.sum(), (hp, wp, hq, wq), retain_graph=True),
            torch.autograd.grad(b.sum(), (hp, wp, hq, wq), retain_graph=True),
            strict=True,
        ):
            assert torch.allclose(x, y, rtol=0, atol=1e-10)
    js = divergences(hp, wp, hq, wq).js
    assert (js <= math.log(2) * got.tv + 1e-12).all()


def test_equal_policies_diverge_by_exactly_zero():
    h, w, _ = data(dtype=torch.float32)
    d = divergences(h, w, h, w)
    assert not d.kl.any() and not d.reverse_kl.any() and not d.tv.any() and d.js.abs().max() < 1e-6


def test_padded_vocabularies_are_cut_to_the_shared_ids():
    h, w, _ = data()
    padded = torch.cat([w, torch.randn(5, w.shape[1], dtype=w.dtype)])
    assert torch.allclose(divergences(h, padded, h, w).kl, torch.zeros(13, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda h, w, y: token_scores(h, w[:, :2], y), "hidden size 6"),
        (lambda h, w, y: token_scores(h, w, y[:3]), "labels"),
        (lambda h, w, y: token_scores(h, w, y, temperature=0.0), "temperature"),
        (lambda h, w, y: divergences(h, w, h[:2], w), "same tokens"),
        (lambda h, w, y: divergences(h, w, h, w, beta=1.0), "beta"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(*data())
