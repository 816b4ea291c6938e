"""The losses as functions: a module's options and its call's in one, like `torch.nn.functional`.

segloss.focal_loss(logits, target, gamma=1.5, token_weight=w)
segloss.FocalLoss(gamma=1.5)(logits, target, token_weight=w)       # the same

Every loss with a `function` name has two here; `make stubs` writes `functional.pyi` from them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from segloss import losses
from segloss.losses.base import constructor_options
from segloss.losses.shapes import of_any_weight, of_one_token
from segloss.sources import LinearLogits

CALL = [
    parameter
    for parameter in inspect.signature(losses.Loss.forward).parameters.values()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
]
SOURCE = [
    parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    for parameter in inspect.signature(LinearLogits).parameters.values()
    if parameter.name not in ("hidden", "weight", "bias")
]


def split(keywords: dict, parameters: list[inspect.Parameter]) -> dict:
    """Take out of `keywords` those that `parameters` name."""
    return {p.name: keywords.pop(p.name) for p in parameters if p.name in keywords}


def dress(function: Callable, name: str, positional: str, keyword_only: list, text: str) -> None:
    names = positional.split()
    leading = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    function.__signature__ = inspect.Signature([*leading, *keyword_only])  # type: ignore[attr-defined]
    function.__name__ = function.__qualname__ = name
    function.__doc__ = text


def functional(name: str, loss_class: type[losses.Loss]) -> Callable:
    """`loss_class` as a function `name(logits, target, *, options of the module and its call)`."""

    def function(logits, target, **keywords):
        call = split(keywords, CALL)
        return loss_class(**keywords)(logits, target, **call)

    text = f"`{loss_class.__name__}(...)(logits, target, ...)`.\n\n{loss_class.__doc__}"
    dress(function, name, "logits target", [*constructor_options(loss_class), *CALL], text)
    return function


def linear_functional(name: str, loss_class: type[losses.Loss]) -> Callable:
    """`name(input, linear_weight, target, *, linear_bias=None, ...)`, the logits never stored."""

    def function(input, linear_weight, target, *, linear_bias=None, **keywords):
        call, of_source = split(keywords, CALL), split(keywords, SOURCE)
        source = LinearLogits(input, linear_weight, linear_bias, **of_source)
        return loss_class(**keywords)(source, target, **call)

    bias = inspect.Parameter("linear_bias", inspect.Parameter.KEYWORD_ONLY, default=None)
    text = (
        f"`{loss_class.__name__}(...)(F.linear(input, linear_weight, linear_bias), target, ...)` "
        "without storing the logits.\n\n"
        "Parameters as `torch.nn.functional.linear_cross_entropy`, then the options of "
        f"`LinearLogits` and of the loss. Without a valid token the value is 0.\n\n"
        f"{loss_class.__doc__}"
    )
    options = [bias, *SOURCE, *constructor_options(loss_class), *CALL]
    dress(function, name, "input linear_weight target", options, text)
    return function


FUNCTIONS: dict[str, Callable] = {}
for _loss in losses.LOSSES.values():
    if _loss.function is not None:
        FUNCTIONS[_loss.function] = functional(_loss.function, _loss)
        linear = f"linear_{_loss.function}"
        FUNCTIONS[linear] = linear_functional(linear, _loss)


def as_torch(name: str, wrap: Callable, *more: inspect.Parameter) -> None:
    """Let a function take every shape that PyTorch's of its name takes."""
    plain = FUNCTIONS[name]
    FUNCTIONS[name] = wrapped = wrap(plain)
    parameters = [*inspect.signature(plain).parameters.values(), *more]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__name__ = wrapped.__qualname__ = name
    wrapped.__doc__ = f"{plain.__doc__}\n\n{wrap.__doc__}"


as_torch("cross_entropy", of_one_token)
as_torch(
    "linear_cross_entropy",
    of_any_weight,
    inspect.Parameter("options", inspect.Parameter.KEYWORD_ONLY, default=None),
)
globals().update(FUNCTIONS)  # `functional.pyi` says the same to mypy and editors
__all__ = sorted(FUNCTIONS)
