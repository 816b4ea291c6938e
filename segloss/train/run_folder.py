"""The run folder, and how a full disk or a kill is met without losing what is finished."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import UserError, first_line

METRICS = "metrics.jsonl"
# folders inside the run folder
RESUME, BEST, FINAL, ADAPTER = "resume", "best", "checkpoint", "adapter"


class RunFolder:
    """What a run leaves behind.

        config.json     the resolved settings, versions and data counts
        metrics.jsonl   one object per step and per evaluation, on disk as soon as it exists
        checkpoint/     the trained model and its tokenizer (safetensors)
        adapter/        with LoRA, the adapters alone, as peft reads them
        resume/         with --save-every, what --resume continues from
        best/           with --patience, the best weights so far, until the run is finished
        results.json, results.md, loss.png

    A failed write ends nothing: it is kept in `failures`, later work goes on, and leaving the
    `with` block reports it. Lines of metrics wait in memory until there is room again.
    """

    def __init__(self, path: str, description: dict[str, Any] | None = None):
        """Create the folder, with its config.json from the first moment it has its name.

        Raises `UserError` where it exists or cannot be made.
        """
        self.path = Path(path)
        if os.path.lexists(path):
            raise exists(path)
        partial = self.path.with_name(f"partial-{self.path.name}")
        try:
            shutil.rmtree(partial, ignore_errors=True)  # what a kill has left
            partial.mkdir(parents=True)
            if description is not None:
                text = json.dumps(description, indent=2) + "\n"
                (partial / "config.json").write_text(text, encoding="utf-8")
            self._open(partial / METRICS)
            partial.rename(self.path)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"cannot create the run folder {path}: {error.strerror}") from None

    @classmethod
    def reopen(cls, path: str) -> RunFolder:
        """The folder of a run that was interrupted. Raises `UserError` where another one has it."""
        folder = cls.__new__(cls)
        folder.path = Path(path)
        folder._open(folder.path / METRICS)
        for partial in folder.path.glob("partial-*"):
            _remove(partial)
        return folder

    def _open(self, metrics: Path) -> None:
        self.failures: list[str] = []
        self._pending = b""
        # unbuffered: a line is with the operating system when `log` returns
        self._metrics = metrics.open("ab", buffering=0)
        if not _lock(self._metrics):
            self._metrics.close()
            raise UserError(f"the run in {metrics.parent} is still going on in another process")

    def log(self, event: str, **values) -> None:
        """Append one line to metrics.jsonl; a number that JSON cannot spell becomes null."""
        self._pending += json.dumps({"event": event, **_finite(values)}).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._metrics.write(self._pending) :]
        except OSError as error:
            self._failed(METRICS, error)

    def metrics_size(self) -> int | None:
        """Bytes of metrics.jsonl, held by the disk; None while lines wait for room."""
        if self._pending:
            return None
        os.fsync(self._metrics.fileno())
        return os.fstat(self._metrics.fileno()).st_size

    def cut_metrics(self, size: int) -> list[dict[str, Any]]:
        """Forget the lines after the first `size` bytes; the rows of those that stay."""
        self._metrics.truncate(size)
        lines = (self.path / METRICS).read_bytes().splitlines()
        return [json.loads(line) for line in lines]

    def write_json(self, name: str, value) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write(self, name: str, save) -> None:
        """`save(path)`, then the rename that makes it `name`: there is all of it or nothing."""
        partial = self.path / f"partial-{name}"
        try:
            save(partial)
            if (self.path / name).is_dir():  # of a run that is resumed; a folder is not replaced
                shutil.rmtree(self.path / name)
            partial.rename(self.path / name)
        except Exception as error:  # safetensors and tokenizers report a full disk each in its way
            self._failed(name, error)
            _remove(partial)

    def attempt(self, name: str, save) -> bool:
        """`save()`, which writes `name` whole or not at all; a failure ends nothing.

        Returns whether it is written.
        """
        try:
            save()
        except Exception as error:
            self._failed(name, error)
            return False
        return True

    def require_room(self, num_bytes: int) -> None:
        """Raise `UserError` where the disk has no room for checkpoints of so many bytes."""
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise UserError(
                f"{self.path} has {free / 1e6:.0f} MB of free disk space; the run's checkpoints "
                f"need {num_bytes / 1e6:.0f} MB"
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
            self.failures = [text for text in self.failures if not text.startswith(METRICS)]
        if error is None:
            self.raise_failures()

    def _failed(self, name: str, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or first_line(error)
        failure = f"{name} ({reason})"
        if failure not in self.failures:
            self.failures.append(failure)


def finished(path: Path) -> bool:
    """Whether a run's results and weights are there, so that nothing is left to resume."""
    return (path / "results.json").exists() and (path / FINAL).exists()


def exists(path: str) -> UserError:
    return UserError(f"the run folder {path} exists already; remove it or give another --output")


def _finite(value):
    """None for a number that JSON cannot spell, at any depth of dicts."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lock(file) -> bool:
    """Have the file alone until it is closed or the process ends; True where that is unknown."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
