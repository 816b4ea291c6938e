"""`segloss report`: runs as one web page that needs no other file, and as pictures."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import TrainConfig, field_docs, option
from .errors import UserError
from .record import Record, read_records

PAGE = "report.html"

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 66rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: right; border-bottom: 1px solid #e5e7eb;
         vertical-align: top; }
td:first-child { white-space: nowrap; }
th:first-child, td:first-child, table.words td, table.words th { text-align: left; }
figure { margin: 0; } img { max-width: 100%; }
figcaption, .note { color: #52606d; font-size: 0.92rem; max-width: 52rem; }
details { margin-top: 2rem; } code { font-size: 0.9em; }
"""


def report(paths: list[str], output: str = "") -> None:
    """Write report.html and its pictures for the runs in some folders.

    Raises `UserError` for a folder that is no run's, or where nothing can be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("segloss report needs matplotlib: pip install 'segloss[train]'")
    records = read_records(paths)
    folder = Path(output or Path(paths[0]) / "report")
    _make_folder(folder)

    from .figures import pictures

    parts = []
    try:
        for picture in pictures(records):
            image = _png(picture.figure)
            (folder / f"{picture.name}.png").write_bytes(image)
            parts.append(_figure(picture.title, picture.caption, image))
        (folder / PAGE).write_text(_page(records, parts), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    print(folder / PAGE)


def _make_folder(folder: Path) -> None:
    """A new folder, or one with an older report, which is replaced."""
    try:
        taken = os.path.lexists(folder) and not (folder / PAGE).exists()
        if taken and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and holds no report; give another --output")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}") from None


def _png(figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # a task's name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(file, dpi=130, format="png")
    return file.getvalue()


# ---------------------------------------------------------------------------------------- page


def _page(records: Sequence[Record], figures: Sequence[str]) -> str:
    title = "segloss: " + ", ".join(record.name for record in records)
    body = [f"<h1>{_text(title)}</h1>"]
    body += [f"<p>{_text(_story(record))}</p>" for record in records]
    body += [_results_table(records), *figures, _chosen(records), _settings(records)]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{_text(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _figure(title: str, caption: str, image: bytes) -> str:
    data = base64.b64encode(image).decode()
    return (
        f"<h2>{_text(title)}</h2>\n<figure>\n"
        f'<img alt="{_text(title)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{_text(caption)}</figcaption>\n</figure>"
    )


def _text(value) -> str:
    return html.escape(str(value))


def _story(record: Record) -> str:
    """What the run did, in words."""
    settings = record.settings
    if record.selection:
        text = f"{record.name}: the loss of a model trained on any subset of its tasks, estimated."
        return text + (" The curves are of its training on all tasks." if record.steps else "")
    if not record.steps:
        return f"{record.name}: no step of training yet."
    tasks = ", ".join(record.tasks)
    size = settings.get("batch_size", 1) * settings.get("accumulation", 1)
    text = (
        f"{record.name}: {settings.get('model', 'a model')} trained on {tasks}; "
        f"{len(record.steps)} of {settings.get('steps', '?')} steps of {size} examples, "
        f"with the loss {settings.get('loss', '?')}"
    )
    if settings.get("lora_rank"):
        text += f", LoRA adapters of rank {settings['lora_rank']}"
    if settings.get("task_weights", "none") != "none":
        text += ", task weights by CoBa"
    if settings.get("sample_weights", "none") != "none":
        text += f", sample weights by {settings['sample_weights']}"
    return f"{text}. {_ending(record)}"


def _ending(record: Record) -> str:
    timing = record.results.get("timing")
    if timing is None:
        return "It has not finished: segloss train --resume goes on with it."
    text = f"Training took {timing['train']:.0f} s."
    if timing.get("stopped_by_time_limit"):
        text += " The time limit ended it early."
    if timing.get("stopped_by_patience"):
        text += " It ended early because the validation loss did not fall any more."
    return text


# -------------------------------------------------------------------------------------- tables


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    attribute = f' class="{kind}"' if kind else ""
    return f"<table{attribute}>\n<tr>{head}</tr>\n{body}\n</table>"


def _results_table(records: Sequence[Record]) -> str:
    """Each task of each finished run."""
    rows = []
    for record in records:
        for row in record.results.get("tasks", []):
            gain = row["exact_match_after"] - row["exact_match_before"]
            low, high = row["gain_low"], row["gain_high"]
            guess = max(row["chance"] or 0.0, row["majority"])
            rows.append(
                [
                    *([record.name] if len(records) > 1 else []),
                    row["task"],
                    str(row["items"]),
                    f"{row['loss_before']:.3f} → {row['loss_after']:.3f}",
                    f"{100 * row['exact_match_before']:.1f} → {100 * row['exact_match_after']:.1f}",
                    f"{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
                    f"{100 * guess:.1f}",
                ]
            )
    if not rows:
        return ""
    header = [
        *(["run"] if len(records) > 1 else []),
        *("task", "held-out items", "loss (nats per token)", "exact match (%)"),
        *("gain (95 % interval)", "guessing"),
    ]
    note = (
        "Interval: paired bootstrap over the items. Guessing: the better of chance and always "
        "giving the most frequent answer. A model that has not seen the form of the answers starts "
        "near 0, so part of a gain is the form."
    )
    return f'<h2>In numbers</h2>\n{_table(header, rows)}\n<p class="note">{_text(note)}</p>'


def _chosen(records: Sequence[Record]) -> str:
    """The tasks that a selection ended in, and its best subsets."""
    parts = []
    for record in records:
        if not record.selection:
            continue
        chosen = ", ".join(record.selection.get("chosen", [])) or "nothing"
        parts.append(f"<h2>Chosen tasks of {_text(record.name)}</h2>\n<p>{_text(chosen)}</p>")
        subsets = sorted(record.selection.get("subsets", []), key=lambda s: s["estimated"])
        rows = [
            [
                " + ".join(subset["tasks"]),
                f"{subset['estimated']:.4f}",
                "-" if subset.get("true") is None else f"{subset['true']:.4f}",
            ]
            for subset in subsets[:12]
        ]
        if rows:
            parts.append(_table(["subset", "estimated loss", "true loss"], rows))
        if len(subsets) > len(rows):
            note = f"The {len(rows)} lowest estimates of {len(subsets)}."
            parts.append(f'<p class="note">{note}</p>')
    return "\n".join(parts)


def _settings(records: Sequence[Record]) -> str:
    """Settings that are not the default or differ between runs; then all of them, folded up."""
    trained = [record for record in records if record.settings]
    if not trained:
        return ""
    docs = field_docs(TrainConfig)
    names = list(dict.fromkeys(name for record in trained for name in record.settings))
    changed = [name for name in names if any(_is_changed(name, r.settings) for r in trained)]
    header = ["setting", *(record.name for record in trained), "what it is"]

    def rows(chosen: Sequence[str]) -> list[list[str]]:
        return [
            [
                option(name),
                *(_shown(record.settings.get(name)) for record in trained),
                docs.get(name, ""),
            ]
            for name in chosen
        ]

    facts = [f"{key} {value}" for key, value in trained[0].description.get("versions", {}).items()]
    where = f"{trained[0].description.get('device', '?')}; " + ", ".join(facts)
    return (
        "<h2>Settings that are not the default</h2>\n"
        + _table(header, rows(changed), "words")
        + f"\n<details><summary>All settings</summary>\n{_table(header, rows(names), 'words')}\n"
        + f'<p class="note">Device and versions of {_text(trained[0].name)}: {_text(where)}</p>\n'
        + "</details>"
    )


# settings that the defaults of others depend on
DECIDING = ("data", "tasks", "steps", "task_weights", "patience", "lora_rank")


def _is_changed(name: str, settings: dict[str, Any]) -> bool:
    """Whether the setting is another than without being given, those others being as they are."""
    if name == "output" or name not in settings:
        return False
    deciding = {key: settings[key] for key in DECIDING if key in settings}
    if settings.get("data"):
        deciding.pop("tasks", None)
    usual = TrainConfig() if name in DECIDING else TrainConfig(**deciding).resolved()
    return _shown(settings[name]) != _shown(getattr(usual, name, None))


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)
