"""The metrics for TensorBoard, where they are asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .errors import UserError


def require_tensorboard() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs tensorboard: pip install 'segloss[tensorboard]'")


class Board:
    """Every number of a row of metrics as a scalar; one per task as `name/task`."""

    def __init__(self, writer=None):
        self.writer = writer

    @classmethod
    def open(cls, folder: Path, wanted: bool, first_step: int) -> Board:
        """Writes nothing unless `wanted`; hides what an interrupted run wrote of later steps."""
        if not wanted:
            return cls()
        from torch.utils.tensorboard import SummaryWriter

        return cls(SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1))

    def add(self, row: dict[str, Any], step: int) -> None:
        if self.writer is None:
            return
        for name, value in _scalars(row):
            self.writer.add_scalar(name, value, step)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *error) -> None:
        if self.writer is not None:
            self.writer.close()


def _scalars(row: dict[str, Any]):
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", number) for key, number in value.items())
        elif isinstance(value, int | float) and name != "step":
            yield name, value
