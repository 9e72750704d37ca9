"""The report as Markdown: the same parts as the page, charts as tables of their ends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lightning_vlm.studies.report.content import Content
from lightning_vlm.studies.report.costs import Cost
from lightning_vlm.studies.report.curves import Figure
from lightning_vlm.studies.report.samples import Samples
from lightning_vlm.studies.report.text import duration, number
from lightning_vlm.studies.report.verdicts import EndpointView


def markdown(content: Content) -> str:
    """The report; foreign texts stand in fenced blocks, or escaped."""
    results = content.results
    parts = [f"# {_text(results.question)}", *map(_text, content.about)]
    states = ", ".join(f"{count} {state}" for state, count in content.states.items())
    parts.append(
        _text(
            "; ".join(
                filter(None, [content.size and f"axes: {content.size}", f"runs of stages: {states}", content.when])
            )
        )
    )
    if content.unfinished:
        parts.append(f"**Not finished: {len(content.unfinished)} of {len(results.stages)} runs of stages.**")
        parts.append(_items(f"{u.name}: {u.state}{', ' + u.exit if u.exit else ''}" for u in content.unfinished))
    for index, view in enumerate(content.endpoints):
        parts += _endpoint(view, "Answer: " if index == 0 else "")
        if index == 0:
            parts += [*_claims(content), *_budget(content)]
    if not content.endpoints:
        parts += [*_claims(content), *_budget(content)]
    for figure in content.figures:
        parts += _figure(figure)
    if content.samples:
        parts += _samples(content.samples)
    parts += ["## Costs", _costs("arm", content.arm_costs, content.total_cost)]
    parts.append(_costs("stage", content.stage_costs, None))
    parts.append("## Settings in which arms differ")
    heads, rows = content.differences
    parts.append(_table(["key", *heads], rows) if rows else "None.")
    parts += ["## How it was made", _items(content.notes)]
    parts.append(_table(["environment", ""], content.environment.items()))
    parts += [f"{results.file.name}:", _fenced(results.text, "yaml")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _text(value: str) -> str:
    """A foreign text inside a line: no markup of Markdown or HTML in it takes effect."""
    value = value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    text = ["| " + " | ".join(c if n == 1 else _text(c) for c in line) + " |" for n, line in enumerate(lines)]
    return "\n".join(text) if len(text) > 2 else ""


def _items(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_text(line)}" for line in lines)


def _fenced(text: str, kind: str = "text") -> str:
    """A block whose fence is longer than any row of backticks in it."""
    longest = max((len(found) for found in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"


def _endpoint(view: EndpointView, prefix: str) -> list[str]:
    parts = [f"## {prefix}{_text(view.name)}", _text(view.about)]
    if view.missing:
        parts.append(f"**Not shown:** {_text(view.missing)}")
    for group in view.groups:
        parts.append(f"### {_text(group.title)}" if group.title else "")
        parts.append(f"**{_text(group.answer)}**" if group.answer else "")
        heads = ["arm", f"mean{view.of_scores}", "95 % interval", "seeds", f"sd of seeds{view.of_differences}", "over"]
        rows = [[a.name, a.mean, a.interval, str(a.seeds), a.spread, a.over] for a in group.arms]
        parts += [_table(heads, rows), _items(pair.short for pair in group.pairs)]
    return parts


def _claims(content: Content) -> list[str]:
    lines = [
        [claim.says, claim.source, group, verdict, sentence]
        for claim in content.claims
        for group, verdict, sentence in claim.judged
    ]
    if not lines:
        return []
    return ["## Claims of the sources", _table(["claim", "source", "where", "verdict", "numbers"], lines)]


def _budget(content: Content) -> list[str]:
    parts = ["## Budgets"]
    if content.unequal:
        parts.append(f"**Not equal: the arms did not spend the same in {_text(', '.join(content.unequal))}.**")
    parts.append(_text(content.results.budget_note or ""))
    rows = [[b.label, b.stage, b.values, b.unit, "equal" if b.equal else "not equal"] for b in content.budget]
    parts.append(_table(["arm", "stage", "spent per run", "unit", "over arms"], rows) if rows else "None declared.")
    return parts


def _figure(figure: Figure) -> list[str]:
    """The first and the last row of each chart."""
    parts = [f"## {_text(figure.title)}", _text(figure.about)]
    parts += [f"**Not shown:** {_text(line)}" for line in figure.missing]
    for chart in figure.charts:
        parts.append(f"### {_text(chart.title)}" if chart.title else "")
        parts += [_text(chart.note), _table(chart.heads, [chart.rows[i] for i in sorted({0, len(chart.rows) - 1})])]
    return parts


def _samples(samples: Samples) -> list[str]:
    parts = ["## Sample outputs", _text(samples.about)]
    parts += [f"**Not shown:** {_text(line)}" for line in samples.missing]
    for sample in samples.samples:
        parts += [f"### {_text(sample.id)}", _text(sample.title), _fenced(f"{sample.prompt}\n\ngold: {sample.gold}")]
        for answer in sample.answers:
            told = "; ".join(filter(None, [answer.verdict, answer.seed, answer.others]))
            parts += [f"{_text(answer.label)} ({_text(told)}):", _fenced(answer.output)]
    return parts


def _costs(first: str, costs: Sequence[Cost], total: Cost | None) -> str:
    heads = [first, "arm"] if first == "stage" else [first]
    heads += ["runs", "time", "CPU time", "steps", "tokens", "peak memory, GiB"]
    rows = []
    for cost in [*costs, *([total] if total else [])]:
        names = [cost.what, cost.label] if first == "stage" else [cost.what]
        times = [duration(cost.seconds), duration(cost.cpu_seconds)]
        rows.append([*names, str(cost.runs), *times, number(cost.steps), number(cost.tokens), number(cost.peak_gib)])
    return _table(heads, rows)
