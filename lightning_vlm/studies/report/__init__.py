"""The report of a study: one HTML page that needs nothing else, and the same as Markdown, JSON and CSV."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_vlm.studies.report.content import gather
from lightning_vlm.studies.report.data import as_json, endpoints_csv, pairs_csv, stages_csv
from lightning_vlm.studies.report.markdown import markdown
from lightning_vlm.studies.report.page import render

if TYPE_CHECKING:
    from lightning_vlm.studies.results import Results


def write_report(results: Results, out: Path) -> list[Path]:
    """Write the report of a study, finished or not.

    The same results give the same bytes. What is missing is said in its place; the rest is there.

    Args:
        results: of the study. out: folder, made where it is missing; files of an earlier report are replaced.

    Returns:
        report.html, report.md, report.json, endpoints.csv, pairs.csv, stages.csv.
    """
    content = gather(results)
    texts = {
        "report.html": render(content),
        "report.md": markdown(content),
        "report.json": as_json(content),
        "endpoints.csv": endpoints_csv(content),
        "pairs.csv": pairs_csv(content),
        "stages.csv": stages_csv(content),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        temporary = out / f".{name}.tmp"
        # Outputs may hold halves of characters, which have no encoding.
        temporary.write_bytes(text.encode("utf-8", errors="replace"))
        os.replace(temporary, out / name)
    return [out / name for name in texts]
