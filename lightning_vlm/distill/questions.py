"""What a question asks for, read off its words alone. Ours; rules that a scorer of one's own can replace.

The words are English. Each score lies in [0, 1], and needs no model.
"""

from __future__ import annotations

import math
import re

from lightning_vlm.data.schema import Sample

# A picture is named, or shown things are.
_PICTURE = re.compile(
    r"\b(?:figures?|diagrams?|pictures?|images?|photos?|photographs?|graphs?|charts?|plots?|drawings?|drawn|maps?|"
    r"illustrations?|illustrated|sketch(?:es)?|tables?|shown|shows|depicted|displayed|pictured|visible|scene|screen|"
    r"shaded|see|look|coloured|colored)\b|<image\d*>",
    re.IGNORECASE,
)
# What one would have to see: colours, places, shapes, things pointed at.
_SEEN = re.compile(
    r"\b(?:red|green|blue|yellow|purple|cyan|orange|pink|black|white|grey|gray|brown|dark|colou?rs?|shapes?|bars?|"
    r"circles?|squares?|triangles?|cross(?:es)?|left|right|above|below|behind|front|top|bottom|upper|lower|next to|"
    r"camera|facing|appears?|these|this|those)\b|\b(?:is|are) there\b|\bthere (?:is|are)\b|"
    r"\b(?:angle|side|line|segment|arc|point)s? (?:at )?(?-i:[A-Z]{1,3}|[a-z])\b|"
    r"\\(?:angle|triangle|odot|overline|widehat)|∠|\b(?:find|value of|solve for|measure of) [a-z]\b|"
    r"(?-i:\b[A-Z] ?[A-Z]\b)",  # a line by its two points
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:[.,]\d+)*(?![\w])|\\frac|\\sqrt|½|¼|¾", re.IGNORECASE)
_NUMBER_WORD = re.compile(
    r"\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|hundred|thousand|half|"
    r"twice|double|third|quarter)\b",
    re.IGNORECASE,
)
_CONDITION = re.compile(
    r"\b(?:if|given|suppose|assume|let|when|where each|such that|similar|congruent|parallel|perpendicular|equal|"
    r"times as|exactly|at least|at most|knowing)\b",
    re.IGNORECASE,
)
_TERM = re.compile(
    r"\b(?:plus|minus|times|sum|difference|product|ratio|proportion|percent(?:age)?|average|mean|median|probability|"
    r"perimeter|area|volume|circumference|radius|diameter|angles?|exterior|interior|similar|congruent|tangent|"
    r"parallel|perpendicular|bisects?|isosceles|equilateral|hypotenuse|square root|equation|function|derivative|"
    r"integral|factor|prime|digits?|remainder|round|nearest|total|remaining|maximum|minimum|largest|smallest|"
    r"possible|different ways)\b|[=+*/^×÷√]|\\(?:frac|sqrt|angle|triangle|times|cdot|sum|int)",
    re.IGNORECASE,
)
# The strongest that is found counts. `how` is a demand for reasons, `how many` for a count.
_DEMANDS: tuple[tuple[float, re.Pattern], ...] = tuple(
    (value, re.compile(pattern, re.IGNORECASE))
    for value, pattern in (
        (1.0, r"\b(?:why|prove|proof|show that|explain|derive|justify|deduce|infer|reason)\b"),
        (0.9, r"\bhow\b(?! (?:many|much|long|old|far|tall|high|wide|big|large|often|deep|heavy|fast|wide)\b)"),
        (
            0.7,
            r"(?<!can )(?<!you )\b(?:find|calculate|compute|determine|solve|evaluate|work out|estimate|simplify|"
            r"construct)\b",
        ),
        (0.5, r"\bhow (?:many|much|long|old|far|tall|high|wide|big|large|often|deep|heavy|fast)\b|\bcompare\b"),
        (0.3, r"\b(?:what|which|who|whose|when)\b"),
        (0.1, r"\b(?:where|is|are|does|do|did|can|has|have|was|were)\b"),
    )
)
_UNASKED = 0.2  # neither a question nor a task is recognised, such as "describe the image."
_FACTS, _QUANTITIES, _TERMS, _CONDITIONS = 3, 6, 4, 2  # how many make a full share
_WORDS = 7.0  # log2 of the words that make one: 127


# The instructions that the sources add ask for steps and boxes whatever the question is.
_INSTRUCTION = re.compile(
    r"(?:^|\n)\s*(?:work out the answer step by step|answer with|choices:|\(?[a-j]\)\s).*", re.IGNORECASE
)


def question_text(sample: Sample) -> str:
    """The last user text of a sample, whole; empty where there is none."""
    users = [message for message in sample.prompt() if message["role"] == "user"]
    return "".join(part.get("text", "") for part in users[-1]["content"]) if users else ""


def asked(sample: Sample) -> str:
    """The last user text of a sample without its options and instruction lines; what the scores read."""
    return _INSTRUCTION.sub("", question_text(sample)).strip()


def refers_to_picture(question: str) -> float:
    """1 where a picture is named, ½ where the words only point at something to be seen, else 0."""
    return 1.0 if _PICTURE.search(question) else 0.5 if _SEEN.search(question) else 0.0


def quantities(question: str) -> int:
    """Numbers that the text gives, as digits or words."""
    return len(_NUMBER.findall(question)) + len(_NUMBER_WORD.findall(question))


def necessity_of(question: str) -> float:
    """(1 + r − f) / 2: r, whether it refers to a picture; f = min(1, quantities / 3), whether the text has the facts.

    1: a picture is named and the text gives no numbers. 0: the text gives all and points at nothing.
    """
    return (1 + refers_to_picture(question) - min(1.0, quantities(question) / _FACTS)) / 2


def difficulty_of(question: str) -> float:
    """Mean of three shares: log2(1 + words) / 7, quantities / 6, mathematical terms and signs / 4; each at most 1."""
    words = min(1.0, math.log2(1 + len(question.split())) / _WORDS)
    terms = len(_TERM.findall(question))
    return (words + min(1.0, quantities(question) / _QUANTITIES) + min(1.0, terms / _TERMS)) / 3


def demand_of(question: str) -> float:
    """The strongest demand of the words.

    1 why, prove, explain; .9 how; .7 find, calculate, solve; .5 how many, how much; .3 what, which, who; .1 where, is,
    does; .2 nothing of these.
    """
    return next((value for value, pattern in _DEMANDS if pattern.search(question)), _UNASKED)


def integration_of(question: str) -> float:
    """(both + reasons) / 2: whether picture and text are both needed, and whether reasons are asked for.

    both = min(r, c): r as in `necessity_of`, c = min(1, (quantities + conditions) / 2) what the text adds to the
    picture. reasons = `demand_of`.
    """
    added = quantities(question) + len(_CONDITION.findall(question))
    both = min(refers_to_picture(question), min(1.0, added / _CONDITIONS))
    return (both + demand_of(question)) / 2
