"""Writes `segloss/functional.pyi`: the functions and their keywords for mypy and editors.

python tests/stubs.py      # or: make stubs
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

from segloss import functional

STUB = Path(__file__).resolve().parents[1] / "segloss" / "functional.pyi"
HEAD = """\
# Written by `make stubs` from the losses' constructors; a test compares it with them.
from typing import Any

from torch import Tensor

from segloss.sharding import VocabShard
from segloss.sources.beside import TopK
from segloss.sweep.request import Statistics
from segloss.sweep.source import Source

"""


def annotation(name: str, parameter: inspect.Parameter) -> str:
    if parameter.annotation is not inspect.Parameter.empty:
        return str(parameter.annotation)
    positional = {
        "logits": "Tensor | Source",
        "linear_bias": "Tensor | None",
        "group": "Any",
        "options": "Any",
    }
    return positional.get(name, "Tensor")


def literal(value) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def signature(name: str, function) -> str:
    parts, keywords = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            parts.append("*")
            keywords = True
        text = f"{parameter.name}: {annotation(parameter.name, parameter)}"
        if parameter.default is not parameter.empty:
            text += f" = {literal(parameter.default)}"
        parts.append(text)
    lines = "".join(f"    {part},\n" for part in parts)
    return f"def {name}(\n{lines}) -> Any: ...\n"


def stub() -> str:
    names = "".join(f'    "{name}",\n' for name in sorted(functional.__all__))
    functions = "".join(signature(n, f) for n, f in functional.FUNCTIONS.items())
    text = f"{HEAD}__all__ = [\n{names}]\n\n{functions}"
    return re.sub(r"from segloss.sweep.request import Statistics\n", "", text)


if __name__ == "__main__":
    STUB.write_text(stub())
