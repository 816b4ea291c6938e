"""Loss expressions: `0.6*ce + 0.4*lovasz`, `focal(gamma=1.5)`.

    expression = term { "+" term }
    term       = [ number "*" ] ( loss | "(" expression ")" )
    loss       = name [ "(" option "=" value { "," option "=" value } ")" ]

The text is parsed with `ast` and walked by hand, never evaluated.
"""

from __future__ import annotations

import ast
import inspect
import math

import segloss
from segloss.losses import Loss

from .errors import UserError, first_line

LOSSES = {
    "ce": "CrossEntropyLoss",
    "focal": "FocalLoss",
    "poly": "PolyLoss",
    "gce": "GeneralizedCrossEntropyLoss",
    "dft": "DFTLoss",
    "sadl": "SelfAdjustingDiceLoss",
    "dice": "DiceLoss",
    "gdice": "GeneralizedDiceLoss",
    "jaccard": "JaccardLoss",
    "tversky": "TverskyLoss",
    "focal_tversky": "FocalTverskyLoss",
    "lovasz": "LovaszSoftmaxLoss",
}

# set by the trainer, or tensors that a command line cannot spell
RESERVED = {"weight", "ignore_index", "reduction", "group"}


def parse_loss(expression: str) -> Loss:
    """Build the loss module that `expression` describes.

    >>> parse_loss("0.6*ce + 0.4*lovasz(classes='present')")

    Raises `UserError` naming the expression, what is wrong in it and what it takes.
    """
    try:
        return _build(ast.parse(expression.strip(), mode="eval").body)
    except UserError as error:
        raise UserError(f"loss {expression!r}: {error}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else first_line(error)
        raise UserError(f"loss {expression!r} cannot be read: {reason}; {USAGE}") from None


USAGE = "write it like 0.6*ce+0.4*lovasz or focal(gamma=1.5), with the names " + " ".join(LOSSES)


def _build(node: ast.expr) -> Loss:
    match node:
        case ast.BinOp(left, ast.Add(), right):
            return _build(left) + _build(right)
        case ast.BinOp(left, ast.Mult(), right):
            factor, loss = (right, left) if _is_number(right) else (left, right)
            return _coefficient(factor) * _build(loss)
        case ast.Name(name):
            return _loss(name, [])
        case ast.Call(ast.Name(name), [], keywords):
            return _loss(name, keywords)
        case ast.Call(ast.Name(name)):
            raise UserError(f"the options of {name} are written with their names, as gamma=1.5")
    raise UserError(f"{ast.unparse(node)!r} is not a loss; {USAGE}")


def _loss(name: str, keywords: list[ast.keyword]) -> Loss:
    if name not in LOSSES:
        raise UserError(f"unknown loss {name!r}; the losses are {' '.join(LOSSES)}")
    loss_class = getattr(segloss, LOSSES[name])
    options = _options(loss_class)
    values = {}
    for keyword in keywords:
        if keyword.arg not in options:
            takes = f"takes {', '.join(options)}" if options else "takes no options"
            raise UserError(f"{name} has no option {keyword.arg!r}; it {takes}")
        values[keyword.arg] = _literal(keyword.value)
    try:
        return loss_class(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {first_line(error)}") from None


def _options(loss_class: type) -> list[str]:
    """The constructor's keywords, followed through `**options` into the base classes."""
    names: list[str] = []
    for base in loss_class.__mro__:
        if "__init__" not in vars(base):
            continue
        _, *parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names += [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in dict.fromkeys(names) if name not in RESERVED]


def _is_number(node: ast.expr) -> bool:
    value = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(value, ast.Constant) and type(value.value) in (int, float)


def _coefficient(node: ast.expr) -> float:
    if not _is_number(node):
        raise UserError(f"{ast.unparse(node)!r} is not a number to multiply a loss by; {USAGE}")
    value = _literal(node)
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"the coefficient {ast.unparse(node)} must be positive and finite")
    return float(value)


def _literal(node: ast.expr):
    """A number, string, True, False or None."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = node
    if not isinstance(value, int | float | str | None):
        raise UserError(f"{ast.unparse(node)!r} is not a plain number, string, True, False or None")
    return value
