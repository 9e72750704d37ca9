"""Chains of a model's own, each under its sample's repetition penalty; judged, and rewritten where they are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_vlm.data.schema import Sample
from lightning_vlm.distill.judge import REWRITE, Judge, ModelJudge, RuleJudge, Verdict, gold_text
from lightning_vlm.distill.model import Model
from lightning_vlm.distill.questions import question_text
from lightning_vlm.distill.reward import Reward, chain_of, score_answer
from lightning_vlm.distill.scorers import Scores
from lightning_vlm.rollouts import Completion, Sampling

Rewrite = Literal["auto", "gold", "samples", "model", "none"]
NO_CHAIN, GOLD_WRONG = "gold text has no chain", "gold text that the rule calls wrong"
NO_RIGHT, MODEL_WRONG, NO_REWRITE = "no right one among further samples", "rewritten wrongly", "wrong, not rewritten"
_RETRY_STEP = 1  # the second half of the keys that draws are named by; first chains have 0
_Text = tuple[str, int, str | None]  # what is to be learned, its tokens, where it comes from
_Found = _Text | str  # or why there is none


@dataclass(frozen=True)
class Chain:
    """What became of a sample.

    Attributes:
        text: what is to be learned. tokens: its length, with the end of turn.
        own: what the model wrote first. own_tokens: its length. finished: whether it ended by itself.
        verdict: of the model's own text.
        rewritten: where `text` comes from if it is not the model's first: `gold`, `samples` or `model`; else None.
        reward: 0 to 5 of `text`; its `score` is None where a judge model gave no number.
        own_reward: of `own`, by the rules, whatever became of it.
    """

    text: str
    tokens: int
    own: str
    own_tokens: int
    finished: bool
    verdict: Verdict
    rewritten: str | None
    reward: Reward
    own_reward: Reward


class Distiller:
    """Writes, judges and rewrites the chains of some samples at a time.

    Args:
        model: writes its own chains.
        judge: says which are right; what was cut off is not, whatever it says.
        rewrite: of wrong ones: `gold` takes the data's own text if it has a chain that the judge's rule calls right;
            `samples` draws up to `samples` more and takes the first right one; `auto` is gold where there is such a
            text, else samples; `model` asks `rewriter`, which is shown question and gold; `none` drops them.
        sampling: of the model's chains. samples: further ones.
        rewriter: for `model`. rater: gives the reward score in place of the rules.
        seed: of all draws. shortest, longest: the length range of the reward score, tokens.

    Raises:
        ValueError: an unknown `rewrite`, or one without what it needs.
    """

    def __init__(
        self,
        model: Model,
        *,
        judge: Judge,
        sampling: Sampling,
        rewrite: Rewrite = "auto",
        samples: int = 4,
        rewriter: Model | None = None,
        rater: ModelJudge | None = None,
        seed: int = 0,
        shortest: int = 1,
        longest: int | None = None,
    ) -> None:
        if rewrite not in ("auto", "gold", "samples", "model", "none"):
            raise ValueError(f"rewrite is {rewrite!r}: choose auto, gold, samples, none, or a model directory")
        if (rewrite == "model") != (rewriter is not None):
            raise ValueError("rewrite: model needs a rewriter, and nothing else does")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if longest is not None and not shortest <= longest:
            raise ValueError(f"shortest {shortest} is above longest {longest}: lower shortest")
        self.model, self.judge, self.rewriter, self.rater = model, judge, rewriter, rater
        self.rewrite, self.samples, self.seed = rewrite, samples, seed
        self.sampling = sampling
        # Greedy draws are all one and the same.
        self.retry = replace(sampling, temperature=1.0) if sampling.greedy else sampling
        self.shortest, self.longest = shortest, longest

    def chains(self, samples: Sequence[Sample], scores: Sequence[Scores]) -> list[Chain | str]:
        """What becomes of each sample: its chain, or why it is dropped.

        Args:
            samples: with their gold. scores: of each, for its penalty.

        Raises:
            BadSample: a prompt that cannot be encoded. ValueError: one that cannot be judged.
        """
        penalties = [score.penalty for score in scores]
        written = self.model.write(samples, sampling=self.sampling, keys=(self.seed, 0), penalties=penalties)
        own = [drawn[0] for drawn in written]
        verdicts = self.judge.verdicts([(done.text, sample) for done, sample in zip(own, samples, strict=True)])
        found: list[_Found] = [(done.text, len(done.ids), None) for done in own]
        wrong = [place for place, pair in enumerate(zip(own, verdicts, strict=True)) if not _kept(*pair)]
        again = self._rewritten([samples[place] for place in wrong], [penalties[place] for place in wrong])
        for place, text in zip(wrong, again, strict=True):
            found[place] = text
        rewards = iter(self._rewards([(s, f) for s, f in zip(samples, found, strict=True) if not isinstance(f, str)]))
        return [
            text if isinstance(text, str) else self._chain(sample, text, done, verdict, next(rewards))
            for sample, text, done, verdict in zip(samples, found, own, verdicts, strict=True)
        ]

    def _chain(self, sample: Sample, found: _Text, done: Completion, verdict: Verdict, reward: Reward) -> Chain:
        text, tokens, rewritten = found
        right = bool(verdict.right)
        own = self._by_rules(done.text, sample, len(done.ids), right=right, finished=done.finished)
        return Chain(text, tokens, done.text, len(done.ids), done.finished, verdict, rewritten, reward, own)

    def _by_rules(self, text: str, sample: Sample, tokens: int, *, right: bool, finished: bool) -> Reward:
        span = {"shortest": self.shortest, "longest": self.longest}
        return score_answer(text, sample, right=right, tokens=tokens, finished=finished, **span)

    def _rewards(self, kept: list[tuple[Sample, _Text]]) -> list[Reward]:
        """Scores of what is kept, all of which is right and whole."""
        if self.rater is None:
            return [self._by_rules(text, s, tokens, right=True, finished=True) for s, (text, tokens, _) in kept]
        rated = self.rater.scores([(text, sample) for sample, (text, _, _) in kept])
        return [Reward(score, {}) for score in rated]

    def _rewritten(self, samples: list[Sample], penalties: list[float]) -> list[_Found]:
        """Another text for each of some samples."""
        if self.rewrite == "none" or not samples:
            return [NO_REWRITE] * len(samples)
        if self.rewrite == "model":
            return self._by_model(samples)
        found: list[_Found] = [NO_CHAIN] * len(samples)
        gold = [] if self.rewrite == "samples" else [n for n, sample in enumerate(samples) if _has_chain(sample)]
        for n, text in zip(gold, self._gold([samples[n] for n in gold]), strict=True):
            found[n] = text
        rest = [] if self.rewrite == "gold" else [n for n in range(len(samples)) if n not in set(gold)]
        again = self._by_sampling([samples[n] for n in rest], [penalties[n] for n in rest])
        for n, text in zip(rest, again, strict=True):
            found[n] = text
        return found

    def _gold(self, samples: list[Sample]) -> list[_Found]:
        texts = [sample.chosen() for sample in samples]
        right = [True] * len(samples)
        if isinstance(self.judge, RuleJudge):  # a rule that calls the gold text wrong does not fit the data
            right = [bool(v.right) for v in self.judge.verdicts(list(zip(texts, samples, strict=True)))]
        return [(t, self.model.tokens(t), "gold") if ok else GOLD_WRONG for t, ok in zip(texts, right, strict=True)]

    def _by_sampling(self, samples: list[Sample], penalties: list[float]) -> list[_Found]:
        if not samples:
            return []
        keys = (self.seed, _RETRY_STEP)
        drawn = self.model.write(samples, sampling=self.retry, keys=keys, n=self.samples, penalties=penalties)
        asked = [(done.text, sample) for sample, group in zip(samples, drawn, strict=True) for done in group]
        verdicts = iter(self.judge.verdicts(asked))
        found: list[_Found] = []
        for group in drawn:
            right = [done for done, verdict in [(done, next(verdicts)) for done in group] if _kept(done, verdict)]
            found.append((right[0].text, len(right[0].ids), "samples") if right else NO_RIGHT)
        return found

    def _by_model(self, samples: list[Sample]) -> list[_Found]:
        sampling = Sampling(max_new_tokens=self.sampling.max_new_tokens)
        texts = []
        for sample in samples:
            asked = REWRITE.format(question=question_text(sample), gold=gold_text(sample))
            texts.append(self.rewriter.answer(sample, asked, sampling=sampling, seed=self.seed).strip())
        verdicts = self.judge.verdicts(list(zip(texts, samples, strict=True)))
        return [
            (text, self.model.tokens(text), "model") if verdict.right and text else MODEL_WRONG
            for text, verdict in zip(texts, verdicts, strict=True)
        ]


def _has_chain(sample: Sample) -> bool:
    text = sample.chosen()
    return bool((text or "").strip()) and bool(chain_of(text, sample.answer))


def _kept(done: Completion, verdict: Verdict) -> bool:
    """Right and whole: one that was cut off must not be learned, whatever stands in it."""
    return bool(verdict.right) and done.finished and bool(done.text.strip())
