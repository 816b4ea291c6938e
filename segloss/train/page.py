"""`segloss report`: runs as one web page that needs no other file, and as pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from .errors import UserError
from .model import require
from .report import NOTES, read_records, story, subsets, summary, table

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
{{ grid(["setting"] + given|list, settings) }}
<p class="note">{{ where }} What is not listed had its default.</p>
</body>
</html>
"""


def report(runs: Sequence[str], output: str = "") -> None:
    """Write report.html and its pictures for the runs in some folders.

    Raises `UserError` for a folder that is no run's, or where nothing can be written.
    """
    for package in ("matplotlib", "pandas"):
        require(package, "segloss report")
    records = read_records(runs)
    folder = Path(output or Path(runs[0]) / "report")
    taken = os.path.lexists(folder) and not (folder / PAGE).exists()
    if taken and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and holds no report; give another --output")

    from .figures import pictures

    given = {record.name: record.given for record in records if record.given}
    about = next((record.description for record in records if record.given), {})
    versions = [f"{name} {version}" for name, version in about.get("versions", {}).items()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_page(
            folder / PAGE,
            title="segloss: " + ", ".join(record.name for record in records),
            stories=map(story, records),
            results=table(records),
            notes=NOTES,
            pictures=[(picture, picture.save(folder)) for picture in pictures(records)],
            chosen=[record for record in records if record.selection],
            given=given,
            where=f"Device {about.get('device', '?')}; {', '.join(versions)}.",
        )
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if table(records)[1]:
        print(summary(records), end="\n\n")
    print(folder / PAGE)


def write_page(path: Path, given: dict[str, dict[str, Any]], **parts: Any) -> None:
    """The template filled in; `given` are the settings of each run or variant."""
    names = sorted({name for options in given.values() for name in options})
    values = [[name, *(options.get(name, "") for options in given.values())] for name in names]
    rows = [[" ".join(map(str, v)) if isinstance(v, list) else v for v in row] for row in values]
    template = Environment(autoescape=True).from_string(TEMPLATE)
    text = template.render(subsets=subsets, given=given, settings=rows, **parts)
    path.write_text(text, encoding="utf-8")
