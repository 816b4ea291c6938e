"""Loss expressions: `0.6*ce + 0.4*lovasz`, `focal(gamma=1.5)`, `mypackage.losses:Hinge(margin=2)`.

    expression = term { "+" term }
    term       = [ number "*" ] ( loss | "(" expression ")" )
    loss       = name [ "(" option "=" value { "," option "=" value } ")" ]
    name       = a short name, or `module:Class` of a loss of one's own

The text is parsed with `ast` and walked by hand, never evaluated.
"""

from __future__ import annotations

import ast
import importlib
import math
import re

from segloss.losses.base import Loss, constructor_options
from segloss.losses.registry import LOSSES

# set by the caller, or tensors that a text cannot spell
RESERVED = {"weight", "ignore_index", "reduction", "group"}
# a quoted string, which is left alone, or `module:Class`, which Python cannot parse
PATH = re.compile(r"""'[^']*'|"[^"]*"|(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)""")
MARK = "__in__"  # stands for the colon


def parse_loss(expression: str) -> Loss:
    """Build the loss module that `expression` describes.

    >>> parse_loss("0.6*ce + 0.4*lovasz(classes='present')")

    A loss of one's own is written `mypackage.losses:Hinge`; its module is imported.
    Raises ValueError naming the expression, what is wrong in it and what it takes.
    """
    if not isinstance(expression, str):
        raise TypeError(f"expression is {expression!r}; it takes a string like '0.6*ce+0.4*lovasz'")
    text = PATH.sub(_marked, expression.strip())
    try:
        return _build(ast.parse(text, mode="eval").body)
    except _Wrong as error:
        raise ValueError(f"loss {expression!r}: {error}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else _first_line(error)
        raise ValueError(f"loss {expression!r} cannot be read: {reason}; {_usage()}") from None


class _Wrong(Exception):
    """What is wrong in an expression that could be parsed."""


def _marked(match: re.Match) -> str:
    if match["module"] is None:
        return match[0]
    return f"{match['module']}{MARK}{match['name']}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _usage() -> str:
    return f"write it like 0.6*ce+0.4*lovasz or focal(gamma=1.5), with the names {' '.join(LOSSES)}"


def _build(node: ast.expr) -> Loss:
    match node:
        case ast.BinOp(left, ast.Add(), right):
            return _build(left) + _build(right)
        case ast.BinOp(left, ast.Mult(), right):
            factor, loss = (right, left) if _is_number(right) else (left, right)
            return _coefficient(factor) * _build(loss)
        case ast.Name() | ast.Attribute() if name := _name(node):
            return _loss(name, [])
        case ast.Call(function, [], keywords) if name := _name(function):
            return _loss(name, keywords)
        case ast.Call(function) if name := _name(function):
            raise _Wrong(f"the options of {name} are written with their names, as gamma=1.5")
    raise _Wrong(f"{ast.unparse(node).replace(MARK, ':')!r} is not a loss; {_usage()}")


def _name(node: ast.expr) -> str | None:
    """The short name or path that a name or a chain of attributes stands for."""
    inner = node
    while isinstance(inner, ast.Attribute):
        inner = inner.value
    return ast.unparse(node).replace(MARK, ":") if isinstance(inner, ast.Name) else None


def _loss(name: str, keywords: list[ast.keyword]) -> Loss:
    loss_class = _imported(name) if ":" in name else LOSSES.get(name)
    if loss_class is None:
        raise _Wrong(
            f"unknown loss {name!r}; the losses are {' '.join(LOSSES)}, or one of your own as "
            "module:Class"
        )
    options = [o.name for o in constructor_options(loss_class) if o.name not in RESERVED]
    values = {}
    for keyword in keywords:
        if keyword.arg not in options:
            takes = f"takes {', '.join(options)}" if options else "takes no options"
            raise _Wrong(f"{name} has no option {keyword.arg!r}; it {takes}")
        values[keyword.arg] = _literal(keyword.value)
    try:
        return loss_class(**values)
    except (TypeError, ValueError) as error:
        raise _Wrong(f"{name}: {_first_line(error)}") from None


def _imported(path: str) -> type[Loss]:
    module, _, name = path.partition(":")
    try:
        loss_class = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _Wrong(f"{path} cannot be imported: {_first_line(error)}") from None
    if not (isinstance(loss_class, type) and issubclass(loss_class, Loss)):
        raise _Wrong(f"{path} is no loss; it takes a subclass of segloss.TokenLoss or RegionLoss")
    return loss_class


def _is_number(node: ast.expr) -> bool:
    value = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(value, ast.Constant) and type(value.value) in (int, float)


def _coefficient(node: ast.expr) -> float:
    if not _is_number(node):
        raise _Wrong(f"{ast.unparse(node)!r} is not a number to multiply a loss by; {_usage()}")
    value = _literal(node)
    if not (math.isfinite(value) and value > 0):
        raise _Wrong(f"the coefficient {ast.unparse(node)} must be positive and finite")
    return float(value)


def _literal(node: ast.expr):
    """A number, string, True, False or None."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = node
    if not isinstance(value, int | float | str | None):
        raise _Wrong(f"{ast.unparse(node)!r} is not a plain number, string, True, False or None")
    return value
