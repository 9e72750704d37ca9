"""What is scored: checked, so that nothing is dropped or mixed up in silence, and tokenised in one go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from lightning_vlm.metrics.captions.java import ptb_tokenize
from lightning_vlm.metrics.captions.text import clean_caption, python_tokenize

Tokenizer = Literal["ptb", "python"]

_TOKENIZERS: dict[str, Callable[[Sequence[str]], list[str]]] = {"ptb": ptb_tokenize, "python": python_tokenize}


def tokenize(texts: Sequence[str], tokenizer: str) -> list[str]:
    """Texts by the tokenizer of that name.

    Raises:
        ValueError: no such tokenizer, a text that is no string, or Java is needed and there is none.
    """
    if tokenizer not in _TOKENIZERS:
        raise ValueError(f"unknown tokenizer {tokenizer!r}: ptb (needs Java) or python")
    if bad := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"{len(bad)} captions are no strings, the first is {bad[0]!r}: give text")
    return _TOKENIZERS[tokenizer](texts)


def tokenize_groups(groups: Sequence[Sequence[str]], tokenizer: str) -> list[list[str]]:
    """Groups of texts (the references of each image) by one call of the tokenizer."""
    words = iter(tokenize([text for group in groups for text in group], tokenizer))
    return [[next(words) for _ in group] for group in groups]


def check_predictions(predictions: Mapping[str, str], *, allow_empty: bool) -> int:
    """Counts the empty ones.

    Raises:
        ValueError: there are none, one is no string, or one is empty and that is not allowed.
    """
    if not predictions:
        raise ValueError("no predictions to score: give at least one caption by image id")
    if bad := {id: text for id, text in predictions.items() if not isinstance(text, str)}:
        first = next(iter(bad.values()))
        raise ValueError(
            f"{_images(bad)}: the prediction is no string but {first!r} (the first); give one caption each"
        )
    empty = [id for id, text in predictions.items() if not clean_caption(text)]
    if empty and not allow_empty:
        raise ValueError(
            f"{_images(empty)}: the prediction is empty; allow_empty=True scores it as a caption of no words"
        )
    return len(empty)


def check_references(references: Mapping[str, Sequence[str]]) -> None:
    """Every image has captions, and every caption has text.

    Raises:
        ValueError: there are no images, one has no list of references or an empty one, or a reference is empty or no
            string.
    """
    if not references:
        raise ValueError("no references: give the captions of at least one image by its id")
    if bad := [id for id, group in references.items() if not is_group(group)]:
        raise ValueError(f"{_images(bad)}: expected a non-empty list of reference captions, got {references[bad[0]]!r}")
    blank = [id for id, g in references.items() if not all(isinstance(t, str) and clean_caption(t) for t in g)]
    if blank:
        raise ValueError(f"{_images(blank)}: a reference is empty or no string; mend it or leave it out")


def check_same_images(predicted: Collection[str], referenced: Collection[str]) -> None:
    """Both sides know the same images.

    Raises:
        ValueError: they do not; both differences are counted.
    """
    extra = [id for id in predicted if id not in referenced]
    missing = [id for id in referenced if id not in predicted]
    if extra or missing:
        sides = [f"predictions without references: {id_list(extra)}"] if extra else []
        sides += [f"references without a prediction: {id_list(missing)}"] if missing else []
        raise ValueError(f"{'; '.join(sides)}. Score the same images on both sides: CIDEr depends on the set")


def is_group(value: Any) -> bool:
    """Whether this is a non-empty list of things, rather than one text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > 0


def id_list(ids: Sequence[Any]) -> str:
    """The count and the first few: `7 ('a', 'b', 'c', …)`."""
    return f"{len(ids)} ({', '.join(repr(id) for id in ids[:3])}{', …' if len(ids) > 3 else ''})"


def _images(ids: Collection[str]) -> str:
    return f"images {id_list(list(ids))}"
