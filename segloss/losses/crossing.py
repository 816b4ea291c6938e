"""What a loss and its backward send to other ranks, for its plan in words.

N tokens, V classes, K of them looked at, B samples. No rank is asked: what depends on other ranks'
tokens is taken from this one's.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from segloss.losses import registry
from segloss.sharding import Crossing
from segloss.sweep.batch import Batch
from segloss.sweep.cost import Asked
from segloss.sweep.request import Request
from segloss.sweep.shards import SENT
from segloss.sweep.source import Source

VOCABULARY, TOKENS = "vocabulary", "tokens"
FORWARD, BACKWARD = "forward", "backward"


def crossing_lines(loss, source: Source, batch: Batch, request: Request) -> list[str]:
    """One line for each kind of ranks that there is."""
    every, sizes = crossings(loss, request, source, batch)
    lines = []
    for ranks, size in sizes.items():
        phases = []
        for phase in (FORWARD, BACKWARD):
            here = [c for c in every if c.ranks == ranks and c.phase == phase]
            if here:
                phases.append(f"{phase} {', '.join(map(in_words, joined(here)))}")
        lines.append(f"{ranks:<10} {size} ranks; {'; '.join(phases) or 'nothing crosses'}")
    return lines


def crossings(
    loss, request: Request, source: Source, batch: Batch
) -> tuple[list[Crossing], dict[str, int]]:
    """(all collectives of a call and its backward, {kind of ranks: how many})."""
    group = source.token_group(loss.group)
    fused = loss.is_row_sum and source.forms_gradients
    spread = source.spread(batch, Asked(request, loss.is_row_sum))
    teacher = batch.beside.teacher
    every = [*spread.crossings, *(() if teacher is None else teacher.gathered)]
    sizes = {}
    if spread.vocabulary > 1:
        sizes[VOCABULARY] = spread.vocabulary
        every += over_vocabulary(parts_of(loss), request, spread, batch, fused)
    if group is not None:
        sizes[TOKENS] = dist.get_world_size(group)
        every += over_tokens(parts_of(loss), request, batch, fused)
    return every, sizes


def parts_of(loss) -> list:
    combined = registry.find("combined:CombinedLoss")
    return list(loss.parts) if isinstance(loss, combined) else [loss]


def counts(request: Request, batch: Batch) -> tuple[int, int]:
    """(B, K) of the class sums."""
    samples = 1
    if request.per_sample:
        ids = batch.sample_ids
        samples = batch.shape[0] if ids is None else torch.unique(ids).numel()
    present = torch.unique(batch.target[batch.valid]).numel()
    return samples, batch.num_classes if request.classes == "all" else present


def over_vocabulary(parts, request, spread, batch, fused: bool) -> list[Crossing]:
    number = batch.dtype.itemsize
    per_row = 3 + request.entropy + request.argmax + 3 * request.column_sums
    every = [
        Crossing(FORWARD, VOCABULARY, "all-gather", spread.chunks, per_row * spread.rows * number)
    ]

    def reduced(phase: str, size: int, count: int = 1) -> None:
        every.append(Crossing(phase, VOCABULARY, "all-reduce", count, size * number))

    listed, kinds = batch.beside.listed, [of.kind for of in request.divergences]
    if listed is not None:
        reduced(FORWARD, spread.rows * listed.shape[1], spread.readings)
    if kinds:
        size = spread.rows * sum(len(SENT[kind]) for kind in kinds) * number
        every.append(Crossing(FORWARD, VOCABULARY, "all-gather", spread.readings, size))
    if "jsd" in kinds:
        reduced(FORWARD, spread.rows * 2 * kinds.count("jsd"), spread.readings)
    if spread.filtered and spread.trained:
        every.append(Crossing(FORWARD if fused else BACKWARD, VOCABULARY, "all-reduce", 1, 16))
    if fused:
        return every
    samples, looked_at = counts(request, batch)
    rankings = [part for part in parts if part.request().rankings]
    if request.prob_sums or request.peaks:
        sums = samples * looked_at * request.prob_sums
        reduced(FORWARD, sums + (samples + 1) * batch.num_classes * request.peaks)
    present = torch.unique(batch.target[batch.valid]).numel()
    for part in rankings:
        cells = present * (samples if part.per_sample else 1)
        reduced(FORWARD, cells)  # the values of the classes
        reduced(FORWARD, cells)  # and how often they occur
        if spread.trained:
            reduced(BACKWARD, batch.target.numel())  # of log_prob
    if spread.trained and (request.prob_sums or request.peaks or rankings):
        reduced(BACKWARD, spread.rows)  # s_i
    return every


def over_tokens(parts, request, batch, fused: bool) -> list[Crossing]:
    number = batch.dtype.itemsize
    samples, looked_at = counts(request, batch)
    every: list[Crossing] = []

    def add(kind: str, count: int, size: int | None) -> None:
        every.append(Crossing(FORWARD, TOKENS, kind, count, size))

    for part in parts:
        if part.is_token_loss:
            if part.reduction == "mean":
                add("all-reduce", 1, number)  # the denominator
            if part.reduction != "none" and not fused:
                add("all-reduce", 1, number)
        elif part.request().prob_sums:
            add("all-reduce", 3, 3 * samples * looked_at * number)
        elif part.request().rankings:
            add("all-gather", 3, None)
            if part.classes == "all":
                add("all-gather", 2, 8 + samples * batch.num_classes * number)
    if fused:
        add("all-reduce", 1, number)
    if request.prob_sums or request.rankings:
        add("all-reduce", 1, batch.num_classes)  # which classes occur
        if request.per_sample:
            add("all-gather", 2, 8 + 8 * batch.target.numel())
    if request.rankings:
        present = torch.unique(batch.target[batch.valid]).numel()
        add("all-reduce", 1 + request.per_sample, present * (1 + samples * request.per_sample))
    if request.peaks:
        add("all-reduce", 1, batch.num_classes * number)
    return every


def joined(every: list[Crossing]) -> list[Crossing]:
    """Those of one kind as one."""
    result = []
    for kind in dict.fromkeys(c.kind for c in every):
        same = [c for c in every if c.kind == kind]
        size = None if any(c.size is None for c in same) else sum(c.size for c in same)
        result.append(
            Crossing(same[0].phase, same[0].ranks, kind, sum(c.count for c in same), size)
        )
    return result


def in_words(crossing: Crossing) -> str:
    name = f"{crossing.count} {crossing.kind}{'s' if crossing.count > 1 else ''}"
    if crossing.size is None:
        return f"{name} (as many numbers as there are tokens and candidates)"
    step = min(3, int(math.log2(max(1, crossing.size)) // 10))
    return f"{name} of {crossing.size / 1024**step:.3g} {('B', 'KiB', 'MiB', 'GiB')[step]}"
