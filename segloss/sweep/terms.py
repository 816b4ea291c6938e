"""The terms of the one backward, from the gradients of a sweep's statistics.

N tokens, V classes, K classes looked at, B samples.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from segloss.kernels.logit_grad import GradTerms
from segloss.sharding import Sharding
from segloss.sweep.classes import group_sum


def grad_terms(saved: dict[str, Tensor], grads: dict[str, Tensor], sharding: Sharding) -> GradTerms:
    """The terms of `kernels/logit_grad.py`, but for the class sums' part of `s_i`.

    Their classes are those of all ranks, their entries the ones whose class is here.
    """
    zero = torch.zeros_like(saved["row_max"])
    target_coef = grads.get("log_prob", zero)
    terms = GradTerms(
        valid=saved["valid"],
        target=saved["target"],
        row_max=saved["row_max"],
        log_sum=saved["log_sum"],
        prob_coef=row_coef(saved, grads),
        target_coef=target_coef,
        target_rest=target_coef * -torch.expm1(saved["log_prob"]),
    )
    if "entropy" in grads:
        terms.entropy, terms.entropy_grad = saved["entropy"], grads["entropy"]
    if "logit_sum" in grads:
        terms.sum_grad, terms.column_weight = grads["logit_sum"], saved.get("column_weight")
    if "prob_sum" in grads:
        terms.sample, terms.class_grad = saved["sample"], grads["prob_sum"].contiguous()
        terms.columns, terms.row_weight = saved.get("classes"), saved.get("row_weight")
    add_entries(terms, candidate_entries(saved, grads), peak_entries(saved, grads))
    if "listed" in grads:
        add_listed(terms, saved["ids"], listed_rest(saved, grads), sharding)
    return terms


def row_coef(saved: dict[str, Tensor], grads: dict[str, Tensor]) -> Tensor:
    """`prob_coef` (N,) as far as it is of single rows, the same on all ranks of the classes."""
    zero = torch.zeros_like(saved["row_max"])
    coef = grads.get("lse", zero) - grads.get("log_prob", zero)
    return coef - listed_rest(saved, grads).sum(-1) if "listed" in grads else coef


def add_entries(terms: GradTerms, candidate: tuple | None, peak: tuple | None) -> None:
    """The entries with a gradient of their own, ordered by row and column, each once."""
    if candidate is None and peak is None:
        return
    if peak is None:
        row, column, grad, prob = candidate
    else:
        both = [entry for entry in (candidate, peak) if entry is not None]
        row, column, grad, prob = (torch.cat(part) for part in zip(*both, strict=True))
    terms.prob_coef = terms.prob_coef - group_sum(prob * grad, row, terms.row_max.numel())
    if peak is not None and row.numel():
        # a candidate and a peak may be the same entry
        width = int(column.max()) + 1
        key, inverse = torch.unique(row * width + column, return_inverse=True)
        row, column, grad = key // width, key % width, group_sum(grad, inverse, key.numel())
    if terms.class_grad is not None and terms.columns is not None:
        column = torch.searchsorted(terms.columns, column)
    terms.entry_row, terms.entry_class, terms.entry_grad = row, column, grad


def listed_rest(saved: dict[str, Tensor], grads: dict[str, Tensor]) -> Tensor:
    """Gradient of the listed classes' own logits (N, k), 0 where nothing is listed."""
    return torch.where((saved["ids"] >= 0) & saved["valid"][:, None], grads["listed"], 0)


def add_listed(terms: GradTerms, listed: Tensor, rest: Tensor, sharding: Sharding) -> None:
    """The listed classes' logits as entries, each place once or with the same sum each time."""
    num_rows, width = listed.shape
    row = torch.arange(num_rows, device=listed.device).repeat_interleave(width)
    here = sharding.holds(listed)
    # once the columns are counted from the first one here, -1 is no entry
    column = torch.where(here, listed, sharding.first - 1).reshape(-1)
    if listed.is_cuda and terms.entry_grad is None and terms.class_grad is None:
        # a class may be listed twice; without a look at how often, which would synchronise
        same = (listed[:, :, None] == listed[:, None, :]).to(rest.dtype)
        rest = torch.bmm(same, rest[:, :, None]).view(-1)
        terms.entry_row, terms.entry_class, terms.entry_rest = row, column, rest
        terms.entry_grad = torch.zeros_like(rest)
        return
    used = (here & terms.valid[:, None]).view(-1)
    row, column, rest = row[used], column[used], rest.view(-1)[used]
    grad = torch.zeros_like(rest)
    if terms.class_grad is not None and terms.columns is not None:
        include(terms, column)
    if terms.entry_grad is not None:
        others = terms.entry_class if terms.columns is None else terms.columns[terms.entry_class]
        row, column = torch.cat([terms.entry_row, row]), torch.cat([others, column])
        rest = torch.cat([torch.zeros_like(terms.entry_grad), rest])
        grad = torch.cat([terms.entry_grad, grad])
    width = int(column.max()) + 1 if column.numel() else 1
    key, inverse = torch.unique(row * width + column, return_inverse=True)
    row, column = key // width, key % width
    if terms.columns is not None:
        column = torch.searchsorted(terms.columns, column)
    terms.entry_row, terms.entry_class = row, column
    terms.entry_grad = group_sum(grad, inverse, key.numel())
    terms.entry_rest = group_sum(rest, inverse, key.numel())


def include(terms: GradTerms, column: Tensor) -> None:
    """More classes among the listed columns, without a gradient of their probability sum."""
    columns = torch.unique(torch.cat([terms.columns, column]))
    place = torch.searchsorted(columns, terms.columns)
    grad = terms.class_grad.new_zeros(terms.class_grad.shape[0], columns.numel())
    grad[:, place] = terms.class_grad
    if terms.entry_class is not None:
        terms.entry_class = place[terms.entry_class]
    terms.columns, terms.class_grad = columns, grad


def candidate_entries(saved, grads) -> tuple | None:
    if "candidate_prob" not in grads:
        return None
    column = saved["present"][saved["candidate_class"]]
    return saved["candidate_row"], column, grads["candidate_prob"], saved["candidate_prob"]


def peak_entries(saved, grads) -> tuple | None:
    if "peak_prob" not in grads:
        return None
    used = (grads["peak_prob"] != 0) & (saved["peak_row"] >= 0)
    row, column = saved["peak_row"][used], used.nonzero()[:, 1]
    return row, column, grads["peak_prob"][used], saved["peak_prob"][used]


def own_terms(terms: GradTerms, sharding: Sharding) -> GradTerms:
    """The terms of the columns that are here."""
    if sharding.is_whole:
        return terms
    listed = terms.columns is not None and terms.class_grad is not None
    columns = sharding.place(terms.columns) if listed else None
    # entries are of these columns alone
    entries = None if terms.entry_class is None else slice(None)
    return column_slice(terms, sharding.place(None), columns, entries)


def whole_dots(terms: GradTerms, saved: dict, grads: dict, sharding: Sharding) -> None:
    """`s_i` of all columns, where `prob_coef` is short of those of these columns alone."""
    per_class = ("prob_sum", "candidate_prob", "peak_prob")
    if sharding.is_whole or not any(name in saved for name in per_class):
        return
    plain = row_coef(saved, grads)
    terms.prob_coef = plain + sharding.sum(terms.prob_coef - plain)


def rescale(terms: GradTerms, *others: Tensor) -> Tensor:
    """Take a power of two out of all terms, so that the largest is about 1: it goes back in after
    the products. Folded into float16 dlogits, 1 / N would flush most of them to 0.

    `others` count towards the largest, and are left to the caller."""
    parts = ("prob_coef", "target_coef", "entropy_grad", "sum_grad", "class_grad", *ENTRIES)
    values = (*(getattr(terms, name) for name in parts), *others)
    present = [p for p in values if p is not None and p.numel()]
    largest = torch.stack([p.abs().amax() for p in present] or [terms.prob_coef.sum()]).amax()
    usable = (largest > 0) & (largest < torch.inf)
    scale = torch.exp2(torch.ceil(torch.log2(torch.where(usable, largest, 1))))
    for name in (*parts, "target_rest"):
        value = getattr(terms, name)
        if value is not None:
            setattr(terms, name, value / scale)
    return scale


ENTRIES = ("entry_grad", "entry_rest")
PER_ROW = (
    "valid", "target", "row_max", "log_sum", "prob_coef", "target_coef", "target_rest",
    "entropy", "entropy_grad", "sum_grad", "sample", "row_weight",
)  # fmt: skip


def row_slices(terms: GradTerms, slices: list[slice]) -> list[GradTerms]:
    """The terms of slices of rows, ascending; one look at the entries for all of them."""
    edges = [0] * (len(slices) + 1)
    if terms.entry_row is not None:
        starts = [s.start for s in slices]
        at = torch.stack([torch.searchsorted(terms.entry_row, start) for start in starts])
        edges = [*at.tolist(), terms.entry_row.numel()]
    return [
        row_slice(terms, here, slice(first, last))
        for here, first, last in zip(slices, edges[:-1], edges[1:], strict=True)
    ]


def row_slice(terms: GradTerms, here: slice, entries: slice) -> GradTerms:
    """The terms of some rows."""
    part = {name: getattr(terms, name) for name in PER_ROW}
    part = {name: None if value is None else value[here] for name, value in part.items()}
    if terms.entry_row is not None:
        part["entry_row"] = terms.entry_row[entries] - here.start
        part["entry_class"] = terms.entry_class[entries]
        part |= entry_values(terms, entries)
    return replace(terms, **part)


def entry_values(terms: GradTerms, entries: Tensor | slice) -> dict[str, Tensor]:
    """What some entries have of their own."""
    found = {name: getattr(terms, name) for name in ENTRIES}
    return {name: value[entries] for name, value in found.items() if value is not None}


def column_slices(terms: GradTerms, num_classes: int, width: int) -> list[GradTerms]:
    """The terms of blocks of the vocabulary; one look at columns and entries for all of them."""
    if width >= num_classes:
        return [terms]
    count = -(-num_classes // width)
    edges = torch.arange(0, count + 1, device=terms.target.device) * width
    looks = []
    if terms.columns is not None and terms.class_grad is not None:
        looks.append(torch.searchsorted(terms.columns, edges))
    listed = bool(looks)
    if terms.entry_class is not None:
        column = terms.columns[terms.entry_class] if listed else terms.entry_class
        order = torch.argsort(column // width, stable=True)
        looks.append(torch.searchsorted(column[order] // width, edges // width))
        terms = replace(
            terms,
            entry_row=terms.entry_row[order],
            entry_class=terms.entry_class[order],
            **entry_values(terms, order),
        )
    found = torch.stack(looks).tolist() if looks else []
    columns = found[0] if listed else None
    entries = found[-1] if terms.entry_class is not None else None
    return [
        column_slice(
            terms,
            slice(i * width, min((i + 1) * width, num_classes)),
            None if columns is None else slice(*columns[i : i + 2]),
            None if entries is None else slice(*entries[i : i + 2]),
        )
        for i in range(count)
    ]


def column_slice(
    terms: GradTerms, classes: slice, columns: slice | None, entries: slice | None
) -> GradTerms:
    """The terms of a block of the vocabulary; a target outside it becomes -1.

    `columns`: which of the listed ones lie in it, `entries`: which of those, ordered by block.
    """
    first, last = classes.start, classes.stop
    inside = (terms.target >= first) & (terms.target < last)
    part: dict = {"target": torch.where(inside, terms.target - first, -1)}
    if terms.column_weight is not None:
        part["column_weight"] = terms.column_weight[classes]
    if columns is not None:
        part["columns"] = terms.columns[columns] - first
        part["class_grad"] = terms.class_grad[:, columns].contiguous()
    elif terms.class_grad is not None:
        part["class_grad"] = terms.class_grad[:, classes].contiguous()
    if entries is not None:
        part["entry_class"] = terms.entry_class[entries] - (columns or classes).start
        part["entry_row"] = terms.entry_row[entries]
        part |= entry_values(terms, entries)
    return replace(terms, **part)
