"""Training states on disk: what `--resume` continues from.

    resume/step-00000040/
        state.safetensors   trained weights, optimizer moments, random state, weighting buffers
        state.json          step, seconds, where metrics.jsonl ended
        trainer_state.json  what transformers' Trainer keeps beside
        manifest.json       size and SHA-256 of the three, written last

Only safetensors and JSON: a state that somebody sends cannot run code when it is read, which a
pickled optimizer could. A folder is written under another name, flushed to the disk and renamed, so
there is all of it or nothing; the manifest tells what a disk or a copy has damaged since.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

PARTIAL = "partial-"
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
TRAINER = "trainer_state.json"  # the Trainer's own name for it, by which it reads it


@dataclass(frozen=True)
class Checkpoint:
    """A training state as read, whole."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Damaged(Exception):
    """The checkpoint is not what was written; the text says how that shows."""


def write(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], trainer: dict
) -> Path:
    """Write `folder/step-…`, replacing one of the same step; OSError on a full disk."""
    from safetensors.torch import save_file

    target = folder / f"step-{step:08d}"
    partial = folder / f"{PARTIAL}{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / TENSORS)
        (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
        (partial / TRAINER).write_text(json.dumps(trainer), encoding="utf-8")
        entries = {name: _entry(partial / name) for name in (TENSORS, STATE, TRAINER)}
        (partial / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            flush(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        flush(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    if path.is_dir() and os.name == "nt":
        return  # a folder cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def read(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step. Raises `Damaged`."""
    from safetensors.torch import load_file

    path = folder / f"step-{step:08d}"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name in (TENSORS, STATE, TRAINER):
            _compare(name, manifest[name], _entry(path / name))
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        return Checkpoint(path, load_file(path / TENSORS), state)
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise Damaged(f"it cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{MANIFEST} cannot be read") from None


def peek(folder: Path, step: int) -> dict[str, Any]:
    """The numbers of a checkpoint, unchecked; empty where they cannot be read."""
    try:
        return json.loads((folder / f"step-{step:08d}" / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def prune(folder: Path, keep: Iterable[int]) -> None:
    """Remove every checkpoint but those of these steps, and what a kill left half-written."""
    kept = {f"step-{step:08d}" for step in keep}
    for path in folder.glob("*step-*"):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _entry(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _compare(name: str, written: dict[str, Any], found: dict[str, Any]) -> None:
    if found["bytes"] != written["bytes"]:
        raise Damaged(f"{name} has {found['bytes']} bytes, {written['bytes']} were written")
    if found != written:
        raise Damaged(f"{name} differs from what was written (SHA-256)")
