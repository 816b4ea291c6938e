"""The settings of `segloss train`: TRL's and transformers' own, and what segloss adds to them.

What is on the command line goes over what is in the file of `--config`, and that over the defaults.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import UserError, first_line

ALIASES = {
    "model": "model_name_or_path",
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "output": "output_dir",
    "keep": "save_total_limit",
    "save_every": "save_steps",
    "validate_every": "eval_steps",
    "lora_rank": "lora_r",
    "lora_targets": "lora_target_modules",
}
"""Short names, and whose they are."""

IMPLIED: dict[str, dict[str, Any]] = {
    "save_every": {"save_strategy": "steps"},
    "validate_every": {"eval_strategy": "steps"},
    "lora_rank": {"use_peft": True},
    "lora_targets": {"use_peft": True},
}
"""What a short name says besides."""


def doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """What segloss adds to the arguments of TRL and transformers."""

    _argument_group_name = "segloss"

    data: list[str] | None = doc(
        None, "files, folders of saved data sets or hub ids; each is a task, unless its rows say so"
    )
    eval_items: int | None = doc(
        None, "held-out items of each task (default: a tenth of --data, at most 100; a test split)"
    )
    validation_items: int | None = doc(
        None, "further items that CoBa, --patience and --eval_strategy read (default: a tenth)"
    )
    split_seed: int | None = doc(None, "what items are held out (default: seed)")
    equal_tasks: bool = doc(False, "draw every task equally often, instead of by its size")
    loss: str | None = doc(None, "as 0.6*ce+0.4*lovasz or focal(gamma=1.5) (default: loss_type)")
    teacher: str | None = doc(
        None, "a model that a loss with distill learns from: a folder, hub id or GGUF file; frozen"
    )
    teacher_rest: Literal["renormalise", "uniform", "ignore"] = doc(
        "renormalise", "what becomes of the probability that the columns teacher_ids and "
        "teacher_log_prob leave out"
    )  # fmt: skip
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
        "none", "how much each example of a batch counts, by its own mean loss: irdro the harder "
        "the more, linupper all but the easy, quadratic the middle, extremes both ends, rank a band"
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
        least = {"coba_warmup": 1, "validation_batch": 1, "min_class_items": 1, "coba_history": 2}
        for name in ("eval_items", "validation_items", "sample_burn_in", "patience", *least):
            value, low = getattr(self, name), least.get(name, 0)
            self._require(name, value is None or value >= low, f"a whole number from {low}")
        for name in ("coba_tau", "sample_temperature"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("sample_band", "time_limit"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number from 0 up")
        self._require("sample_fraction", 0 < self.sample_fraction <= 1, "a number above 0, up to 1")

    def _require(self, name: str, good: bool, takes: str) -> None:
        if not good:
            raise UserError(f"--{name} is {getattr(self, name)}; it takes {takes}")


@dataclass(frozen=True)
class Settings:
    """Everything that a command is told, as TRL's and our own dataclasses."""

    options: Any
    """`Options`, or a subclass."""
    script: Any
    training: Any
    """TRL's `SFTConfig`."""
    model: Any
    mixture: Any
    given: dict[str, Any]
    """What was on the command line or in the file, under its full name; JSON can hold it."""


# ------------------------------------------------------------------------------------ parsing


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
    parser = build_parser(options, prog, description)
    words, path = expanded(words)
    values = dict(stored or {})
    if path is not None:
        values |= read_file(path)
    parser.set_defaults_with_config(**deepcopy(values))
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        raise parser.unknown(unknown[0])
    raw = vars(namespace)
    named = {name for word in words if word.startswith("--") for name in [parser.dest(word)]}
    given = {name: deepcopy(raw[name]) for name in {*values, *named} if name in raw}
    fit_machine(raw, given)
    try:
        with warnings.catch_warnings():  # TRL's own use of names that transformers lets go
            warnings.simplefilter("ignore", FutureWarning)
            ours, script, training, model, mixture = parser.parse_dict(raw, allow_extra_keys=True)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(first_line(error)) from None
    return Settings(ours, script, training, model, mixture, given)


def build_parser(
    options: type = Options, prog: str = "segloss train", description: str = ""
) -> Any:
    """TRL's parser, over `Options` and TRL's own dataclasses; every fault is a `UserError`."""
    import trl

    class Parser(trl.TrlParser):
        def error(self, message: str) -> Any:
            raise UserError(message)

        def unknown(self, name: str, where: str = "") -> UserError:
            name = name.partition("=")[0]
            if not name.startswith("--"):
                return UserError(f"{where}{name!r} is no option")
            known = [n[2:].replace("-", "_") for a in self._actions for n in a.option_strings]
            near = difflib.get_close_matches(name[2:].replace("-", "_"), [*known, *ALIASES], n=1)
            hint = f"did you mean --{near[0]}?" if near else f"{prog} --help lists them"
            return UserError(f"{where}there is no option {name}; {hint}")

        def dest(self, word: str) -> str:
            action = self._option_string_actions.get(word.partition("=")[0])
            return "" if action is None else action.dest

        def set_defaults_with_config(self, **values: Any) -> list[str]:
            """Scalars go as text, which argparse converts and checks like the command line's."""
            for action in self._actions:
                value = values.get(action.dest)
                if (
                    value is not None
                    and action.choices
                    and str(value) not in map(str, action.choices)
                ):
                    takes = ", ".join(map(str, action.choices))
                    raise UserError(f"--{action.dest} is {value}; it takes {takes}")
                if isinstance(value, str) and action.nargs == "+":
                    values[action.dest] = [value]
            texts = {
                k: str(v) if isinstance(v, bool | int | float) else v for k, v in values.items()
            }
            unknown = super().set_defaults_with_config(**texts)
            if unknown:
                raise self.unknown(unknown[0], "--config: ")
            return unknown

    own = (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    parser = Parser((options, *own), prog=prog, description=description, allow_abbrev=False)
    for action in parser._actions:
        if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
            action.nargs, action.const = "?", True  # --bf16 alone is yes
    return parser


def expanded(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Full names for short ones, with what they imply; and the file of `--config`."""
    left, path, result = list(words), None, []
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--"):
            result.append(word)
        elif name == "config":
            if not equals and not left:
                raise UserError("--config takes a file")
            path = value if equals else left.pop(0)
        else:
            for key, implied in IMPLIED.get(name, {}).items():
                result.append(f"--{key}={implied}")
            result.append(f"--{ALIASES.get(name, name)}{equals}{value}")
    return result, path


def read_file(path: str) -> dict[str, Any]:
    """The settings in a YAML or JSON file under their full names; its `env` is set, as by TRL."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where} is not YAML: {problem or first_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON or UTF-8: {first_line(error)}") from None
    if isinstance(values, dict) and "given" in values:  # the segloss.json of a run
        values = {k: v for k, v in values["given"].items() if k != "output_dir"}
    if not isinstance(values, dict):
        raise UserError(f"{path}: settings are needed, one `name: value` a line")
    for name, value in (values.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        found |= IMPLIED.get(name, {})
        found[ALIASES.get(name, name)] = value
    return found


def fit_machine(raw: dict[str, Any], given: dict[str, Any]) -> None:
    """TRL's defaults are for a GPU: without one, the CPU, in bfloat16 only where it has it."""
    import torch

    from segloss.doctor import cpu_flags

    if not torch.accelerator.is_available():
        given.setdefault("use_cpu", True)
    if (
        given.get("use_cpu")
        and not raw.get("fp16")
        and not {"amx_bf16", "avx512_bf16", "bf16"} & cpu_flags()
    ):
        given.setdefault("bf16", False)
    # a NaN is to be seen, not averaged away
    given.setdefault("logging_nan_inf_filter", False)
    if raw.get("patience"):
        given.setdefault("eval_strategy", "steps")
        given.setdefault("load_best_model_at_end", True)
        given.setdefault("metric_for_best_model", "eval_loss")
        if "eval_steps" in given:
            given.setdefault("save_steps", given["eval_steps"])
    raw |= deepcopy(given)
