"""`segloss report`: runs as one web page that needs no other file, and as pictures."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .report import NOTES, Record, markdown, read_records, scored, story, table

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
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: right; border-bottom: 1px solid #e5e7eb;
         vertical-align: top; }
th:nth-child(-n+{{ words }}), td:nth-child(-n+{{ words }}) { text-align: left; }
table.words td, table.words th { text-align: left; }
figure { margin: 0; } img { max-width: 100%; }
figcaption, .note { color: #52606d; font-size: 0.92rem; max-width: 52rem; }
</style>
</head>
<body>
{% macro table(header, rows, kind="") %}<table class="{{ kind }}">
<tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endmacro %}
<h1>{{ title }}</h1>
{% for text in stories %}<p>{{ text }}</p>
{% endfor %}
{% if results[1] %}<h2>In numbers</h2>
{{ table(*results) }}
<p class="note">{{ notes }}</p>{% endif %}
{% for picture, image in pictures %}<h2>{{ picture.title }}</h2>
<figure><img alt="{{ picture.title }}" src="data:image/png;base64,{{ image }}">
<figcaption>{{ picture.caption }}</figcaption></figure>
{% endfor %}
{% for record in chosen %}<h2>Chosen tasks of {{ record.name }}</h2>
<p>{{ record.selection.get("chosen", [])|join(", ") or "nothing" }}</p>
{{ table(["subset", "estimated loss", "true loss"], subsets(record)) }}
{% endfor %}
<h2>Settings</h2>
{{ table(["setting"] + names, settings, "words") }}
<p class="note">{{ where }}</p>
</body>
</html>
"""


def report(paths: Sequence[str], output: str = "") -> None:
    """Write report.html and its pictures for the runs in some folders.

    Raises `UserError` for a folder that is no run's, or where nothing can be written.
    """
    for package in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"segloss report needs {package}: pip install {package}")
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
    if scored(records):
        print(markdown(records), end="\n\n")
    print(folder / PAGE)


def png(figure: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # a task's name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(file, dpi=130, format="png")
    return file.getvalue()


def page(records: Sequence[Record], drawn: Sequence[tuple[Any, str]]) -> str:
    from jinja2 import Environment

    names = list(dict.fromkeys(name for record in records for name in record.given))
    trained = [record for record in records if record.given]
    versions = trained[0].description.get("versions", {}) if trained else {}
    facts = ", ".join(f"{package} {version}" for package, version in versions.items())
    device = trained[0].description.get("device", "?") if trained else "?"
    return (
        Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(
            title="segloss: " + ", ".join(record.name for record in records),
            words=3,
            stories=[story(record) for record in records],
            results=table(records),
            notes=NOTES,
            pictures=drawn,
            chosen=[record for record in records if record.selection],
            subsets=subsets,
            names=[record.name for record in trained],
            settings=[
                [n, *(shown(record.given.get(n)) for record in trained)] for n in sorted(names)
            ],
            where=f"Device {device}; {facts}. What is not listed had its default.",
        )
    )


def subsets(record: Record) -> list[list[str]]:
    """The twelve lowest estimates."""
    found = sorted(record.selection.get("subsets", []), key=lambda s: s["estimated"])
    return [
        [
            " + ".join(subset["tasks"]),
            f"{subset['estimated']:.4f}",
            "-" if subset.get("true") is None else f"{subset['true']:.4f}",
        ]
        for subset in found[:12]
    ]


def shown(value: Any) -> str:
    return (
        " ".join(map(str, value))
        if isinstance(value, list)
        else str("" if value is None else value)
    )
