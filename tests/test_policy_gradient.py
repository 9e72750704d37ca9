"""Policy-gradient losses against arithmetic done by hand, and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_vlm.losses.policy_gradient import (
    PolicyLoss,
    Tokens,
    correction_factors,
    group_advantages,
    has_spread,
    k3,
)

F64 = torch.float64


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def tokens(advantages, *, old, rows=None, weights=None, **more) -> Tokens:
    """Tokens of the given old log-probs; by default each is a completion of its own, of weight 1."""
    n = len(old)
    rows = torch.arange(n) if rows is None else torch.tensor(rows)
    weights = torch.ones(n, dtype=F64) if weights is None else vector(*weights)
    return Tokens(vector(*advantages), weights, rows, int(rows.max()) + 1, old=old, **more)


def value_and_slope(loss: PolicyLoss, known: Tokens, logprobs: torch.Tensor) -> tuple[list[float], list[float]]:
    """[N] losses, and the slope of their sum in each log-prob."""
    leaf = logprobs.clone().requires_grad_()
    values = loss(leaf, known)
    (slope,) = torch.autograd.grad(values.sum(), leaf)
    return values.tolist(), slope.tolist()


# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    """[1, 0, 0, 1]: mean ½, Σ(r − ½)² = 1, sample deviation √(1/3); [0, 3]: mean 1.5, deviation √4.5."""
    spread = math.sqrt(1 / 3) + 1e-4
    got = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=F64))
    assert got[0].tolist() == pytest.approx([0.5 / spread, -0.5 / spread, -0.5 / spread, 0.5 / spread], rel=1e-14)
    got = group_advantages(torch.tensor([[0.0, 3.0], [2.0, 2.0]], dtype=F64))
    assert got[0].tolist() == pytest.approx([-1.5 / (math.sqrt(4.5) + 1e-4), 1.5 / (math.sqrt(4.5) + 1e-4)], rel=1e-14)
    assert got[1].tolist() == [0.0, 0.0]


def test_advantages_without_deviation_are_differences_to_the_mean():
    got = group_advantages(torch.tensor([[0.0, 3.0], [1.0, 1.0]], dtype=F64), std=False)
    assert got.tolist() == [[-1.5, 1.5], [0.0, 0.0]]


@pytest.mark.parametrize("std", [True, False])
def test_equal_rewards_give_exactly_zero_though_their_mean_is_rounded(std):
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.7, 0.7 + 1e-8, 0.7]], dtype=F64)
    assert rewards.mean(1)[0] != 0.1
    assert not group_advantages(rewards, std=std).any() and not has_spread(rewards).any()
    assert has_spread(torch.tensor([[0.0, 2e-6], [0.0, 0.5e-6]])).tolist() == [True, False]


# --- surrogates -------------------------------------------------------------------------------------------------------

CLIPPED = [  # ratio, advantage, settings, loss, slope in the log-prob, (stopped by the lower, by the upper clip)
    (1.1, 2.0, {}, -2.2, -2.2, (False, False)),
    (1.5, 2.0, {}, -2.4, 0.0, (False, True)),
    (0.5, 2.0, {}, -1.0, -1.0, (False, False)),
    (1.5, 2.0, {"clip_high": 0.28}, -2.56, 0.0, (False, True)),
    (1.25, 2.0, {"clip_high": 0.28}, -2.5, -2.5, (False, False)),
    (0.9, -1.0, {}, 0.9, 0.9, (False, False)),
    (0.5, -1.0, {}, 0.8, 0.0, (True, False)),
    (0.5, -1.0, {"clip_low": 0.6}, 0.5, 0.5, (False, False)),
    (1.5, -1.0, {}, 1.5, 1.5, (False, False)),
    (5.0, -1.0, {}, 5.0, 5.0, (False, False)),
    (5.0, -1.0, {"dual_clip": 3.0}, 3.0, 0.0, (False, False)),
    (2.5, -1.0, {"dual_clip": 3.0}, 2.5, 2.5, (False, False)),
    (5.0, 2.0, {"dual_clip": 3.0}, -2.4, 0.0, (False, True)),
    (0.5, -1.0, {"dual_clip": 3.0}, 0.8, 0.0, (True, False)),
]


@pytest.mark.parametrize("ratio, advantage, settings, value, slope, stopped", CLIPPED)
def test_clip_by_hand(ratio, advantage, settings, value, slope, stopped):
    logprobs = vector(-1.0)
    known, loss = tokens([advantage], old=logprobs - math.log(ratio)), PolicyLoss(**settings)
    got = value_and_slope(loss, known, logprobs)
    assert got[0] == pytest.approx([value], rel=1e-12) and got[1] == pytest.approx([slope], rel=1e-12)
    assert tuple(bool(where[0]) for where in loss.clipped(logprobs, known)) == stopped


def test_without_old_log_probs_the_ratio_is_one_and_the_slope_that_of_the_log_prob():
    known = tokens([2.0, -1.0], old=vector(0.0, 0.0))._replace(old=None)
    for loss in (PolicyLoss(), PolicyLoss(dual_clip=3.0), PolicyLoss(importance="sequence")):
        values, slopes = value_and_slope(loss, known, vector(-1.0, -2.0))
        assert values == [-2.0, 1.0] and slopes == [-2.0, 1.0]


@pytest.mark.parametrize(
    "ratio, advantage, coefficient, stopped",
    [
        (1.5, 2.0, 1.2, (False, True)),
        (1.1, 2.0, 1.1, (False, False)),
        (0.5, 2.0, 0.8, (True, False)),
        (0.5, -1.0, 0.8, (True, False)),
        (1.5, -1.0, 1.2, (False, True)),
    ],
)
def test_cispo_by_hand(ratio, advantage, coefficient, stopped):
    """−c·A·log π with the clipped ratio held: every token keeps a gradient."""
    logprobs = vector(-0.7)
    known, loss = tokens([advantage], old=logprobs - math.log(ratio)), PolicyLoss(surrogate="cispo")
    values, slopes = value_and_slope(loss, known, logprobs)
    assert values == pytest.approx([coefficient * advantage * 0.7], rel=1e-12)
    assert slopes == pytest.approx([-coefficient * advantage], rel=1e-12)
    assert tuple(bool(where[0]) for where in loss.clipped(logprobs, known)) == stopped


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [
        (1.0, 2.0, -4.0, -2.0),  # σ(0)·4 = 2; the slope is plain policy gradient's
        (1.0, -1.0, 2 / 1.05, 1.0),
        (2.0, 1.0, -4 * sigmoid(1.0), -8 * sigmoid(1.0) * sigmoid(-1.0)),
        (2.0, -1.0, 4 / 1.05 * sigmoid(1.05), 8 * sigmoid(1.05) * sigmoid(-1.05)),
    ],
)
def test_sapo_by_hand(ratio, advantage, value, slope):
    known = tokens([advantage], old=vector(-1.0 - math.log(ratio)))
    got = value_and_slope(PolicyLoss(surrogate="sapo"), known, vector(-1.0))
    assert got[0] == pytest.approx([value], rel=1e-12) and got[1] == pytest.approx([slope], rel=1e-12)


def test_k3_by_hand():
    """Reference twice, half and just as likely: 2 − ln 2 − 1, ½ + ln 2 − 1, 0; slopes 1 − π_ref/π."""
    reference = vector(-1 + math.log(2), -1 - math.log(2), -1.0)
    leaf = torch.full((3,), -1.0, dtype=F64, requires_grad=True)
    values = k3(leaf, reference)
    assert values.tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5, 0.0], abs=1e-15)
    assert torch.autograd.grad(values.sum(), leaf)[0].tolist() == pytest.approx([-1.0, 0.5, 0.0], abs=1e-15)


def test_kl_and_correction_by_hand():
    """The correction bears on the surrogate alone, weights on both: ¼·(3·(−2) + ½·(1 − ln 2))."""
    known = tokens([2.0], old=vector(-1.0), weights=[0.25], reference=vector(-1 + math.log(2)), correction=vector(3.0))
    values, slopes = value_and_slope(PolicyLoss(kl_beta=0.5), known, vector(-1.0))
    assert values == pytest.approx([0.25 * (-6 + 0.5 * (1 - math.log(2)))], rel=1e-12)
    assert slopes == pytest.approx([0.25 * (-6 - 0.5)], rel=1e-12)


def test_the_sequence_ratio_by_hand():
    """Log-ratios .2 and −.4: both tokens are weighed by e^−.1. One of .3 alone: e^.3, clipped to 1.2."""
    logprobs = vector(-1.0, -2.0, -3.0)
    known = tokens([1.0, 1.0, 2.0], old=logprobs - vector(0.2, -0.4, 0.3), rows=[0, 0, 1], weights=[0.5, 0.5, 1.0])
    loss = PolicyLoss(importance="sequence")
    values, slopes = value_and_slope(loss, known, logprobs)
    half = math.exp(-0.1) / 2
    assert values == pytest.approx([-half, -half, -2.4], rel=1e-12)
    # The sum over the completion is its ratio, of which each of its two log-probs has half.
    assert slopes == pytest.approx([-half, -half, 0.0], rel=1e-12)
    assert loss.log_ratio(logprobs, known).exp().tolist() == pytest.approx([2 * half, 2 * half, math.exp(0.3)])
    assert [where.tolist() for where in loss.clipped(logprobs, known)] == [[False] * 3, [False, False, True]]


# --- finite differences -----------------------------------------------------------------------------------------------


def drawn(**more) -> tuple[torch.Tensor, Tokens]:
    """Nine tokens of three completions, ratios on both sides of every bound, none near one."""
    log_ratios = vector(0.05, -0.1, 0.5, -0.6, 1.5, 0.1, -1.2, 0.3, -0.05)
    logprobs = -vector(0.3, 1.2, 2.0, 0.7, 3.0, 1.5, 0.9, 2.2, 0.1)
    advantages = [1.3, 1.3, 1.3, -0.8, -0.8, -0.8, -0.8, 0.4, 0.4]
    weights = [1 / 3, 1 / 3, 1 / 3, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5]
    rows = [0, 0, 0, 1, 1, 1, 1, 2, 2]
    return logprobs, tokens(advantages, old=logprobs - log_ratios, rows=rows, weights=weights, **more)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_high": 0.28},
        {"dual_clip": 3.0},
        {"surrogate": "sapo"},
        {"importance": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
        {"importance": "sequence", "surrogate": "sapo"},
        {"kl_beta": 0.3},
        {"kl_beta": 0.3, "importance": "sequence"},
    ],
    ids=str,
)
def test_slopes_are_those_of_finite_differences(settings):
    g = torch.Generator().manual_seed(0)
    shift = torch.randn(9, generator=g, dtype=F64)
    logprobs, known = drawn(correction=torch.rand(9, generator=g, dtype=F64))
    known = known._replace(reference=logprobs + 0.3 * shift)
    loss = PolicyLoss(**settings)
    _, slopes = value_and_slope(loss, known, logprobs)
    step = 1e-6
    for place in range(9):
        moved = torch.zeros(9, dtype=F64)
        moved[place] = step
        difference = (loss(logprobs + moved, known).sum() - loss(logprobs - moved, known).sum()) / (2 * step)
        assert slopes[place] == pytest.approx(float(difference), rel=1e-7, abs=1e-9)


def test_cispo_is_the_slope_of_log_probs_weighed_by_constants():
    """Finite differences of Σ c·log π, c held at the clipped ratio."""
    logprobs, known = drawn()
    _, slopes = value_and_slope(PolicyLoss(surrogate="cispo", clip_low=0.3, clip_high=0.4), known, logprobs)
    held = -(logprobs - known.old).exp().clamp(0.7, 1.4) * known.advantages * known.weights
    assert slopes == pytest.approx(held.tolist(), rel=1e-12)


# --- what has drawn the tokens ----------------------------------------------------------------------------------------


def test_correction_factors_by_hand():
    """Ratios 3, ½ | 5 | 1/5 of completions 0, 1 and 3: geometric means √1.5, 5, 1/5; completion 2 has no token."""
    sampling = vector(-1.0, -2.0, -0.5, -4.0)
    old = sampling + torch.log(vector(3.0, 0.5, 5.0, 0.2))
    rows = torch.tensor([0, 0, 1, 3])
    truncated = correction_factors(old, sampling, rows, 4, "truncate", 2.0)
    assert truncated.tolist() == pytest.approx([2.0, 0.5, 2.0, 0.2], rel=1e-12)
    assert correction_factors(old, sampling, rows, 4, "mask", 2.0).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert correction_factors(old, sampling, rows, 4, "mask", 5.01).tolist() == [1.0, 1.0, 1.0, 1.0]


def test_parts_of_tokens_keep_what_belongs_together():
    logprobs, known = drawn(correction=torch.arange(9, dtype=F64))
    loss = PolicyLoss(dual_clip=3.0)
    parts = [loss(logprobs[at], known.part(at)) for at in (slice(0, 4), slice(4, 9))]
    assert torch.equal(torch.cat(parts), loss(logprobs, known))
    assert known.part(slice(2, 5)).count == 3 and known.part(slice(2, 5)).reference is None
