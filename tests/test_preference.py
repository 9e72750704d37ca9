"""Preference losses and SFT-C's terms: values worked out by hand, limits, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_vlm.losses.kernel import token_scores
from lightning_vlm.losses.preference import Pairs, PreferenceLoss, bco, cooling_weight, vulnerable
from lightning_vlm.losses.sft_c import awake, constraint, smooth


def pairs(chosen, rejected, *, tokens=(4.0, 5.0), reference=(-10.0, -10.0)):
    """One pair per entry of `chosen` and `rejected`, its log-probs differentiable."""
    columns = [torch.tensor(side, dtype=torch.double, requires_grad=True) for side in (chosen, rejected)]
    n = len(chosen)
    return Pairs(*columns, *(torch.full((n,), v, dtype=torch.double) for v in (*reference, *tokens)))


def total(loss, p, *, floor=None, shift=0.0):
    """The objective over the pairs of `p`, each term divided by their number."""
    terms, each = loss(p, weights=loss.cooling(p, floor), shift=shift)
    value = sum(term.weight * term.sum for term in terms.values()) / len(p.chosen)
    assert set(terms) == set(loss.names) and each.mean().item() == pytest.approx(value.item(), rel=1e-12)
    return value


def gradient(loss, p, **more):
    """d objective / d (log π(y_w), log π(y_l))."""
    return torch.autograd.grad(
        total(loss, p, **more), (p.chosen, p.rejected), allow_unused=True, materialize_grads=True
    )


def test_dpo_by_hand():
    """Δ_w = 2, Δ_l = −1, β = .1: margin .3, loss ln(1 + e^−.3) = .554355, gradient ∓.1·σ(−.3) = ∓.0425557."""
    p = pairs([-8.0], [-11.0])
    assert total(PreferenceLoss(), p).item() == pytest.approx(0.5543552, abs=1e-6)
    to_chosen, to_rejected = gradient(PreferenceLoss(), p)
    assert to_chosen.item() == pytest.approx(-0.0425557, abs=1e-6) == -to_rejected.item()


def test_at_the_reference_every_preference_loss_is_ln_2():
    p = pairs([-10.0, -10.0], [-10.0, -10.0])
    for weighting in ("none", "cooling"):
        assert total(PreferenceLoss(weighting=weighting), p, floor=-3.0).item() == pytest.approx(math.log(2))


def test_cw_dpo_by_hand():
    """ℓ̄(y_l) = −11/5 = −2.2, ℓ_floor −3, τ .5: w_c = σ(1.6) = .832018.

    Margin .1·(2 + .832018) = .2832018, loss ln(1 + e^−.2832018) = .5615384; a' = σ(.2832018) = .570331. Gradient on the
    winner −.1·(1 − a') = −.0429669, on the loser that times −w_c, .0357493.
    """
    p, loss = pairs([-8.0], [-11.0]), PreferenceLoss(weighting="cooling", tau=0.5)
    assert loss.cooling(p, -3.0).item() == pytest.approx(0.8320184, abs=1e-6)
    assert total(loss, p, floor=-3.0).item() == pytest.approx(0.5615384, abs=1e-6)
    to_chosen, to_rejected = gradient(loss, p, floor=-3.0)
    assert to_chosen.item() == pytest.approx(-0.0429669, abs=1e-6)
    assert to_rejected.item() == pytest.approx(0.0357493, abs=1e-6)


def test_before_there_is_a_mean_the_weight_is_one_half():
    p = pairs([-8.0, -9.0], [-11.0, -50.0])
    for detach in (True, False):
        weights = PreferenceLoss(weighting="cooling", detach_weight=detach).cooling(p, None)
        assert weights.tolist() == [0.5, 0.5] and weights.requires_grad is not detach


def test_a_weight_of_one_is_dpo_and_of_zero_pushes_the_winner_alone():
    """w_c → 1 far above the floor, → 0 far below; then −log σ(βΔ_w), and no gradient on the loser."""
    p = pairs([-8.0, -12.0], [-11.0, -7.0])
    cooled = PreferenceLoss(weighting="cooling", tau=1e-3)
    assert total(cooled, p, floor=-1e9).item() == total(PreferenceLoss(), p).item()
    for a, b in zip(gradient(cooled, p, floor=-1e9), gradient(PreferenceLoss(), p), strict=True):
        assert torch.equal(a, b)
    want = -torch.nn.functional.logsigmoid(0.1 * p.delta_chosen).mean()
    assert total(cooled, p, floor=1e9).item() == pytest.approx(want.item(), rel=1e-12)
    to_chosen, to_rejected = gradient(cooled, p, floor=1e9)
    assert torch.equal(to_rejected, torch.zeros(2, dtype=torch.double))
    assert torch.equal(to_chosen, torch.autograd.grad(want, p.chosen)[0])


def test_focal_dpo_by_hand():
    """Margin .3: p = σ(.3) = .574443, (1 − p)² = .181099, loss .181099 · .554355 = .100393; no gradient in p."""
    p = pairs([-8.0], [-11.0])
    loss = PreferenceLoss(weighting="focal", gamma=2.0)
    assert total(loss, p).item() == pytest.approx(0.1003932, abs=1e-6)
    assert gradient(loss, p)[0].item() == pytest.approx(0.181099 * -0.0425557, abs=1e-6)
    plain = PreferenceLoss(weighting="focal", gamma=0.0)
    assert torch.equal(total(plain, p), total(PreferenceLoss(), p))
    assert gradient(plain, p) == gradient(PreferenceLoss(), p)


def test_bco_by_hand():
    """Rewards .2 and −.1 with δ = .05: −ln σ(.15) − ln σ(.15) = 2 · .620957 = 1.241914."""
    values = torch.tensor([0.2, -0.1], dtype=torch.double)
    assert bco(values[:1], values[1:], 0.05).item() == pytest.approx(1.2419141, abs=1e-6)


def test_mpo_is_the_weighted_sum_of_its_parts():
    """.8·DPO + .2·BCO + NLL(y_w)/|y_w| = .8·.554355 + .2·1.241914 + 8/4 = 2.691867."""
    p = pairs([-8.0], [-11.0])
    loss = PreferenceLoss(dpo_weight=0.8, bco_weight=0.2, nll_weight=1.0)
    assert loss.names == ("preference", "bco", "chosen_nll")
    assert total(loss, p, shift=0.05).item() == pytest.approx(2.6918671, abs=1e-6)
    assert PreferenceLoss(dpo_weight=0.0, nll_weight=1.0).names == ("chosen_nll",)
    assert total(PreferenceLoss(dpo_weight=0.0, nll_weight=1.0), p).item() == 2.0


@pytest.mark.parametrize("side", [0.5, 2.0])
def test_the_undetached_weight_turns_the_loser_around(side):
    """Coefficient on ∇log π(y_l): β(1 − a')[w_c + Δ_l·w_c(1 − w_c)/(τ|y_l|)], negative once Δ_l/|y_l| < −τ/(1 − w_c).

    The reference is set so that Δ_l/|y_l| is `side` times that bound; detached, the coefficient never changes sign.
    """
    beta, tau, floor, tokens, mean = 0.1, 0.7, -3.0, 5.0, -3.5
    weight = 1 / (1 + math.exp(-(mean - floor) / tau))
    delta = side * tokens * -tau / (1 - weight)
    p = pairs([-8.0], [mean * tokens], tokens=(4.0, tokens), reference=(-10.0, mean * tokens - delta))
    settings = {"beta": beta, "weighting": "cooling", "tau": tau}
    held = gradient(PreferenceLoss(**settings), p, floor=floor)[1].item()
    free = gradient(PreferenceLoss(**settings, detach_weight=False), p, floor=floor)[1].item()
    decided = 1 / (1 + math.exp(-beta * (2.0 - weight * delta)))
    assert held == pytest.approx(beta * (1 - decided) * weight, rel=1e-9) and held > 0
    slope = weight + delta * weight * (1 - weight) / (tau * tokens)
    assert free == pytest.approx(beta * (1 - decided) * slope, rel=1e-9)
    assert free > 0 if side < 1 else free < 0


@pytest.mark.parametrize(
    "loss",
    [
        PreferenceLoss(beta=0.3),
        PreferenceLoss(weighting="cooling", tau=0.5, detach_weight=False),
        PreferenceLoss(dpo_weight=0.8, bco_weight=0.2, nll_weight=1.0),
    ],
)
def test_gradients_by_finite_differences(loss):
    p = pairs([-8.0, -12.0, -9.0], [-11.0, -7.0, -30.0])

    def value(chosen, rejected):
        return total(loss, p._replace(chosen=chosen, rejected=rejected), floor=-2.0, shift=0.1)

    assert torch.autograd.gradcheck(value, (p.chosen, p.rejected))


@pytest.mark.parametrize("weighting", ["none", "cooling", "focal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
def test_margins_of_ten_thousand_are_finite(weighting, dtype):
    """−log σ(±10⁴): 0 and 10⁴, with gradients 0 and ∓β; nothing overflows in float32."""
    p = Pairs(*(column.detach().to(dtype) for column in pairs([1e4, -1e4], [-1e4, 1e4], reference=(0.0, 0.0))))
    p = p._replace(chosen=p.chosen.requires_grad_(), rejected=p.rejected.requires_grad_())
    loss = PreferenceLoss(beta=1.0, weighting=weighting, bco_weight=1.0, nll_weight=1.0)
    assert total(loss, p, floor=-3.0).isfinite()
    assert all(g.isfinite().all() for g in gradient(loss, p, floor=-3.0))
    alone = PreferenceLoss(beta=0.5, weighting="none")
    assert total(alone, p).item() == pytest.approx(5e3)
    assert [g.tolist() for g in gradient(alone, p)] == [[0.0, -0.25], [0.0, 0.25]]


def test_the_vulnerable_zone():
    """a = σ(β(Δ_w − Δ_l)) in [.8, .99]: margins between ln 4 = 1.386 and ln 99 = 4.595."""
    margins = torch.tensor([0.0, 1.38, 1.39, 4.59, 4.6], dtype=torch.double)
    p = pairs((margins / 0.1 - 10).tolist(), [-10.0] * 5)
    assert vulnerable(p, 0.1).tolist() == [False, False, True, True, False]
    assert cooling_weight(torch.tensor([-3.0]), -3.0, 1.0).item() == 0.5


# --- SFT-C -----------------------------------------------------------------------------------------------------------


def test_the_constraint_raises_the_negatives_nll():
    """Negatives of −1, −3 nats, λ = .1: the term is .1·(−4), which over 2 tokens is −.1·NLL⁻ = −.2; asleep at C = 2."""
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    term = constraint(logprobs, weight=0.1)["constraint"]
    assert term.weight * term.sum.item() / 2 == pytest.approx(-0.2)
    (term.weight * term.sum / 2).backward()
    assert logprobs.grad.tolist() == pytest.approx([0.05, 0.05])  # descent lowers log π
    assert awake(1.99, 2.0) and not awake(2.0, 2.0)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_smooth_is_cross_entropy_with_smoothed_labels(alpha):
    """Against torch's own over the whole vocabulary, in float64, with the gradient on hidden states and head."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator, dtype=torch.double).requires_grad_() for n in (5, 11))
    labels = torch.tensor([3, 0, 10, 3, 7])
    logits = hidden @ weight.T
    want = 0.05 * torch.nn.functional.cross_entropy(logits, labels, label_smoothing=alpha)
    logprobs = token_scores(hidden, weight, labels).logprobs
    uniform = logprobs - (hidden * (weight[labels] - weight.mean(0))).sum(-1)
    torch.testing.assert_close(uniform, logits.log_softmax(-1).mean(-1))
    term = smooth(logprobs, uniform if alpha else None, weight=0.05, label_smoothing=alpha)["smooth"]
    got = term.weight * term.sum / len(labels)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    for a, b in zip(*(torch.autograd.grad(v, (hidden, weight)) for v in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
