"""`segloss report`: runs as one web page that needs no other file, and as pictures."""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from .errors import UserError
from .model import require
from .report import NOTES, Record, read_records, story, subsets, summary, table

PAGE = "report.html"

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 66rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; border-bottom: 1px solid #e5e7eb;
         vertical-align: top; }
.scores :is(th, td):not(:nth-child(1), :nth-child(3)) { text-align: right; }
figure { margin: 0; } img { max-width: 100%; }
figcaption, .note { color: #52606d; font-size: 0.92rem; max-width: 52rem; }
</style>
</head>
<body>
{% macro grid(header, rows, kind="") %}<table class="{{ kind }}">
{% for row in [header] + rows %}<tr>{% set cell = "th" if loop.first else "td" %}
{% for text in row %}<{{ cell }}>{{ text }}</{{ cell }}>{% endfor %}</tr>
{% endfor %}</table>{% endmacro %}
<h1>{{ title }}</h1>
{% for text in stories %}<p>{{ text }}</p>
{% endfor %}
{% if results[1] %}<h2>In numbers</h2>
{{ grid(*results, kind="scores") }}
<p class="note">{{ notes }}</p>{% endif %}
{% for picture, image in pictures %}<h2>{{ picture.title }}</h2>
<figure><img alt="{{ picture.title }}" src="data:image/png;base64,{{ image }}">
<figcaption>{{ picture.caption }}</figcaption></figure>
{% endfor %}
{% for record in chosen %}<h2>Chosen tasks of {{ record.name }}</h2>
<p>{{ record.selection.get("chosen", [])|join(", ") or "nothing" }}</p>
{{ grid(*subsets(record.selection)) }}
{% endfor %}
<h2>Settings</h2>
{{ grid(["setting"] + names, settings) }}
<p class="note">{{ where }}</p>
</body>
</html>
"""


def report(paths: Sequence[str], output: str = "") -> None:
    """Write report.html and its pictures for the runs in some folders.

    Raises `UserError` for a folder that is no run's, or where nothing can be written.
    """
    require("matplotlib", "segloss report")
    records = read_records(paths)
    folder = Path(output or Path(paths[0]) / "report")
    taken = os.path.lexists(folder) and not (folder / PAGE).exists()
    if taken and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and holds no report; give another --output")

    from .figures import pictures

    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = []
        for picture in pictures(records):
            image = png(picture.figure)
            (folder / f"{picture.name}.png").write_bytes(image)
            drawn.append((picture, base64.b64encode(image).decode()))
        (folder / PAGE).write_text(page(records, drawn), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if table(records)[1]:
        print(summary(records), end="\n\n")
    print(folder / PAGE)


def png(figure: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # a task's name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(file, dpi=130, format="png")
    return file.getvalue()


def page(records: Sequence[Record], drawn: Sequence[tuple[Any, str]]) -> str:
    trained = [record for record in records if record.given]
    options = sorted({name for record in trained for name in record.given})
    about = trained[0].description if trained else {}
    facts = [f"{package} {version}" for package, version in about.get("versions", {}).items()]
    return html(
        title="segloss: " + ", ".join(record.name for record in records),
        stories=map(story, records),
        results=table(records),
        notes=NOTES,
        pictures=drawn,
        chosen=[record for record in records if record.selection],
        names=[record.name for record in trained],
        settings=[[n, *(shown(record.given.get(n)) for record in trained)] for n in options],
        where=f"Device {about.get('device', '?')}; {', '.join(facts)}. What is not listed had its "
        "default.",
    )


def html(**parts: Any) -> str:
    """The template filled in."""
    return Environment(autoescape=True).from_string(TEMPLATE).render(subsets=subsets, **parts)


def shown(value: Any) -> str:
    return (
        " ".join(map(str, value))
        if isinstance(value, list)
        else str("" if value is None else value)
    )
