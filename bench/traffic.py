"""Bytes a kernel moves, counted load by load in Triton's interpreter.

    TRITON_INTERPRET=1 python -m bench.traffic [LAUNCH ...]    # JSON: launch -> kernel -> bytes

What is counted is what the program asks for, not what caches make of it: a second read of the same
byte counts again. A kernel that multiplies matrices is charged for what its tiles read.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from bench import launches

V = 8192  # two of our tiles of a row, none of them ragged


@dataclass
class Traffic:
    """Of one kernel in one launch; bytes by tile accesses, and those of single elements apart."""

    read: int = 0
    written: int = 0
    read_singly: int = 0  # per-row numbers, and the target's logit
    written_singly: int = 0
    programs: int = 0
    touched: list[np.ndarray] = field(default_factory=list, repr=False)  # logits read, by address

    def add(self, way: str, pointers, mask) -> None:
        used = pointers.data[mask.data]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        name = way if pointers.data.size > 1 else f"{way}_singly"
        setattr(self, name, getattr(self, name) + used.size * size)

    def logits(self) -> int:
        """How many different logits were read."""
        return np.unique(np.concatenate(self.touched)).size if self.touched else 0

    def per_logit(self, logits: int | None = None) -> dict[str, float]:
        """`logits`: how many the launch stands for, where no kernel reads them."""
        count = logits or self.logits()
        totals = {k: v for k, v in asdict(self).items() if k not in ("touched", "programs")}
        share = {name: totals[name] / max(1, count) for name in ("read", "written")}
        singly = (self.read_singly + self.written_singly) / max(1, self.programs)
        return share | {"singly_per_program": singly, "logits": count}


@contextmanager
def tracing() -> Iterator[dict[str, Traffic]]:
    """Inside, interpreted kernels count what they move, by name."""
    found: dict[str, Traffic] = {}
    running = [Traffic(), (0, 0)]
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic = builder.create_atomic_rmw
    start, place = executor._init_args_hst, builder.set_grid_idx

    def counted_load(self, pointers, mask, *rest, **options):
        traffic, (first, last) = running
        traffic.add("read", pointers, mask)
        used = pointers.data[mask.data]
        if pointers.data.size > 1:
            traffic.touched.append(used[(used >= first) & (used < last)])
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self, pointers, value, mask, *rest, **options):
        running[0].add("written", pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def counted_atomic(self, operation, pointers, value, mask, *rest):
        running[0].add("read", pointers, mask)
        running[0].add("written", pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    def counted_start(self, args, options):
        running[0] = found.setdefault(self.fn.__name__, Traffic())
        values = tree_leaves([*args, *options.values()])  # those in tuples too
        logits = next(value for value in values if isinstance(value, Tensor))
        first = logits.data_ptr()
        running[1] = (first, first + logits.numel() * logits.element_size())
        return start(self, args, options)

    def counted_program(self, *index):
        running[0].programs += 1
        return place(self, *index)

    with (
        patch.object(builder, "set_grid_idx", counted_program),
        patch.object(builder, "create_masked_load", counted_load),
        patch.object(builder, "create_masked_store", counted_store),
        patch.object(builder, "create_atomic_rmw", counted_atomic),
        patch.object(executor, "_init_args_hst", counted_start),
        np.errstate(all="ignore"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield found


def count(names: Iterable[str]) -> dict[str, dict[str, dict[str, float]]]:
    result = {}
    for name in names:
        if name in launches.PEERS:
            result[name] = count_peer(name)
            continue
        with tracing() as found:
            launches.launch(name, torch.bfloat16, V, launches.PLAIN)
        result[name] = {kernel: traffic.per_logit() for kernel, traffic in found.items()}
    return result


def count_peer(name: str) -> dict[str, dict]:
    try:
        with tracing() as found:
            launches.PEERS[name]("sm_90")
    except ImportError as missing:
        return {"": {"error": str(missing)}}
    logits = None if name.startswith("Liger") else launches.HEAD[0] * launches.HEAD[1]
    return {kernel: traffic.per_logit(logits) for kernel, traffic in found.items()}


if __name__ == "__main__":
    everything = [*launches.LAUNCHES, *launches.PEERS]
    print(json.dumps(count(sys.argv[1:] or everything), indent=1))
