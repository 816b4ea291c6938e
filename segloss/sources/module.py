"""Logits of a head of any kind, made a chunk of rows at a time by its own `forward`.

N tokens (the valid ones), V classes, K classes present, R rows of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from segloss.head.inputs import CPU_CHUNK_BYTES, CPU_CHUNK_ROWS, GPU_CHUNK_BYTES, GPU_CHUNK_ROWS
from segloss.head.panels import ClassTotals
from segloss.head.rows import compact_batch, compacted, even_slices, renumbered, spread
from segloss.head.sweep import ROW_OUTPUTS, ROW_STATS, kept_rows_only, kept_statistics
from segloss.kernels.candidates import candidates
from segloss.kernels.class_stats import row_dots
from segloss.kernels.common import Rows
from segloss.kernels.row_stats import row_stats
from segloss.sweep.attach import attach
from segloss.sweep.batch import Batch
from segloss.sweep.beside import (
    DIVERGENCES,
    LISTED,
    Backward,
    Readings,
    has_plain,
    logits_gradient,
    pack,
)
from segloss.sweep.classes import class_ids, class_index, thresholds
from segloss.sweep.request import Request, Sweep
from segloss.sweep.source import Source
from segloss.sweep.terms import grad_terms, rescale, row_slices


@dataclass(frozen=True, eq=False)
class ModuleLogits(Source):
    """`transform(module(hidden))`, a chunk of rows at a time; backward calls the module again.

    For heads that are no `hidden @ weight.T`: other adapters than LoRA, adapter dropout, quantised
    weights, a class of one's own. One call of the module forward and one backward for every loss.

    Args:
        hidden: (..., D).
        module: the head.
        forward: what makes (1, R, V) of (1, R, D) with the module's tensors, each row by itself.
        softcap, scale, bias, num_classes: done to its logits, as `transform.Transform` does.
    """

    hidden: Tensor
    module: nn.Module
    forward: Callable
    softcap: float | None = None
    scale: float = 1.0
    bias: Tensor | None = None
    width: int | None = None
    packs = False
    tensors: dict[str, Tensor] = field(init=False, repr=False)
    num_columns: int = field(init=False, repr=False)
    autocast: tuple = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "tensors", trained_tensors(self.module))
        object.__setattr__(self, "autocast", autocast_of(self.hidden.device))
        flat = self.hidden.detach().reshape(-1, self.hidden.shape[-1])
        with torch.no_grad(), Repeatable(flat.device):
            # of one row even where there is none
            one = flat[:1] if len(flat) else flat.new_zeros(1, flat.shape[1])
            columns = self.logits(one).shape[-1]
        object.__setattr__(self, "num_columns", columns)

    @property
    def leading_shape(self) -> torch.Size:
        return self.hidden.shape[:-1]

    @property
    def num_classes(self) -> int:
        return self.num_columns

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, V) of (R, D), before scale and softcap."""
        z = self.forward(hidden[None])[0, ..., : self.width]
        return z if self.bias is None else z + self.bias.to(z.device, z.dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self.logits(self.hidden.reshape(-1, self.hidden.shape[-1])[index])

    def block(self, rows: Tensor | slice, classes: slice) -> Rows:
        device = self.hidden.device.type
        with torch.autocast(device, self.autocast[1], enabled=self.autocast[0]):
            return super().block(rows, classes)

    def block_rows(self, num_rows: int) -> int:
        return chunk_rows(self, num_rows)

    def sweep(self, batch: Batch, request: Request) -> Sweep:
        return sweep_module(self, batch, request)

    def plan(self, batch: Batch, row_sum: bool, all_classes: bool, peaks: bool) -> str:
        rows = int(batch.valid.sum())
        return (
            f"tokens     {rows} of {batch.target.numel()} (ignored ones left out)\n"
            "mode       the head's own forward, twice, and its backward\n"
            f"chunks     of {chunk_rows(self, rows)} rows"
        )

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        raise TypeError("a head that is used by its own forward is not compiled; use eager mode")

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> ModuleLogits:
        raise TypeError("a head that is used by its own forward is not compiled; use eager mode")


def autocast_of(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """By name, what gets a gradient; under FSDP1 plain tensors stand where the parameters were.

    Errors: TypeError where an engine gathers the parts of the head one by one, as its own hooks
    inside of `forward` would do it, and not while the head runs.
    """
    check_one_unit(module)
    found: dict[str, Tensor] = {}
    for prefix, part in module.named_modules():
        for name, tensor in {**vars(part), **part._parameters}.items():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                if not tensor.numel():  # a ZeRO-3 placeholder
                    raise in_parts(module)
                found[f"{prefix}.{name}".lstrip(".")] = tensor
    return found


def check_one_unit(module: nn.Module) -> None:
    if any(hasattr(part, "_fsdp_wrapped_module") for part in module.modules()):
        raise in_parts(module)


def in_parts(module: nn.Module) -> TypeError:
    return TypeError(
        f"the head is a {type(module).__name__}, and its engine gathers the parts one by one; make "
        "the head one unit (FSDP), or leave it out of the adapter (ZeRO-3)"
    )


class Repeatable:
    """A `with` block whose random numbers are those of the state it was made in.

    The generator outside goes on as if the block were not there; `advance` lets it follow.
    """

    def __init__(self, device: torch.device):
        self.devices = [] if device.type == "cpu" else [device]
        self.module: Any = torch.get_device_module(device) if self.devices else None
        self.state = torch.get_rng_state(), self._device_state()

    def _device_state(self):
        return [self.module.get_rng_state(device) for device in self.devices]

    def _set(self, state) -> None:
        torch.set_rng_state(state[0])
        for device, value in zip(self.devices, state[1], strict=True):
            self.module.set_rng_state(value, device)

    def __enter__(self) -> None:
        self.outside = torch.get_rng_state(), self._device_state()
        self._set(self.state)

    def __exit__(self, *exception) -> None:
        self._set(self.outside)


class Repeated(nn.Module):
    """Calls `forward` of a head with given tensors in place of its own, past the head's hooks."""

    def __init__(self, module: nn.Module, forward: Callable):
        super().__init__()
        self.head = module
        self.call = forward

    def forward(self, hidden: Tensor) -> Tensor:
        return self.call(hidden[None])[0]


def chunk_rows(source: ModuleLogits, num_rows: int) -> int:
    """Rows whose logits fit the bytes of a chunk, as of a linear head."""
    gpu = source.device.type == "cuda"
    budget = GPU_CHUNK_BYTES if gpu else CPU_CHUNK_BYTES
    rows = budget // (source.num_classes * source.hidden.dtype.itemsize)
    return max(1, min(num_rows, max(GPU_CHUNK_ROWS if gpu else CPU_CHUNK_ROWS, rows)))


def slices_of(source: ModuleLogits, num_rows: int) -> list[slice]:
    step = chunk_rows(source, num_rows)
    return [slice(i, min(i + step, num_rows)) for i in range(0, max(1, num_rows), step)]


def sweep_module(source: ModuleLogits, batch: Batch, request: Request) -> Sweep:
    """Every statistic of the request, its chunks read while they are there."""
    device = source.device.type
    autocast = autocast_of(source.device)
    random = Repeatable(source.device)
    num_tokens = batch.target.numel()
    with torch.no_grad():
        rows = None if bool(batch.valid.all()) else batch.valid.nonzero()[:, 0]
        inner = compact_batch(batch, rows)
        ids = class_ids(request, batch)
        row_ids = {n: compacted(ids.get(n), rows) for n in ("sample", "own")}
        per_class = ClassTotals(source, request, ids, row_ids["sample"], inner)  # type: ignore[arg-type]
        flat = source.hidden.reshape(-1, source.hidden.shape[-1])
        hidden = flat if rows is None else flat[rows]
        slices = slices_of(source, len(hidden))
        readings = Readings(inner.beside, inner.valid, request.divergences)
        collected, panels = [], []
        for here in slices:
            with torch.autocast(device, autocast[1], enabled=autocast[0]):
                data = source.logits(hidden[here])
            z = Rows.of(data, source.softcap, source.scale)
            panel = per_class.panel(z)
            with torch.autocast(device, enabled=False):
                stats = row_stats(
                    z,
                    inner.target[here],
                    batch.ignore_index,
                    entropy=request.entropy,
                    argmax=request.argmax,
                    column_sums=request.column_sums,
                    column_weight=request.column_weight,
                )
                readings.read(z, here, stats)
                per_class.add(panel, stats, here)
            collected.append(stats)
            if request.rankings:
                panels.append(replace(z, data=z.data[:, :, ids["present"]]))
        stacked: dict[str, Tensor] = {
            name: torch.cat([getattr(c, name) for c in collected])
            for name in (*ROW_STATS, "row_max", "log_sum")
            if name != "lse" and getattr(collected[0], name) is not None
        }
        stacked["lse"] = stacked["row_max"] + stacked["log_sum"]
        stacked |= {n: v for n, v in readings.outputs().items() if v is not None}
        values: dict[str, Any] = {
            name: spread(stacked.get(name), rows, num_tokens, -1 if name == "argmax" else 0)
            for name in (*ROW_STATS, LISTED, DIVERGENCES)
        }
        target = class_index(batch.target, batch.valid, batch.num_classes)
        found = Sweep(**values, target=target, **ids)
        per_class.store(found)
        if request.rankings:
            tau = thresholds(request, batch, found)
            entries = list(candidates_of(panels, slices, stacked, row_ids, tau))
            found.candidate_row, found.candidate_class, found.candidate_prob = entries
            if rows is not None:
                found.candidate_row = rows[found.candidate_row]
    outputs = {
        name: getattr(found, name)
        for name in (*ROW_OUTPUTS, "prob_sum", "candidate_prob", "peak_prob")
    }
    packed, seconds = pack(batch.beside, request.divergences)
    saved = {
        **kept_statistics(found, inner, stacked, row_ids["sample"], rows, request),
        "peak_row": renumbered(per_class.peak_row, rows),
        **readings.saved(),
        **packed,
    }
    # the rule keeps no tensor: they live in the saved ones only
    rule = functools.partial(
        gradients,
        names=tuple(source.tensors),
        repeated=Repeated(source.module, source.forward),
        transform=(source.softcap, source.scale, source.bias, source.width),
        autocast=autocast,
        random=random,
        step=chunk_rows(source, len(hidden)),
        divergences=request.divergences,
        seconds=seconds,
    )
    tensors = (source.hidden, *source.tensors.values())
    found = replace(found, **attach(rule, outputs, saved, tensors))
    found.named(batch.beside, request.divergences)
    return found


def candidates_of(panels, slices, stats: dict, row_ids: dict, tau) -> Iterator[Tensor]:
    """(row, class, probability) of the Lovász candidates, from panels (R, K) of every chunk."""
    found = []
    columns = torch.arange(tau.shape[-1], device=tau.device)
    for panel, here in zip(panels, slices, strict=True):
        at = panel, stats["row_max"][here], stats["log_sum"][here], columns
        part = candidates(*at, row_ids["sample"][here], row_ids["own"][here], tau)
        found.append((part.row + here.start, part.class_index, part.prob))
    return (torch.cat(column) for column in zip(*found, strict=True))


def gradients(
    tensors,
    saved,
    grads,
    needed,
    *,
    names,
    repeated,
    transform,
    autocast,
    random,
    step,
    divergences,
    seconds,
) -> tuple:
    """Gradients of hidden and of the head's tensors, from those of the statistics."""
    hidden, *weights = tensors
    softcap, scale, bias, width = transform
    rows = saved.get("rows")
    if rows is not None:
        grads = {name: grad[rows] if name in ROW_OUTPUTS else grad for name, grad in grads.items()}
        saved = kept_rows_only(saved, rows)
    terms = grad_terms(saved, grads)
    upstream = grads.get(DIVERGENCES)
    power = rescale(terms, *(() if upstream is None else (upstream,)))
    upstream = None if upstream is None else upstream / power
    back = Backward.of(saved, upstream, divergences, seconds)
    flat = hidden.reshape(-1, hidden.shape[-1])
    kept = flat if rows is None else flat[rows]
    leaves = [w.detach().requires_grad_() for w in weights]
    given = {f"head.{name}": leaf for name, leaf in zip(names, leaves, strict=True)}
    kept_grad = torch.zeros_like(kept)
    sums: list = [0] * len(leaves)
    with random:
        slices = even_slices(len(kept), step)
        for here, part in zip(slices, row_slices(terms, slices), strict=True):
            chunk = kept[here].detach().requires_grad_()
            with (
                torch.enable_grad(),
                torch.autocast(hidden.device.type, autocast[1], enabled=autocast[0]),
            ):
                z = torch.func.functional_call(repeated, given, (chunk,))
            raw = z.detach()[..., :width]
            raw = raw.contiguous() if bias is None else raw + bias.to(raw.device, raw.dtype)
            dz = torch.zeros_like(z)
            block = Rows.of(raw, softcap, scale)
            if part.class_grad is not None:
                at = part.row_max, part.log_sum, part.columns
                dots = row_dots(block, *at, part.sample, part.class_grad)  # type: ignore[arg-type]
                weight = 1 if part.row_weight is None else part.row_weight
                part.prob_coef = part.prob_coef - dots * weight
            pairs, out = back.pairs(block, here), torch.empty_like(raw)
            dz[..., :width] = logits_gradient(block, part, pairs, out, has_plain(grads))
            found = torch.autograd.grad(z, [chunk, *leaves], dz, allow_unused=True)
            kept_grad[here] = 0 if found[0] is None else found[0]
            for i, grad in enumerate(found[1:]):
                if grad is not None:  # chunks are added up in float32 at least
                    sums[i] = sums[i] + grad.to(torch.promote_types(grad.dtype, torch.float32))
    if rows is not None:
        kept_grad = torch.zeros_like(flat).index_copy_(0, rows, kept_grad)
    every = [kept_grad.view(hidden.shape), *sums]
    return tuple(
        (torch.zeros_like(t) if isinstance(g, int) else (g * power).to(t.dtype)) if need else None
        for t, g, need in zip(tensors, every, needed, strict=True)
    )
