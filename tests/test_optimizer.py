"""PartOptimizer against torch's own optimizers, its schedules by hand, its checkpoints."""

import copy

import pytest
import torch
from torch import nn

from lightning_vlm.algorithms.groups import parameter_groups
from lightning_vlm.algorithms.optimizer import PartOptimizer, lr_factor


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6, bias=False)).to(dtype)


def backward(model, seed):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    model(x.to(model[0].weight.dtype)).float().square().sum().backward()


def group(params, kind, lr=1e-2, weight_decay=0.1):
    return {"params": list(params), "kind": kind, "lr": lr, "weight_decay": weight_decay}


def test_adamw_and_muon_side_by_side_equal_torchs_own():
    a, b = net(), net()
    ours = PartOptimizer([group([a[0].weight, a[2].weight], "muon"), group([a[0].bias], "adamw", weight_decay=0.0)])
    muon = torch.optim.Muon([b[0].weight, b[2].weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([b[0].bias], lr=1e-2, weight_decay=0.0)
    for seed in range(4):
        for model, optimizers in ((a, [ours]), (b, [muon, adamw])):
            for o in optimizers:
                o.zero_grad()
            backward(model, seed)
            for o in optimizers:
                o.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-7)


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_saved_and_restored_it_goes_on_bit_for_bit(master, kind):
    dtype = torch.bfloat16 if master else torch.float32

    def build(model):
        groups = [group([model[0].weight, model[2].weight], kind), group([model[0].bias], "adamw")]
        return PartOptimizer(groups, master_weights=master)

    def train(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            backward(model, seed)
            optimizer.gradients()
            optimizer.step()

    whole = net(dtype)
    train(whole, build(whole), range(6))
    first = net(dtype)
    optimizer = build(first)
    train(first, optimizer, range(3))
    weights, state = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    second = net(dtype)
    second.load_state_dict(weights)
    resumed = build(second)
    resumed.load_state_dict(state)
    train(second, resumed, range(3, 6))
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_masters_keep_updates_that_bfloat16_would_lose():
    """At lr 1e-5 a weight near 1 moves by 1e-5 a step, far below bfloat16's spacing of 2⁻⁸; a master keeps it."""
    moved = {}
    for master in (False, True):
        p = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
        optimizer = PartOptimizer([group([p], "adamw", lr=1e-5, weight_decay=0.0)], master_weights=master)
        for _ in range(500):
            optimizer.zero_grad()
            p.float().sum().backward()
            optimizer.gradients()
            optimizer.step()
        moved[master] = 1 - p.float().mean().item()
    assert moved[False] == 0
    assert moved[True] == pytest.approx(500e-5, rel=0.25)


def test_gradients_are_accumulated_in_float32_under_masters():
    """256 + 1 is 256 in bfloat16; the master's gradient must be 257."""
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = PartOptimizer([group([p], "adamw")], master_weights=True)
    (p.sum() * 256).backward()
    p.sum().backward()
    assert optimizer.gradients()[p].tolist() == [257.0, 257.0] and p.grad is None


def test_missing_gradients_count_as_zero():
    model = net()
    optimizer = PartOptimizer([group(model.parameters(), "adamw")])
    gradients = optimizer.gradients()
    assert all(not g.any() for g in gradients.values()) and len(gradients) == 3


def test_checkpoint_of_other_trainable_parts_is_refused():
    model = net()
    state = PartOptimizer([group([model[0].weight], "adamw")]).state_dict()
    with pytest.raises(ValueError, match="holds 1 parameters, this run trains 3"):
        PartOptimizer([group(model.parameters(), "adamw")]).load_state_dict(state)


def test_unknown_kind():
    with pytest.raises(ValueError, match="sgd"):
        PartOptimizer([group(net().parameters(), "sgd")])


@pytest.mark.parametrize(
    "schedule, step, expected",
    [
        ("constant", 0, 0.25),  # the first of four warm-up steps
        ("constant", 3, 1.0),
        ("constant", 99, 1.0),
        ("linear", 4, 1.0),
        ("linear", 52, 0.5 * 0.9 + 0.1),  # half way between 4 and 100, floor 0.1
        ("cosine", 52, 0.5 * 0.9 + 0.1),
        ("wsd", 59, 1.0),
        ("wsd", 80, 0.5 * 0.9 + 0.1),  # half way through the last 40 %
        ("wsd", 100, 0.1),
    ],
)
def test_schedules_by_hand(schedule, step, expected):
    got = lr_factor(step, total=100, warmup=4, schedule=schedule, decay_fraction=0.4, min_ratio=0.1)
    assert got == pytest.approx(expected)


def test_groups_by_part_rule_and_decay():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "up": nn.Linear(4, 4), "conv": nn.Conv2d(3, 4, 2)})
    named = list(model.named_parameters())
    groups = parameter_groups(
        {"language": named},
        kind="muon",
        lr={"language": 0.1},
        weight_decay={"language": 0.2},
        warmup={"language": 3},
        embeddings={id(model["embed"].weight)},
    )
    names = {id(p): n for n, p in named}
    got = {(g["kind"], g["weight_decay"]): sorted(names[id(p)] for p in g["params"]) for g in groups}
    assert got == {
        ("adamw", 0.2): ["conv.weight", "embed.weight"],
        ("muon", 0.2): ["up.weight"],
        ("adamw", 0.0): ["conv.bias", "up.bias"],
    }
