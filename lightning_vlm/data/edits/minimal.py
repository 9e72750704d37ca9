"""Minimal edits of English captions: one attribute, count, relation or object is made wrong, all else stays.

Such captions serve as rejected answers in preference data. The rules and word lists are ours; they stand in for the
edits that CW-DPO's paper has GPT-4o write. An edit is meant to be false of the picture, judged by text alone: nothing
is swapped in that the caption or any other caption of the image mentions, nor by a near synonym. Where grammar is in
doubt, a place is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from lightning_vlm.data.edits import grammar, modifiers, things
from lightning_vlm.data.sources.spec import one_of

KINDS = ("attribute", "count", "relation", "object")
_TOKEN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+(?:[:.,]\d+)*(?:st|nd|rd|th)?|[^\w\s]")
_A = re.compile(r"\b(an?)(\s+)$", re.IGNORECASE)
_CONSONANT = re.compile(r"(?:uni|use|usu|uti|eu|one\b|once)", re.IGNORECASE)  # vowel letters that sound otherwise
_SILENT = re.compile(r"(?:hour|honest|heir)", re.IGNORECASE)
_LOOK_BACK = 4  # words between a noun and its article


@dataclass(frozen=True, slots=True)
class Edit:
    """A caption with one thing made wrong.

    Attributes:
        text: the edited caption. kind: one of `KINDS`.
        before, after: what was exchanged for what, as it stands in the captions (without the article, which follows).
    """

    text: str
    kind: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class _Place:
    """Characters `start` to `end` of the caption, and what may stand there instead."""

    start: int
    end: int
    choices: tuple[str, ...]


def _normal(text: str) -> str:
    return " ".join(_TOKEN.findall(text.lower()))


class _Caption:
    """A caption in tokens, with what is known about its image.

    Args:
        text: the caption. others: other captions of the image.
    """

    def __init__(self, text: str, others: Sequence[str]) -> None:
        self.text = text
        matches = list(_TOKEN.finditer(text))
        self.spans = [m.span() for m in matches]
        self.tokens = [m[0].lower() for m in matches]
        self.known = "".join(f" {_normal(t)} " for t in (text, *others))

    def at(self, index: int) -> str:
        """The token at `index`; "" beyond the ends."""
        return self.tokens[index] if 0 <= index < len(self.tokens) else ""

    def words(self, first: int, end: int) -> str:
        """The text from token `first` up to token `end`."""
        return self.text[self.spans[first][0] : self.spans[end - 1][1]] if first < end else ""

    def knows(self, *phrases: str) -> bool:
        """Whether one of them occurs in any caption of the image."""
        return any(f" {phrase} " in self.known for phrase in phrases)

    def place(self, first: int, last: int, choices: Sequence[str]) -> _Place:
        """Tokens `first` to `last`, and what may stand there."""
        return _Place(self.spans[first][0], self.spans[last][1], tuple(choices))


def minimal_edit(caption: str, rng: Random, *, kinds: Sequence[str] = KINDS, others: Sequence[str] = ()) -> Edit | None:
    """Make one thing of a caption wrong.

    The kind is drawn evenly among those that the caption allows, then the place, then what stands there instead.
    Articles and capitals follow.

    Args:
        caption: a true caption.
        rng: of all draws; the same state gives the same edit.
        kinds: what may be changed: `attribute` (colour, size, material, age, pattern, state), `count`, `relation`
            (left and right, above and below, inside and outside, near and far, …), `object` (the thing itself, a
            person's sex, or where it is).
        others: other captions of the same image: neither the edit nor what it swaps in is among them.

    Returns:
        The edit, or None if nothing can be edited.

    Raises:
        ValueError: no kind, or an unknown one.
    """
    check_kinds(kinds)
    read = _Caption(caption, others)
    taken = {_normal(text).rstrip(" .") for text in (caption, *others)}
    found = {kind: [p for p in _PLACES[kind](read) if p.choices] for kind in KINDS if kind in kinds}
    while found := {kind: places for kind, places in found.items() if places}:
        kind = rng.choice(list(found))
        place = found[kind].pop(rng.randrange(len(found[kind])))
        edit = _edited(caption, place, rng.choice(place.choices), kind)
        if _normal(edit.text).rstrip(" .") not in taken:
            return edit
    return None


def check_kinds(kinds: Sequence[str]) -> None:
    """Refuse kinds that there are not.

    Raises:
        ValueError: no kind, or an unknown one.
    """
    if not kinds:
        raise ValueError(f"no kind of edit is given; choose among {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of edit {kind!r}{one_of(str(kind), KINDS)}")


def _edited(caption: str, place: _Place, new: str, kind: str) -> Edit:
    old, head, tail = caption[place.start : place.end], caption[: place.start], caption[place.end :]
    acronym = old.isupper() and 1 < len(old) < 4 and not caption.isupper()  # TV
    if old.isupper() and len(old) > 1 and not acronym:
        new = new.upper()
    elif old[0].isupper() and not (acronym and head.strip()):
        new = new[0].upper() + new[1:]
    if article := _A.search(head):
        right = "an" if _vowel(new) else "a"
        right = right.capitalize() if article[1][0].isupper() else right
        head = head[: article.start()] + right + article[2]
    return Edit(head + new + tail, kind, old, new)


def _vowel(word: str) -> bool:
    """Whether `an` stands before a word."""
    return bool(_SILENT.match(word)) or (word[:1].lower() in tuple("aeiou") and not _CONSONANT.match(word))


# --- attributes -------------------------------------------------------------------------------------------------------


def _attributes(caption: _Caption) -> Iterator[_Place]:
    for i, token in enumerate(caption.tokens):
        if token in modifiers.COLOURS:
            yield from _colours(caption, i)
        following = caption.at(i + 1)
        for rule in modifiers.ADJECTIVES.get(token, ()):
            if rule.unlike & {following} or (rule.before and not rule.before & {following, *_nouns_after(caption, i)}):
                continue
            attributive = following.isalpha() and following not in grammar.FUNCTION and not following.endswith("ing")
            predicative = caption.at(i - 1) in grammar.LINKING and not rule.before
            mentions = [word for new in rule.new for word in (new, *modifiers.SIGNS.get(new, ()))]
            if (attributive or predicative) and not caption.knows(*mentions):
                yield caption.place(i, i, rule.new)
                break
    for pattern, new in modifiers.PHRASES:
        for match in pattern.finditer(caption.text):
            if not caption.knows(*new):
                yield _Place(*match.span("x"), new)


def _nouns_after(caption: _Caption, index: int) -> list[str]:
    """The words after a modifier up to the next function word, at most three."""
    found = []
    for token in caption.tokens[index + 1 : index + 4]:
        if token in grammar.FUNCTION or not token[0].isalpha():
            break
        found.append(token)
    return found


def _colours(caption: _Caption, i: int) -> Iterator[_Place]:
    """A colour before a noun, or after a form of be; what has few colours (hair, grass, animals) takes one of these."""
    colour, before, after = caption.at(i), caption.at(i - 1), caption.at(i + 1)
    joined = after in ("and", ",") and caption.at(i + 2) in modifiers.COLOURS
    attributive = after.isalpha() and after not in grammar.FUNCTION | grammar.VERBS and after not in modifiers.COLOURS
    if not (joined or attributive or (before in grammar.LINKING and colour != "orange")):
        return
    nouns = _nouns_after(caption, i + 2 if joined else i)
    if modifiers.NOT_COLOURED & {before, *nouns[:1]} or modifiers.PERSONS & set(nouns):
        return
    if before in grammar.LINKING and caption.knows("light", "lights", "signal"):
        return
    allowed = next(
        (modifiers.COLOURS_OF[noun] for noun in reversed(nouns) if noun in modifiers.COLOURS_OF), modifiers.NEW_COLOURS
    )
    known = {c for c in modifiers.COLOURS if caption.knows(c)}
    near = {n for c in known for n in modifiers.COLOURS[c]}
    yield caption.place(i, i, [new for new in allowed if new not in known | near])


# --- counts -----------------------------------------------------------------------------------------------------------


def _counts(caption: _Caption) -> Iterator[_Place]:
    for i, token in enumerate(caption.tokens):
        following = caption.at(i + 1)
        if token in grammar.NUMBERS[1:] and following.isalpha() and following not in grammar.NO_COUNT:
            yield caption.place(i, i, _number_words(caption, _near_numbers(grammar.NUMBERS.index(token) + 1)))
        elif token.isdecimal() and 1 < int(token) < 100 and _is_plural(following):
            numbers = [k for k in _near_numbers(int(token)) if not caption.knows(str(k), *grammar.NUMBERS[k - 1 : k])]
            yield caption.place(i, i, [str(k) for k in numbers])
        elif token in ("a", "an", "one"):
            yield from _of_many(caption, i)
            yield from _one(caption, i)
        elif token == "several" and _is_plural(following) and not caption.knows(*grammar.PAIRS):
            yield caption.place(i, i, ["two"])


def _near_numbers(n: int) -> list[int]:
    """Numbers above 1 that differ from `n` by one or two."""
    return [k for k in range(max(2, n - 2), n + 3) if k != n]


def _number_words(caption: _Caption, numbers: Sequence[int]) -> list[str]:
    """The words for those numbers that no caption of the image has, in letters or digits; `couple` says two."""
    known = {2} if caption.knows(*grammar.PAIRS) else set()
    words = [grammar.NUMBERS[k - 1] for k in numbers if k not in known and k <= len(grammar.NUMBERS)]
    return [word for word in words if not caption.knows(word, str(grammar.NUMBERS.index(word) + 1))]


def _is_plural(token: str) -> bool:
    return token.isalpha() and (token in things.PLURALS or (token.endswith("s") and not token.endswith("ss")))


def _of_many(caption: _Caption, i: int) -> Iterator[_Place]:
    """`a couple of dogs` → `four dogs`, `a group of dogs` → `two dogs`, unless a verb may belong to the group."""
    which, noun = caption.at(i + 1), caption.at(i + 3)
    if caption.at(i) != "a" or caption.at(i + 2) != "of" or not _is_plural(noun):
        return
    if which == "couple" or (which == "pair" and noun in things.PLURALS and noun not in grammar.NO_PAIR):
        new = _number_words(caption, (3, 4, 5))
    elif which in grammar.GROUPS and not caption.knows(*grammar.PAIRS):
        new = ["two"]
    else:
        return
    if not grammar.SINGULAR_VERBS & set(caption.tokens[i + 4 :]):
        yield caption.place(i, i + 2, new)


def _one(caption: _Caption, i: int) -> Iterator[_Place]:
    """`a dog` → `two dogs`, and `a dog is` → `two dogs are`, where nothing else has to agree."""
    first = next((k for k in range(i + 1, i + 4) if things.match(caption.tokens, k)), None)
    between = caption.tokens[i + 1 : first]
    if first is None or not all(word.isalpha() and word not in grammar.FUNCTION for word in between):
        return
    noun = things.match(caption.tokens, first)
    end = first + noun.length
    if (
        noun.number != "one"
        or noun.place
        or caption.at(first - 1) in things.COMPOUNDS
        or not _ends_noun(caption, end, "one")
    ):
        return
    after, rest, verb = caption.at(end), set(caption.tokens[end:]), ""
    if i == 0:  # the subject
        if verb := grammar.AGREE.get(after, ""):
            rest = set(caption.tokens[end + 1 :])
        agrees = not rest & grammar.SINGULAR_VERBS
    else:
        agrees = caption.at(i - 1) in grammar.BEFORE_OBJECT and (after in grammar.AFTER_OBJECT or after in ("", "."))
    if after in ("and", ",", "&") and caption.at(end + 1) not in grammar.DETERMINERS:
        agrees = False  # in "a cup and spoon" both share the article
    plurals = [form.plural for form in noun.concept.forms]
    if not agrees or rest & grammar.PRONOUNS or caption.knows(*plurals, *grammar.MANY):
        return
    things_named = caption.words(first, end)
    short = things_named.isupper() and len(things_named) < 4  # TV
    plural = f"{things_named}s" if short else noun.form.plural
    phrase = " ".join(word for word in (caption.words(i + 1, first), plural, verb) if word)
    numbers = _number_words(caption, (2, 3, 4))
    yield caption.place(i, end if verb else end - 1, [f"{number} {phrase}" for number in numbers])


# --- relations --------------------------------------------------------------------------------------------------------


def _relations(caption: _Caption) -> Iterator[_Place]:
    taken: list[tuple[int, int]] = []
    for pattern, new in modifiers.RELATIONS:
        for match in pattern.finditer(caption.text):
            start, end = match.span("x")
            if any(start < b and a < end for a, b in taken):
                continue
            taken.append((start, end))
            yield _Place(start, end, tuple(n for n in new if not caption.knows(n)))


# --- objects ----------------------------------------------------------------------------------------------------------


def _objects(caption: _Caption) -> Iterator[_Place]:
    i = 0
    while i < len(caption.tokens):
        noun = things.match(caption.tokens, i)
        if noun is None:
            i += 1
            continue
        end = i + noun.length
        number = _number(caption, i, noun)
        if number and _is_a_thing(caption, i, end, noun, number):
            new = [
                form.plural if number == "many" else form.singular
                for form, concept in noun.siblings
                if not caption.knows(*things.mentions_of(concept))
            ]
            yield caption.place(i, end - 1, new)
        i = end


def _number(caption: _Caption, i: int, noun: things.Noun) -> str:
    """`one`, `many` or `mass`; "" for `sheep` where only the verb would tell."""
    if noun.form.singular != noun.form.plural:
        return noun.number
    before = set(caption.tokens[max(0, i - 3) : i])
    if before & grammar.SINGULAR_ARTICLES and "of" not in before:
        return "one"
    return "many" if before & grammar.PLURAL_ARTICLES or caption.at(i - 1) == "of" else ""


def _is_a_thing(caption: _Caption, i: int, end: int, noun: things.Noun, number: str) -> bool:
    """Whether the noun stands for itself (no part of a compound) and keeps its grammar when exchanged."""
    if caption.at(i - 1) in things.COMPOUNDS or noun.refused(caption.tokens, i):
        return False
    if not _ends_noun(caption, end, number):
        return False
    if number == "one" and i > 0 and not _has_article(caption, i):
        return False
    return not (noun.sexed and grammar.PRONOUNS & set(caption.tokens))


def _ends_noun(caption: _Caption, end: int, number: str) -> bool:
    """Whether a noun that ends before token `end` is no modifier of what follows."""
    token = caption.at(end)
    if number == "many" and token in grammar.PLURAL_VERBS:
        return True
    if not token or token in '.,;:!?&()"' or token in grammar.FUNCTION or token in grammar.VERBS:
        return True
    verbal = token.endswith(("ing", "ed")) and token not in grammar.NO_VERBS
    return verbal and token not in modifiers.COLOURS


def _has_article(caption: _Caption, i: int) -> bool:
    """Whether an article, number or possessive belongs to the noun at `i`; other bare nouns are kinds or masses.

    At the beginning of a caption the article is often left out.
    """
    for token in reversed(caption.tokens[max(0, i - _LOOK_BACK) : i]):
        if token in grammar.DETERMINERS or token.endswith(("'s", "’s")):
            return True
        verbal = token in grammar.VERBS or (token.endswith("ing") and token not in grammar.NO_VERBS)
        if verbal or token in grammar.FUNCTION or not token[0].isalpha():
            return False
    return i <= _LOOK_BACK


_PLACES: dict[str, Callable[[_Caption], Iterator[_Place]]] = {
    "attribute": _attributes,
    "count": _counts,
    "relation": _relations,
    "object": _objects,
}
