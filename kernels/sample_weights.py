"""Per-sample mean of token losses and the samples' weights, in one launch.

N tokens, B samples. A sample without tokens has loss NaN and weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .common import LOG2E, jit, launcher, next_power_of_2, tl, use_triton, widest


@dataclass(frozen=True)
class Tokens:
    """Log-probabilities of the targets, grouped by sample."""

    log_prob: Tensor  # (N,)
    order: Tensor  # (N,) int64, tokens sorted by sample; those of no sample come first
    first: Tensor  # (B + 1,) int64, where each sample starts in `order`

    @classmethod
    def of(cls, log_prob: Tensor, sample: Tensor, num_samples: int) -> Tokens:
        """`sample` (N,) is each token's sample, negative for none."""
        order = torch.argsort(sample, stable=True)
        ids = torch.arange(num_samples + 1, device=sample.device, dtype=sample.dtype)
        return cls(log_prob.contiguous(), order, torch.searchsorted(sample[order], ids))


@dataclass(frozen=True)
class Scheme:
    """How a loss becomes a weight."""

    name: str  # irdro, linupper, quadratic, extremes, rank or uniform
    temperature: float = 1.0
    fraction: float = 1.0  # rank: of the samples, how many the band holds
    band: float = 0.0  # rank: how many bands of that size are harder than it


# ------------------------------------------------------------------------------------- Triton


@jit
def rank_band(
    own,  # (BLOCK_B,)
    there,  # (BLOCK_B,)
    losses,  # (B,)
    n,
    B,
    fraction,
    band,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """The share of a sample's rank that lies in the band, equal losses sharing their ranks."""
    above = tl.zeros((BLOCK_B,), tl.float64)
    equal = tl.zeros((BLOCK_B,), tl.float64)
    for first in range(0, B, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        other = tl.load(losses + j, mask=j < B, other=float("nan"))[None, :]
        above += tl.sum(tl.where(other > own[:, None], 1.0, 0.0).to(tl.float64), axis=1)
        equal += tl.sum(tl.where(other == own[:, None], 1.0, 0.0).to(tl.float64), axis=1)
    capacity = tl.minimum(tl.maximum(tl.floor(fraction * n), 1.0), n)
    low = tl.minimum(tl.floor(band * capacity), n - capacity)
    overlap = tl.minimum(above + equal, low + capacity) - tl.maximum(above, low)
    return tl.where(there, tl.maximum(overlap, 0.0) / tl.maximum(equal, 1.0), 0.0)


@jit
def sample_weights_kernel(
    log_prob,  # (N,)
    order,  # (N,)
    first_token,  # (B + 1,)
    losses,  # (B,) written with MEANS, read without
    weights,  # (B,)
    effective,  # ()
    B,
    temperature: tl.float64,
    fraction: tl.float64,
    band: tl.float64,
    MEANS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    SCHEME: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A program has a block of samples; with WEIGHTS there is one program with all of them."""
    DTYPE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    if MEANS:
        begin = tl.load(first_token + b, mask=b < B, other=0)
        end = tl.load(first_token + b + 1, mask=b < B, other=0)
        total = tl.zeros((BLOCK_B,), DTYPE)
        for first in range(0, tl.max(end - begin, axis=0), BLOCK_T):
            place = begin[:, None] + first + tl.arange(0, BLOCK_T)[None, :]
            here = place < end[:, None]
            token = tl.load(order + place, mask=here, other=0)
            total -= tl.sum(tl.load(log_prob + token, mask=here, other=0.0).to(DTYPE), axis=1)
        count = (end - begin).to(DTYPE)
        mean = tl.where(count > 0, total / tl.maximum(count, 1.0), float("nan"))
        tl.store(losses + b, mean, mask=b < B)
    if WEIGHTS:
        if MEANS:
            raw = mean
            tl.debug_barrier()  # ranks read what other threads have just stored
        else:
            raw = tl.load(losses + b, mask=b < B, other=float("nan")).to(DTYPE)
        there = raw == raw
        n = tl.sum(tl.where(there, 1.0, 0.0).to(tl.float64), axis=0)
        # an infinite loss is a very large one: differences stay numbers
        bound = 1e300 if DOUBLE else 1e37
        loss = tl.minimum(tl.maximum(tl.where(there, raw, 0.0), -bound), bound)
        most = tl.max(tl.where(there, loss, -bound), axis=0)
        heat = tl.full((), temperature, DTYPE)
        if SCHEME == "rank":
            w = rank_band(
                raw, there, losses, n, B,
                tl.full((), fraction, tl.float64), tl.full((), band, tl.float64), BLOCK_B, BLOCK_T,
            ).to(DTYPE)  # fmt: skip
        else:
            if SCHEME == "irdro":
                f = (loss - most) / heat
            elif SCHEME == "uniform":
                f = tl.zeros_like(loss)
            else:
                least = tl.min(tl.where(there, loss, bound), axis=0)
                span = most - least
                h = 2.0 * ((loss - least) / tl.where(span > 0.0, span, 1.0)) - 1.0
                if SCHEME == "linupper":
                    f = tl.minimum(h, 0.0)
                elif SCHEME == "quadratic":
                    f = -h * h
                else:
                    f = tl.abs(h)
                f = (f - tl.max(tl.where(there, f, float("-inf")), axis=0)) / heat
            w = tl.where(there, tl.exp2(tl.where(there, f, 0.0) * LOG2E), 0.0)
        total_w = tl.sum(w, axis=0)
        w = w / tl.where(total_w > 0.0, total_w, 1.0)
        tl.store(weights + b, w, mask=b < B)
        square = tl.sum(w * w, axis=0)
        size = tl.where(square > 0.0, 1.0 / tl.where(square > 0.0, square, 1.0), 0.0)
        tl.store(effective, size)


@launcher
def sample_weights_triton(tokens, losses, weights, effective, scheme) -> None:
    num_samples = losses.numel()
    width = next_power_of_2(num_samples)
    block_b = width if weights is not None else min(width, 8)
    block_t = max(1, 2048 // block_b) if losses.dtype == torch.float32 else max(1, 1024 // block_b)
    spare = losses  # stands where a pointer is not used
    sample_weights_kernel[(-(-num_samples // block_b),)](
        spare if tokens is None else tokens.log_prob,
        spare if tokens is None else tokens.order,
        spare if tokens is None else tokens.first,
        losses,
        spare if weights is None else weights,
        spare if effective is None else effective,
        num_samples,
        scheme.temperature,
        scheme.fraction,
        scheme.band,
        MEANS=tokens is not None,
        WEIGHTS=weights is not None,
        SCHEME=scheme.name,
        DOUBLE=losses.dtype == torch.float64,
        BLOCK_B=block_b,
        BLOCK_T=block_t,
        num_warps=max(4, min(32, block_b * block_t // 512)),
    )


# -------------------------------------------------------------------------------------- torch


def sample_means_torch(tokens: Tokens, losses: Tensor) -> None:
    """Summed in float64, in the order of the tokens."""
    values = tokens.log_prob.index_select(0, tokens.order).to(widest(losses.device))
    sums = torch.segment_reduce(values, "sum", offsets=tokens.first, initial=0, unsafe=True)
    losses.copy_(-sums / tokens.first.diff())  # 0 / 0 is NaN: no tokens


def rank_band_torch(losses: Tensor, there: Tensor, scheme: Scheme) -> Tensor:
    """The share of a sample's rank that lies in the band, equal losses sharing their ranks."""
    dtype = widest(losses.device)
    n = there.sum()
    ascending = losses.masked_fill(~there, -torch.inf).sort().values
    above = losses.numel() - torch.searchsorted(ascending, losses, right=True)
    equal = losses.numel() - torch.searchsorted(ascending, losses) - above
    capacity = (scheme.fraction * n.to(dtype)).floor().clamp(min=1).minimum(n)
    low = (scheme.band * capacity).floor().minimum(n - capacity)
    overlap = (above + equal).minimum(low + capacity) - above.maximum(low)
    return (overlap.clamp(min=0) / equal.clamp(min=1)).masked_fill(~there, 0)


def scheme_logits(losses: Tensor, there: Tensor, name: str) -> Tensor:
    """What the softmax over the samples is taken of, times the temperature."""
    if name == "uniform":
        return torch.zeros_like(losses)
    # an infinite loss is a very large one: differences stay numbers
    bound = 1e300 if losses.dtype == torch.float64 else 1e37
    losses = losses.clamp(-bound, bound)
    most = losses.masked_fill(~there, -bound).amax()
    if name == "irdro":
        return losses - most
    least = losses.masked_fill(~there, bound).amin()
    span = most - least
    h = 2 * ((losses - least) / torch.where(span > 0, span, 1)) - 1
    if name == "linupper":
        return h.clamp(max=0)
    return -h.square() if name == "quadratic" else h.abs()


def weigh_torch(losses: Tensor, weights: Tensor, effective: Tensor, scheme: Scheme) -> None:
    there = ~losses.isnan()
    if scheme.name == "rank":
        w = rank_band_torch(losses, there, scheme).to(losses.dtype)
    else:
        f = scheme_logits(losses, there, scheme.name)
        f = (f - f.masked_fill(~there, -torch.inf).amax()) / scheme.temperature
        w = f.exp().masked_fill(~there, 0)
    total = w.sum()
    torch.div(w, torch.where(total > 0, total, 1), out=weights)
    square = weights.square().sum()
    effective.copy_(torch.where(square > 0, 1 / square, 0))


def sample_weights_torch(tokens, losses, weights, effective, scheme) -> None:
    if tokens is not None:
        sample_means_torch(tokens, losses)
    if weights is not None:
        weigh_torch(losses, weights, effective, scheme)


# ---------------------------------------------------------------------------------- launchers


def _launch(tokens, losses, weights, effective, scheme) -> None:
    if losses.numel():
        launch = sample_weights_triton if use_triton(losses) else sample_weights_torch
        launch(tokens, losses, weights, effective, scheme)
    elif effective is not None:
        effective.zero_()


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def sample_means(tokens: Tokens) -> Tensor:
    """Mean of `-log_prob` per sample (B,), NaN of no tokens; float32, or float64 for float64."""
    dtype = _compute_dtype(tokens.log_prob)
    losses = tokens.log_prob.new_empty(tokens.first.numel() - 1, dtype=dtype)
    _launch(tokens, losses, None, None, Scheme("uniform"))
    return losses


def sample_weights(losses: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(weights (B,) of sum 1, their effective sample size ()); 0 where the loss (B,) is NaN."""
    losses = losses.to(_compute_dtype(losses)).contiguous()
    weights, effective = torch.empty_like(losses), losses.new_empty(())
    _launch(None, losses, weights, effective, scheme)
    return weights, effective


def sample_means_and_weights(tokens: Tokens, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """(losses (B,), weights (B,), effective sample size ()): both of the above in one launch."""
    dtype = _compute_dtype(tokens.log_prob)
    losses = tokens.log_prob.new_empty(tokens.first.numel() - 1, dtype=dtype)
    weights, effective = torch.empty_like(losses), losses.new_empty(())
    _launch(tokens, losses, weights, effective, scheme)
    return losses, weights, effective
