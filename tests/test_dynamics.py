"""Learning-dynamics probes: texts, quantities by hand and against full logits; files and pictures."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import MLFlowLogger
from PIL import Image

from callbacks import LearningDynamics
from callbacks.dynamics import append_lines, keep_lines, preference_of, read_lines
from lightning_vlm.algorithms import SFT
from lightning_vlm.benchmarks.probe import Preference, Probe, preference_quantities
from lightning_vlm.data.module import VLMData
from lightning_vlm.data.probe import ProbeSamples
from lightning_vlm.data.schema import Sample, image, message, text
from lightning_vlm.data.sources import SourceSpec
from lightning_vlm.data.world.source import WorldSource
from lightning_vlm.losses.kernel import divergences, token_scores
from lightning_vlm.models.load import load_model
from lightning_vlm.models.spec import Backbone

CAPTIONS = {"size": 6, "families": ["caption"], "pairs": True}


# --- texts -----------------------------------------------------------------------------------------------------------


def test_texts_of_the_world():
    """A paraphrase is another true caption; what is irrelevant is false here; a permutation has the same words."""
    source = WorldSource(split="val", size=20, families=["caption"], pairs=True)
    samples = ProbeSamples(source)
    assert samples.texts == ("chosen", "rejected", "paraphrase", "irrelevant", "permutation") and len(samples) == 20
    everything = {sample.chosen() for sample in source}
    for plain, sample in zip(source, samples, strict=True):
        texts, references = sample.info["probe"], plain.info["references"]
        assert (texts["chosen"], texts["rejected"]) == (plain.chosen(), plain.rejected)
        assert texts["paraphrase"] in references and texts["paraphrase"] != texts["chosen"]
        assert texts["irrelevant"] in everything and texts["irrelevant"] not in (*references, plain.rejected)
        assert sorted(texts["permutation"].split()) == sorted(texts["chosen"].split())
        assert texts["permutation"] != texts["chosen"]
        assert "probe" not in plain.info


def test_texts_are_keyed_by_seed_and_sample():
    source = WorldSource(split="val", size=20, families=["caption"], pairs=True)
    one, same, other = ProbeSamples(source), ProbeSamples(source), ProbeSamples(source, seed=1)
    drawn = [[sample.info["probe"] for sample in samples] for samples in (one, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def sample(id, chosen, images=(), **more):
    return Sample(id, [message("user", image(), text("?")), message("assistant", text(chosen))], list(images), **more)


def test_texts_that_do_not_exist_are_left_out():
    """No pair, no reference, one word twice, and the same picture everywhere."""
    samples = ProbeSamples([sample("a", "red red", ["1.png"]), sample("b", "blue", ["1.png"])])
    assert [s.info["probe"] for s in samples] == [{"chosen": "red red"}, {"chosen": "blue"}]
    assert samples.texts == ("chosen",)
    others = ProbeSamples(
        [sample("a", "red", ["1.png"]), sample("b", "red", ["2.png"]), sample("c", "blue", ["3.png"])]
    )
    assert [s.info["probe"].get("irrelevant") for s in others] == ["blue", "blue", "red"]
    with pytest.raises(ValueError, match="sample p: does not end with an assistant message"):
        ProbeSamples([Sample("p", [message("user", text("?"))])])


# --- quantities by hand ----------------------------------------------------------------------------------------------


def test_preference_quantities_by_hand():
    """Two chosen tokens gained 3 nats each, four rejected ones lost 2 each: β(6 + 8) = 1.4, σ(1.4) = .802."""
    record = {"chosen_since_start": 3.0, "chosen_tokens": 2, "rejected_since_start": -2.0, "rejected_tokens": 4}
    record["rejected"] = -3.5
    found = preference_quantities(record, Preference(beta=0.1, tau=0.5, ell_floor=-3.0))
    assert found["reward_margin"] == pytest.approx(1.4)
    assert found["preference"] == pytest.approx(1 / (1 + math.exp(-1.4)))
    assert found["vulnerable"] == 1.0
    assert found["cooling_weight"] == pytest.approx(1 / (1 + math.e))
    assert preference_quantities(record, Preference(beta=0.09))["vulnerable"] == 0.0  # σ(1.26) = .779
    assert preference_quantities(record, Preference(beta=0.35))["vulnerable"] == 0.0  # σ(4.9) = .993
    assert "cooling_weight" not in preference_quantities(record, Preference(ell_floor=None))
    far = record | {"chosen_since_start": -4000.0}
    assert preference_quantities(far, Preference())["preference"] == 0.0


def hand_made(**more):
    """A probe of two samples, of which one has a rejected text."""
    samples = ProbeSamples([sample("a", "x y", ["1"], rejected="z"), sample("b", "y", ["2"])])
    return Probe(name="p", samples=samples, every=1, **more)


def record(id, chosen, **more):
    base = {"id": id, "chosen": chosen, "chosen_tokens": 2, "argmax": -0.1, "entropy": 0.5, "top1": 0.9}
    return base | {"tv": 0.0, "js": 0.0, "confidences": [0.9, 0.7], "correct": [1.0, 0.0]} | more


def test_summary_by_hand():
    """Means over samples of what each sample has; differences to the first probe and to the one before."""
    probe = hand_made()
    first = probe.summary([record("a", -1.0, rejected=-2.0, rejected_tokens=1), record("b", -3.0)])
    assert first.metrics["chosen"] == -2.0 and first.metrics["rejected"] == -2.0
    changes = {name: value for name, value in first.metrics.items() if "_since_" in name}
    assert set(changes.values()) == {0.0} and {"chosen_since_start", "entropy_since_last"} <= changes.keys()
    assert (first.metrics["reward_margin"], first.metrics["preference"]) == (0.0, 0.5)
    # Confidences .9 and .7 fall in bins of their own, two right of two and none of two.
    assert first.metrics["ece"] == pytest.approx(0.5 * 0.1 + 0.5 * 0.7) and first.metrics["tokens"] == 4
    probe.summary([record("a", -1.5, rejected=-2.0, rejected_tokens=1), record("b", -3.0)])
    records = [record("a", -1.25, rejected=-4.0, rejected_tokens=1), record("b", -5.0)]
    third = probe.summary(records)
    assert third.metrics["chosen_since_start"] == pytest.approx((-0.25 - 2) / 2)
    assert third.metrics["chosen_since_last"] == pytest.approx((0.25 - 2) / 2)
    assert records[0]["chosen_since_last"] == 0.25 and "confidences" not in records[0]
    assert third.metrics["reward_margin"] == pytest.approx(0.1 * (2 * -0.25 - -2))  # of the one pair
    assert first.metrics.keys() == third.metrics.keys() < probe.metric_names  # these records lack some texts
    assert set(third.intervals()) < probe.metric_names


def test_summary_of_answers():
    from lightning_vlm.benchmarks import RULES

    probe = hand_made(rule=RULES["exact"])
    with pytest.raises(ValueError, match="no sample has a gold answer"):
        _ = probe.metric_names
    probe.samples = ProbeSamples([sample("a", "x", answer="x"), sample("b", "y")])
    summary = probe.summary([record("a", -1.0, score=0.0, confidence=0.75), record("b", -1.0)])
    assert (summary.metrics["answer_accuracy"], summary.metrics["answer_ece"]) == (0.0, 0.75)
    with pytest.raises(ValueError, match="scores sets of answers"):
        _ = hand_made(rule=RULES["coco/python"]).metric_names


def test_summary_refuses_what_cannot_be_compared():
    probe = hand_made()
    with pytest.raises(ValueError, match="nothing to score"):
        probe.summary([])
    with pytest.raises(ValueError, match="chosen of sample a is nan"):
        probe.summary([record("a", math.nan), record("b", -1.0)])
    probe.forget()
    probe.summary([record("a", -1.0)])
    with pytest.raises(ValueError, match="sample b was not there at the start"):
        probe.summary([record("b", -1.0)])


def test_constants_come_from_a_preference_model():
    default = Preference(beta=0.3)
    assert preference_of(SimpleNamespace(beta=0.5), default) is default  # another algorithm's beta
    module = SimpleNamespace(beta=0.5, tau=2.0, ell_floor=-5.0)
    assert preference_of(module, default) == Preference(beta=0.5, tau=2.0, ell_floor=-5.0)
    module.ell_floor, module.ell_floor_value = "mean", -1.25
    assert preference_of(module, default).ell_floor == -1.25
    module.ell_floor_value = None
    assert preference_of(module, default).ell_floor is None


def test_divergences_of_a_tiny_distribution():
    """p = (.9, .1), q = (.1, .9): TV .8, JS = ln 2 − H(.9, .1); and JS ≤ ln 2 · TV for any pair."""
    p, q = torch.tensor([[0.9, 0.1]]).double().log(), torch.tensor([[0.1, 0.9]]).double().log()
    head = torch.eye(2, dtype=torch.float64)
    found = divergences(p, head, q, head)
    assert float(found.tv) == pytest.approx(0.8)
    assert float(found.js) == pytest.approx(math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 500, 8, generator=generator, dtype=torch.float64) * 4
    heads = torch.randn(2, 30, 8, generator=generator, dtype=torch.float64)
    found = divergences(hidden[0], heads[0], hidden[1], heads[1])
    assert (found.js <= math.log(2) * found.tv + 1e-12).all() and (found.js >= 0).all()
    scores = token_scores(hidden[0], heads[0], torch.zeros(500, dtype=torch.long))
    assert torch.allclose(scores.top_logprobs.exp(), (hidden[0] @ heads[0].T).softmax(-1).max(-1).values)


# --- a run against full logits ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of SFT in float64, probed before, between and after; the answers are captions of a few tokens."""
    folder = tmp_path_factory.mktemp("dynamics")
    backbone = Backbone(path="embedded:qwen2_5_vl-tiny", dtype="float64")
    probe = LearningDynamics(
        source=SourceSpec(kind="world", split="val", options=CAPTIONS),
        every=1, limit=5, answer_rule="own", max_new_tokens=4, draw_every=3,
    )  # fmt: skip
    mlflow = MLFlowLogger(
        experiment_name="t", tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=str(folder / "artifacts")
    )
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, logger=mlflow, callbacks=[probe], default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    module = SFT(backbone=backbone, lr=1e-2, micro_batch_tokens=300)
    train = {"world": SourceSpec(kind="world", split="train", options={"size": 100})}
    data = VLMData(backbone=backbone, train=train, batch_size=4, workers=0, eval_batch_size=2)
    trainer.fit(module, data)
    place = folder / "probes" / "probe"
    return SimpleNamespace(
        folder=place, trainer=trainer, module=module, data=data, probe=probe, mlflow=mlflow,
        records=read_lines(place / "records.jsonl"), summary=read_lines(place / "summary.jsonl"),
    )  # fmt: skip


def logits_of(model, row):
    """[tokens, V] log-probabilities before each scored token, by the family's own forward; and the labels."""
    pixels = row.images[0].tensors
    ids = row.input_ids[None]
    kinds = (ids == model.config.image_token_id).int()
    model.model.rope_deltas = None
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **pixels)
    mask = row.loss_mask[1:]
    return out.logits[0, :-1][mask].log_softmax(-1), row.input_ids[1:][mask]


@torch.no_grad()
def test_quantities_against_full_logits(run):
    """Everything a record holds after training, recomputed row by row from whole distributions."""
    now = run.module.policy.model.eval()
    start = load_model(run.module.backbone).eval()
    confidences, correct = [], []
    last = [line for line in run.records if line["step"] == 2]
    assert len(last) == 5
    for line, sample in zip(last, sorted(run.probe.probe.samples, key=lambda s: s.id), strict=True):
        assert line["id"] == sample.id
        for row in run.data.encoder.encode_answers(sample, sample.info["probe"]):
            (log_p, labels), (log_q, _) = logits_of(now, row), logits_of(start, row)
            mean, before = (float(x.gather(1, labels[:, None]).mean()) for x in (log_p, log_q))
            assert line[row.name] == pytest.approx(mean, abs=1e-9) and line[f"{row.name}_tokens"] == len(labels)
            assert line[f"{row.name}_since_start"] == pytest.approx(mean - before, abs=1e-9)
            if row.name != "chosen":
                continue
            p, q = log_p.exp(), log_q.exp()
            m = (p + q) / 2
            kl = [(x * (x / m).log()).sum(-1).mean() for x in (p, q)]
            top, ids = log_p.max(-1)
            expected = {
                "argmax": top.mean(), "entropy": -(p * log_p).sum(-1).mean(), "top1": top.exp().mean(),
                "tv": (p - q).abs().sum(-1).mean() / 2, "js": sum(kl) / 2,
            }  # fmt: skip
            assert {k: line[k] for k in expected} == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-9)
            assert 0 < line["js"] <= math.log(2) * line["tv"]
            confidences += top.exp().tolist()
            correct += (ids == labels).tolist()
    bins = [min(int(c * 15 - 1e-12), 14) for c in confidences]
    gaps = [sum(correct[i] - confidences[i] for i in range(len(bins)) if bins[i] == b) for b in set(bins)]
    assert run.summary[-1]["ece"] == pytest.approx(sum(map(abs, gaps)) / len(bins), abs=1e-9)
    assert run.summary[-1]["tokens"] == len(bins)


@torch.no_grad()
def test_answers_are_greedy_and_confident_as_a_whole(run):
    """The answer by a naive loop of forwards over a growing row; its confidence the product of its probabilities."""
    model, processor = run.module.policy.model.eval(), run.data.processor
    for line in [line for line in run.records if line["step"] == 2][:2]:
        sample = next(s for s in run.probe.probe.samples if s.id == line["id"])
        row, logprob, ids = run.data.encoder.encode_prompt(sample), 0.0, []
        for _ in range(4):
            grown = torch.cat([row.input_ids, torch.tensor([*ids, 0])])
            mask = torch.zeros(len(grown), dtype=torch.bool)
            mask[-1] = True
            logits = logits_of(model, SimpleNamespace(input_ids=grown, loss_mask=mask, images=row.images))[0][0]
            allowed = logits.clone()
            allowed[list(processor.banned_ids)] = -math.inf
            ids.append(int(allowed.argmax()))
            logprob += float(logits[ids[-1]])
            if ids[-1] in processor.eos_ids:
                break
        assert line["output"] == processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert line["confidence"] == pytest.approx(math.exp(logprob), rel=1e-6)
        assert line["score"] == float(line["output"] in sample.info["references"])


def test_the_start_differs_from_itself_by_nothing(run):
    start = [line for line in run.records if line["step"] == 0]
    zero = ("tv", "js", "chosen_since_start", "argmax_since_last", "reward_margin", "vulnerable")
    assert len(start) == 5 and all(line[name] == 0 for line in start for name in zero)
    assert all(line["preference"] == 0.5 for line in start)
    assert [line["step"] for line in run.summary] == [0, 1, 2]
    by_step = [{r["id"]: r["chosen"] for r in run.records if r["step"] == k} for k in (1, 2)]
    for line in (line for line in run.records if line["step"] == 2):
        assert line["chosen_since_last"] == line["chosen"] - by_step[0][line["id"]]


def test_summary_is_logged_as_metrics(run):
    logged = {k: float(v) for k, v in run.trainer.callback_metrics.items() if k.startswith("val/probe/")}
    last = run.summary[-1]
    assert {f"val/probe/{name}" for name in run.probe.probe.metric_names} == logged.keys()
    assert all(
        value == pytest.approx(last[name.removeprefix("val/probe/")], rel=1e-5) for name, value in logged.items()
    )
    low, high = last["intervals"]["chosen"]
    assert low <= last["chosen"] <= high
    assert run.summary[0]["intervals"]["tv"] == [0, 0]  # equal by definition, not by chance
    assert run.summary[0]["intervals"]["vulnerable"][1] > 0  # a share of five
    history = run.mlflow.experiment.get_metric_history(run.mlflow.run_id, "val/probe/chosen")
    assert [entry.step for entry in history] == [0, 1, 2]


def test_pictures_and_artifacts(run):
    names = {"logprobs", "squeezing", "entropy", "top1", "divergence", "calibration", "preference"}
    pictures = sorted((run.folder / "pictures").iterdir())
    assert {p.name for p in pictures} == {f"{name}.png" for name in names}
    assert all(min(Image.open(p).size) > 300 for p in pictures)
    client, base = run.mlflow.experiment, "probes/probe"
    stored = {a.path for a in client.list_artifacts(run.mlflow.run_id, base)}
    assert stored == {f"{base}/{name}" for name in ("records.jsonl", "summary.jsonl", "pictures")}
    assert len(client.list_artifacts(run.mlflow.run_id, f"{base}/pictures")) == len(names)
    assert not [p for p in run.folder.iterdir() if p.name.startswith(".")]


# --- files -----------------------------------------------------------------------------------------------------------


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "records.jsonl"
    keep_lines(path, 3)
    append_lines(path, [{"step": step, "x": 0.1} for step in (0, 2, 2, 4)])
    with path.open("a") as stream:
        stream.write('{"step": 4, "x"')
    assert [line["step"] for line in read_lines(path)] == [0, 2, 2, 4]
    keep_lines(path, 2)
    assert path.read_text() == "".join(json.dumps({"step": s, "x": 0.1}) + "\n" for s in (0, 2, 2))
    with pytest.raises(ValueError):
        append_lines(path, [{"step": 5, "x": math.inf}])
    assert len(read_lines(path)) == 3


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"draw_every": -1}, {"beta": 0.0}, {"tau": -1.0}])
def test_impossible_settings(wrong):
    with pytest.raises(ValueError, match="LearningDynamics"):
        LearningDynamics(source=SourceSpec(kind="world"), **wrong)
