"""On-policy distillation: zero for equal models, a naive oracle, off-policy shares, GRPO beside it, ranks, refusals."""

from __future__ import annotations

import pytest
import torch

from lightning_vlm.algorithms import OPD
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.spec import Backbone
from lightning_vlm.rewards import Reward

from .conftest import run_scenarios
from .runs.scenarios import run

STUDENT, LARGER, OTHER = "embedded:qwen2_5_vl-tiny", "embedded:qwen2_5_vl-small", "embedded:llava-tiny"
ROLLOUT = {"temperature": 0.8, "max_new_tokens": 12, "stop": ["o"]}  # so that completions differ in length


def spec(name: str, tmp_path, **settings) -> dict:
    """A run of one optimizer step in float64."""
    own = {"teacher": LARGER, "rollout": ROLLOUT, "lr": 1e-2, "clip_norm": 0.0, "micro_batch_tokens": 120}
    return {
        "name": name,
        "model": STUDENT,
        "world": {"size": 16},
        "algorithm": "OPD",
        "steps": 1,
        "batch_size": 4,
        "run_dir": str(tmp_path / name),
        "settings": own | settings,
    }


class Seen:
    """The rows of each step, as `accumulate` is given them."""

    def __init__(self, monkeypatch) -> None:
        self.items, accumulate = [], OPD.accumulate

        def noted(module, items, *args):
            self.items.append(items)
            return accumulate(module, items, *args)

        monkeypatch.setattr(OPD, "accumulate", noted)

    def rows(self, step: int = 0):
        return [row for item in self.items[step] for row in item]


def policies() -> tuple[Policy, Policy]:
    """Student and teacher as they are before the first step, in float64."""
    models = (load_model(Backbone(path=path, dtype="float64")) for path in (STUDENT, LARGER))
    return tuple(Policy(model, family_of(model)) for model in models)


def distributions(policy: Policy, row) -> torch.Tensor:
    """[n, V] log π at temperature .8 at the scored places, by the model's own forward of this row alone."""
    inputs = {"input_ids": row.input_ids[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    inputs |= policy.family.merge(row.images)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == policy.model.config.image_token_id).int()
    return (policy.model(**inputs).logits[0] / 0.8).log_softmax(-1)[row.loss_mask.nonzero()[:, 0] - 1]


@pytest.fixture
def seen(monkeypatch):
    return Seen(monkeypatch)


@pytest.mark.parametrize("objective, bound", [("full", 0.0), ("jsd", 1e-6), ("topk", 0.0), ("sampled", 0.0)])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(objective, bound, tmp_path):
    record = run(spec("same", tmp_path, teacher=STUDENT, objective=objective), 1)
    assert abs(record["losses"][0]) <= bound
    assert max(float(g.abs().max()) for g in record["gradients"].values()) <= max(bound, 1e-12)
    assert record["metrics"]["train/tokens"] > 0


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_gradient_is_that_of_the_divergence_written_out(aggregation, tmp_path, seen):
    """Reverse KL at every token of every completion by full softmax, one row at a time, mean by hand."""
    record = run(spec("oracle", tmp_path, aggregation=aggregation, group_size=2), 1)
    student, teacher = policies()
    rows, total = seen.rows(), 0.0
    assert len(rows) == 8 and len({row.scored for row in rows}) > 1
    for row in rows:
        p, q = (distributions(policy, row) for policy in (student, teacher))
        divergence = (p.exp() * (p - q.detach())).sum(-1)
        weight = 1 / sum(r.scored for r in rows) if aggregation == "token" else 1 / (row.scored * len(rows))
        total = total + weight * divergence.sum()
    total.backward()
    assert record["losses"][0] == pytest.approx(total.item(), abs=1e-10)
    for name, parameter in student.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(record["gradients"][name], parameter.grad, rtol=0, atol=1e-9)


def test_sampled_is_the_policy_gradient_of_the_log_ratio(tmp_path, seen):
    """Σ_t −A_t·log p_t / tokens with A_t = log q_t − log p_t, differentiated by hand."""
    record = run(spec("sampled", tmp_path, objective="sampled"), 1)
    student, teacher = policies()
    rows, total = seen.rows(), 0.0
    for row in rows:
        labels = row.input_ids[row.loss_mask][:, None]
        p, q = (distributions(policy, row).gather(1, labels)[:, 0] for policy in (student, teacher))
        advantages = (q - p).detach()
        total = total - (advantages * p).sum() / sum(r.scored for r in rows)
    total.backward()
    for name, parameter in student.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(record["gradients"][name], parameter.grad, rtol=0, atol=1e-9)


def test_grpo_beside_it_adds_its_gradient(tmp_path):
    """distill + 2·GRPO on the same completions: gradients add up."""
    reward = {"length": {"kind": "length", "target": 6}}
    shared = {"group_size": 4, "rewards": reward}
    distilled = run(spec("distilled", tmp_path, **shared), 1)
    both = run(spec("both", tmp_path, reward_weight=2.0, **shared), 1)
    alone = spec("alone", tmp_path, **shared)
    alone["algorithm"] = "GRPO"
    del alone["settings"]["teacher"]
    alone = run(alone, 1)
    assert any(float(g.abs().max()) > 1e-6 for g in alone["gradients"].values())
    for name, gradient in both["gradients"].items():
        want = distilled["gradients"][name] + 2 * alone["gradients"][name]
        torch.testing.assert_close(gradient, want, rtol=0, atol=1e-9)


def test_a_share_of_prompts_is_answered_by_the_data(tmp_path, seen):
    """All of them: the rows are the gold answers, and nobody's draws are reported."""
    record = run(spec("data", tmp_path, off_policy=1.0), 1)
    rows = seen.rows()
    plain = spec("sft", tmp_path)
    plain |= {"algorithm": "SFT", "settings": {"lr": 1e-2}}
    sft = run(plain, 1)
    # The same samples, in the same order, scored alike but for what stands before the last answer (nothing here).
    sft["rows"] = sft["rows"][0]  # of this rank
    assert sorted(row.id for row in rows) == sorted(row[0] for row in sft["rows"][0])
    assert {row.id: tuple(row.input_ids[row.loss_mask].tolist()) for row in rows} == {
        r[0]: r[3] for r in sft["rows"][0]
    }
    assert record["metrics"]["train/tokens"] == sum(row.scored for row in rows)
    assert "train/completion_length" not in record["metrics"]


@pytest.mark.parametrize("teacher", [LARGER, OTHER])
def test_a_share_of_prompts_is_answered_by_the_teacher(teacher, tmp_path, seen):
    """Half by draw: which, is a matter of the sample's id; the teacher's own log-probs say it wrote them."""
    settings = {"off_policy": 0.5, "off_policy_from": "teacher", "teacher": teacher, "group_size": 2}
    record = run(spec("half", tmp_path, **settings) | {"batch_size": 16}, 1)
    rows = seen.rows()
    assert len(rows) == 32 and record["losses"][0] > 0
    own = {row.id for row in rows if not row.info["engine_logprobs"].isnan().any()}
    others = {row.id for row in rows} - own
    assert own and others and record["metrics"]["train/logprob_gap"] < 1e-5
    again = run(spec("again", tmp_path, **settings, micro_batch_tokens=60) | {"batch_size": 16}, 1)
    torch.testing.assert_close(again["losses"][0], record["losses"][0], rtol=0, atol=1e-10)


def test_the_same_gradient_on_two_ranks_and_under_any_cut(tmp_path):
    """Completions of unequal length on each rank; a teacher that is sharded, too; another architecture as teacher."""
    base = {"group_size": 3}
    cases = {"full": {}, "other": {"teacher": OTHER}, "sampled": {"objective": "sampled"}}
    found = {}
    for layout, processes, changes in (
        ("one", 1, {}),
        ("cut", 1, {"micro_batch_tokens": 40, "share_prompts": False}),
        ("ddp", 2, {}),
        ("fsdp2", 2, {}),
    ):
        specs = []
        for case, settings in cases.items():
            entry = spec(case, tmp_path / layout, **base, **settings, **changes) | {"batch_size": 5}
            specs.append(entry | ({"strategy": layout} if processes == 2 else {}))
        done = run_scenarios(specs, tmp_path / layout, processes=processes)
        assert done.returncode == 0, done.stderr
        found[layout] = torch.load(tmp_path / layout / "records.pt")
    for case in cases:
        for layout in ("cut", "ddp", "fsdp2"):
            for name, gradient in found["one"][case]["gradients"].items():
                torch.testing.assert_close(found[layout][case]["gradients"][name], gradient, rtol=0, atol=1e-9)


BACKBONE = Backbone(path=STUDENT)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"objective": "kl"}, "model.objective is 'kl'"),
        ({"beta": 2.0, "objective": "jsd"}, "beta must lie in"),
        ({"beta": 0.3}, "model.beta has an effect with model.objective jsd only"),
        ({"topk": 5}, "model.topk has an effect with model.objective topk only"),
        ({"topk": 0, "objective": "topk"}, "topk must be at least 1"),
        ({"off_policy": 2.0}, "off_policy between 0 and 1"),
        ({"off_policy": 0.5, "objective": "sampled"}, "does not go with model.objective sampled"),
        ({"off_policy_from": "me"}, "choose data or teacher"),
        ({"reward_weight": 1.0}, "needs model.rewards"),
        ({"clip_high": 0.3}, "model.clip_high has no effect without"),
        ({"dynamic_sampling": 2}, "model.dynamic_sampling has no effect without"),
        ({"entropy_coef": 0.1}, "model.entropy_coef has no effect without"),
        ({"rewards": {"length": Reward(kind="length", target=3)}, "group_size": 1, "reward_weight": 1.0}, "at least 2"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_settings_that_make_no_sense_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        OPD(backbone=BACKBONE, teacher=LARGER, **wrong)
