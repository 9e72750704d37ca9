"""Influence: first order against real steps, by token against the kernel built in full, and the command."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vlm.cli import influence as command
from lightning_vlm.cli import main as cli
from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.world import WorldSource
from lightning_vlm.models.batch import Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.parts import PartPolicy, apply_parts
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.models.tiny import make_tiny
from lightning_vlm.probes.influence import (
    check_step,
    check_steps,
    direction,
    dpo_update,
    gradients,
    influence,
    influence_by_part,
    log_prob,
    sft_update,
    stepped,
    token_influence,
)
from tests.runs.commands import workplace, write


@pytest.fixture(scope="module", params=("embedded:qwen2_5_vl-tiny", "embedded:llava-tiny"))
def world(request):
    """A policy in float64 and the pairs [(chosen, rejected)] of three pictures."""
    backbone = Backbone(path=request.param, dtype="float64")
    encoder, model = Encoder(load_processor(backbone)), load_model(backbone)
    source = WorldSource(size=30, questions_per_image=1, pairs=True, direct_fraction=1.0)
    return Policy(model, family_of(model)), [encoder.encode_pair(source[i]) for i in (0, 1, 7)]


def state(policy):
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    modes = [module.training for module in policy.modules()]
    return weights, modes, [p.requires_grad for p in policy.parameters()]


def test_the_first_order_is_the_first_order(world):
    """Halving η quarters what it leaves out, and at small η it leaves out less than a thousandth."""
    policy, ((a, _), (b, b_wrong), _) = world
    for probe, update in ((a, sft_update(a)), (a, sft_update(b)), (b_wrong, dpo_update(b, b_wrong))):
        gaps, shares = [], []
        for eta in (1e-6, 5e-7, 2.5e-7):
            predicted, real = check_step(policy, probe, update, eta)
            gaps.append(real - predicted)
            shares.append(abs(gaps[-1] / predicted))
        assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.03)
        assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.02)  # the third order falls with η
        assert max(shares) < 1e-3


def test_the_step_is_what_sgd_does_and_nothing_is_left_changed(world):
    """Real changes equal those of torch's SGD on the loss as written, on another copy of the model."""
    policy, ((a, a_wrong), (b, b_wrong), _) = world
    policy.train()
    policy.model.model.language_model.eval()  # modes that differ are kept, each
    before = state(policy)
    eta, probes = 1e-3, [a, a_wrong, b]
    found = check_steps(policy, probes, [sft_update(b), dpo_update(b, b_wrong, beta=0.3, cooling=0.4)], eta=eta)
    after = state(policy)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0]) and before[1:] == after[1:]
    assert all(p.grad is None for p in policy.parameters())

    def sft(copy):
        return -log_prob(copy, b)

    def dpo(copy):
        deltas = [log_prob(copy, row) - log_prob(copy, row).detach() for row in (b, b_wrong)]
        return -torch.nn.functional.logsigmoid(0.3 * (deltas[0] - 0.4 * deltas[1]))

    for column, loss in enumerate((sft, dpo)):
        copy = deepcopy(policy).eval()
        start = torch.stack([log_prob(copy, row) for row in probes]).detach()
        optimizer = torch.optim.SGD(copy.parameters(), lr=eta)
        loss(copy).backward()
        optimizer.step()
        moved = torch.stack([log_prob(copy, row) for row in probes]).detach() - start
        torch.testing.assert_close(found.real[:, column], moved, rtol=1e-9, atol=1e-12)


def test_weights_come_back_when_something_fails_inside(world):
    policy, ((a, _), *_) = world
    before = state(policy)[0]
    step = direction(policy, sft_update(a))
    with pytest.raises(RuntimeError, match="inside"), stepped(policy, step, 0.1):
        assert any(not torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
        raise RuntimeError("inside")
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())


def test_symmetric_with_positive_diagonal_and_the_sum_of_its_parts(world):
    """A Gram matrix for supervised losses; a frozen part has no share, and the others keep theirs."""
    policy, pairs = world
    rows = [row for pair in pairs for row in pair]
    matrix = influence(policy, rows, [sft_update(row) for row in rows])
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-12)
    assert torch.linalg.eigvalsh(matrix).min() > 0
    parts = influence_by_part(policy, rows[:2], [sft_update(rows[2])])
    torch.testing.assert_close(sum(parts.values()), matrix[:2, 2:3], rtol=1e-12, atol=1e-12)
    assert set(parts) == {"vision", "projector", "language"}  # the head is tied to the embeddings
    frozen = Policy(policy.model, policy.family)
    trained = {p: p.requires_grad for p in policy.parameters()}
    try:
        apply_parts(frozen, policy.family, {"vision": PartPolicy(freeze=True)})
        alone = influence_by_part(frozen, rows[:2], [sft_update(rows[2])])
        assert set(alone) == {"projector", "language"}
        for part, values in alone.items():
            torch.testing.assert_close(values, parts[part], rtol=1e-12, atol=1e-12)
        for p in policy.parameters():
            p.requires_grad_(False)
        with pytest.raises(ValueError, match="no weight of the model is trained"):
            influence(frozen, rows[:1], [sft_update(rows[0])])
    finally:
        for p, value in trained.items():
            p.requires_grad_(value)


def test_by_token(world):
    """Contributions sum to the influence of the texts, and one equals −A K G with K [V, V] built logit by logit."""
    policy, ((a, _), (b, _), _) = world
    tokens = token_influence(policy, a, b)
    assert tokens.contributions.shape == (a.scored, b.scored)
    whole = influence(policy, [a], [sft_update(b)]).item()
    assert tokens.contributions.sum().item() == pytest.approx(whole, rel=1e-9)

    policy.eval()
    params = [p for p in policy.parameters() if p.requires_grad]
    jacobians, ends = [], []
    for row, place in ((a, 0), (b, -1)):
        hidden, weight = policy(collate([row], policy.family, pad_id=0), raw=True)
        logits = hidden[place] @ weight.T
        grads = [torch.autograd.grad(z, params, retain_graph=True, materialize_grads=True) for z in logits]
        jacobians.append(torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]))
        label = row.input_ids[row.loss_mask][place]
        ends.append(torch.nn.functional.one_hot(label, len(logits)) - logits.detach().softmax(-1))
    kernel = jacobians[0] @ jacobians[1].T
    belief, residual = ends[0], -ends[1]
    assert tokens.contributions[0, -1].item() == pytest.approx((-belief @ kernel @ residual).item(), rel=1e-9)
    assert tokens.beliefs[0].item() == pytest.approx(belief.norm().item(), rel=1e-12)
    assert tokens.residuals[-1].item() == pytest.approx(residual.norm().item(), rel=1e-12)
    strength = (-belief / belief.norm()) @ kernel @ (residual / residual.norm())
    assert tokens.coupling[0, -1].item() == pytest.approx(strength.item(), rel=1e-9)


def test_pulls_of_dpo_are_its_derivatives(world):
    """c = β(1 − a) up, w_c·c down, against autograd; Δ = 0 gives β/2; large margins neither overflow nor pull."""
    _, ((chosen, rejected), *_) = world
    for beta, cooling, deltas in ((0.1, 1.0, (0.0, 0.0)), (0.5, 0.3, (1.5, -2.0)), (0.2, 0.0, (-3.0, 4.0))):
        given = torch.tensor(deltas, dtype=torch.float64, requires_grad=True)
        (-torch.nn.functional.logsigmoid(beta * (given[0] - cooling * given[1]))).backward()
        update = dpo_update(chosen, rejected, beta=beta, cooling=cooling, deltas=deltas)
        assert update.rows == (chosen, rejected)
        assert update.pulls == pytest.approx([-g for g in given.grad.tolist()], rel=1e-12, abs=1e-15)
    assert dpo_update(chosen, rejected).pulls == pytest.approx((0.05, -0.05))
    assert dpo_update(chosen, rejected, deltas=(1e6, -1e6)).pulls == (0.0, 0.0)
    assert dpo_update(chosen, rejected, deltas=(-1e6, 1e6)).pulls == pytest.approx((0.1, -0.1))


def test_dpo_is_linear_in_its_texts(world):
    """influence(DPO) = c·influence(chosen) − w_c·c·influence(rejected)."""
    policy, (probe, (chosen, rejected), _) = world
    single = influence(policy, probe, [sft_update(chosen), sft_update(rejected)])
    pair = influence(policy, probe, [dpo_update(chosen, rejected, beta=0.2, cooling=0.7)])
    torch.testing.assert_close(pair[:, 0], 0.1 * single[:, 0] - 0.07 * single[:, 1], rtol=1e-9, atol=1e-9)


def test_what_is_refused(world):
    policy, ((a, b), *_) = world
    for beta in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta must be positive"):
            dpo_update(a, b, beta=beta)
    with pytest.raises(ValueError, match=r"cooling must lie in \[0, 1\], got 1.5"):
        dpo_update(a, b, cooling=1.5)
    for eta in (0, -1e-4, math.inf, math.nan):
        with pytest.raises(ValueError, match="eta must be a positive number"):
            check_steps(policy, [a], [sft_update(a)], eta=eta)
    for probes, updates in (([], [sft_update(a)]), ([a], [])):
        with pytest.raises(ValueError, match="needs probes and examples"):
            influence(policy, probes, updates)
    with pytest.raises(ValueError, match="no rows"):
        gradients(policy, [])
    silent = Row(id="silent", input_ids=a.input_ids, loss_mask=torch.zeros_like(a.loss_mask), images=a.images)
    for call in (lambda: gradients(policy, [silent]), lambda: token_influence(policy, a, silent)):
        with pytest.raises(ValueError, match=r"row silent \(chosen\) has no scored token"):
            call()


# --- the command -----------------------------------------------------------------------------------------------------

TINY = "embedded:llava-tiny"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with three samples of messages and two preference pairs, to work in."""
    workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(cli.COMMANDS, "influence", ("lightning_vlm.cli.influence", ""))
    answers = (("red", "blue"), ("a red circle", "a green circle"))
    pairs = ({"chosen": chosen, "rejected": rejected} for chosen, rejected in answers)
    write("pairs.jsonl", *(dict(pair, id=f"p{n}", image="red.png", prompt="what ?") for n, pair in enumerate(pairs)))
    return tmp_path


def run(*words: str) -> dict:
    """The JSON of a command that must succeed."""
    assert cli.main(["influence", *words]) == 0
    return json.loads(Path("influence.json").read_text())


def test_the_command(place, capsys):
    """Numbers of the file are those of the library; the table has every pair; the picture is a picture."""
    eta = 1e-5
    found = run(TINY, "--train", "good.jsonl", "--probe", "pairs.jsonl", "--eta", str(eta), "--limit", "2")
    out = capsys.readouterr().out
    texts = [(p["id"], p["text"]) for p in found["probes"]]
    assert texts == [(f"preference/p{n}", side) for n in (0, 1) for side in ("chosen", "rejected")]
    assert [t["id"] for t in found["train"]] == ["messages/good0", "messages/good1"]
    assert "chosen, predicted" in out and "rejected, predicted" in out
    assert out.count("messages/good0") == out.count("messages/good1") == 2 and "preference/p1" in out
    assert "influence: influence.json; picture: influence.png" in out

    backbone = Backbone(path=TINY, dtype="float64")
    encoder, model = Encoder(load_processor(backbone)), load_model(backbone)
    policy = Policy(model, family_of(model))
    pairs = [encoder.encode_pair(sample) for sample in command._samples("pairs.jsonl", "probe", 2)]
    trained = encoder.encode(command._samples("good.jsonl", "train", 1)[0])
    wanted = check_steps(policy, [r for pair in pairs for r in pair], [sft_update(trained)], eta=eta)
    for name in ("predicted", "real"):
        got = torch.tensor(found[name], dtype=torch.float64)
        torch.testing.assert_close(got[:, :1], getattr(wanted, name), rtol=1e-9, atol=1e-12)
    shares = sum(torch.tensor(v, dtype=torch.float64) for v in found["predicted_by_part"].values())
    torch.testing.assert_close(shares, torch.tensor(found["predicted"], dtype=torch.float64))
    assert [p["logprob"] for p in found["probes"]] == pytest.approx(wanted.before.tolist())

    picture = np.asarray(Image.open("influence.png").convert("RGB")).astype(int)
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    blue, red = ((picture[..., a] - picture[..., b] > 60).sum() for a, b in ((2, 0), (0, 2)))
    assert blue > 500 and red > 50, "rising and falling texts have their colours"
    assert sorted(p.name for p in place.iterdir() if "tmp" in p.name) == []


def test_the_command_on_pairs_of_the_world(place):
    """DPO: the pulls of the start; a probe without a rejected text has one row; `--cooling` scales the loser."""
    words = (TINY, "--train", "world:train", "--limit", "1", "--loss", "dpo", "--image", "deep/er.svg")
    found = run(*words, "--probe", "good.jsonl")
    assert [p["text"] for p in found["probes"]] == ["chosen"]
    assert found["train"][0]["pulls"] == pytest.approx({"chosen": 0.05, "rejected": -0.05})
    cooled = run(*words, "--probe", "world:val", "--cooling", "0.5")
    assert cooled["train"][0]["pulls"] == pytest.approx({"chosen": 0.05, "rejected": -0.025})
    assert Path("deep/er.svg").read_text().startswith("<?xml")


def test_a_step_too_long_is_told(place, capsys):
    run(TINY, "--train", "good.jsonl", "--probe", "pairs.jsonl", "--eta", "0.1", "--limit", "1")
    assert "That is much: an --eta below 0.1" in capsys.readouterr().out


def test_large_models_are_refused_before_they_are_read(place, monkeypatch, capsys):
    make_tiny("llava_siglip_llama", "model")
    monkeypatch.setattr(command, "PARAMETER_LIMIT", 10_000)
    words = ("model", "--train", "good.jsonl", "--probe", "good.jsonl", "--limit", "1")
    with monkeypatch.context() as nothing:
        nothing.setattr("lightning_vlm.models.load.load_model", lambda _: pytest.fail("the model was loaded"))
        assert cli.main(["influence", *words]) == 2
    assert "parameters, more than 10,000" in (error := capsys.readouterr().err) and "--force" in error
    count = run(*words, "--force")["parameters"]
    assert f"model has {count:,} parameters" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("./gone --train good.jsonl --probe good.jsonl", "'./gone' does not exist"),
        ("embedded:nope --train good.jsonl --probe good.jsonl", "no embedded model is named 'nope'"),
        (f"{TINY} --train god.jsonl --probe good.jsonl", "--train: data path 'god.jsonl' does not exist; did you mean"),
        (f"{TINY} --train good.jsonl --probe empty.jsonl", "--probe: empty.jsonl is empty"),
        (f"{TINY} --train good.jsonl --probe other.jsonl", "--probe: other.jsonl has neither `messages` nor"),
        (f"{TINY} --train world:moon --probe good.jsonl", "--train: the world has no split 'moon'"),
        (f"{TINY} --train good.jsonl --probe good.jsonl --loss dpo", "sample messages/good0: has no `rejected` text"),
        (f"{TINY} --train good.jsonl --probe good.jsonl --cooling .5", "--cooling has no effect on --loss sft"),
        (f"{TINY} --train pairs.jsonl --probe good.jsonl --loss dpo --cooling 2", "cooling must lie in [0, 1]"),
        (f"{TINY} --train good.jsonl --probe good.jsonl --eta 0", "--eta must be a positive number, got 0"),
        (f"{TINY} --train good.jsonl --probe good.jsonl --eta 1e200", "not finite: lower --eta"),
        (f"{TINY} --train good.jsonl --probe good.jsonl --limit 0", "--limit must be at least 1, got 0"),
        (f"{TINY} --train good.jsonl --probe good.jsonl --image x.gif", "must end in .png, .pdf or .svg"),
        (f"{TINY} --train good.jsonl --probe good.jsonl --out .", "--out . is a directory"),
        (f"{TINY} --train good.jsonl", "the following arguments are required: --probe"),
    ],
)
def test_what_the_command_refuses(place, capsys, words, said):
    Path("empty.jsonl").touch()
    write("other.jsonl", {"a": 1})
    assert cli.main(["influence", *words.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line and "from " not in line
    assert not Path("influence.json").exists() and not Path("influence.png").exists()
