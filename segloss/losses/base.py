"""What every loss shares: the call, the reductions, the arithmetic of weighted sums.

N tokens, V classes.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from segloss.batch import Batch, make_batch
from segloss.compiled import compiled_loss
from segloss.distributed import sum_over
from segloss.linear import FusedPlan, fused_loss
from segloss.logits import LinearLogits, as_source, describe
from segloss.statistics import Request, Statistics, Sweep, make_sweep, public_statistics

REDUCTIONS = ("mean", "sum", "none")


def check_choice(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it takes {' or '.join(map(repr, choices))}")


def check_number(name: str, value, low: float = 0.0, high: float = math.inf) -> float:
    """A finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {describe(value)}; it takes a number")
    if not (low <= value <= high and value < math.inf):
        span = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} is {value}; it takes a number {span}")
    return float(value)


def constructor_options(loss_class: type) -> list[inspect.Parameter]:
    """The constructor's parameters as keyword-only ones, those behind `**options` included."""
    options: dict[str, inspect.Parameter] = {}
    for base in loss_class.__mro__:
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in own:
            if parameter.kind is not parameter.VAR_KEYWORD:
                options.setdefault(parameter.name, parameter.replace(kind=parameter.KEYWORD_ONLY))
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own):
            break
    return list(options.values())


def described(init: Callable) -> Callable:
    """A constructor that ends by writing `description`: class and options of the loss in a string.

    `torch.compile` guards a string by its value; it would make a symbol of a number that differs
    between two losses. Options are therefore fixed once a loss is made.
    """

    @functools.wraps(init)
    def wrapped(self, *arguments, **options):
        init(self, *arguments, **options)
        if type(self).__init__ is wrapped:  # the outermost, so that every option is set
            self.description = self.describe()

    return wrapped


class Loss(nn.Module):
    """A loss of logits (..., V) and integer targets (...); subclasses give formula and needs.

    Args of every loss:
        weight: (V,) class weights, constant, or None.
        ignore_index: tokens with this target are removed from every sum, mean and count.
        reduction: "mean", "sum" or "none".
        group: process group the tokens are sharded over, or None. Every rank returns the global
            loss, and its logits get the gradient of the global loss; under averaging data
            parallelism multiply the loss by the world size.
    """

    weight: Tensor | None
    is_token_loss = False
    description: str
    option_names: tuple[str, ...] = ()  # of the constructor, `weight` and `group` apart

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        names = (option.name for option in constructor_options(cls))
        cls.option_names = tuple(n for n in names if n not in ("weight", "group"))
        if "__init__" in vars(cls):
            cls.__init__ = described(cls.__init__)  # type: ignore[method-assign]

    @described
    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        group=None,
    ):
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index is {describe(ignore_index)}; it takes an integer")
        if weight is not None and not (
            isinstance(weight, Tensor) and weight.dim() == 1 and weight.is_floating_point()
        ):
            raise TypeError(f"weight is {describe(weight)}; it takes a float tensor of shape (V,)")
        self.register_buffer("weight", None if weight is None else weight.detach())
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.group = group

    def forward(
        self,
        logits,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        sample_ids: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        return_statistics: bool = False,
    ) -> Tensor | tuple[Tensor, Statistics]:
        """The loss of logits (..., V), a tensor or a logits source, at target (...).

        Args:
            token_weight: (...) floats >= 0, constant: a token of weight 2 equals the token listed
                twice, one of weight 0 the token not listed.
            sample_ids: (...) integers, which sample a token belongs to; by default the leading
                index of (B, T, V).
            normalizer: what a token mean is divided by instead of the batch's own weight, such as
                the number of tokens of all accumulated micro-batches; a region or ranking loss is
                multiplied by (weight of this batch's tokens / normalizer).
            return_statistics: also return detached log_prob, lse, entropy and argmax.
        """
        if torch.compiler.is_compiling() and self.compiles:
            keywords = {
                "token_weight": token_weight,
                "sample_ids": sample_ids,
                "normalizer": normalizer,
                "return_statistics": return_statistics,
            }
            return compiled_loss(self, logits, target, keywords)
        source = as_source(logits)
        batch = make_batch(
            source,
            target,
            ignore_index=self.ignore_index,
            token_weight=token_weight,
            sample_ids=sample_ids,
            group=self.group,
        )
        self.check(source)
        normalizer = check_normalizer(normalizer, self.reduction, source)
        request = self.request()
        if return_statistics:
            request = replace(request, entropy=True, argmax=True)
        if isinstance(source, LinearLogits) and fusible(self) and source.needs_grad():
            plan = self.fused_plan(batch, normalizer, request)
            loss, sweep = fused_loss(source, batch, plan)
            loss = sum_over(loss, self.group)
            return (loss, public_statistics(sweep, batch)) if return_statistics else loss
        sweep = make_sweep(source, batch, request)
        with torch.autocast(source.device.type, enabled=False):
            loss = self.value(sweep, batch, normalizer)
        if not return_statistics:
            return loss
        statistics = public_statistics(sweep, batch)
        for name in ("log_prob", "lse", "entropy"):
            setattr(statistics, name, getattr(statistics, name).detach())
        return loss, statistics

    @property
    def compiles(self) -> bool:
        """Whether one custom op can stand for a call: its value's shape must be known."""
        return self.group is None and (self.reduction != "none" or self.is_token_loss)

    def describe(self) -> str:
        """A literal `(class name, ((option, value), ...))`, without the tensors."""
        options = ", ".join([f"({name!r}, {getattr(self, name)!r})" for name in self.option_names])
        return f"({type(self).__name__!r}, ({options},))"

    def check(self, source) -> None:
        """Options that only the logits can prove wrong."""
        if self.weight is None:
            return
        if self.weight.shape[0] != source.num_classes:
            raise ValueError(
                f"weight has shape {tuple(self.weight.shape)}; it takes ({source.num_classes},), "
                "one number per class"
            )
        if self.weight.device != source.device:
            raise ValueError(f"weight is on {self.weight.device}, but logits on {source.device}")

    def request(self) -> Request:
        """The statistics `value` reads beyond log_prob and lse."""
        return Request()

    def value(self, sweep: Sweep, batch: Batch, normalizer: Tensor | None) -> Tensor:
        """The reduced loss."""
        raise TypeError(f"{type(self).__name__} does not define value(sweep, batch, normalizer)")

    def fused_plan(self, batch: Batch, normalizer: Tensor | None, request: Request) -> FusedPlan:
        """This loss as factors known before the logits are; only of a `fusible` loss."""
        raise TypeError(f"{type(self).__name__} is not a sum over tokens")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.option_names)

    # weighted sums: `0.6 * CrossEntropyLoss() + 0.4 * LovaszSoftmaxLoss()`

    def __mul__(self, coefficient: float) -> Loss:
        from segloss.losses.combined import CombinedLoss

        return CombinedLoss([(coefficient, self)])

    __rmul__ = __mul__

    def __add__(self, other: Loss) -> Loss:
        from segloss.losses.combined import CombinedLoss

        if not isinstance(other, Loss):
            return NotImplemented
        return CombinedLoss([(1.0, self), (1.0, other)])

    def __radd__(self, other) -> Loss:
        # so that sum([...]) works
        return self if other == 0 else NotImplemented


def fusible(loss: Loss) -> bool:
    """Whether a scalar sum over tokens: its gradients can be formed while a chunk's logits live."""
    return loss.is_token_loss and loss.reduction != "none"


def check_normalizer(normalizer, reduction: str, source) -> Tensor | None:
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(f"normalizer goes with reduction='mean'; reduction is {reduction!r}")
    if isinstance(normalizer, Tensor) and normalizer.numel() == 1:
        return normalizer.detach().reshape(()).to(source.device, source.dtype)
    if isinstance(normalizer, (int, float)) and not isinstance(normalizer, bool):
        if not 0 <= normalizer < math.inf:
            raise ValueError(f"normalizer is {normalizer}; it takes a number >= 0")
        # filled on the device: a copy of the host's number would wait
        return torch.full((), float(normalizer), dtype=source.dtype, device=source.device)
    raise TypeError(f"normalizer is {describe(normalizer)}; it takes a number or a 0-dim tensor")


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is 0: nothing was counted."""
    return numerator / torch.where(denominator == 0, 1, denominator)


def power(base: Tensor, exponent: float) -> Tensor:
    """base ** exponent for base >= 0; below 1 the slope at base 0 is taken as 0, not infinite."""
    if exponent == 1:
        return base
    if exponent > 1 or exponent == 0:
        return base**exponent
    zero = base <= 0
    return torch.where(zero, 0, torch.where(zero, 1, base) ** exponent)
