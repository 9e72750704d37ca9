"""The report as one HTML page that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from jinja2 import Environment, StrictUndefined

from lightning_vlm.studies.report.content import Content
from lightning_vlm.studies.report.costs import measured
from lightning_vlm.studies.report.curves import BEFORE_AND_AFTER, Figure
from lightning_vlm.studies.report.shapes import swatch
from lightning_vlm.studies.report.style import CSS, SCRIPT
from lightning_vlm.studies.report.template import PAGE
from lightning_vlm.studies.report.text import clean, duration, number

_TONES = {
    "good": ("better", "holds", "equal", "done", "right"),
    "bad": ("contradicted", "not equal", "failed", "wrong"),
    "info": ("different",),
    "warn": ("no verdict", "interrupted", "changed", "running"),
}


def render(content: Content) -> str:
    """The page.

    Model outputs, logs and names are foreign texts: the template escapes everything but our own drawings, and the page
    forbids itself to load anything and to run any script but its own.
    """
    charts = [
        ("curves", "Learning curves", content.curves),
        ("entropy", "Entropy", content.entropies),
        ("pass-at-k-section", BEFORE_AND_AFTER, [content.passes] if content.passes else []),
        ("probes", "Probes", content.probes),
    ]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {
        "tone": _tone,
        "swatch": swatch,
        "duration": duration,
        "number": number,
        "measured": measured,
    }
    page = environment.from_string(PAGE).render(
        c=content,
        r=content.results,
        charts=charts,
        parts=_parts(content, charts),
        css=CSS,
        script=SCRIPT,
        policy=policy,
        yaml=clean(content.results.text, 200_000),
    )
    return page.strip() + "\n"


def _tone(verdict: str) -> str:
    """CSS class of a verdict's or a state's badge; the word itself says it, too."""
    return next((tone for tone, words in _TONES.items() if verdict in words), "")


def _parts(content: Content, charts: list[tuple[str, str, list[Figure]]]) -> list[tuple[str, str]]:
    """Identifier and title of what the page has, for its list of contents."""
    wanted: list[tuple[Any, str, str]] = [
        (content.unfinished, "unfinished", "Not finished"),
        (content.endpoints, "answer", "Answer"),
        (content.claims, "claims", "Claims"),
        (True, "budgets", "Budgets"),
        (content.endpoints[1:], "endpoints", "Other endpoints"),
        *((figures, ident, title.split(" before")[0]) for ident, title, figures in charts),
        (content.samples, "samples", "Sample outputs"),
        (True, "costs", "Costs"),
        (True, "settings", "Settings"),
        (True, "made", "How it was made"),
    ]
    return [(ident, title) for there, ident, title in wanted if there]
