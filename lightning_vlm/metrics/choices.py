"""Which option an output chooses, by its letter or by its text. Pure functions that never guess."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from lightning_vlm.metrics.extract import (
    boxes_and_tags,
    concluded,
    conditional,
    emphasised,
    last_sentence,
    marked_clauses,
    split_reasoning,
    trim,
    withheld,
)
from lightning_vlm.metrics.mathematics import normalise_math
from lightning_vlm.metrics.numbers import numbers_equal, parse_number, plain_latex

_ROUND = r"(?<![\w\\])[(\[] ?(?P<round>[A-Za-z]) ?[)\]]"  # not the argument of f(x)
# "A" and "I" are words unless something shows that they are letters.
_BARE = (
    r"(?-i:\b(?P<bare>[B-HJ-Z](?![\w'’^_]|\s?[=+*/<>^])|[AI](?=$|[\n.):,;/&*_]|\s?\(|\s[-–—:]\s|"
    r"\s(?:because|since|as|is|was|would|must|and|or|which|with|rather|not)\b)))"
)
_LETTER = rf"[*_`]{{0,3}}(?:{_ROUND}|{_BARE})"
_NOUN = r"(?:(?:the\s)?(?:correct\s)?(?:option|choice|answer|letter)s?\s(?:is\s)?)"

_AT_START = re.compile(
    rf"(?:(?:both|either|neither)\s)?{_NOUN}?(?:{_LETTER}|(?-i:(?P<small>[a-z])(?=[.):]?$)))", re.IGNORECASE
)
_NAMED = re.compile(rf"\b(?:option|choice|letter)\s{_LETTER}|{_ROUND.replace('round', 'lone')}", re.IGNORECASE)
_ANOTHER = re.compile(
    r"(?:\s?\([^()]{1,60}\))?[*_`)\s.:]{0,4}(?:[,/&]|\bor\b|\band\b)\s{0,2}"
    rf"(?:(?:or|and|also|maybe|perhaps|possibly|either)\s)?(?:(?:option|choice)\s)?{_LETTER}",
    re.IGNORECASE,
)
_STATEMENTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # "(C) is correct", "(C) Simple is the best answer", "Option B is the right answer"
        rf"{_LETTER}(?:(?<=[)\]])[:,]?\s[^.\n(]{{0,60}}?)?[*_`]{{0,3}},?\s(?:is|would be|must be)\s(?:the\s)?"
        r"(?:only\s|most\s|best\s)?(?:correct|right|best|answer|true|accurate|appropriate)"
        r"(?:\s(?:answer|choice|option|one|statement)\b|(?=[*_`]{0,3}(?:[.,;:!\n]|\Z|\s(?:because|since|as|answer)\b)))",
        # "I choose D", "it matches option (B)", "故选B"
        rf"(?<!not )\b(?:choose|chose|select|selected|pick|picked|go with|opt for)\s{_NOUN}?{_LETTER}",
        rf"\b(?:is|be|matches|corresponds to|gives|means)\s(?:the\s)?(?:option|choice|letter)\s{_LETTER}",
        r"(?:故选|应选|选)(?:择|项)?\s?[:：为]?\s?[(（]?(?P<round>(?-i:[A-Z]))(?P<bare>)",
    )
)
_DENIED = re.compile(r"\b(?:none|neither|no|nor|not)\b[^.\n]*\Z|(?-i:\b[A-Z]|\))(?:[,/]|\sor|\sand)\s\Z", re.IGNORECASE)
_LETTER_LINE = re.compile(rf"[*_`#>\s]*(?:{_ROUND}|(?P<bare>[A-Z]))[.):]?[*_`.\s]*")
_LABELLED_LINE = re.compile(r"[*_`#> \t]{0,6}(?:[(\[](?P<round>[A-Za-z])[)\]]|(?P<bare>[A-Z])[.):])[*_`]{0,3}(?=\s)")
# "… is the Tilapia", "… would decrease"
_ENDING = re.compile(
    r"\b(?:is|are|was|were|be|shows?|would|will)\s(?P<whole>(?:(?:also|likely|most likely|actually|the|a|an)\s){0,3}"
    r"(?P<text>[^,;:()]{1,80}))\Z",
    re.IGNORECASE,
)
_OPENING = re.compile(r"[^,.;:!\n–—]{2,}(?=[,.;:!\n–—])")  # "Yes, …"
_RATIO = re.compile(r"(\d+(?:\.\d+)?) ?: ?(\d+(?:\.\d+)?)")

_MOST_STATEMENTS = 20  # the last ones of an output; one of them decides
_UNDECIDED = ""


@dataclass(frozen=True)
class Choice:
    """The option an output chooses.

    Attributes:
        letter: its capital letter.
        how: what shows it, one of the names in `choose_option`.
    """

    letter: str
    how: str


def choose_option(output: str, choices: Sequence[str] | int) -> Choice | None:
    r"""The one option that the output chooses, or None.

    The first of these that names an option decides:

    1. `alone`: the output is nothing but an option, its letter or its text.
    2. `boxed`, `tag`: the last box, the last answer tag.
    3. `marker`: the last marker ("the answer is …") or statement ("(C) is correct", "I choose D").
    4. `emphasis`: the only option set in bold, where no other number is.
    5. `line`: the first or the last line is a letter or starts with one: `(B) 5 cm`. A list of options has none.
    6. `conclusion`: the last sentence ends in the text of an option ("… is the Tilapia").
    7. `opening`: the output opens with the text of an option as a clause of its own ("Yes, …").
    8. `sentence`: the only letter in parentheses in the last sentence.

    A letter decides over a text: `(B) 5 cm` is B though B may be 7 cm. Not extracted are two different letters at the
    place that decides ("A or B"), a letter that no option has, a text that several options share, and an answer that is
    denied or withheld. The words "A" and "I" are no letters. Texts are compared without regard to case, whitespace,
    typesetting, units and degree signs, and numbers by value. Reasoning closed by `</think>` counts only by its marks
    (2 and 3), and only where the reply has no answer.

    Args:
        output: what the model wrote.
        choices: the texts of the options, or their number where only letters are known.

    Raises:
        ValueError: there are no options, or more than there are letters.
    """
    texts = [] if isinstance(choices, int) else list(choices)
    count = choices if isinstance(choices, int) else len(texts)
    if not 1 <= count <= 26:
        raise ValueError(f"a question has 1 to 26 options, got {count}; grade an open question as a short answer")
    for how, letter in _readings(output, texts, count):
        if letter is not None:
            return Choice(letter, how) if letter else None
    return None


def matching_choices(text: str, choices: Sequence[str]) -> list[int]:
    """Indices of the options that a text equals: to the letter, else as formulas without units, else by value."""
    for key in (_plain_key, _math_key):
        wanted = key(text)
        found = [index for index, choice in enumerate(choices) if wanted and key(choice) == wanted]
        if found:
            return found
    number = _number(text)
    if number is None:
        return []
    values = map(_number, choices)
    return [index for index, value in enumerate(values) if value is not None and numbers_equal(number, value)]


def _readings(output: str, texts: list[str], count: int) -> Iterator[tuple[str, str | None]]:
    """What each place says, in the order in which they decide: a letter, `_UNDECIDED`, or None for nothing."""
    reply, reasoning = split_reasoning(output)
    whole, sentence = trim(reply), trim(last_sentence(reply))
    lone = _LETTER_LINE.fullmatch(whole)
    yield "alone", _in_range(_letter(lone), count) if lone else _by_text(whole, texts)
    yield from _marks(reply, texts, count)
    if len(whole.split()) <= 2:
        yield "alone", _read(whole, texts, count)
    yield "emphasis", _by_emphasis(set(emphasised(reply)), texts, count)
    yield "line", _by_line(whole, count)
    if conclusion := concluded(reply):
        yield "conclusion", _read(conclusion.text, texts, count)
    for ending in _ENDING.finditer(sentence):
        if not conditional(sentence[: ending.end("whole")]):
            yield "conclusion", _by_ending(ending, texts)
    if opening := _OPENING.match(whole[:200]):
        keys = [_plain_key(text) for text in texts]
        yield "opening", _only(_nth(i) for i, key in enumerate(keys) if key == _plain_key(opening.group()))
    yield "sentence", _only(_in_range(_letter(match), count) for match in re.finditer(_ROUND, sentence))
    yield from _marks(reasoning, texts, count)


def _marks(text: str, texts: list[str], count: int) -> Iterator[tuple[str, str | None]]:
    """Readings of the last box, the last tag, and the markers and statements, last first."""
    last = {}
    for mark in boxes_and_tags(text):
        last.setdefault(mark.how, mark.text)
    for how, marked in last.items():
        yield how, _read(marked, texts, count)
    statements = [match for statement in _STATEMENTS for match in statement.finditer(text)]
    places = [(start, clause) for start, _, clause in marked_clauses(text)]
    places += [(match.start(), match) for match in statements]
    for start, said in sorted(places, key=lambda place: -place[0])[:_MOST_STATEMENTS]:
        if isinstance(said, str):
            yield "marker", _read(said, texts, count)
        elif not _DENIED.search(text, max(0, start - 60), start):
            yield "marker", _one_letter(said, text, count)


def _read(clause: str, texts: list[str], count: int) -> str | None:
    """The option that a stated answer names."""
    text = plain_latex(clause).replace("*", "").strip()
    start, by_text = _AT_START.match(text), _by_text(text, texts)
    if start and not (start["small"] and by_text) and (letter := _one_letter(start, text, count)):
        return letter  # a small letter alone may be the variable that an option consists of
    if by_text is not None:
        return by_text
    if start or withheld(text):
        return _UNDECIDED
    return _only(_in_range(_letter(match), count) for match in _NAMED.finditer(text))


def _one_letter(match: re.Match, text: str, count: int) -> str:
    """The letter of a match, unless another one is named beside it or no option has it."""
    another = _ANOTHER.match(text, match.end())
    if another and _in_range(_letter(another), count) and _letter(another) != _letter(match):
        return _UNDECIDED
    return _in_range(_letter(match), count)


def _by_emphasis(pieces: set[str], texts: list[str], count: int) -> str | None:
    """The only option among what is set in bold; None where a number that is no option stands beside it."""
    if len(pieces) > _MOST_STATEMENTS:
        return None
    readings = {piece: _read(piece, texts, count) for piece in pieces}
    others = [piece for piece, letter in readings.items() if not letter and parse_number(piece) is not None]
    return None if others else _only(readings.values())


def _by_line(text: str, count: int) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    ends = lines[:1] + lines[-1:]
    named = {_letter(match) for line in ends if (match := _LETTER_LINE.fullmatch(line))}
    if not named and any(_LABELLED_LINE.match(line) for line in ends):
        named = {_one_letter(match, line, count) for line in lines if (match := _LABELLED_LINE.match(line))}
    if not named:
        return None
    return _in_range(named.pop(), count) if len(named) == 1 else _UNDECIDED


def _by_text(text: str, texts: list[str]) -> str | None:
    found = matching_choices(text, texts) if texts else []
    if not found:
        return None
    return _nth(found[0]) if len(found) == 1 else _UNDECIDED


def _by_ending(ending: re.Match, texts: list[str]) -> str | None:
    """An option whose text ends a sentence, with its article, without it, or before a noun ("the Mucronate leaf")."""
    for text in (ending["whole"], ending["text"], ending["text"].rpartition(" ")[0]):
        if (letter := _by_text(text, texts)) is not None:
            return letter
    return None


def _only(letters: Iterable[str | None]) -> str | None:
    """The one letter that is named; None where there is none or several."""
    named = {letter for letter in letters if letter}
    return named.pop() if len(named) == 1 else None


def _letter(match: re.Match) -> str:
    return next(letter for letter in match.groupdict().values() if letter).upper()


def _nth(index: int) -> str:
    return chr(ord("A") + index)


def _in_range(letter: str, count: int) -> str:
    return letter if letter and ord(letter) - ord("A") < count else _UNDECIDED


def _number(text: str) -> Fraction | None:
    """A number, of options also a ratio: `1:4` is 1/4."""
    return parse_number(_RATIO.sub(r"\1/\2", plain_latex(text)) if len(text) < 100 else text)


def _plain_key(text: str) -> str:
    return "".join(trim(text).casefold().split())


def _math_key(text: str) -> str:
    return "".join(normalise_math(trim(text)).casefold().split()).rstrip(".")
