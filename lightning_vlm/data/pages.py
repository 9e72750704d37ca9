"""HTML pages to look at samples: tables with their pictures inside the file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

_STYLE = (
    "body{font:14px sans-serif}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:6px;vertical-align:top;text-align:left}"
    "pre{white-space:pre-wrap;margin:0;max-width:36em}.right{background:#e6f4e6}.wrong{background:#fbe9e7}"
)


def inline(picture: Image.Image) -> str:
    """An `<img>` that holds the picture in the smaller format: PNG for most drawings, JPEG for photographs."""
    encoded = {}
    for kind in ("png", "jpeg"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        encoded[kind] = base64.b64encode(buffer.getvalue()).decode()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    return f'<img src="data:image/{kind};base64,{encoded[kind]}">'


def row(cells: Iterable[str], style: str = "") -> str:
    """A row of a table.

    Args:
        cells: HTML. style: `right` (green), `wrong` (red) or nothing.
    """
    return f'<tr class="{style}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def page(title: str, summary: str, heads: Sequence[str], rows: Iterable[str]) -> str:
    """A page with one table.

    Args:
        title, summary, heads: plain text. rows: of `row`.
    """
    columns = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>"
        f"<table><tr>{columns}</tr>{''.join(rows)}</table>\n"
    )
