"""The run folder, and how a full disk is met without losing what is finished."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from .errors import UserError, first_line


class RunFolder:
    """What a run leaves behind.

        config.json     the resolved settings, versions and data counts
        metrics.jsonl   one object per step and per evaluation, on disk as soon as it exists
        checkpoint/     the trained model and its tokenizer (safetensors)
        results.json, results.md, loss.png

    A failed write ends nothing: it is kept in `failures`, later work goes on, and leaving the
    `with` block reports it. Lines of metrics wait in memory until there is room again.
    """

    def __init__(self, path: str):
        """Create the folder. Raises `UserError` where it exists or cannot be made."""
        self.path = Path(path)
        self.failures: list[str] = []
        self._pending = b""
        try:
            self.path.mkdir(parents=True)
            # unbuffered: a line is with the operating system when `log` returns
            self._metrics = (self.path / "metrics.jsonl").open("ab", buffering=0)
        except FileExistsError:
            raise exists(path) from None
        except OSError as error:
            raise UserError(f"cannot create the run folder {path}: {error.strerror}") from None

    def log(self, event: str, **values) -> None:
        """Append one line to metrics.jsonl; a number that JSON cannot spell becomes null."""
        values = {key: _finite(value) for key, value in values.items()}
        self._pending += json.dumps({"event": event, **values}).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._metrics.write(self._pending) :]
        except OSError as error:
            self._failed("metrics.jsonl", error)

    def write_json(self, name: str, value) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write(self, name: str, save) -> None:
        """`save(path)`, then the rename that makes it `name`: there is all of it or nothing."""
        partial = self.path / f"partial-{name}"
        try:
            save(partial)
            partial.rename(self.path / name)
        except Exception as error:  # safetensors and tokenizers report a full disk each in its way
            self._failed(name, error)
            _remove(partial)

    def require_room(self, num_bytes: int) -> None:
        """Raise `UserError` where the disk has no room for a checkpoint of so many bytes."""
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise UserError(
                f"{self.path} has {free / 1e6:.0f} MB of free disk space; the checkpoint after "
                f"training needs {num_bytes / 1e6:.0f} MB"
            )

    def raise_failures(self) -> None:
        """Raise `UserError` if anything could not be written."""
        if self.failures:
            raise UserError(f"could not write to {self.path}: {'; '.join(self.failures)}")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._metrics.close()
        if not self._pending:
            self.failures = [text for text in self.failures if not text.startswith("metrics.jsonl")]
        if error is None:
            self.raise_failures()

    def _failed(self, name: str, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or first_line(error)
        failure = f"{name} ({reason})"
        if failure not in self.failures:
            self.failures.append(failure)


def exists(path: str) -> UserError:
    return UserError(f"the run folder {path} exists already; remove it or give another --output")


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
