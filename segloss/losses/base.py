"""What every loss shares: the call, the reductions, the arithmetic of weighted sums.

N tokens, V classes.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from segloss.checks import check_choice, describe, is_dtensor
from segloss.distributed import as_group, sum_over
from segloss.losses import registry
from segloss.losses.crossing import crossing_lines
from segloss.sharding import Sharding
from segloss.sources import (
    TopK,
    as_source,
    is_local,
    is_probabilities,
    make_beside,
    public_statistics,
)
from segloss.sweep.batch import Batch, make_batch
from segloss.sweep.beside import Beside
from segloss.sweep.request import Request, RowSum, Statistics, Sweep
from segloss.sweep.source import Source

REDUCTIONS = ("mean", "sum", "none")


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

    parameters = list(inspect.signature(init).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(init)
    def wrapped(self, *arguments, **options):
        init(self, *arguments, **options)
        if type(self).__init__ is not wrapped:
            return  # a base's: the outermost alone sees every option
        self.description = None
        if len(arguments) <= len(names):
            given = dict(zip(names[: len(arguments)], arguments, strict=True))
            self.description = self.describe(given | options)

    return wrapped


def is_literal(value) -> bool:
    """Whether `repr` of the value can be read again."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str))


class Loss(nn.Module):
    """A loss of logits (..., V) and integer targets (...); subclasses give formula and needs.

    Args of every loss:
        weight: (V,) class weights, constant, or None.
        ignore_index: tokens with this target are removed from every sum, mean and count.
        reduction: "mean", "sum" or "none".
        group: process group (or 1-D DeviceMesh) the tokens are sharded over, or None. Every rank
            returns the global loss, and its logits get the gradient of the global loss; under
            averaging data parallelism multiply the loss by the world size.

    A class of one's own has all that the built-in ones have. With `short="hinge"` behind its bases
    it is known by that name to `parse_loss`; without, as `mypackage.losses:Hinge`.
    """

    weight: Tensor | None
    is_token_loss = False
    reads_teacher = False
    takes_probabilities = False  # as targets (..., V)
    description: str | None  # what `torch.compile` keeps of it; None if an option is no plain value
    key: ClassVar[str]
    function: ClassVar[str | None]  # of segloss, the loss as a function
    short: ClassVar[str | None]
    option_names: tuple[str, ...] = ()  # of the constructor, `weight` and `group` apart

    def __init_subclass__(cls, function: str | None = None, short: str | None = None, **keywords):
        super().__init_subclass__(**keywords)
        registry.register(cls, function, short)
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
        if is_dtensor(weight):
            raise TypeError("weight is a DTensor; it takes the whole (V,): weight.full_tensor()")
        self.register_buffer("weight", None if weight is None else weight.detach())
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.group = as_group(group)

    def forward(
        self,
        logits,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        sample_ids: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        teacher: Tensor | Source | TopK | None = None,
        columns: Tensor | None = None,
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
            teacher: of `DistillationLoss`, alone or in a sum: logits (..., V), a logits source or
                `TopK`. It gets no gradient.
            columns: (..., k) integers, class ids of each token, -1 to skip: a formula of one's own
                finds their log-probabilities in `stats.column_log_prob` (N, k).
            return_statistics: also return detached log_prob, lse, entropy and argmax.
        """
        if torch.compiler.is_compiling():
            # here, not above: what traces takes longer to import than all the rest
            from segloss.losses.compiled import compiled_loss, eager_loss

            keywords: dict[str, Any] = {
                "token_weight": token_weight,
                "sample_ids": sample_ids,
                "normalizer": normalizer,
                "return_statistics": return_statistics,
            }
            if teacher is not None or columns is not None or target.is_floating_point():
                keywords |= {"teacher": teacher, "columns": columns}
                return eager_loss(self, logits, target, keywords)
            called = compiled_loss if self.compiles and is_local(logits) else eager_loss
            return called(self, logits, target, keywords)
        source = as_source(logits)
        probabilities = None
        if self.takes_probabilities and is_probabilities(target, source):
            probabilities = target
            target = self.stand_in(target)
        self.check_teacher(teacher)
        beside = make_beside(source, columns=columns, teacher=teacher, probabilities=probabilities)
        batch = make_batch(
            source,
            target,
            ignore_index=self.ignore_index,
            token_weight=token_weight,
            sample_ids=sample_ids,
            group=source.token_group(self.group),
            beside=beside,
        )
        self.check(source)
        normalizer = check_normalizer(normalizer, self.reduction, source)
        request = self.request_for(beside)
        if return_statistics:
            request = replace(request, entropy=True, argmax=True)
        if self.is_row_sum and source.forms_gradients:
            loss, stats = source.row_sum(batch, self.row_sum(batch, normalizer, request))
            loss = sum_over(loss, batch.group)
            stats.named(beside, ())
            return (loss, public_statistics(stats, batch)) if return_statistics else loss
        sweep = source.sweep(batch, request)
        with torch.autocast(source.device.type, enabled=False):
            loss = self.value(sweep, batch, normalizer)
        if not return_statistics:
            return loss
        statistics = public_statistics(sweep, batch)
        for name in ("log_prob", "lse", "entropy", "column_log_prob"):
            value = getattr(statistics, name)
            setattr(statistics, name, None if value is None else value.detach())
        return loss, statistics

    def explain(self, logits, target: Tensor) -> str:
        """What `self(logits, target)` and its backward do: chunks, matrix products, bytes, and
        what crosses ranks."""
        source = as_source(logits)
        whole = Sharding.whole(source.num_classes)  # without a word to other ranks
        batch = make_batch(source, target, ignore_index=self.ignore_index, sharding=whole)
        request = self.request()
        all_classes = request.prob_sums and isinstance(request.classes, str)
        all_classes = all_classes and request.classes == "all"
        plan = source.plan(batch, self.is_row_sum, all_classes, request.peaks)
        if self.reads_teacher:
            plan += (
                "\nteacher    not counted: of a head, one product and a chunk of its logits more"
            )
        return "\n".join([plan, *crossing_lines(self, source, batch)])

    @property
    def is_row_sum(self) -> bool:
        """Whether the value is a sum over rows of numbers with constant factors."""
        trained = any(parameter.requires_grad for parameter in self.parameters())
        return self.is_token_loss and self.reduction != "none" and not trained

    @property
    def compiles(self) -> bool:
        """Whether one custom op can stand for a call: its value's shape must be known."""
        known = self.reduction != "none" or self.is_token_loss
        plain = self.description is not None and not any(True for _ in self.parameters())
        return self.group is None and known and plain

    def describe(self, options: Mapping[str, Any]) -> str | None:
        """A literal `(key, ((option, value), ...))`; a tensor option is the buffer of its name."""
        buffers = [name for name, _ in self.named_buffers()]
        parts = []
        for name, value in options.items():
            if name == "group" or (isinstance(value, Tensor) and name in buffers):
                continue
            if not is_literal(value):
                return None
            parts.append(f"({name!r}, {value!r}), ")
        return f"({self.key!r}, ({''.join(parts)}))"

    def check(self, source: Source) -> None:
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

    def check_teacher(self, teacher) -> None:
        """Refuse a teacher that nothing reads, and a loss without the one it needs."""
        name = type(self).__name__
        if teacher is not None and not self.reads_teacher:
            raise TypeError(
                f"{name} reads no teacher; it goes to DistillationLoss, alone or in a sum such as "
                f"0.5 * {name}() + 0.5 * DistillationLoss()"
            )
        if teacher is None and self.reads_teacher:
            raise TypeError(f"teacher is missing: call {name} as loss(logits, target, teacher=...)")

    def stand_in(self, probabilities: Tensor) -> Tensor:
        """Class indices (...) in the place of probability targets: none is ignored."""
        if self.ignore_index >= 0:
            raise ValueError(
                f"ignore_index is {self.ignore_index}, and target holds probabilities, which "
                "ignore no class; leave a token out by token_weight 0"
            )
        return torch.zeros(probabilities.shape[:-1], dtype=torch.int64, device=probabilities.device)

    def request_for(self, beside: Beside) -> Request:
        """What `value` reads, given what the call gives beside the target."""
        return self.request()

    def request(self) -> Request:
        """The statistics `value` reads beyond log_prob and lse."""
        return Request()

    def value(self, sweep: Sweep, batch: Batch, normalizer: Tensor | None) -> Tensor:
        """The reduced loss."""
        raise TypeError(f"{type(self).__name__} does not define value(sweep, batch, normalizer)")

    def row_sum(self, batch: Batch, normalizer: Tensor | None, request: Request) -> RowSum:
        """This loss as factors known before the logits are, where `is_row_sum`."""
        raise TypeError(f"{type(self).__name__} is not a sum over tokens")

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in self.option_names if hasattr(self, name)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    # weighted sums: `0.6 * CrossEntropyLoss() + 0.4 * LovaszSoftmaxLoss()`

    def __mul__(self, coefficient: float) -> Loss:
        return registry.find("combined:CombinedLoss")([(coefficient, self)])

    __rmul__ = __mul__

    def __add__(self, other: Loss) -> Loss:
        if not isinstance(other, Loss):
            return NotImplemented
        return registry.find("combined:CombinedLoss")([(1.0, self), (1.0, other)])

    def __radd__(self, other) -> Loss:
        # so that sum([...]) works
        return self if other == 0 else NotImplemented


def check_normalizer(normalizer, reduction: str, source: Source) -> Tensor | None:
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
