"""The results as text and as a picture."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.bench.ratios import median

_GIB = 2**30
_FORMS = {"": "as shipped", "_compacted": "compacted"}  # of the peer: how its figures end → what it is called
_PACKAGES = ("lightning-vlm", "trl", "torch", "transformers", "lightning", "accelerate")


def versions() -> dict[str, str]:
    """What was measured with what."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def lines(result: dict[str, Any]) -> list[str]:
    """One work as lines of text."""
    percent = f"{100 * result['coverage']:.0f} %"
    forms = [form for form in _FORMS if f"ratio{form}" in result]
    out = [f"{result['work']}: {result['title']}", f"  {result['shape']}"]
    width = max(map(len, result["contenders"]))
    for name, contender in result["contenders"].items():
        times, lengths = contender["seconds"], [n for step in contender["lengths"] for n in step]
        above = (contender["peak_bytes"] - contender["loaded_bytes"]) / _GIB
        out.append(
            f"  {name:{width}}  {median(times):8.3f} s a step [{min(times):.3f}, {max(times):.3f}]   "
            f"peak {contender['peak_bytes'] / _GIB:.2f} GiB, {above:.2f} above what was loaded"
            + (f"; {sum(lengths) / len(lengths):.1f} tokens a completion" if lengths else "")
        )

    def ratio(figures: dict[str, float], name: str) -> str:
        return f"{figures[name]:.2f} [{figures[f'{name}_low']:.2f}, {figures[f'{name}_high']:.2f}]"

    for name, figures in (("", result), *result["variants"].items()):
        label = f"times faster{', ' + name if name else ''}"
        times = ", ".join(f"{ratio(figures, f'ratio{form}')} than {_FORMS[form]}" for form in forms)
        by_processor = ", ".join(f"{figures[f'ratio{form}_cpu']:.2f}" for form in forms)
        out.append(
            f"  {label:{width}}  {times} (median of the rounds' ratios, {percent} interval); "
            f"by processor time {by_processor}"
        )
    peaks = ", ".join(f"{result[f'peak_ratio{form}']:.2f} of {_FORMS[form]}" for form in forms)
    out.append(f"  {'peak memory':{width}}  {peaks}; above what was loaded {result['peak_ratio_above']:.2f}")
    out.append(
        f"  {'same results':{width}}  {result['compared']} within {result['largest_gap']:.0e} (relative) "
        "before anything was timed"
    )
    if result["cache_filling_s"] is not None:
        out.append(
            f"  {'reference cache':{width}}  filled before, once: {result['cache_filling_s']:.1f} s with one step"
        )
    if result["note"]:
        out.append(f"  {result['note']}")
    return out


def draw(results: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """A picture of the ratios with their intervals; an ending matplotlib knows decides the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = []
    for result in results:
        for name, figures in (("", result), *result["variants"].items()):
            rows.append((result["work"] + (f", {name}" if name else ""), figures))
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for offset, (form, colour) in enumerate(zip(_FORMS, ("tab:blue", "tab:orange"), strict=True)):
        key, label = f"ratio{form}", _FORMS[form]
        there = [(i + 0.2 * offset - 0.1, f) for i, (_, f) in enumerate(rows) if key in f]
        if not there:
            continue
        heights, middles = [i for i, _ in there], [f[key] for _, f in there]
        errors = [[f[key] - f[f"{key}_low"] for _, f in there], [f[f"{key}_high"] - f[key] for _, f in there]]
        axes.errorbar(middles, heights, xerr=errors, fmt="o", capsize=4, color=colour, label=f"TRL {label}")
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    percent = f"{100 * results[0]['coverage']:.0f} %"
    axes.set_xlabel(f"times faster (median of paired ratios, {percent} interval)")
    axes.set_title(title, fontsize=8)
    figure.legend(loc="outside lower right", ncols=2)
    figure.savefig(path, dpi=150)
