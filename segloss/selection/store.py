"""Margins and projected gradients of samples, in memory and in files.

R rows (a sample's margins), D dimensions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Rows:
    """Margins and projected gradients of some samples, a row each (or one per token)."""

    margin: Tensor  # (R,) float64
    gradient: Tensor  # (R, D) float64
    task: np.ndarray  # (R,) str

    def take(self, mask: np.ndarray) -> Rows:
        kept = torch.from_numpy(mask)
        return Rows(self.margin[kept], self.gradient[kept], self.task[mask])


@dataclass
class Shard:
    """Some samples as they lie in a file."""

    id: list[str] = field(default_factory=list)
    task: list[str] = field(default_factory=list)
    role: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # how many of the rows below are the sample's
    margin: np.ndarray = field(default_factory=lambda: np.zeros(0))
    gradient: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        text = {name: np.array(getattr(self, name), dtype=str) for name in ("id", "task", "role")}
        numbers = {
            name: np.array(getattr(self, name), dtype=np.int64) for name in ("tokens", "rows")
        }
        assert self.gradient is not None
        return text | numbers | {"margin": self.margin, "gradient": self.gradient}


class Store:
    """Shards by sample id, in memory and, given a folder, on disk: NumPy files without pickles.

    A file is there whole or not at all, so that a collection may be killed at any time; the next
    one goes on with the samples that are missing.
    """

    def __init__(self, folder: str | os.PathLike | None, identity: dict):
        self.shards: list[Shard] = []
        self.ids: set[str] = set()
        self._rows: dict[str, Rows] = {}
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_identity(identity)
            for path in sorted(self.folder.glob("rows-*.npz")):
                self._keep(self._read(path))

    def add(self, shard: Shard) -> None:
        if self.folder is not None:
            number = 1 + max(
                (int(p.stem.partition("-")[2]) for p in self.folder.glob("rows-*.npz")), default=-1
            )
            arrays: dict[str, Any] = shard.arrays()
            write_whole(
                self.folder / f"rows-{number:05d}.npz", lambda file: np.savez(file, **arrays)
            )
        self._keep(shard)
        self._rows.clear()

    def rows(self, role: str) -> Rows:
        """All rows with a role."""
        if role not in self._rows:
            shards = [shard for shard in self.shards if role in shard.role]
            if not shards:
                raise ValueError(f"no samples yet: call collect(samples, role={role!r}) first")
            margin = np.concatenate([shard.margin for shard in shards])
            gradient = np.concatenate([shard.gradient for shard in shards])
            repeat = np.concatenate([shard.rows for shard in shards])
            task = np.repeat(np.concatenate([shard.task for shard in shards]), repeat)
            mine = np.repeat(np.concatenate([shard.role for shard in shards]), repeat) == role
            rows = Rows(torch.from_numpy(margin), torch.from_numpy(gradient).double(), task)
            rows = rows.take(mine)
            if not (rows.margin.isfinite().all() and rows.gradient.isfinite().all()):
                raise ValueError(
                    f"the {role} samples hold margins or gradients that are no numbers"
                )
            self._rows[role] = rows
        return self._rows[role]

    def tokens(self, task: str) -> int:
        """Predicted tokens of a task's target samples."""
        return sum(
            tokens
            for shard in self.shards
            for name, role, tokens in zip(shard.task, shard.role, shard.tokens, strict=True)
            if name == task and role == "target"
        )

    def _keep(self, shard: Shard) -> None:
        self.shards.append(shard)
        self.ids.update(shard.id)

    def _check_identity(self, identity: dict) -> None:
        assert self.folder is not None
        path = self.folder / "store.json"
        if not path.exists():
            text = json.dumps(identity, indent=2) + "\n"
            write_whole(path, lambda file: file.write(text.encode()))
            return
        found = json.loads(path.read_text())
        different = [key for key in identity if found.get(key) != identity[key]]
        if different:
            key = different[0]
            raise ValueError(
                f"store {self.folder} holds gradients with {key}={found.get(key)!r}, not "
                f"{identity[key]!r}; give another folder, or remove this one"
            )

    @staticmethod
    def _read(path: Path) -> Shard:
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            lists = {
                name: arrays[name].tolist() for name in ("id", "task", "role", "tokens", "rows")
            }
            return Shard(**lists, margin=arrays["margin"], gradient=arrays["gradient"])
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it and collect again") from None
        except Exception as error:
            if type(error).__name__ != "BadZipFile":
                raise
            raise ValueError(f"{path} is damaged ({error}); remove it and collect again") from None


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """A file that is complete on disk before it has its name."""
    partial = path.with_name(f"partial-{path.name}")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
