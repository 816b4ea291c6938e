"""Columns of a data set that the loss reads, through collators that do not know them.

B rows of T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss.checks import describe
from segloss.integrations.window import IGNORE, LOSS_COLUMNS, TEACHER_COLUMNS


class KeepColumns:
    """A collator that knows only its own columns, and beside it those that the loss reads.

    A column has a number per row, or one per token, which is filled up with 0 where the collator
    fills up the row; those of a stored teacher have a list of numbers per token. Whatever else is
    asked of it is the collator's.
    """

    def __init__(self, collator: Callable[[list], Any]):
        self.collator = collator

    def __call__(self, examples: list[Any], *args, **kwargs) -> Any:
        names = columns_of(examples)
        if not names:
            return self.collator(examples, *args, **kwargs)
        known = [{k: v for k, v in row.items() if k not in names} for row in examples]
        batch = self.collator(known, *args, **kwargs)
        if isinstance(batch, Mapping):
            for name in names:
                if name not in batch:
                    batch[name] = collated(name, examples, batch)  # type: ignore[index]
        return batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)


def columns_of(data: Any) -> list[str] | None:
    """Those of an example or a data set; None where it does not say before it is read."""
    names = data.keys() if isinstance(data, Mapping) else getattr(data, "column_names", None)
    if names is None and isinstance(data, (list, tuple)) and data:
        rows = [row for row in data if isinstance(row, Mapping)]
        names = set().union(*rows) if rows else None  # one that some rows have is one of all
    return None if names is None else [name for name in LOSS_COLUMNS if name in names]


def collated(name: str, examples: Sequence[Any], batch: Mapping[str, Tensor]) -> Tensor:
    """One column: per row (B,), per token (B, T), or of rows that were joined to (1, T).

    Those of a stored teacher have one more dimension, the longest list's k.
    """
    if any(example.get(name) is None for example in examples):
        raise ValueError(f"{name} is missing in some rows; it takes a number for each")
    try:
        if name in TEACHER_COLUMNS:
            values = lists(name, examples)
        else:
            values = [torch.as_tensor(example[name]) for example in examples]
    except (TypeError, ValueError):
        wanted = "a list of numbers per token" if name in TEACHER_COLUMNS else "numbers"
        raise ValueError(
            f"{name} is {describe(examples[0][name])}; the loss reads this column and takes "
            f"{wanted}"
        ) from None
    ids = next((batch[key] for key in ("labels", "input_ids") if key in batch), None)
    if ids is None or (ids.shape[0] == len(values) and all(v.dim() == 0 for v in values)):
        return torch.stack(values)
    lengths = [length_of(example) for example in examples]
    for value, length in zip(values, lengths, strict=True):
        if name in TEACHER_COLUMNS:
            if len(value) != length:
                raise ValueError(
                    f"{name} has {len(value)} lists in a row of {length} tokens; it takes one per "
                    "token"
                )
        elif value.dim() > 1 or (value.dim() == 1 and len(value) != length):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} in a row of {length} tokens; it takes one "
                "number, or one per token"
            )
    rows = [
        value if value.dim() > 1 else value.expand(length)
        for value, length in zip(values, lengths, strict=True)
    ]
    if ids.shape[0] == 1 and len(rows) > 1:  # joined to one row
        return filled(name, torch.cat(rows), 0, ids.shape[1] - sum(lengths))[None]
    if ids.shape[0] != len(rows):
        raise ValueError(
            f"{name} is given for {len(rows)} rows, of which the collator made {ids.shape[0]}; "
            "pack the data set together with this column, and with sample_ids"
        )
    width = ids.shape[1]
    return torch.stack([placed(name, row, width, batch, i) for i, row in enumerate(rows)])


def lists(name: str, examples: Sequence[Any]) -> list[Tensor]:
    """(T, k) of each row, k that of the longest list of all."""
    tables = [x.tolist() if hasattr(x, "tolist") else x for x in (row[name] for row in examples)]
    width = max([1, *(len(part) for table in tables for part in table)])
    dtype = torch.float32 if name == "teacher_log_prob" else None
    fill = TEACHER_COLUMNS[name]
    return [
        torch.as_tensor([[*part, *[fill] * (width - len(part))] for part in table], dtype=dtype)
        .reshape(len(table), width)
        for table in tables
    ]  # fmt: skip


def filled(name: str, row: Tensor, before: int, after: int) -> Tensor:
    """With what stands for nothing at the ends of the first dimension."""
    others = (0, 0) * (row.dim() - 1)
    return F.pad(row, (*others, before, after), value=TEACHER_COLUMNS.get(name, 0))


def length_of(example: Mapping[str, Any]) -> int:
    """Of the row of labels, which the loss is of; those of a decoder are not its input's."""
    labels = example.get("labels", example.get("input_ids"))
    return len(labels) if labels is not None and not isinstance(labels, int) else 1


def placed(name: str, row: Tensor, width: int, batch: Mapping[str, Tensor], i: int) -> Tensor:
    """The row where its tokens stand in the collated batch: on the left or on the right."""
    room = width - len(row)
    if room == 0:
        return row
    if room < 0:
        raise ValueError(
            f"{name} has {len(row)} numbers for a row that the collator cut to {width} tokens; cut "
            "the data set together with this column"
        )
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    on_the_left = True
    if labels is not None and bool((labels[i, len(row) :] != IGNORE).any()):
        on_the_left = False
    elif labels is not None and bool((labels[i, :room] != IGNORE).any()):
        on_the_left = True
    elif mask is not None and mask.shape[1:] == (width,):
        on_the_left = bool(mask[i, 0] != 0)
    return filled(name, row, *((0, room) if on_the_left else (room, 0)))
