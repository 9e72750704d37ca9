"""Distillation against full distributions and autograd (the slow oracle): values, gradients, limits, expectations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_vlm.losses.distillation as module
from lightning_vlm.losses.distillation import distill, sampled_advantages, top_logprobs
from lightning_vlm.losses.kernel import token_scores

F64 = torch.float64
OBJECTIVES = [
    {"objective": "full"},
    {"objective": "jsd", "beta": 0.5},
    {"objective": "jsd", "beta": 0.1},
    {"objective": "jsd", "beta": 0.9},
    {"objective": "jsd", "beta": 0.0},
    {"objective": "jsd", "beta": 1.0},
    {"objective": "topk", "k": 1},
    {"objective": "topk", "k": 5},
    {"objective": "topk", "k": 100},
]


def data(n=13, d=6, v=29, other_d=4, other_v=29, dtype=F64, seed=0):
    """Student's hidden and head, with gradient, then the teacher's, then labels and weights of tokens."""
    g = torch.Generator().manual_seed(seed)
    shapes = (n, d), (v, d), (n, other_d), (other_v, other_d)
    tensors = [torch.randn(*shape, generator=g, dtype=F64).to(dtype) for shape in shapes]
    for mine in tensors[:2]:
        mine.requires_grad_()
    return *tensors, torch.randint(v, (n,), generator=g), torch.rand(n, generator=g, dtype=F64).to(dtype)


def oracle(h, w, th, tw, *, objective, beta=0.5, k=64, temperature=1.0, teacher_temperature=None):
    """[N] divergences from whole distributions, written down from their definitions."""
    s = min(len(w), len(tw))
    log_p = (h @ w[:s].T / temperature).log_softmax(-1)
    log_q = (th @ tw[:s].T / (teacher_temperature or temperature)).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if objective == "topk":
        k = min(k, s)
        ids = q.argsort(-1, descending=True)
        log_p, log_q = log_p.gather(1, ids), log_q.gather(1, ids)

        def bucketed(x):
            return torch.cat([x[:, :k], x[:, k:].logsumexp(-1, keepdim=True)], 1) if k < s else x

        log_p, log_q = bucketed(log_p), bucketed(log_q)
        p = log_p.exp()
    if objective == "jsd" and beta == 0:
        return (q * (log_q - log_p)).sum(-1)
    if objective != "jsd" or beta == 1:
        return (p * (log_p - log_q)).sum(-1)
    log_m = (beta * q + (1 - beta) * p).log()
    inner = beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * (p * (log_p - log_m)).sum(-1)
    return inner / (beta * (1 - beta))


@pytest.mark.parametrize("vocabularies", [(29, 29), (29, 33), (33, 29)], ids=str)
@pytest.mark.parametrize("temperature", [{}, {"temperature": 0.7}, {"temperature": 0.7, "teacher_temperature": 1.3}])
@pytest.mark.parametrize("own", OBJECTIVES, ids=str)
def test_values_and_gradients_equal_full_distributions(own, temperature, vocabularies):
    """Every chunk size, with and without weights of tokens; entropies and log-probs over all of the student's ids."""
    h, w, th, tw, labels, weights = data(v=vocabularies[0], other_v=vocabularies[1])
    want = oracle(h, w, th, tw, **own, **temperature)
    scores = token_scores(h, w, labels, temperature=temperature.get("temperature", 1.0))
    for chunk in (1, 4, 13, 100, None):
        for of_tokens in (None, weights):
            got = distill(h, w, th, tw, labels=labels, token_weights=of_tokens, chunk_rows=chunk, **own, **temperature)
            total = (want * (1 if of_tokens is None else weights)).sum()
            torch.testing.assert_close(got.values, want, rtol=0, atol=1e-12)
            torch.testing.assert_close(got.total, total, rtol=0, atol=1e-11)
            torch.testing.assert_close(got.entropies, scores.entropies, rtol=0, atol=1e-12)
            torch.testing.assert_close(got.logprobs, scores.logprobs, rtol=0, atol=1e-12)
            assert not (got.values.requires_grad or got.entropies.requires_grad or got.logprobs.requires_grad)
            ours = torch.autograd.grad(got.total * 0.3, (h, w))
            theirs = torch.autograd.grad(total * 0.3, (h, w), retain_graph=True)
            for x, y in zip(ours, theirs, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("own", OBJECTIVES, ids=str)
def test_few_rows_at_a_time_change_nothing(own, monkeypatch):
    h, w, th, tw, _, weights = data()
    whole = distill(h, w, th, tw, token_weights=weights, **own)
    monkeypatch.setattr(module, "BLOCK", 2 * 29)
    cut = distill(h, w, th, tw, token_weights=weights, **own)
    torch.testing.assert_close(cut.values, whole.values, rtol=0, atol=1e-14)
    pairs = zip(torch.autograd.grad(cut.total, (h, w)), torch.autograd.grad(whole.total, (h, w)), strict=True)
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("own", OBJECTIVES, ids=str)
def test_finite_differences(own):
    h, w, th, tw, _, weights = data(n=3, d=2, v=5, other_d=3, other_v=4)

    def total():
        return distill(h, w, th, tw, token_weights=weights, chunk_rows=2, **own).total

    for tensor, gradient in zip((h, w), torch.autograd.grad(total(), (h, w)), strict=True):
        flat, found = tensor.detach().view(-1), []
        for i in range(len(flat)):
            old, ends = flat[i].item(), []
            for step in (1e-6, -1e-6):
                flat[i] = old + step
                ends.append(total().item())
            flat[i] = old
            found.append((ends[0] - ends[1]) / 2e-6)
        torch.testing.assert_close(gradient.view(-1), torch.tensor(found, dtype=F64), rtol=0, atol=1e-8)


def test_two_tokens_by_hand():
    """p = (¾, ¼), q = (½, ½), m = (⅝, ⅜): sums of a few logarithms."""
    one = torch.ones(1, 1, dtype=F64)
    w, tw = torch.tensor([[3.0], [1.0]], dtype=F64).log(), torch.zeros(2, 1, dtype=F64)
    kl_pm = 0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)
    kl_qm = 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)
    reverse, forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    wanted = [
        ({"objective": "full"}, reverse),
        ({"objective": "jsd", "beta": 0.5}, 2 * kl_pm + 2 * kl_qm),
        ({"objective": "jsd", "beta": 0.0}, forward),
        ({"objective": "jsd", "beta": 1.0}, reverse),
        ({"objective": "topk", "k": 1}, reverse),
    ]
    for own, want in wanted:
        assert distill(one, w, one, tw, **own).total.item() == pytest.approx(want, abs=1e-14)
    got = distill(one, w, one, tw, labels=torch.tensor([1]))
    assert got.logprobs.item() == pytest.approx(math.log(0.25))
    assert got.entropies.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.8])
def test_jsd_is_trls_divided_by_its_mixture_weights(beta):
    """At β = .5 four times TRL's."""
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    h, w, th, tw, *_ = data()
    theirs = trainer.generalized_jsd_loss(
        (h @ w.T)[None], (th @ tw.T)[None], beta=beta, temperature=0.7, reduction="sum"
    )
    ours = distill(h, w, th, tw, objective="jsd", beta=beta, temperature=0.7).total
    torch.testing.assert_close(ours * beta * (1 - beta), theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_jsd_is_continuous_at_both_ends(end, dtype):
    """It comes to the KL at the end, value and gradient; float32 follows float64 all the way."""
    exact, (h, w, th, tw, *_) = data(), data(dtype=dtype)

    def at(h, w, th, tw, beta):
        got = distill(h, w, th, tw, objective="jsd", beta=beta)
        return [x.detach().to(F64) for x in (got.values, *torch.autograd.grad(got.total, (h, w)))]

    limit = at(h, w, th, tw, end)
    torch.testing.assert_close(limit[0], oracle(*exact[:4], objective="jsd", beta=end).detach(), rtol=1e-5, atol=1e-5)
    gaps = []
    for distance in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-13, 1e-200):
        near = at(h, w, th, tw, abs(end - distance))
        for x, y in zip(near, at(*exact[:4], abs(end - distance)), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
        gaps.append(max((x - y).abs().max().item() for x, y in zip(near, limit, strict=True)))
    assert gaps[0] > 0.1 and gaps[4] < 2e-5 and gaps[5] == gaps[6] == 0


def test_jsd_has_one_curvature_at_equality_for_every_beta():
    """D(p, p + ε) / ε² → ½ Σ δ²/p, half of Fisher's information, whatever β is."""
    w = torch.tensor([0.5, 0.3, 0.2], dtype=F64).log()[:, None]
    step = 1e-4 * torch.tensor([1.0, -1.0, 0.5], dtype=F64)[:, None]
    one = torch.ones(1, 1, dtype=F64)
    p = w.exp()[:, 0]
    delta = p * (step[:, 0] - (p * step[:, 0]).sum())
    want = 0.5 * (delta**2 / p).sum().item()
    for beta in (0.0, 0.05, 0.5, 0.95, 1.0):
        got = distill(one, w, one, w + step, objective="jsd", beta=beta).total.item()
        assert got == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("own", OBJECTIVES, ids=str)
def test_equal_student_and_teacher_give_exactly_zero(own, dtype):
    """Value and gradient, to the bit, at a width that fills several vector registers and a rest."""
    h, w, *_ = data(n=37, d=16, v=1003, dtype=dtype)
    h, w = (5 * h.detach()).requires_grad_(), w
    got = distill(h, w, h, w, temperature=0.7, chunk_rows=16, **own)
    assert not got.values.any() and got.total == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(got.total, (h, w)))


@pytest.mark.parametrize("own", OBJECTIVES, ids=str)
def test_padding_of_either_head_adds_nothing(own):
    h, w, *_ = data(dtype=torch.float32)
    padded = torch.cat([w.detach(), torch.randn(5, w.shape[1])])
    for mine, other in ((w, padded), (padded.requires_grad_(), w)):
        got = distill(h, mine, h, other, **own)
        assert got.values.abs().max() <= 1e-6
        grads = torch.autograd.grad(got.total, (h, mine))
        assert max(g.abs().max() for g in grads) < 1e-5 and not grads[1][29:].any()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 40), st.floats(0.05, 5.0), st.sampled_from([0.1, 3.0, 30.0])
)
def test_divergences_are_ordered_and_finite(seed, beta, k, temperature, spread):
    """0 ≤ topk ≤ full, topk grows with k, D ≥ 0, and nothing overflows, however peaked the distributions are."""
    h, w, th, tw, *_ = data(seed=seed, dtype=torch.float32)
    h, th = h.detach() * spread, th * spread
    h.requires_grad_()

    def value(**own):
        got = distill(h, w, th, tw, temperature=temperature, **own)
        assert got.values.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(got.total, (h, w)))
        return got.values

    full, jsd = value(objective="full"), value(objective="jsd", beta=beta)
    few, more = value(objective="topk", k=k), value(objective="topk", k=k + 1)
    slack = 1e-5 * (1 + full)
    assert (jsd >= -slack).all() and (few >= -slack).all()
    assert (few <= more + slack).all() and (more <= full + slack).all()


def test_sampled_agrees_with_full_in_expectation():
    """E_{y~p}[−A·∇log p(y)], every y enumerated, is the gradient of the reverse KL."""
    h, w, th, tw, *_ = data(n=1, v=7, other_v=7)
    logp = (h @ w.T).log_softmax(-1)[0]
    logq = (th @ tw.T).log_softmax(-1)[0]
    advantages = sampled_advantages(logp, logq)
    assert not advantages.requires_grad
    torch.testing.assert_close(advantages, (logq - logp).detach())
    surrogate = -(logp.detach().exp() * advantages * logp).sum()
    want = torch.autograd.grad(surrogate, (h, w))
    got = torch.autograd.grad(distill(h, w, th, tw).total, (h, w))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    assert not sampled_advantages(logp, logp).any()


def test_likeliest_ids_are_found_by_stretches():
    """1000 ids in stretches of 128 and a rest; ties may fall either way, values may not."""
    values = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)).mul(8).round()
    values[0], values[1, 990:], values[2] = 0.0, 99.0, torch.arange(1000.0)
    for k in (1, 3):
        ids = module._top_ids(values, k)
        assert [len(set(row)) for row in ids.tolist()] == [k] * 7
        torch.testing.assert_close(values.gather(1, ids).sort().values, values.topk(k).values.sort().values)


@pytest.mark.parametrize("chunk", [1, 5, None])
def test_top_logprobs_are_those_of_the_whole_distribution(chunk):
    h, w, *_ = data()
    ids, logprobs = top_logprobs(h, w, 4, temperature=0.7, chunk_rows=chunk)
    want = (h @ w.T / 0.7).log_softmax(-1).topk(4)
    assert torch.equal(ids, want.indices) and not logprobs.requires_grad
    torch.testing.assert_close(logprobs, want.values.detach(), rtol=0, atol=1e-12)


def test_a_frozen_head_or_trunk_gets_no_gradient_and_costs_none():
    h, w, th, tw, *_ = data()
    want = torch.autograd.grad(distill(h, w, th, tw).total, (h, w))
    for mine in ((h, w.detach()), (h.detach(), w)):
        total = distill(*mine, th, tw).total
        (at,) = (i for i, tensor in enumerate(mine) if tensor.requires_grad)
        torch.testing.assert_close(torch.autograd.grad(total, mine[at])[0], want[at], rtol=0, atol=1e-13)
    assert not distill(h.detach(), w.detach(), th, tw).total.requires_grad
    with torch.no_grad():
        assert not distill(h, w, th, tw).total.requires_grad


def test_the_teacher_gets_no_gradient():
    h, w, th, tw, *_ = data()
    th.requires_grad_(), tw.requires_grad_()
    distill(h, w, th, tw).total.backward()
    assert th.grad is None and tw.grad is None and h.grad is not None


def test_a_second_backward_is_refused():
    h, w, th, tw, *_ = data()
    total = distill(h, w, th, tw).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already used"):
        total.backward()


def test_bfloat16_is_computed_in_float32_and_autocast_is_ignored():
    h, w, th, tw, *_ = (x.detach().bfloat16() if x.is_floating_point() else x for x in data(dtype=torch.float32))
    h.requires_grad_(), w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = distill(h, w, th, tw)
    want = oracle(h.float(), w.float(), th.float(), tw.float(), objective="full")
    assert got.total.dtype == torch.float32
    torch.testing.assert_close(got.values, want.detach(), rtol=1e-5, atol=1e-5)
    (got.total * 0.5).backward()
    wide = torch.autograd.grad(want.sum() * 0.5, (h, w))
    for tensor, gradient in zip((h, w), wide, strict=True):
        assert tensor.grad.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-2, atol=1e-2)


def test_no_positions_still_touch_the_graph():
    h, w, th, tw, *_ = data(n=1)
    got = distill(h[:0], w, th[:0], tw)
    got.total.backward()
    assert got.total == 0 and not w.grad.any() and not h.grad.any()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda h, w, t, u: distill(h, w[:, :2], t, u), "of the student"),
        (lambda h, w, t, u: distill(h, w, t, u[:, :2]), "of the teacher"),
        (lambda h, w, t, u: distill(h, w, t[:2], u), "scores 13 positions and the teacher 2"),
        (lambda h, w, t, u: distill(h, w, t, u, token_weights=torch.ones(3)), r"token_weights has shape \(3,\)"),
        (lambda h, w, t, u: distill(h, w, t, u, labels=torch.ones(3).long()), "labels has shape"),
        (lambda h, w, t, u: distill(h, w, t, u, objective="kl"), "choose one of full, jsd, topk"),
        (lambda h, w, t, u: distill(h, w, t, u, beta=1.1), "got 1.1"),
        (lambda h, w, t, u: distill(h, w, t, u, objective="topk", k=0), "k must be at least 1"),
        (lambda h, w, t, u: distill(h, w, t, u, temperature=0.0), "temperatures must be positive"),
        (lambda h, w, t, u: top_logprobs(h, w, 30), "29 ids of the head"),
        (lambda h, w, t, u: top_logprobs(h, w, 3, temperature=-1.0), "temperature must be positive"),
        (lambda h, w, t, u: sampled_advantages(h[:, 0], t[:2, 0]), "same tokens"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(*data()[:4])
