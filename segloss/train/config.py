"""The settings of `segloss train`: TRL's and transformers' own, and what segloss adds to them.

What is on the command line goes over what is in the file of `--config`, and that over the defaults.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import warnings
from collections import namedtuple
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import trl
import yaml

from segloss import doctor

from .errors import UserError, first_line, nearest, text_of

ALIASES = {
    "model": "model_name_or_path", "output": "output_dir", "lr": "learning_rate",
    "steps": "max_steps", "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size",
    "accumulation": "gradient_accumulation_steps", "keep": "save_total_limit",
    "save_every": "save_steps", "validate_every": "eval_steps",
    "lora_rank": "lora_r", "lora_targets": "lora_target_modules",
}  # fmt: skip
"""Short names, and whose they are; below, what some say besides."""
IMPLIED: dict[str, dict[str, Any]] = {
    "save_every": {"save_strategy": "steps"}, "validate_every": {"eval_strategy": "steps"},
    "lora_rank": {"use_peft": True}, "lora_targets": {"use_peft": True},
}  # fmt: skip
THEIRS = (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig)


def doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """What segloss adds to the arguments of TRL and transformers."""

    _argument_group_name = "segloss"
    LEAST: ClassVar[dict[str, float]] = {
        "eval_items": 0, "validation_items": 0, "coba_warmup": 1, "coba_history": 2,
        "coba_tau": 1e-6, "validation_batch": 1, "sample_temperature": 1e-6, "sample_burn_in": 0,
        "sample_fraction": 1e-6, "sample_band": 0, "patience": 0, "min_class_items": 1,
        "time_limit": 0,
    }  # fmt: skip

    data: list[str] | None = doc(None, "files, saved data sets or hub ids, each a task of its own")
    tasks: list[str] | None = doc(None, "of the data's tasks, those to train on (default: all)")
    eval_items: int | None = doc(None, "held-out rows of a task (default: a tenth, at most 100)")
    validation_items: int | None = doc(
        None, "further rows, which CoBa, --patience and --eval_strategy read (default: a tenth)"
    )
    split_seed: int | None = doc(None, "what items are held out (default: seed)")
    equal_tasks: bool = doc(False, "draw every task equally often, instead of by its size")
    loss: str | None = doc(None, "as 0.6*ce+0.4*lovasz or focal(gamma=1.5) (default: loss_type)")
    teacher: str | None = doc(None, "a model, frozen, that a loss with distill learns from")
    teacher_rest: Literal["renormalise", "uniform", "ignore"] = doc(
        "renormalise", "what becomes of the probability that teacher_ids leave out"
    )
    head: Literal["fused", "logits"] = doc(
        "fused", "fused: logits are never made; logits: the model's own, for a head that does more"
    )
    task_weights: Literal["none", "coba"] = doc(
        "none", "coba: the slower a task's validation loss falls, the more it counts"
    )
    coba_warmup: int | None = doc(None, "steps with equal weights (default: a tenth of the steps)")
    coba_history: int | None = doc(None, "steps CoBa's slopes are of (default: 4 x the warm-up)")
    coba_tau: float = doc(5.0, "how sharply CoBa turns to tasks' own histories if one diverges")
    coba_mode: Literal["paper", "published"] = doc("paper", "its formulas or its authors' code")
    validation_batch: int = doc(4, "validation items of each task that CoBa reads after a step")
    sample_weights: Literal["none", "irdro", "linupper", "quadratic", "extremes", "rank"] = doc(
        "none", "how an example's own loss weighs it: irdro the harder the more, linupper all but "
        "the easy, quadratic the middle, extremes both ends, rank a band"
    )  # fmt: skip
    sample_temperature: float = doc(1.0, "the smaller, the further are the weights from equal")
    sample_burn_in: int = doc(0, "steps with equal sample weights before the scheme's begin")
    sample_fraction: float = doc(0.25, "of rank: the share of the examples that its band holds")
    sample_band: float = doc(1.0, "of rank: how many bands of that size are harder; 0 the hardest")
    patience: int = doc(0, "stop after so many evaluations without a lower validation loss")
    evaluate_before: bool = doc(True, "evaluate the held-out items before training as well")
    exact_match: bool = doc(True, "generate greedy answers; most of an evaluation's time")
    min_class_items: int = doc(1, "macro-F1 is over the answers of so many held-out items")
    merge: bool | None = doc(None, "LoRA: leave the merged model too (default: of a GGUF file)")
    time_limit: float = doc(0.0, "seconds for the whole run, its evaluations included; 0 for none")

    def __post_init__(self) -> None:
        for name, least in self.LEAST.items():
            value, default = getattr(self, name), getattr(type(self), name)
            if value is not default and (value is None or not least <= value < math.inf):
                raise UserError(f"--{name} is {value}; it takes a number from {least} up")


@dataclass
class TrainOptions(Options):
    resume: str | None = doc(None, "the folder of an interrupted run, to go on with it")


@dataclass
class EvaluateOptions(Options):
    json: str = doc("", "a file for the results")


Settings = namedtuple("Settings", "options script training model mixture given")
"""What a command is told: our options, TRL's own dataclasses, and what was given by name."""


def settings(
    words: Sequence[str],
    stored: dict[str, Any] | None = None,
    options: type = Options,
    prog: str = "segloss train",
    description: str = "",
) -> Settings:
    """The settings of a command line, over those of its `--config`, over those that are stored.

    `words` are hyphened or underscored names of `options`, of `SFTConfig`, and of TRL's script,
    model and mixture arguments. Raises `UserError` naming the option and the nearest one.
    """
    parser = Parser((options, *THEIRS), prog=prog, description=description, allow_abbrev=False)
    path = parser.parse_known_args([*full_names(words)])[0].config
    given, spelled = {}, []
    for name, value in ((stored or {}) | (read_file(path) if path else {})).items():
        full = ALIASES.get(name, name)
        listed = getattr(parser._option_string_actions.get(f"--{full}"), "nargs", None) == "+"
        parts = value if listed and isinstance(value, list) else [value]
        if parts and all(isinstance(part, str | bool | int | float) for part in parts):
            # argparse checks them like the command line's
            spelled += [f"--{name}", *map(str, parts)] if listed else [f"--{name}={value}"]
        elif value is None or not hasattr(options, full):  # TRL's own take mappings too
            given[full] = value
        else:
            raise UserError(f"--{full} is {value}; it takes text and numbers, and lists of them")
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    namespace, unknown = parser.parse_known_args([*full_names([*spelled, *words])])
    if unknown:
        raise parser.unknown(unknown[0].partition("=")[0])
    given |= vars(namespace)
    given.pop("config", None)
    fit_machine(given)
    try:
        with warnings.catch_warnings():  # TRL's own use of names that transformers lets go
            warnings.simplefilter("ignore", FutureWarning)
            return Settings(*parser.parse_dict(deepcopy(given)), given)  # type: ignore[call-arg]
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(first_line(error)) from None


class Parser(trl.TrlParser):
    """TRL's, with `--config`; every fault is a `UserError`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_argument("--config", metavar="FILE", help="settings in YAML or JSON")
        for action in self._actions:
            if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
                action.nargs, action.const = "?", True  # --bf16 alone is yes

    def error(self, message: str) -> Any:
        raise UserError(message)

    def unknown(self, name: str) -> UserError:
        if not name.startswith("--"):
            return UserError(f"{name!r} is no option")
        known = [n for n in self._option_string_actions if "-" not in n[2:]]
        known += [f"--{short}" for short in ALIASES]
        hint = nearest("--" + name[2:].replace("-", "_"), known, f"{self.prog} --help lists them")
        return UserError(f"there is no option {name}; {hint}")


def full_names(words: Sequence[str]) -> Iterator[str]:
    """The words with full names for short ones, and with what these imply."""
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--"):
            yield from (f"--{key}={implied}" for key, implied in IMPLIED.get(name, {}).items())
            word = f"--{ALIASES.get(name, name)}{equals}{value}"
        yield word


def read_file(path: str) -> dict[str, Any]:
    """The settings in a YAML or JSON file; its `env` is set, as by TRL."""
    kind, read = ("JSON", json.loads) if path.endswith(".json") else ("YAML", yaml.safe_load)
    try:
        values = read(text_of(path))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not {kind}: {' '.join(str(error).split())}") from None
    if isinstance(values, dict) and "given" in values:  # the segloss.json of a run
        values = {k: v for k, v in values["given"].items() if k != "output_dir"}
    if not isinstance(values, dict):
        raise UserError(f"{path}: settings are needed, one `name: value` a line")
    os.environ.update({k: str(v) for k, v in (values.pop("env", None) or {}).items()})
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def fit_machine(given: dict[str, Any]) -> None:
    """TRL's defaults are for a GPU: without one, the CPU, in bfloat16 only where it has it."""
    if not torch.accelerator.is_available():
        given.setdefault("use_cpu", True)
    native = {"amx_bf16", "avx512_bf16", "bf16"} & doctor.cpu_flags()
    if given.get("use_cpu") and not given.get("fp16") and not native:
        given.setdefault("bf16", False)
    # a NaN is to be seen, not averaged away
    given.setdefault("logging_nan_inf_filter", False)
    if given.get("patience"):
        early = {"eval_strategy": "steps", "load_best_model_at_end": True}
        early |= {"metric_for_best_model": "eval_loss"}
        early |= {"save_steps": given["eval_steps"]} if "eval_steps" in given else {}
        given |= early | given
