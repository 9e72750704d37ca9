"""The embedded world as a source of samples: endless, deterministic, with exact gold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random

from lightning_vlm.data.schema import Sample, image, message, text
from lightning_vlm.data.world.captions import minimal_edit
from lightning_vlm.data.world.families import FAMILIES, Question
from lightning_vlm.data.world.scene import GRID, Scene, masks, patch_labels, picture
from lightning_vlm.models.embedded import COLOURS

SPLITS: dict[str, tuple[str, ...]] = {
    "train": tuple(FAMILIES),
    "val": tuple(FAMILIES),
    "test": tuple(FAMILIES),
    "ood_pairs": ("caption", "count"),
    "ood_numbers": ("angle", "perimeter"),
    "ood_two_attributes": ("count",),
}
"""Split → the families it has. The `ood_` splits show what the others never do."""


class WorldSource(Sequence[Sample]):
    r"""Samples of the embedded world; sample k is a pure function of (seed, split, k) and the settings.

    Image k // `questions_per_image` belongs to family number (image modulo number of families), so that every batch
    read in order is balanced and the questions about one image stand side by side. Answers are in `\boxed{}`, at the
    end of a chain that says what was read off the picture and calculates, or alone (`direct`). The prompt does not say
    which is wanted: the model itself chooses, and reinforcement learning may teach it when reasoning pays.

    `Sample.answer` is the gold answer (None for captions). `Sample.info` has `family`, `split`, `question` (kind within
    the family), `kind` (`chain`, `direct` or `caption`), `image` (number of the image), `patch_labels` ([16, 5] uint8,
    see `scene.patch_labels`), `masks` (callable → class names, [objects, 64, 64] bool), for captions `references` (the
    five true captions; a caption is exactly right if it is one of them), and with `pairs` `edit`, what was made wrong.

    Args:
        split: one of `SPLITS`; no two splits share a random stream.
        size: number of samples.
        seed: seed of everything drawn.
        families: families to draw from; None takes all that the split has.
        direct_fraction: share of questions answered directly; 0 gives chains only.
        chains_first: the first so many samples are chains whatever `direct_fraction` says (a curriculum, where the
            source is read in order).
        questions_per_image: 1 or 2 samples in a row about each image.
        pairs: fill `Sample.rejected`: a caption with one word made false, or the answer derived from a misreading.
        text_only: say in words what the picture shows, before the question, instead of showing it.
        easy_pairs: share of the pairs whose rejected answer is that of another picture instead, which is easy to tell.

    Raises:
        ValueError: an unknown split or family, a family the split lacks, or a number out of range.
    """

    def __init__(
        self,
        *,
        split: str = "train",
        size: int = 10_000,
        seed: int = 0,
        families: Sequence[str] | None = None,
        direct_fraction: float = 0.3,
        chains_first: int = 0,
        questions_per_image: int = 2,
        pairs: bool = False,
        easy_pairs: float = 0.0,
        text_only: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"the world has no split {split!r}; choose one of {', '.join(SPLITS)}")
        self.families = SPLITS[split] if families is None else tuple(families)
        for family in self.families:
            if family not in SPLITS[split]:
                raise ValueError(f"split {split!r} has no family {family!r}; choose among {', '.join(SPLITS[split])}")
        if not self.families:
            raise ValueError("the world needs at least one family; leave `families` out for all of them")
        if size < 1:
            raise ValueError(f"size is {size}; it must be at least 1")
        if not 0 <= direct_fraction <= 1:
            raise ValueError(f"direct_fraction is {direct_fraction}; it must lie between 0 and 1")
        if not 0 <= easy_pairs <= 1 or (easy_pairs and not pairs):
            raise ValueError(f"easy_pairs is {easy_pairs}; it must lie between 0 and 1, and needs pairs: true")
        if chains_first < 0:
            raise ValueError(f"chains_first is {chains_first}; it must be at least 0")
        if questions_per_image not in (1, 2):
            raise ValueError(f"questions_per_image is {questions_per_image}; choose 1 or 2")
        self.split, self.size, self.seed = split, size, seed
        self.direct_fraction, self.chains_first = direct_fraction, chains_first
        self.questions_per_image, self.pairs, self.easy_pairs = questions_per_image, pairs, easy_pairs
        self.text_only = text_only

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        index = range(self.size)[index]  # negative indices, IndexError
        number, which = divmod(index, self.questions_per_image)
        family = self.families[number % len(self.families)]
        key = f"world/{self.split}/{self.seed}/{number}"
        scene, questions = FAMILIES[family](Random(f"{key}/{family}"), self.split, self.questions_per_image)
        # The style of an answer has its own stream, so that settings about it leave the pictures as they are.
        return self._sample(index, number, family, scene, questions[which], Random(f"{key}/{which}/style"))

    def _sample(self, index: int, number: int, family: str, scene: Scene, question: Question, style: Random) -> Sample:
        info = {
            "family": family,
            "split": self.split,
            "question": question.kind,
            "image": number,
            "patch_labels": patch_labels(scene),
            "masks": partial(masks, scene),
        }
        direct = style.random() < self.direct_fraction and index >= self.chains_first
        rejected = gold = None
        if family == "caption":
            info.update(kind="caption", references=list(question.values))
            target = question.values[0]
            if self.pairs:
                rejected, info["edit"] = minimal_edit(target, scene.figures, style)
        else:
            info["kind"] = "direct" if direct else "chain"
            steps, answer = question.solve(question.values)
            gold, target = str(answer), _answer(steps, answer, direct)
            if self.pairs:
                rejected, info["edit"] = _wrong_answer(question, answer, direct, style), "misreading"
        if rejected is not None and style.random() < self.easy_pairs:
            rejected, info["edit"] = self._of_another(family, target, question, direct, style), "another picture"
        shown = [image(), text(question.text)]
        if self.text_only:
            shown = [text(f"{_in_words(scene)} {question.text}")]
        return Sample(
            id=f"world-{self.split}-{self.seed}-{index}",
            messages=[message("user", *shown), message("assistant", text(target))],
            images=[] if self.text_only else [partial(picture, scene)],
            rejected=rejected,
            answer=gold,
            source="world",
            info=info,
        )

    def _of_another(self, family: str, target: str, question: Question, direct: bool, style: Random) -> str:
        """The answer to a question about another picture, where it is not right about this one, too."""
        while True:
            (other, *_) = FAMILIES[family](style, self.split, 1)[1]
            text = other.values[0] if family == "caption" else _answer(*other.solve(other.values), direct)
            right = (
                text in question.values if family == "caption" else text.rpartition("{")[2] == target.rpartition("{")[2]
            )
            if not right:
                return text


def _in_words(scene: Scene) -> str:
    """All that a scene shows, in its order, in the closed vocabulary of the embedded models.

    Figures and labels have row and column, `red circle at 0: 2, blue square at 3: 1.`, `a triangle with 40 at 0: 1, x
    at 3: 0, 65 at 3: 3.`; bars have column and value, `red bar at 1 = 7, blue bar at 2 = 10.`.
    """
    things = [f"{f.name} at {_place(f.cell)}" for f in scene.figures]
    things += [f"{COLOURS[bar.colour]} bar at {bar.column} = {bar.value}" for bar in scene.bars]
    things += [f"{label.text} at {_place(label.cell)}" for label in scene.labels]
    outline = "a triangle with " if scene.triangle is not None else ""
    return f"{outline}{', '.join(things)}."


def _place(cell: int) -> str:
    """Row and column of a cell: `3: 1`."""
    return f"{cell // GRID}: {cell % GRID}"


def _answer(steps: str, answer: int, direct: bool) -> str:
    return rf"\boxed{{{answer}}}" if direct else rf"{steps}. \boxed{{{answer}}}"


def _wrong_answer(question: Question, answer: int, direct: bool, rng: Random) -> str:
    """The right derivation of a misreading that changes the answer."""
    while True:
        steps, wrong = question.solve(question.misread(rng, question.values))
        if wrong != answer:
            return _answer(steps, wrong, direct)
