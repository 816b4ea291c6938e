"""Sample weights from the samples' own losses, and the token weights that carry them.

N tokens, B samples, K tasks.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from segloss.checks import INTEGERS, describe
from segloss.distributed import concatenate_over, gather_sizes, sum_over
from segloss.kernels.common import widest
from segloss.kernels.sample_weights import (
    Scheme,
    Tokens,
    sample_means,
    sample_means_and_weights,
    sample_weights,
)
from segloss.weighting.coba import check_integer

SCHEMES = ("irdro", "linupper", "quadratic", "extremes", "rank")


# ------------------------------------------------------------------------------ sample losses


class _SampleMeans(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_prob, sample, num_samples):
        tokens = Tokens.of(log_prob, sample, num_samples)
        ctx.save_for_backward(sample, tokens.first)
        ctx.dtype = log_prob.dtype
        return sample_means(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        sample, first = ctx.saved_tensors
        per_token = (-grad / first.diff())[sample.clamp(min=0)] if grad.numel() else grad
        return per_token.masked_fill(sample < 0, 0).to(ctx.dtype), None, None


def sample_losses(
    log_prob: Tensor,
    sample_ids: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    num_samples: int | None = None,
) -> Tensor:
    """Mean cross-entropy of each sample's tokens, (B,)::

        -torch.stack([log_prob[sample_ids == b].mean() for b in range(B)])

    Differentiable and deterministic; float32, or float64 for float64. A sample without tokens has
    loss NaN, which `SampleWeighting` gives weight 0: sum weighted losses with `nansum`.

    Args:
        log_prob: (...) log-probabilities of the targets, as in `Statistics.log_prob`.
        sample_ids: (...) integers, which sample a token belongs to; negative: to none. Packed
            sequences need them; by default the leading index of a (B, T) tensor.
        valid: (...) bool, which tokens count, as in `Statistics.valid`; default all.
        num_samples: B, if the ids are 0 to B - 1. Without it the samples are the distinct ids in
            ascending order, which takes a look at them (one synchronisation on a GPU).
    """
    sample, count = _samples_of(log_prob, sample_ids, valid, num_samples)
    return _SampleMeans.apply(log_prob.reshape(-1), sample, count)


def _samples_of(log_prob, sample_ids, valid, num_samples) -> tuple[Tensor, int]:
    """(index of each token's sample (N,), -1 where it has none or does not count; B)."""
    if not isinstance(log_prob, Tensor) or not log_prob.is_floating_point():
        raise TypeError(f"log_prob is {describe(log_prob)}; it takes a float tensor")
    for name, tensor in (("sample_ids", sample_ids), ("valid", valid)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != log_prob.shape:
            raise ValueError(
                f"{name} is {describe(tensor)}; it takes a tensor of log_prob's shape "
                f"{tuple(log_prob.shape)}"
            )
    if sample_ids is not None and sample_ids.dtype not in INTEGERS:
        raise TypeError(f"sample_ids is {describe(sample_ids)}; it takes an integer dtype")
    if valid is not None and valid.dtype != torch.bool:
        raise TypeError(f"valid is {describe(valid)}; it takes a bool tensor")
    if num_samples is not None:
        check_integer("num_samples", num_samples, 0)
    if sample_ids is None:
        if log_prob.dim() < 2:
            raise ValueError(
                f"log_prob has shape {tuple(log_prob.shape)}; without sample_ids it takes "
                "(samples, tokens)"
            )
        count = log_prob.shape[0]
        if num_samples not in (None, count):
            raise ValueError(
                f"num_samples is {num_samples}; without sample_ids it is log_prob's leading {count}"
            )
        index = torch.arange(count, device=log_prob.device)
        sample = index.view(-1, *[1] * (log_prob.dim() - 1)).expand(log_prob.shape).reshape(-1)
    else:
        sample, count = _indexed(sample_ids.reshape(-1).to(torch.int64), num_samples)
    if valid is not None:
        sample = sample.masked_fill(~valid.reshape(-1), -1)
    return sample, count


def _indexed(ids: Tensor, num_samples: int | None) -> tuple[Tensor, int]:
    if num_samples is None:
        distinct = torch.unique(ids)
        distinct = distinct[distinct >= 0]
        index = torch.searchsorted(distinct, ids)
        return torch.where(ids < 0, -1, index), distinct.numel()
    if ids.device.type == "cpu" and bool((ids >= num_samples).any()):
        raise ValueError(
            f"sample_ids has {int(ids.max())}; with num_samples={num_samples} it takes ids below "
            "that"
        )
    return torch.where((ids < 0) | (ids >= num_samples), -1, ids), num_samples


# ----------------------------------------------------------------------------- sample weights


class SampleWeighting:
    """Weights of the samples of a batch from their own losses; sum 1, detached::

        weights = torch.softmax(losses.detach() / temperature, 0)       # scheme="irdro"
        loss = (weights * losses).sum()

    With `h = 2 (l - min l) / (max l - min l) - 1` over the batch (all losses equal: uniform), the
    weights are `softmax(f / temperature)` with

    | scheme | f | |
    |---|---|---|
    | `irdro` | l | gradient of `T log mean exp(l / T)`: hard samples, outliers most |
    | `linupper` | min(h + 1, 1) | the easy half less; an outlier at most e^(1/T) times any other |
    | `quadratic` | 1 - h^2 | neither the easiest nor the hardest |
    | `extremes` | abs(h) | both ends |
    | `rank` | | no softmax: one band of the ranks, uniform in it |

    `rank` sorts by falling loss, takes bands of `fraction` of the samples and keeps number `band`:
    0 the hardest, 1 the next and so on. Samples of equal loss share their ranks, so that their
    order does not matter.

    The batch is whatever is passed: pass the losses of the whole accumulated batch, from a first
    pass without gradients; with `group` those of all ranks count.

    Sources: irdro and rank arXiv:2402.14270 (whose title says that it discards the hardest samples:
    only `rank` with band >= 1 does); the others Sow et al., ICLR 2025, over the global batch.

    Args:
        temperature: in the unit of the losses for irdro; small: the largest loss takes all.
            An attribute; change it to anneal.
        burn_in: so many first calls give uniform weights.
        fraction, band: of `rank`; by default the second hardest quarter.
        group: process group the samples are sharded over; every rank must call, with any number of
            samples, and gets its own samples' weights, which sum to 1 over all ranks.
    """

    def __init__(
        self,
        scheme: str = "irdro",
        temperature: float = 1.0,
        burn_in: int = 0,
        group=None,
        *,
        fraction: float = 0.25,
        band: float = 1,
    ):
        if scheme not in SCHEMES:
            raise ValueError(f"scheme is {scheme!r}; it takes one of {', '.join(SCHEMES)}")
        check_integer("burn_in", burn_in, 0)
        check_number("temperature", temperature, 0, math.inf)
        check_number("fraction", fraction, 0, 1)
        if isinstance(band, bool) or not isinstance(band, (int, float)):
            raise TypeError(f"band is {describe(band)}; it takes a number")
        if not 0 <= band < math.inf:
            raise ValueError(f"band is {band}; it takes a number >= 0")
        self.scheme = scheme
        self.temperature = temperature
        self.burn_in = burn_in
        self.group = group
        self.fraction = fraction
        self.band = band
        self._calls = 0
        self._weights: Tensor | None = None
        self._effective: Tensor | None = None

    def __call__(self, sample_loss: Tensor) -> Tensor:
        """Weights (B,) of losses (B,); NaN marks a sample without tokens, which weighs 0.

        float32, or float64 for float64. Counts as a step of the burn-in.
        """
        if not isinstance(sample_loss, Tensor) or not sample_loss.is_floating_point():
            raise TypeError(f"sample_loss is {describe(sample_loss)}; it takes a float tensor")
        if sample_loss.dim() != 1:
            raise ValueError(
                f"sample_loss has shape {tuple(sample_loss.shape)}; it takes (B,), one per sample"
            )
        scheme = self._next_scheme()
        with torch.no_grad():
            losses = sample_loss.detach()
            if self.group is None:
                self._weights, self._effective = sample_weights(losses, scheme)
                return self._weights
            sizes = gather_sizes(losses.numel(), losses.device, self.group)
            before = sum(sizes[: dist.get_rank(self.group)])
            every = concatenate_over(losses, self.group)
            weights, self._effective = sample_weights(every, scheme)
            self._weights = weights[before : before + losses.numel()].clone()
            return self._weights

    def from_tokens(
        self,
        log_prob: Tensor,
        sample_ids: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        num_samples: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`sample_losses(...)` and the weights of these, both (B,) and detached, in one launch."""
        if self.group is not None:
            losses = sample_losses(log_prob, sample_ids, valid=valid, num_samples=num_samples)
            return losses.detach(), self(losses)
        sample, count = _samples_of(log_prob, sample_ids, valid, num_samples)
        scheme = self._next_scheme()
        with torch.no_grad():
            tokens = Tokens.of(log_prob.detach().reshape(-1), sample, count)
            losses, self._weights, self._effective = sample_means_and_weights(tokens, scheme)
        return losses, self._weights

    def _next_scheme(self) -> Scheme:
        burning = self._calls < self.burn_in
        self._calls += 1
        name = "uniform" if burning else self.scheme
        return Scheme(name, float(self.temperature), float(self.fraction), float(self.band))

    @property
    def weights(self) -> Tensor | None:
        """(B,) of the last call, as it returned them."""
        return self._weights

    @property
    def effective_sample_size(self) -> Tensor | None:
        """() `1 / sum w^2` of the last call, over all ranks: B if uniform, 1 if one has it all."""
        return self._effective

    def state_dict(self) -> dict:
        """How many calls there were: what the burn-in depends on."""
        return {"scheme": self.scheme, "calls": self._calls}

    def load_state_dict(self, state: dict) -> None:
        if state["scheme"] != self.scheme:
            raise ValueError(
                f"state has scheme={state['scheme']!r}, but this SampleWeighting has "
                f"scheme={self.scheme!r}"
            )
        self._calls = state["calls"]


def check_number(name: str, value, above: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {describe(value)}; it takes a number")
    if not (above < value <= most and math.isfinite(value)):
        limit = f" and <= {most:g}" if math.isfinite(most) else ""
        raise ValueError(f"{name} is {value}; it takes a number > {above:g}{limit}")


# ------------------------------------------------------------------------------ token weights


def token_weights(
    num_tokens: Tensor,
    *,
    sample_weights: Tensor | None = None,
    task_ids: Tensor | None = None,
    task_weights: Tensor | None = None,
    group=None,
) -> Tensor:
    """What every token of sample b weighs, (B,), so that the *sum* over tokens is the wanted mean::

        w = token_weights(num_tokens, ...)      # once, over the whole accumulated batch
        criterion(logits, target, token_weight=w[:, None].expand_as(target), normalizer=1)

    With l_b the mean loss of sample b's tokens, and n_b their number, that is

    | given | loss | weight |
    |---|---|---|
    | nothing | mean over tokens | 1 / sum n |
    | `sample_weights` | sum_b w_b l_b | w_b / n_b |
    | `task_weights` | sum_i omega_i (mean over task i's tokens) | omega_i / (sum of n in i) |
    | both | sum_i omega_i (sum of w_b l_b in i) / (sum of w_b in i) | omega_i w_b / n_b / sum w |

    The denominators run over all samples passed, and with `group` over those of all ranks, whatever
    micro-batch they end up in: micro-batches' losses add up, and one that holds a single task is
    still scaled by its omega. A task without tokens has no term, and the others are not scaled up
    for it. A sample without tokens weighs 0.

    Where a loss has a constant of the size of token counts (`smooth` of the region losses, 1e-5),
    pass `w * n` and `normalizer=n` with n the number of tokens: the same token losses, and region
    losses see tokens that weigh about 1.

    Args:
        num_tokens: (B,) tokens that are not ignored, or the sums of their weights.
        sample_weights: (B,) as from `SampleWeighting`; not normalised here.
        task_ids: (B,) integers 0 to K - 1; goes with `task_weights`.
        task_weights: (K,) as from `CoBa.weights`.
        group: process group that the whole batch is sharded over; averaging data parallelism needs
            the loss times the world size.

    Returns:
        (B,) float64 (float32 on a device without it), detached.
    """
    if not isinstance(num_tokens, Tensor) or num_tokens.dim() != 1:
        raise ValueError(f"num_tokens is {describe(num_tokens)}; it takes a tensor (B,)")
    if (task_ids is None) != (task_weights is None):
        given, missing = "task_ids", "task_weights"
        if task_ids is None:
            given, missing = missing, given
        raise ValueError(f"{given} is given but {missing} is None; they go together")
    for name, tensor in (("sample_weights", sample_weights), ("task_ids", task_ids)):
        if tensor is not None and not (
            isinstance(tensor, Tensor) and tensor.shape == num_tokens.shape
        ):
            raise ValueError(
                f"{name} is {describe(tensor)}; it takes a tensor of num_tokens' shape "
                f"{tuple(num_tokens.shape)}"
            )
    dtype = widest(num_tokens.device)
    n = num_tokens.detach().to(dtype)
    share = n if sample_weights is None else sample_weights.detach().to(n.device, dtype)
    share = torch.where(n > 0, share, 0)  # of its task, or of the batch
    per_token = share / torch.where(n > 0, n, 1)
    if task_weights is None:
        return per_token / _total(share.sum(), group) if sample_weights is None else per_token
    omega, index = _check_tasks(task_weights, task_ids, dtype)
    tasks = torch.arange(omega.numel(), device=index.device)
    totals = share @ (index[:, None] == tasks).to(dtype)
    return per_token * (omega / _total(totals, group))[index]


def _check_tasks(task_weights, task_ids, dtype) -> tuple[Tensor, Tensor]:
    if not isinstance(task_weights, Tensor) or task_weights.dim() != 1:
        raise ValueError(f"task_weights is {describe(task_weights)}; it takes a tensor (K,)")
    if task_ids.dtype not in INTEGERS:
        raise TypeError(f"task_ids is {describe(task_ids)}; it takes an integer dtype")
    num_tasks = task_weights.numel()
    if task_ids.device.type == "cpu" and task_ids.numel():
        low, high = int(task_ids.min()), int(task_ids.max())
        if low < 0 or high >= num_tasks:
            raise ValueError(
                f"task_ids has {low if low < 0 else high}; with task_weights of shape "
                f"({num_tasks},) it takes 0 to {num_tasks - 1}"
            )
    return task_weights.detach().to(task_ids.device, dtype), task_ids.to(torch.int64)


def _total(share: Tensor, group) -> Tensor:
    """Over the ranks, as a denominator."""
    total = sum_over(share, group)
    return torch.where(total == 0, 1, total)
