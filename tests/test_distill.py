"""Distillation: a penalty for each row, judges, rewriting, ablation, lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from lightning_vlm.benchmarks.rules import RULES
from lightning_vlm.data.images import load_image
from lightning_vlm.data.schema import Sample, image, message, text
from lightning_vlm.data.world import WorldSource
from lightning_vlm.distill import Distiller, Model, ModelJudge, RuleJudge
from lightning_vlm.distill.ablation import Ablation, blank
from lightning_vlm.distill.chains import GOLD_WRONG, MODEL_WRONG, NO_CHAIN, NO_REWRITE, NO_RIGHT
from lightning_vlm.distill.judge import read_score, read_verdict
from lightning_vlm.distill.report import THIRDS, length_table, thirds
from lightning_vlm.distill.scorers import Scores
from lightning_vlm.models.collate import collate
from lightning_vlm.rollouts import Completion, PolicyEngine, Sampling


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava"])
def model(request) -> Model:
    return Model(f"embedded:{request.param}-tiny", dtype="float64", device="cpu")


@pytest.fixture(scope="module")
def world() -> list[Sample]:
    return list(WorldSource(size=8, seed=5, direct_fraction=0.0))


# --- a penalty for each row ------------------------------------------------------------------------------------------


def slow(model: Model, sample: Sample, penalty: float, steps: int) -> list[int]:
    """Greedy, the whole sequence through the model at every step, and what was written penalised id by id."""
    row = model.encoder.encode_prompt(sample)
    prompt, written = row.input_ids.tolist(), []
    for _ in range(steps):
        row.input_ids = torch.tensor(prompt + written)
        row.loss_mask = torch.zeros(len(row.input_ids), dtype=torch.bool)
        batch = collate([row], model.policy.family, model.processor.pad_id, side="left")
        with torch.no_grad(), model.policy.inputs(batch) as inputs:
            logits = model.policy.model(**inputs).logits[0, -1]
        for id in set(written):
            logits[id] = logits[id] / penalty if logits[id] > 0 else logits[id] * penalty
        logits[sorted(model.processor.banned_ids)] = -torch.inf
        written.append(int(logits.argmax()))
        if written[-1] in model.processor.eos_ids:
            break
    return written


def test_each_row_has_its_own_penalty(model, world):
    """What one by one with plain forwards gives, of all rows at once, and however they are put together."""
    penalties = [1.0, 1.2, 1.5, 2.0, 0.7, 1.7, 1.0, 3.0]
    sampling = Sampling(max_new_tokens=14)
    found = [group[0].ids for group in model.write(world, sampling=sampling, keys=(0, 0), penalties=penalties)]
    assert found == [slow(model, s, p, 14) for s, p in zip(world, penalties, strict=True)]
    assert len({tuple(ids) for ids in found}) > 4
    plain = [group[0].ids for group in model.write(world, sampling=sampling, keys=(0, 0))]
    assert [found[n] == plain[n] for n in (0, 6)] == [True, True] and found != plain
    engine = PolicyEngine(model.policy, model.processor, batch_size=3)
    rows = [model.encoder.encode_prompt(s) for s in world][::-1]
    again = engine.generate(rows, sampling=sampling, keys=(0, 0), penalties=penalties[::-1])
    assert [group[0].ids for group in again][::-1] == found


def test_drawn_under_penalties(model, world):
    """Log-probs of sampling are those of the penalised distribution; the others are the model's own."""
    sampling = Sampling(max_new_tokens=10, temperature=1.0)
    drawn = model.write(world, sampling=sampling, keys=(3, 1), n=2, penalties=[1.8] * 8)
    free = model.write(world, sampling=sampling, keys=(3, 1), n=2, penalties=[1.0] * 8)
    plain = model.write(world, sampling=sampling, keys=(3, 1), n=2)
    assert [c.ids for g in free for c in g] == [c.ids for g in plain for c in g]
    for group in free:
        for done in group:
            assert done.sampling_logprobs[0] >= done.logprobs[0]  # bans alone
    first = [(g[0].ids[0], g[0].logprobs[0]) for g in drawn]  # nothing is penalised yet
    assert first == [(g[0].ids[0], pytest.approx(g[0].logprobs[0])) for g in plain]
    assert any(abs(c.sampling_logprobs[5] - c.logprobs[5]) > 0.01 for g in drawn for c in g if len(c.ids) > 5)


def test_penalties_that_cannot_be(model, world):
    for penalties, sampling, said in (
        ([1.0], Sampling(), "1 for 2 prompts"),
        ([1.0, 0.0], Sampling(), "must be positive numbers .*, got 0.0"),
        ([1.0, 1.0], Sampling(repetition_penalty=1.2), "repetition_penalty 1.2 has no effect beside penalties"),
    ):
        with pytest.raises(ValueError, match=said):
            model.write(world[:2], sampling=sampling, keys=(0, 0), penalties=penalties)


# --- judges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply, verdict",
    [
        (r"It fits. \boxed{1}", True), (r"\boxed{0}", False), (r"\boxed{yes}", True), ("<answer>wrong</answer>", False),
        ("First: is it 5?\nYes, it is correct.", True), ("That is not correct.", None), ("right or wrong?", None),
        ("", None), (r"\boxed{7}", None), ("No.", False),
    ],
)  # fmt: skip
def test_verdicts_of_a_model(reply, verdict):
    assert read_verdict(reply) is verdict


@pytest.mark.parametrize(
    "reply, score",
    [
        (r"Good. \boxed{4}", 4.0), ("I say 3.5", 3.5), (r"\boxed{6}", None), ("2 of 5", None), ("none", None),
        ("", None), ("Of 5 steps all are right.\nRating: 0", 0.0),
    ],
)  # fmt: skip
def test_scores_of_a_model(reply, score):
    assert read_score(reply) == score


class Talker:
    """In the place of a model: writes what it is told, and remembers what it was asked."""

    path = "talker"

    def __init__(self, *texts: str, finished: bool = True) -> None:
        self.texts, self.finished, self.asked, self.penalties = list(texts), finished, [], []

    def write(self, samples, *, sampling, keys, n=1, penalties=None) -> list[list[Completion]]:
        self.penalties.append((keys, sampling.temperature, n, list(penalties or ())))
        return [[self._completion(self.texts.pop(0)) for _ in range(n)] for _ in samples]

    def answer(self, sample, question, *, sampling, seed) -> str:
        self.asked.append(question)
        return self.texts.pop(0)

    def tokens(self, content: str) -> int:
        return len(content.split()) + 1

    def _completion(self, content: str) -> Completion:
        finished = self.finished and not content.endswith("...")
        return Completion(list(range(self.tokens(content))), content, finished, [], [])


def asks(id: str, answer: str = "5", target: str | None = r"2 + 3 = 5. \boxed{5}") -> Sample:
    turns = [
        message("user", text("What is two plus three?")),
        *([message("assistant", text(target))] if target else []),
    ]
    return Sample(id, turns, answer=answer, info={"family": "bars", "split": "train"})


def scores(value: float = 1.5) -> Scores:
    return Scores({}, {}, 0.5, 0.5, 0.5, value)


RULE = RuleJudge(RULES["world/exact"])
WRONG, RIGHT = r"2 + 3 = 6. \boxed{6}", r"so \boxed{5}"


def distil(model: Talker, *samples: Sample, **how):
    how = {"judge": RULE, "sampling": Sampling()} | how
    found = Distiller(model, **how).chains(samples, [scores(1 + n / 10) for n in range(len(samples))])
    return [chain if isinstance(chain, str) else (chain.text, chain.rewritten, chain.tokens) for chain in found]


GOLD = (r"2 + 3 = 5. \boxed{5}", "gold", 7)


def test_right_chains_stay_and_wrong_ones_are_rewritten():
    model = Talker(RIGHT, WRONG, RIGHT + " ...")  # the third is right, but cut off
    assert distil(model, asks("a"), asks("b"), asks("c")) == [(RIGHT, None, 3), GOLD, GOLD]
    assert model.penalties == [((0, 0), 0.0, 1, [1.0, 1.1, 1.2])]


def test_chains_say_all_that_happened():
    model = Talker(WRONG)
    (chain,) = Distiller(model, judge=RULE, sampling=Sampling()).chains([asks("a")], [scores()])
    assert (chain.own, chain.own_tokens, chain.finished) == (WRONG, 7, True)
    assert (chain.verdict.right, chain.verdict.extraction) == (False, "6")
    assert chain.reward.score == 5 and chain.own_reward.score == 2  # wrong, and 2 + 3 is not 6: 5 − 2 − 1


def test_further_samples_where_the_data_have_no_chain():
    bare = asks("bare", target=r"\boxed{5}")
    model = Talker(WRONG, WRONG, WRONG, WRONG, RIGHT, RIGHT + " again", WRONG)
    found = distil(model, asks("a"), bare, samples=4, sampling=Sampling(temperature=0.7))
    assert found == [GOLD, (RIGHT, "samples", 3)]
    assert model.penalties[1] == ((0, 1), 0.7, 4, [1.1])
    assert distil(Talker(WRONG, WRONG, WRONG), bare, samples=2) == [NO_RIGHT]
    model = Talker(WRONG, WRONG, WRONG)
    assert distil(model, asks("a"), rewrite="samples", samples=2) == [NO_RIGHT]
    assert model.penalties[1][1:3] == (1.0, 2)  # greedy draws would all be the same


def test_what_is_dropped_and_why():
    assert distil(Talker(WRONG), asks("a"), rewrite="none") == [NO_REWRITE]
    assert distil(Talker(WRONG), asks("a", target="5"), rewrite="gold") == [NO_CHAIN]
    assert distil(Talker(WRONG), asks("a", target=None), rewrite="gold") == [NO_CHAIN]
    assert distil(Talker(WRONG), asks("a", answer="7")) == [GOLD_WRONG]


def test_a_model_rewrites():
    teller = Talker(RIGHT, WRONG)
    found = distil(Talker(WRONG, WRONG), asks("a"), asks("b"), rewrite="model", rewriter=teller)
    assert found == [(RIGHT, "model", 3), MODEL_WRONG]
    assert "What is two plus three?" in teller.asked[0] and r"\boxed{5}" in teller.asked[0]


def test_a_model_judges_and_rates():
    judge, rater = Talker("\\boxed{1}", "what?"), Talker("\\boxed{3}", "no idea")
    judge, rater = ModelJudge(judge), ModelJudge(rater)
    model = Talker(WRONG, RIGHT)  # the judge is wrong, and has its way
    distiller = Distiller(model, judge=judge, sampling=Sampling(), rater=rater)
    first, second = distiller.chains([asks("a"), asks("b")], [scores(), scores()])
    assert (first.text, first.reward.score, first.verdict.said) == (WRONG, 3, "\\boxed{1}")
    assert second.verdict.right is None and second.rewritten == "gold" and second.reward.score is None
    assert f"Given answer: {WRONG}" in judge.model.asked[0] and "Right answer: 5" in judge.model.asked[0]


def test_settings_that_cannot_be():
    for how, said in (
        ({"rewrite": "again"}, "rewrite is 'again'"),
        ({"rewrite": "model"}, "needs a rewriter"),
        ({"samples": 0}, "at least 1"),
        ({"shortest": 9, "longest": 3}, "shortest 9 is above longest 3"),
    ):
        with pytest.raises(ValueError, match=said):
            Distiller(Talker(), judge=RULE, sampling=Sampling(), **how)
    with pytest.raises(ValueError, match="scores a set"):
        RuleJudge(RULES["coco/python"])
    with pytest.raises(ValueError, match="no gold answer"):
        distil(Talker(RIGHT), Sample("a", [message("user", text("?"))], info={"family": "bars", "split": "train"}))
    with pytest.raises(ValueError, match="does not fit the data: the samples have no 'family'"):
        distil(Talker(RIGHT), Sample("a", [message("user", text("?"))], answer="5"))


# --- ablation --------------------------------------------------------------------------------------------------------


def test_ablation_is_the_difference_of_log_probs(model, world):
    """Against a forward by hand; a picture that is blank already makes no difference."""
    sample = world[3]
    picture = load_image(sample.images[0])
    scorer, found = Ablation(model), []
    for shown in (picture, blank(picture)):
        row = model.encoder.encode_answer(Sample("x", sample.messages, images=[shown]))[0]
        batch = collate([row], model.policy.family, model.processor.pad_id)
        with torch.no_grad(), model.policy.inputs(batch) as inputs:
            logprobs = model.policy.model(**inputs).logits[0].log_softmax(-1)
        places = row.loss_mask.nonzero()[:, 0]
        found.append(logprobs[places - 1, row.input_ids[places]].mean().item())
    assert scorer(sample, [picture]) == pytest.approx(found[0] - found[1], abs=1e-9) and found[0] != found[1]
    assert scorer(sample, [blank(picture)]) == pytest.approx(0, abs=1e-12)
    assert scorer(sample, []) == 0.0


COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")


def coloured(n: int, *, told: bool) -> Sample:
    """A square of some colour; the question says which, or only the picture does."""
    colour = COLOURS[n % len(COLOURS)]
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste(colour, (8 + n % 7, 8 + n % 5, 48, 48))
    question = f"there is a {colour} square. what is the square?" if told else "what is the square?"
    turns = [message("user", image(), text(question)), message("assistant", text(f"the square is {colour}."))]
    return Sample(f"{n}-{told}", turns, images=[picture], answer=colour)


def test_questions_that_the_text_answers_need_the_picture_less():
    """A tiny model learns colours from pictures and from words; the ablation tells the two kinds apart, each sample."""
    model = Model("embedded:llava-tiny", device="cpu")
    train = [coloured(n, told=False) for n in range(18)] + [coloured(n, told=True) for n in range(6)]
    train += [replace(sample, images=[blank(sample.images[0])]) for sample in train[18:]]  # words alone serve as well
    rows = [model.encoder.encode(sample) for sample in train]
    batch = collate(rows, model.policy.family, model.processor.pad_id)
    params = list(model.policy.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(params, lr=3e-3)
    for _ in range(90):
        loss = -model.policy.score(batch).logprobs.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    scorer = Ablation(model)
    need = {
        told: [scorer(s, s.images) for s in (coloured(n, told=told) for n in range(60, 84))] for told in (False, True)
    }
    assert min(need[False]) > 0.03 > 3 * max(map(abs, need[True])), need


# --- report ----------------------------------------------------------------------------------------------------------


def test_thirds_keep_equals_together():
    assert thirds([1.0, 1.1, 1.2, 1.3, 1.4, 1.5]) == [t for t in THIRDS for _ in range(2)]
    assert thirds([1.5, 1.0, 1.25]) == [THIRDS[2], THIRDS[0], THIRDS[1]]
    assert thirds([1.3] * 4) == [THIRDS[0]] * 4 and thirds([1.0, 1.0, 1.0, 2.0]) == [THIRDS[0]] * 3 + [THIRDS[2]]


def test_length_table_by_hand():
    def record(p: float, family: str, own: int, tokens: int, rewritten: str | None) -> dict:
        return {"penalty": p, "family": family, "own_tokens": own, "tokens": tokens, "rewritten": rewritten}

    table = length_table(
        [record(1.1, "a", 10, 10, None), record(1.1, "b", 30, 20, "gold"), record(1.9, "a", 4, 4, None)]
    )
    assert table[THIRDS[0], "all"] == (2, 1.1, 20, 20, 15, 0.5) and table[THIRDS[0], "b"] == (1, 1.1, 30, 30, 20, 0)
    assert table[THIRDS[2], "all"] == (1, 1.9, 4, 4, 4, 1) and (THIRDS[1], "all") not in table
