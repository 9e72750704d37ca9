r"""Where an output says its answer: `\boxed{…}`, `<answer>…</answer>`, a marker, a conclusion. Pure string functions.

Nothing is guessed: an output that states no answer has none. What is found is a piece of the output as it stands there;
`choices`, `numbers` and `short_answer` read it further. All run in linear time, whatever the output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_vlm.metrics.mathematics import is_mathematical
from lightning_vlm.metrics.numbers import parse_number

_BOX = re.compile(r"\\boxed\s*\{")
_ANY_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # the first branch steps over \{, \} and line breaks
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)

_LINK = r"\s{0,2}[*_`]{0,3}\s{0,2}(?:\b(?:is|are|would be|should be|must be|will be)\b|[=:：])"
_MARKER = re.compile(
    # "The (correct) answer (to the question) is", "Answer:", "**Answer**:", "the correct option is", "答案："
    r"\b(?:ans(?:wers?)?|(?:correct|right|best|final)\s(?:option|choice|letter|statement|value|result))"
    rf"(?:\s(?:to|for)\s[^.:=\n]{{1,80}}?|,[^.,:=\n]{{1,60}},)?{_LINK}"
    r"|答案[是为选]?\s?[:：]?"
    # "Final answer 42", "### Answer" on a line of its own, "#### 42" (GSM8K)
    r"|\bfinal\sanswer[*_`]{0,3}\s(?=[\d$\\(-])"
    r"|^[#*_ \t]{0,8}(?:the\s)?(?:final\s)?answer[*_: \t]{0,8}$"
    r"|^\#{4}[ \t](?=[^\n]{1,60}$)",
    re.IGNORECASE | re.MULTILINE,
)
_MOST_MARKERS = 20  # the last ones of an output; one of them decides
_LEAD = re.compile(r"[\s:：]*(?:[*_`]{1,3}(?=\s)[\s:：]*)?")  # up to the answer; `**5**` keeps its emphasis
_ADVERBS = re.compile(
    r"(?:(?:therefore|thus|hence|clearly|simply|indeed|probably|most likely|likely|also|actually|then|just|still)"
    r"\b[\s,:]{0,3}){1,3}",
    re.IGNORECASE,
)
# Where the clause of an answer may end. Formulas are stepped over; the reason given is not part of the answer.
_STOP = re.compile(
    r"\n|(?P<formula>\$\$?|\\\(|\\\[)|(?P<period>[.!?](?=[*_`\"”')\]]*(?:\s|$)))|[。！]|</|<\||"
    r",?\s(?:because|since)\s|,\s(?:as|so|which|meaning|where)\s",
    re.IGNORECASE,
)
_CLOSER = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
_LONGEST_CLAUSE = 1000  # characters
_LIST_ITEM = re.compile(r"[*_ \t]{0,8}\n\s*(?:[*_]{0,2}\(?\d{1,2}[.)]|[*+•-])\s+\S")
_HYPOTHESIS = re.compile(r"\b(?:if|suppose|assuming|for example|for instance|e\.g)\b[^.\n]*\Z", re.IGNORECASE)
_WITHHELD = re.compile(
    r"(?:not|neither|never|isn't|cannot|can't|could not|couldn't|unable|unknown|undetermined|unclear|indeterminate|"
    r"n/a|impossible to|insufficient|i (?:don't|do not|can't|cannot|am not|am unable)|(?:i'm |i am )?sorry)\b",
    re.IGNORECASE,
)
_NO_ANSWER = re.compile(r"(?:correct|incorrect|wrong|as follows|below|shown below|given below)", re.IGNORECASE)

_COURTESY = re.compile(
    r"i hope (?:this|that|it)|hope this|(?:please )?let me know|(?:do|would) you (?:have|like|want)|is there anything|"
    r"if you have|feel free",
    re.IGNORECASE,
)
_LONGEST_SENTENCE = 600  # characters
_SENTENCE_END = re.compile(r"(?<=[.!?])[*_\"”)]{0,3}\s+(?=[A-Z*$\\(“\"#])|\n+")
_DISPLAYED = re.compile(r"\s*(?:\\\[.*?\\\]|\$\$.*?\$\$)", re.DOTALL)
_EQUALS = re.compile(
    r"(?:\b(?:is|are|be|equals|equal to)\s|=|≈|\\approx\b)\s*(?:(?:therefore|thus|hence|then|simply|exactly),?\s){0,2}",
    re.IGNORECASE,
)
_PLACE = re.compile(r"\b(?:at|for|with|as|to|from|by)\s\S{1,12}\s?\Z", re.IGNORECASE)  # "the slope at x = 5"
_REMARK = re.compile(r"\s\([^()]*\)\W*\Z")  # "7.8 % (11.2 % - 3.4 %)"
_THERE_ARE = re.compile(
    r"\bthere\s(?:is|are|was|were|will be|would be)\s"
    r"(?:(?:only|exactly|now|still|a total of|about|approximately)\s)?[*_]{0,2}"
    r"(?P<count>-?\d[\d,]*(?:\.\d+)?(?![\w.])|[a-z]+(?:-[a-z]+)?)\b",
    re.IGNORECASE,
)
_CONDITION = re.compile(
    r"\b(?:not|never|cannot|if|when|where|unless|suppose|assume|assuming|let|whether|might|may|could|perhaps|maybe|"
    r"impossible|unable|without|depends)\b|n't\b",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(
    r"\b(?:for example|for instance|suppose|imagine)\b|\bif\b.*\b(?:would|could|might)\s\Z", re.IGNORECASE | re.DOTALL
)
_EMPHASISED = re.compile(r"\*\*([^*\n]{1,80})\*\*")
_QUOTED = re.compile(r"(?:\*\*|__|\"|“|`)[^*_\"“”`\n]{1,60}(?:\*\*|__|\"|”|`)")
_MARKUP = re.compile(r"\\boxed|\\fbox|</?answer>|\banswers?\b", re.IGNORECASE)
_ROW = re.compile(r"[*+•-]\s|\|")  # of a list or a table
_MOST_WORDS = 5
_LONGEST_ANSWER = 2000  # characters; longer texts are not searched for markdown


@dataclass(frozen=True)
class Extraction:
    """What an output states as its answer.

    Attributes:
        text: the piece of the output, as it stands there, without the markdown around it.
        how: what shows it: `boxed`, `tag`, `marker`, `emphasis`, `conclusion` or `alone`.
    """

    text: str
    how: str


def boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{…}`, braces balanced, or None.

    A box that is never closed (a truncated output) does not count, an earlier complete one does. Escaped braces `\{`
    and `\}` do not nest. A box that holds nothing but a box is unwrapped: `\boxed{\boxed{5}}` gives `5`.
    """
    return next(_boxes(text, _BOX), None)


def answer_tag(text: str) -> str | None:
    """Content of the last complete `<answer>…</answer>`, stripped, or None."""
    return next(_tags(text), None)


def explicit_answer(text: str) -> str | None:
    r"""The answer the output marks as such: the last `\boxed{…}`, else the last `<answer>…</answer>`, else None."""
    answer = boxed(text)
    return answer if answer is not None else answer_tag(text)


def marked_or_whole(text: str) -> str:
    """The marked answer, or the whole output where nothing is marked: for tasks that also allow direct answers."""
    answer = explicit_answer(text)
    return text.strip() if answer is None else answer


def final_answer(output: str) -> Extraction | None:
    r"""What the output states as its answer, or None where it states none.

    The first of these that there is:

    1. `boxed`: the last complete `\boxed{…}` or `\fbox{…}` that is not empty.
    2. `tag`: the last complete `<answer>…</answer>` that is not empty; a box in it is unwrapped.
    3. `marker`: the clause behind the last "the answer is", "Answer:", "the correct option is", "#### " and the like,
       to the end of the sentence or line. Formulas are not cut; a reason ("because …") is not part of it. Passed over
       are markers with nothing usable behind them, with an explanation that goes on, and in a hypothesis ("if …").
    4. `emphasis`: the only number that the output sets in bold.
    5. `conclusion`: the last sentence ends in "… is / equals / = / ≈" and a number with its unit, a formula, a letter
       or something quoted, or counts ("there are 5 …"), and is neither conditional nor negated.
    6. `alone`: the last line is nothing but such a value, or the whole output is one line of at most five words.

    An answer that is denied or withheld ("not 5 but 6", "unknown", "N/A", "cannot be determined") is none, and only
    what ends the output after it is looked at; `stated_answer` gives it. A possibility ("the answer could be 5") is no
    statement, and "5 or 6" is an answer as it stands, equal to neither. Where reasoning is closed by `</think>`, what
    follows is read; a mark (1 to 3) inside the reasoning counts only where that states no answer.
    """
    found = stated_answer(output)
    if found is not None and found.how == "marker" and withheld(found.text):
        reply, _ = split_reasoning(output)
        found = concluded(reply) or _alone(reply)
    return None if found is None or withheld(found.text) else found


def stated_answer(output: str) -> Extraction | None:
    """As `final_answer`, but a denied or withheld answer is given as it stands: it may be one of the options."""
    reply, reasoning = split_reasoning(output)
    for rule, text in (
        (_marked, reply),
        (_bold_number, reply),
        (concluded, reply),
        (_alone, reply),
        (_marked, reasoning),
    ):
        if (found := rule(text)) is not None:
            return found
    return None


def withheld(text: str) -> bool:
    """Whether a stated answer denies or refuses one: "not 5", "unknown", "N/A", "cannot be determined"."""
    return _WITHHELD.match(text) is not None


def split_reasoning(output: str) -> tuple[str, str]:
    """The reply behind the last `</think>` and the reasoning before it; an output without it is all reply."""
    reasoning, closed, reply = output.rpartition("</think>")
    return (reply, reasoning) if closed else (output, "")


def boxes_and_tags(text: str) -> Iterator[Extraction]:
    """The boxes of a text, last first, then its answer tags, last first; empty ones left out."""
    for box in _boxes(text, _ANY_BOX):
        if trim(box):
            yield Extraction(trim(box), "boxed")
    for tag in _tags(text):
        if answer := trim(next(_boxes(tag, _ANY_BOX), tag)):
            yield Extraction(answer, "tag")


def marked_clauses(text: str) -> list[tuple[int, int, str]]:
    """Start, end and text of the clauses behind the last markers, in order; hypotheses and empty ones left out."""
    markers = list(_MARKER.finditer(text))[-_MOST_MARKERS:]
    limits = [*(marker.start() for marker in markers), len(text)][1:]
    found = []
    for marker, limit in zip(markers, limits, strict=True):
        end, clause = _clause(text, marker.end(), limit)
        hypothesis = _HYPOTHESIS.search(text, max(0, marker.start() - 200), marker.start())
        heading = marker.group().startswith("####") and not _is_value(clause)
        if clause and not hypothesis and not heading and not _LIST_ITEM.match(text, marker.end()):
            found.append((marker.start(), end, clause))
    return found


def emphasised(text: str) -> list[str]:
    """What a text sets in bold, in order."""
    return [trim(match.group(1)) for match in _EMPHASISED.finditer(text)]


def last_sentence(text: str) -> str:
    """The last sentence that is no courtesy ("I hope this helps!"); displayed formulas belong to their sentence."""
    tail = text.rstrip()[-_LONGEST_SENTENCE:]
    flat = _DISPLAYED.sub(lambda match: re.sub(r"\s", " ", match.group()), tail)  # keeps every position
    ends = [match.span() for match in _SENTENCE_END.finditer(flat)]
    starts, stops = [0, *(end for _, end in ends)], [*(start for start, _ in ends), len(tail)]
    for start, stop in zip(reversed(starts), reversed(stops), strict=True):
        sentence = tail[start:stop].strip()
        if any(c.isalnum() for c in sentence) and not _COURTESY.match(sentence):
            return sentence
    return ""


def concluded(text: str) -> Extraction | None:
    """The value in which the last sentence ends, or the count that it states."""
    sentence = last_sentence(text)
    if sentence.endswith("?"):
        return None
    for equals in reversed(list(_EQUALS.finditer(sentence))):
        before, value = sentence[: equals.start()], _within_formula(sentence[equals.end() :])
        if value.count("{") != value.count("}"):  # an index or a bound inside a formula
            continue
        value, place = _REMARK.sub("", value), equals.group()[0] == "=" and _PLACE.search(before)
        if _is_value(value) and not place and not conditional(before):
            return Extraction(trim(value), "conclusion")
        break
    for there in _THERE_ARE.finditer(sentence):
        if parse_number(there["count"]) is not None and not conditional(sentence[: there.start()]):
            return Extraction(there["count"], "conclusion")
    return None


def conditional(before: str) -> bool:
    """Whether the clause that leads to a value sets a condition, denies it or only supposes it."""
    if _SUPPOSED.search(before):
        return True
    return _CONDITION.search(re.split(r"[,;:]\s|\b(?:so|thus|hence|therefore)\b", before)[-1]) is not None


def trim(text: str) -> str:
    """A piece of text without the whitespace, closing punctuation, quotes and markdown around it."""
    text, before = text.strip(), None
    while text != before and len(text) <= _LONGEST_ANSWER:
        before = text
        if text.endswith((".", ",", ";", ":", "!", "。")) and not re.search(r"(?:\\.|\b[A-Za-z]\.[A-Za-z]\.)\Z", text):
            text = text[:-1]
        for mark in ("**", "__", "`", "*"):
            count = text.count(mark)
            if text.startswith(mark) and (count % 2 or (count == 2 and text.endswith(mark))):
                text = text[len(mark) :]
            if text.endswith(mark) and text.count(mark) % 2:
                text = text[: -len(mark)]
        if len(text) > 1 and text[0] + text[-1] in ('""', "“”", "''", "‘’"):
            text = text[1:-1]
        text = text.strip()
    return text


def _boxes(text: str, opening: re.Pattern) -> Iterator[str]:
    """Contents of the complete boxes of a text, last first, each as far inside as it holds nothing but a box."""
    closing, opened = {}, []
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            opened.append(brace.end())
        elif brace.group() == "}" and opened:
            closing[opened.pop()] = brace.start()
    found, position = [], 0
    while box := opening.search(text, position):
        position = box.end()
        if box.end() in closing:  # else it is not closed, and boxes inside it may still be complete
            position = closing[box.end()] + 1
            found.append((box.end(), closing[box.end()]))
    for start, end in reversed(found):
        while (inner := opening.match(text, start, end)) and not text[closing[inner.end()] + 1 : end].strip():
            start, end = inner.end(), closing[inner.end()]
        yield text[start:end].strip()


def _tags(text: str) -> Iterator[str]:
    """Contents of the complete answer tags of a text, last first."""
    found, start = [], None
    for tag in _TAG.finditer(text):
        if not tag.group(1):
            start = tag.end()
        elif start is not None:
            found.append(text[start : tag.start()].strip())
            start = None
    return reversed(found)


def _clause(text: str, start: int, limit: int) -> tuple[int, str]:
    """End and trimmed text of the clause that starts behind a marker."""
    start = _LEAD.match(text, start, limit).end()
    if adverbs := _ADVERBS.match(text, start, limit):
        start = adverbs.end()
    end = limit = min(limit, start + _LONGEST_CLAUSE)
    position = start
    while stop := _STOP.search(text, position, limit):
        position = stop.end()
        if stop["formula"]:
            closer = text.find(_CLOSER[stop["formula"]], position, limit)
            position = position if closer < 0 else closer + len(stop["formula"])
        elif not (stop["period"] and text[position : position + 9].lstrip()[:1].islower()):  # "5 sq. units" goes on
            end = position if stop["period"] else stop.start()
            break
    return end, trim(text[start:end])


def _marked(text: str) -> Extraction | None:
    for found in boxes_and_tags(text):
        return found
    for _, end, clause in reversed(marked_clauses(text)):
        explains = len(clause.split()) > _MOST_WORDS and not _is_value(clause) and trim(text[end:])
        if not explains and not _NO_ANSWER.fullmatch(clause):
            return Extraction(clause, "marker")
    return None


def _bold_number(text: str) -> Extraction | None:
    numbers = {piece: number for piece in emphasised(text) if (number := parse_number(piece)) is not None}
    return Extraction(next(reversed(numbers)), "emphasis") if len(set(numbers.values())) == 1 else None


def _alone(text: str) -> Extraction | None:
    text = text.strip().removeprefix("<think>").strip()
    if "\n" not in text and len(text.split()) <= _MOST_WORDS:
        whole = trim(text) and not text.endswith(("?", ":")) and not _MARKUP.search(text)
        return Extraction(trim(text), "alone") if whole else None
    last = last_sentence(text)
    own_line = last and text.endswith(last) and text[: -len(last)].rstrip(" \t").endswith("\n")
    if own_line and _is_value(last) and not _ROW.match(last):
        return Extraction(trim(last), "alone")
    return None


def _within_formula(text: str) -> str:
    r"""What follows an equals sign up to the `$`, `\)` or `\]` that closes the formula it stands in."""
    for opening, closer in _CLOSER.items():
        position = text.find(closer)
        if position >= 0 and (text.count(closer) % 2 if opening == closer else opening not in text[:position]):
            return text[:position]
    return text


def _is_value(text: str) -> bool:
    """Whether a text is a number with its unit, a formula, the letter of an option, or a few quoted words."""
    bare = trim(text)
    if not bare or len(bare) > 200:
        return False
    if _QUOTED.fullmatch(text.strip(" .")) or re.fullmatch(r"\(?[A-Z]\)?", bare) or parse_number(bare) is not None:
        return True
    return bool(re.search(r"[\d\\$∞∅π√]", bare)) and is_mathematical(bare)
