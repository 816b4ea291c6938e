"""What the command line shows instead of a traceback, and files read so."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something the user can put right, wherever it is found: one line on stderr, exit code 2."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """What was meant by a name that is not known."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def text_of(path: str | Path) -> str:
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        lines = content[: error.start].split(b"\n")
        place = f"{error.reason} at byte {len(lines[-1]) + 1}"
        raise UserError(f"{path}, line {len(lines)}: not UTF-8 ({place})") from None


def parsed(text: str, where: str | Path) -> Any:
    """What JSON says."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{where}{line}: not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{where}: not JSON that can be read (nested too deeply)") from None


def json_rows(text: str, source: str | Path) -> list[tuple[str, Any]]:
    """(where, object) of each line that is not blank, or of each item of an array in a .json."""
    if str(source).endswith(".json") and text.lstrip().startswith("["):
        return [(f"{source}, item {i}", row) for i, row in enumerate(parsed(text, source), 1)]
    lines = [(f"{source}, line {number}", line) for number, line in enumerate(text.split("\n"), 1)]
    return [(where, parsed(line, where)) for where, line in lines if line.strip()]
