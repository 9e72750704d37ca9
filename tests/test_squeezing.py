"""The squeezing effect's closed form against real gradient steps on logits."""

from __future__ import annotations

import pytest
import torch

from lightning_vlm.metrics.squeezing import falling, unlikelihood_rates

V = 12
STEP = 1e-5


def stepped(logits, label, eta):
    """log π after one descent step of size η on +log π_label, by autograd."""
    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(z.log_softmax(-1)[label], z)
    return (logits - eta * gradient).log_softmax(-1)


def vectors():
    """Random logits, and extreme ones: nearly one-hot, two peaks, uniform, a long tail."""
    noise = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 3.0, 8.0):
        yield torch.randn(V, generator=noise, dtype=torch.float64) * scale
    yield torch.zeros(V, dtype=torch.float64)
    yield torch.tensor([30.0] + [0.0] * (V - 1), dtype=torch.float64)
    yield torch.tensor([20.0, 20.0] + [-5.0] * (V - 2), dtype=torch.float64)
    yield -torch.arange(V, dtype=torch.float64) * 4


@pytest.mark.parametrize("label", [0, 3, V - 1])
@pytest.mark.parametrize("logits", vectors())
def test_rates_are_those_of_a_real_step(logits, label):
    """Central differences; and a real step moves every token to the side that the bound says."""
    probs, label = logits.softmax(-1), torch.tensor(label)
    up, down = stepped(logits, label, STEP), stepped(logits, label, -STEP)
    rates = unlikelihood_rates(probs, label)
    torch.testing.assert_close(rates, (up - down) / (2 * STEP), rtol=0, atol=1e-8)
    moved = up - logits.log_softmax(-1)
    clear = rates.abs() > 1e-4  # further from the bound than rounding and the step's curvature
    assert torch.equal(falling(probs, label)[clear], (moved < 0)[clear])
    bound = probs.square().sum() - probs[label]
    others = torch.arange(V) != label
    assert (moved[clear & others & (probs < bound)] < 0).all()
    assert (moved[clear & others & (probs > bound)] > 0).all()


def test_by_hand():
    """π = (.5, .3, .2), ‖π‖² = .38. Pushing .2 down: bound .18, others rise by .32 and .12; its own .2 − .18 − 1."""
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rates = unlikelihood_rates(probs, torch.tensor(2))
    torch.testing.assert_close(rates, torch.tensor([0.32, 0.12, -0.98], dtype=torch.float64))
    # (.7, .2, .08, .02), ‖π‖² = .5368, y the last: all below .5168 fall, only the top token gains.
    squeezed = falling(torch.tensor([0.7, 0.2, 0.08, 0.02], dtype=torch.float64), torch.tensor(3))
    assert squeezed.tolist() == [False, True, True, True]


def test_mass_is_kept_the_label_falls_and_the_top_token_rises():
    """In a batch of [2, 50] vectors; Σ π_k rate_k = 0."""
    noise = torch.Generator().manual_seed(1)
    probs = (3 * torch.randn(2, 50, V, generator=noise, dtype=torch.float64)).softmax(-1)
    labels = torch.randint(V, (2, 50), generator=noise)
    rates, fall = unlikelihood_rates(probs, labels), falling(probs, labels)
    assert (probs * rates).sum(-1).abs().max() < 1e-14
    assert fall.gather(-1, labels[..., None]).all()
    tops = probs.argmax(-1)
    assert not fall.gather(-1, tops[..., None])[..., 0][tops != labels].any()
    alone = torch.stack([unlikelihood_rates(p, y) for p, y in zip(probs[1], labels[1], strict=True)])
    torch.testing.assert_close(rates[1], alone, rtol=0, atol=1e-15)


def test_a_label_with_all_the_mass_moves_nothing():
    probs, label = torch.tensor([1.0, 0.0]), torch.tensor(0)
    assert unlikelihood_rates(probs, label)[0] == 0
    assert falling(probs, label).tolist() == [False, False]


@pytest.mark.parametrize(
    ("probs", "labels", "words"),
    [
        ([[0.5, 0.5]], 0, "expected probs"),
        ([0.5, 0.5], 2, r"labels must lie in \[0, 2\)"),
        ([0.5, 0.5], -1, "labels must lie in"),
        ([3.0, 1.0], 0, "no probability vector"),
        ([1.5, -0.5], 0, "no probability vector"),
        ([float("nan"), 1.0], 0, "no probability vector"),
    ],
)
def test_what_is_refused(probs, labels, words):
    for function in (unlikelihood_rates, falling):
        with pytest.raises(ValueError, match=words):
            function(torch.tensor(probs), torch.tensor(labels))
