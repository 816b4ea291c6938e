"""CoBa: a validation loss per task goes into rings on the device, task weights come out.

K tasks, N updates that a slope is fitted to, A updates whose slopes the absolute scores look at, G
updates that the divergence factor looks back at.
NaN in a ring: nothing there, since the task was missing or the ring is not full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .common import LOG2E, jit, launcher, next_power_of_2, tl, use_triton, widest


@dataclass
class TaskHistory:
    """What is kept of the past, all float64; update number u is in place `u % size` of a ring."""

    baseline: Tensor  # (K,) the losses that ratios are relative to, NaN before a task's first one
    last: Tensor  # (K + 1,) each column's most recent ratio
    ratios: Tensor  # (N, K + 1) loss / baseline; the last column is the largest of the others
    steps: Tensor  # (N,) when the ratios were measured
    slopes: Tensor  # (A, K) of the ratios, from the end of the warm-up on
    max_slopes: Tensor  # (G,) the largest slope, or the slope of the largest ratio

    @classmethod
    def empty(cls, num_tasks: int, history: int, scored: int, window: int, device) -> TaskHistory:
        shapes = {
            "baseline": (num_tasks,),
            "last": (num_tasks + 1,),
            "ratios": (history, num_tasks + 1),
            "steps": (history,),
            "slopes": (scored, num_tasks),
            "max_slopes": (window,),
        }
        dtype = widest(torch.device(device))
        return cls(
            **{
                name: torch.full(shape, torch.nan, dtype=dtype, device=device)
                for name, shape in shapes.items()
            }
        )


class TaskWeights(NamedTuple):
    """What one update gives, all detached; uniform during the warm-up, the slopes apart."""

    weights: Tensor  # (K,) sum 1
    relative: Tensor  # (K,) relative convergence scores, sum 1
    absolute: Tensor  # (K,) absolute convergence scores, sum 1
    divergence: Tensor  # () the divergence factor
    slopes: Tensor  # (K,) per step; NaN where a task has fewer than two values


@dataclass(frozen=True)
class Moment:
    """Where an update stands, known on the host: nothing here has to be read from the device."""

    update: int  # how many came before
    step: int
    active: bool  # the warm-up is over


# ------------------------------------------------------------------------------------- Triton


@jit
def masked_softmax(x, mask):
    """Softmax over the lanes of the mask, 0 elsewhere (and everywhere if the mask is empty)."""
    shifted = x - tl.max(tl.where(mask, x, float("-inf")), axis=0)
    e = tl.where(mask, tl.exp2(tl.where(mask, shifted, 0.0) * LOG2E), 0.0)
    total = tl.sum(e, axis=0)
    return e / tl.where(total > 0.0, total, 1.0)


@jit
def window_tile(
    ratios,  # (N, K + 1)
    steps,  # (N,)
    ratio,  # (BLOCK_K,) of this update
    step,
    reference,  # (BLOCK_K,)
    newer,  # (BLOCK_K,) how many values of the column are newer than the tile
    first,
    slot,
    k,
    K,
    N,
    PUBLISHED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the window, newest first: (x, y, which are there); this update's row included.

    y is relative to the column's most recent value, so that a constant loss has slope 0 exactly.
    """
    age = first + tl.arange(0, BLOCK_N)
    place = (slot - age + N) % N
    inside = (age < N)[:, None] & (k <= K)[None, :]
    pointers = ratios + place[:, None] * (K + 1) + k[None, :]
    y = tl.load(pointers, mask=inside, other=float("nan"))
    # the newest row comes from registers: other threads may not have written it yet
    y = tl.where((age == 0)[:, None], ratio[None, :], y)
    there = inside & (y == y)
    if PUBLISHED:  # missing values close ranks
        one = tl.where(there, 1.0, 0.0).to(y.dtype)
        x = one - tl.cumsum(one, axis=0) - newer[None, :]
    else:
        x = tl.load(steps + place, mask=age < N, other=0.0) - step
        x = tl.where(age == 0, 0.0, x)[:, None] + tl.zeros_like(y)
    return tl.where(there, x, 0.0), tl.where(there, y - reference[None, :], 0.0), there


@jit
def task_weights_kernel(
    losses,  # (K,)
    baseline,  # (K,) this and the next five are updated
    last,  # (K + 1,)
    ratios,  # (N, K + 1)
    steps,  # (N,)
    slopes,  # (A, K)
    max_slopes,  # (G,)
    weights_out,  # (K,)
    relative_out,  # (K,)
    absolute_out,  # (K,)
    divergence_out,  # ()
    slopes_out,  # (K,)
    slot,
    slope_slot,
    max_slot,
    filled,
    active,
    K,
    N,
    A,
    step: tl.float64,
    tau: tl.float64,
    PUBLISHED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One program does it all: a few thousand numbers."""
    k = tl.arange(0, BLOCK_K)
    is_task = k < K
    nothing = tl.full((BLOCK_K,), float("nan"), tl.float64)
    step = tl.full((), step, tl.float64)
    tau = tl.full((), tau, tl.float64)

    loss = tl.load(losses + k, mask=is_task, other=float("nan")).to(tl.float64)
    measured = tl.abs(loss) < float("inf")
    base = tl.load(baseline + k, mask=is_task, other=float("nan"))
    base = tl.where((base != base) & measured & (loss > 0.0), loss, base)
    ratio = tl.where(measured, loss / base, nothing)
    largest = tl.max(tl.where(ratio == ratio, ratio, float("-inf")), axis=0)
    largest = tl.where(largest > float("-inf"), largest, float("nan"))
    ratio = tl.where(k == K, largest, ratio)
    reference = tl.load(last + k, mask=k <= K, other=float("nan"))
    reference = tl.where(ratio == ratio, ratio, reference)
    tl.store(baseline + k, base, mask=is_task)
    tl.store(last + k, reference, mask=k <= K)

    # the slope of every column, by two passes: means, then what deviates from them
    count = tl.zeros((BLOCK_K,), tl.float64)
    x_sum = tl.zeros((BLOCK_K,), tl.float64)
    y_sum = tl.zeros((BLOCK_K,), tl.float64)
    for first in range(0, N, BLOCK_N):
        x, y, there = window_tile(
            ratios, steps, ratio, step, reference, count, first, slot, k, K, N, PUBLISHED, BLOCK_N
        )
        count += tl.sum(tl.where(there, 1.0, 0.0).to(tl.float64), axis=0)
        x_sum += tl.sum(x, axis=0)
        y_sum += tl.sum(y, axis=0)
    x_mean = x_sum / tl.maximum(count, 1.0)
    y_mean = y_sum / tl.maximum(count, 1.0)
    newer = tl.zeros((BLOCK_K,), tl.float64)
    xx = tl.zeros((BLOCK_K,), tl.float64)
    xy = tl.zeros((BLOCK_K,), tl.float64)
    for first in range(0, N, BLOCK_N):
        x, y, there = window_tile(
            ratios, steps, ratio, step, reference, newer, first, slot, k, K, N, PUBLISHED, BLOCK_N
        )
        newer += tl.sum(tl.where(there, 1.0, 0.0).to(tl.float64), axis=0)
        x = tl.where(there, x - x_mean[None, :], 0.0)
        y = tl.where(there, y - y_mean[None, :], 0.0)
        xx += tl.sum(x * x, axis=0)
        xy += tl.sum(x * y, axis=0)
    tl.store(ratios + slot * (K + 1) + k, ratio, mask=k <= K)
    tl.store(steps + slot, step)
    slope = tl.where(count > 1.0, xy / tl.where(count > 1.0, xx, 1.0), nothing)
    tl.store(slopes_out + k, slope, mask=is_task)

    if PUBLISHED:
        slope = tl.where(count > 1.0, slope, 0.0)
        max_slope = tl.sum(tl.where(k == K, slope, 0.0), axis=0)
        known = is_task
    else:
        known = is_task & (slope == slope)
        max_slope = tl.max(tl.where(known, slope, float("-inf")), axis=0)
        max_slope = tl.where(max_slope > float("-inf"), max_slope, float("nan"))
    num_known = tl.sum(tl.where(known, 1.0, 0.0).to(tl.float64), axis=0)

    total = tl.sum(tl.where(known, tl.abs(slope), 0.0), axis=0)
    relative = masked_softmax(num_known * slope / tl.where(total > 0.0, total, 1.0), known)

    size = tl.zeros((BLOCK_K,), tl.float64)
    number = tl.zeros((BLOCK_K,), tl.float64)
    for first in range(0, A, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        inside = (place < A)[:, None] & is_task[None, :]
        pointers = slopes + place[:, None] * K + k[None, :]
        a = tl.load(pointers, mask=inside, other=float("nan"))
        a = tl.where((place == slope_slot)[:, None], slope[None, :], a)
        there = inside & (a == a)
        size += tl.sum(tl.where(there, tl.abs(a), 0.0), axis=0)
        number += tl.sum(tl.where(there, 1.0, 0.0).to(tl.float64), axis=0)
    absolute = masked_softmax(-number * slope / tl.where(size > 0.0, size, 1.0), known)

    # the divergence factor, over every slope kept: their size first, then the softmax over steps
    size_g = tl.zeros((BLOCK_G,), tl.float64)
    number_g = tl.zeros((BLOCK_G,), tl.float64)
    least_g = tl.full((BLOCK_G,), float("inf"), tl.float64)
    for first in range(0, filled, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        a = tl.load(max_slopes + g, mask=g < filled, other=float("nan"))
        a = tl.where(g == max_slot, max_slope, a)
        there = (g < filled) & (a == a)
        size_g += tl.where(there, tl.abs(a), 0.0)
        number_g += tl.where(there, 1.0, 0.0)
        least_g = tl.minimum(least_g, tl.where(there, a, float("inf")))
    size_all = tl.sum(size_g, axis=0)
    number_all = tl.sum(number_g, axis=0)
    least = tl.min(least_g, axis=0)
    least = tl.where(least < float("inf"), least, 0.0)
    rate = tau * number_all / tl.where(size_all > 0.0, size_all, 1.0)
    exp_g = tl.zeros((BLOCK_G,), tl.float64)
    for first in range(0, filled, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        a = tl.load(max_slopes + g, mask=g < filled, other=float("nan"))
        a = tl.where(g == max_slot, max_slope, a)
        there = (g < filled) & (a == a)
        exp_g += tl.where(there, tl.exp2(tl.where(there, least - a, 0.0) * rate * LOG2E), 0.0)
    own = tl.exp2((least - max_slope) * rate * LOG2E)
    exp_all = tl.sum(exp_g, axis=0)
    divergence = number_all * own / tl.where(exp_all > 0.0, exp_all, 1.0)
    divergence = tl.where(max_slope == max_slope, divergence, 1.0)
    if not PUBLISHED:
        divergence = tl.minimum(divergence, 1.0)

    weights = divergence * relative + (1.0 - divergence) * absolute
    num_tasks = tl.sum(tl.where(is_task, 1.0, 0.0).to(tl.float64), axis=0)
    if PUBLISHED:
        weights = masked_softmax(num_tasks * weights, is_task)
        floor = 0.1 / num_tasks
        low = tl.sum(tl.where(is_task & (weights < floor), 1.0, 0.0), axis=0)
        weights = tl.where(low > 0.0, 0.9 * weights + floor, weights)
    else:
        share = num_known / num_tasks
        weights = tl.where(known, share * weights, 1.0 / num_tasks)
        relative = tl.where(known, share * relative, 1.0 / num_tasks)
        absolute = tl.where(known, share * absolute, 1.0 / num_tasks)

    if active != 0:
        tl.store(slopes + slope_slot * K + k, slope, mask=is_task)
        tl.store(max_slopes + max_slot, max_slope)
    else:
        weights = tl.zeros_like(weights) + 1.0 / num_tasks
        relative = weights
        absolute = weights
        divergence = tl.full((), 1.0, tl.float64)
    tl.store(weights_out + k, weights, mask=is_task)
    tl.store(relative_out + k, relative, mask=is_task)
    tl.store(absolute_out + k, absolute, mask=is_task)
    tl.store(divergence_out, divergence)


@launcher
def task_weights_triton(
    history: TaskHistory,
    losses: Tensor,  # (K,)
    moment: Moment,
    out: TaskWeights,
    tau: float,
    published: bool,
) -> None:
    size, scored, window = len(history.steps), len(history.slopes), len(history.max_slopes)
    num_tasks = losses.numel()
    block_k = next_power_of_2(num_tasks + 1)
    block_n = max(1, min(next_power_of_2(size), 512 // block_k))
    task_weights_kernel[(1,)](
        losses,
        history.baseline,
        history.last,
        history.ratios,
        history.steps,
        history.slopes,
        history.max_slopes,
        out.weights,
        out.relative,
        out.absolute,
        out.divergence,
        out.slopes,
        moment.update % size,
        moment.update % scored,
        moment.update % window,
        min(moment.update + 1, window),
        int(moment.active),
        num_tasks,
        size,
        scored,
        float(moment.step),
        tau,
        PUBLISHED=published,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_G=512,
        num_warps=max(4, min(32, block_k // 128)),
    )


# -------------------------------------------------------------------------------------- torch


def masked_softmax_torch(x: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the masked elements (K,), 0 elsewhere."""
    return x.masked_fill(~mask, -torch.inf).softmax(0).masked_fill(~mask, 0)


def nonzero(x: Tensor) -> Tensor:
    """A denominator: 1 where x is 0, as there the numerator is too."""
    return torch.where(x == 0, 1, x)


def store_losses(history: TaskHistory, losses: Tensor, moment: Moment) -> None:
    measured = losses.isfinite()
    starts = history.baseline.isnan() & measured & (losses > 0)
    history.baseline.copy_(torch.where(starts, losses, history.baseline))
    ratio = (losses / history.baseline).masked_fill(~measured, torch.nan)
    largest = ratio.nan_to_num(-torch.inf).amax(0, keepdim=True)
    ratio = torch.cat([ratio, largest.masked_fill(largest == -torch.inf, torch.nan)])
    history.last.copy_(torch.where(ratio.isnan(), history.last, ratio))
    place = moment.update % len(history.steps)
    history.ratios[place] = ratio
    history.steps[place] = moment.step


def fit_slopes(history: TaskHistory, moment: Moment, published: bool) -> Tensor:
    """Least-squares slope (K + 1,) of every column of the ratios; NaN of fewer than two values."""
    there = ~history.ratios.isnan()
    if published:  # missing values close ranks
        newest = moment.update % len(history.steps) + 1
        in_order = there.roll(-newest, 0).to(history.ratios.dtype).cumsum(0)
        x = in_order.roll(newest, 0)
    else:
        x = (history.steps - moment.step)[:, None].expand_as(history.ratios)
    x = x.masked_fill(~there, 0)
    # relative to the most recent value, so that a constant loss has slope 0 exactly
    y = (history.ratios - history.last).masked_fill(~there, 0)
    count = there.sum(0, dtype=x.dtype)
    x = (x - x.sum(0) / count).masked_fill(~there, 0)
    y = (y - y.sum(0) / count).masked_fill(~there, 0)
    return ((x * y).sum(0) / nonzero(x.square().sum(0))).masked_fill(count < 2, torch.nan)


def divergence_factor(max_slopes: Tensor, now: Tensor, tau: float) -> Tensor:
    """`n softmax(-tau n a / sum |a|)` over the slopes a (G,), at the present one `now` ()."""
    there = ~max_slopes.isnan()
    a = max_slopes.masked_fill(~there, 0)
    number = there.sum(dtype=a.dtype)
    rate = tau * number / nonzero(a.abs().sum())
    least = max_slopes.nan_to_num(torch.inf).amin()
    total = torch.exp((least - a) * rate).masked_fill(~there, 0).sum()
    factor = number * torch.exp((least - now) * rate) / total
    return torch.where(now.isnan(), 1, factor)


def task_weights_torch(
    history: TaskHistory,
    losses: Tensor,  # (K,)
    moment: Moment,
    out: TaskWeights,
    tau: float,
    published: bool,
) -> None:
    num_tasks = losses.numel()
    store_losses(history, losses.to(history.baseline.dtype), moment)
    slope = fit_slopes(history, moment, published)
    out.slopes.copy_(slope[:-1])
    if not moment.active:
        for part in (out.weights, out.relative, out.absolute):
            part.fill_(1 / num_tasks)
        out.divergence.fill_(1)
        return
    if published:
        slope = slope.nan_to_num(0)
        slope, max_slope = slope[:-1], slope[-1]
        known = torch.ones_like(slope, dtype=torch.bool)
    else:
        slope = slope[:-1]
        known = ~slope.isnan()
        max_slope = slope.nan_to_num(-torch.inf).amax()
        max_slope = max_slope.masked_fill(max_slope == -torch.inf, torch.nan)
    history.slopes[moment.update % len(history.slopes)] = slope
    history.max_slopes[moment.update % len(history.max_slopes)] = max_slope

    num_known = known.sum(dtype=slope.dtype)  # an integer would divide in float32
    slope = slope.masked_fill(~known, 0)
    relative = masked_softmax_torch(num_known * slope / nonzero(slope.abs().sum()), known)

    number = (~history.slopes.isnan()).sum(0, dtype=slope.dtype)
    size = history.slopes.abs().nansum(0)
    absolute = masked_softmax_torch(-number * slope / nonzero(size), known)

    filled = min(moment.update + 1, len(history.max_slopes))
    divergence = divergence_factor(history.max_slopes[:filled], max_slope, tau)
    if not published:
        divergence = divergence.clamp(max=1)
    weights = divergence * relative + (1 - divergence) * absolute
    if published:
        weights = torch.softmax(num_tasks * weights, 0)
        floor = 1 / (10 * num_tasks)
        weights = torch.where((weights < floor).any(), 0.9 * weights + floor, weights)
    else:
        share, uniform = num_known / num_tasks, 1 / num_tasks
        weights, relative, absolute = (
            torch.where(known, share * part, uniform) for part in (weights, relative, absolute)
        )
    out.weights.copy_(weights)
    out.relative.copy_(relative)
    out.absolute.copy_(absolute)
    out.divergence.copy_(divergence)


# ----------------------------------------------------------------------------------- launcher


def task_weights(
    history: TaskHistory,
    losses: Tensor,  # (K,) any float dtype; not finite: the task is missing
    moment: Moment,
    *,
    tau: float,
    published: bool,
) -> TaskWeights:
    """Put the losses into `history` (written in place) and weigh the tasks."""
    num_tasks = losses.numel()
    new = history.baseline.new_empty
    vectors = [new(num_tasks) for _ in range(4)]
    out = TaskWeights(*vectors[:3], new(()), vectors[3])
    launch = task_weights_triton if use_triton(losses) else task_weights_torch
    launch(history, losses.contiguous(), moment, out, tau, published)
    return out
