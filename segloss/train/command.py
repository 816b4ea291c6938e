"""The `segloss` command."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from .config import TrainConfig, add_arguments, given, read_settings
from .errors import UserError, first_line

EPILOG = """\
prompts and masking:
  Prompt, completion and the tokenizer's end of text are joined verbatim (no chat template; begin a
  completion with a space if the prompt ends without one). Only the completion and the end of text
  carry loss. The built-in tasks:
    asdiv          Question: {passage} {question}\\nAnswer: 48 points
    boolq          {passage}\\nQuestion: {question}?\\nAnswer: Yes
    siqa           Question: {passage} {question}\\nOptions: a; b; c\\nAnswer: b
    commonsenseqa, openbookqa, piqa
                   the same without a passage
    nq             Question: {question}?\\nAnswer: the first of the answers
  Tasks take turns in a batch. Exact match compares the greedy answer with the completion after case
  folding, collapsing white space and removing surrounding punctuation.

settings file:
  --config takes YAML (lines such as `batch-size: 8`) or JSON with the same names as the options, or
  the config.json of an earlier run. What is on the command line goes over it.

examples:
  segloss train
  segloss train --loss "focal(gamma=1.5)" --tasks boolq siqa --steps 60
  segloss train --model path/to/model --data mine.jsonl --output runs/mine
  segloss train --task-weights coba --sample-weights irdro --tasks asdiv boolq siqa commonsenseqa
  segloss train --config mine.yaml --lr 1e-4 --save-every 100 --output runs/mine
  segloss train --resume runs/mine
  segloss select --target siqa --check 2
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 with one message on stderr."""
    try:
        arguments = _parser().parse_args(argv)
        return arguments.action(arguments)
    except UserError as error:
        print(f"segloss: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "segloss: interrupted; what was finished is in the run folder, and "
            "segloss train --resume goes on with it",
            file=sys.stderr,
        )
        return 130


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option like any other wrong input."""

    def error(self, message: str):
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="segloss", description="Fused losses for language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    _add_select(commands)
    _add_report(commands)
    doctor = commands.add_parser(
        "doctor", help="show versions, device and backend, and check each family of losses"
    )
    doctor.set_defaults(action=_doctor)
    return parser


def _add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="fine-tune a language model with any loss, task weights and sample weights",
        description="Fine-tune a causal language model on several tasks, with held-out loss and "
        "exact match before and after.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("--config", metavar="FILE", help="settings as YAML or JSON, see below")
    train.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with the interrupted run in this folder, with its own settings; besides it "
        "only --time-limit is taken, which then counts from now",
    )
    add_arguments(train, TrainConfig)
    train.set_defaults(action=_train)


EVALUATED = (
    *("data", "tasks", "eval_items", "max_prompt_tokens", "max_completion_tokens"),
    *("batch_size", "seed", "precision", "head"),
)


def _add_evaluate(commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="held-out loss and exact match of a run's model, or of any model",
        description="Evaluate a model without training: loss per completion token, token "
        "accuracy, entropy and exact match of greedy answers. A run's model is evaluated with the "
        "run's own settings, hence on the items it was not trained on, unless options say "
        "otherwise; for any other model the defaults are those below.",
        allow_abbrev=False,
    )
    evaluate.add_argument(
        "target", metavar="RUN_OR_MODEL", help="a run folder, a model folder, smollm2 or gemma3"
    )
    evaluate.add_argument(
        "--json", metavar="FILE", default="", help="also write the result here (default: nowhere)"
    )
    add_arguments(evaluate, TrainConfig, only=EVALUATED)
    evaluate.set_defaults(action=_evaluate)


def _add_select(commands) -> None:
    from .select import SHARED, SelectConfig

    select = commands.add_parser(
        "select",
        help="choose the tasks to fine-tune on, from gradients instead of trials",
        description="Train on all tasks once, take each sample's gradient once, and estimate from "
        "them the loss after fine-tuning on any subset of the tasks (GradEx). Ends in the best "
        "subset and the command that trains on it. Compare with --check before relying on it.",
        allow_abbrev=False,
    )
    own = {field.name for field in dataclasses.fields(SelectConfig)}
    own -= {field.name for field in dataclasses.fields(TrainConfig)}
    add_arguments(select, SelectConfig, only={*SHARED, *own})
    select.set_defaults(action=_select)


def _add_report(commands) -> None:
    report = commands.add_parser(
        "report",
        help="one web page and pictures of one or several runs, side by side",
        description="Write report.html, which needs no other file and no network, and its "
        "pictures as PNG: loss per task, task weights, sample weights, results, and estimated "
        "against true losses where a run selected tasks.",
        allow_abbrev=False,
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, also unfinished")
    report.add_argument(
        "--output", metavar="FOLDER", default="", help="(default: report/ in the first run folder)"
    )
    report.set_defaults(action=_report)


def _train(arguments: argparse.Namespace) -> int:
    settings = given(arguments, TrainConfig)
    if arguments.resume is not None:
        if arguments.config is not None or set(settings) - {"time_limit"}:
            raise UserError("--resume takes the run's own settings; only --time-limit goes with it")
        from .run import resume

        return _in_memory(resume, arguments.resume, settings.get("time_limit"))
    if arguments.config is not None:
        stored = read_settings(arguments.config, TrainConfig)
        if {"tasks", "data"} & set(settings):  # the file's data give way to the command line's
            stored = {k: v for k, v in stored.items() if k not in ("tasks", "data")}
        settings = stored | settings
    from .run import train

    return _in_memory(train, TrainConfig(**settings))


def _evaluate(arguments: argparse.Namespace) -> int:
    from .evaluate import evaluate

    settings = given(arguments, TrainConfig)
    return _in_memory(evaluate, arguments.target, settings, arguments.json)


def _select(arguments: argparse.Namespace) -> int:
    from .select import SelectConfig, select

    return _in_memory(select, SelectConfig(**given(arguments, SelectConfig)))


def _report(arguments: argparse.Namespace) -> int:
    from .page import report

    report(arguments.runs, arguments.output)
    return 0


def _in_memory(action, *values) -> int:
    """Call it; being out of memory is a message, as any other thing the user can put right."""
    try:
        action(*values)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("out of memory", "can't allocate memory")):
            raise
        raise UserError(
            f"out of memory ({first_line(error)}); lower --batch-size and raise --accumulation"
        ) from None
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from segloss.doctor import doctor

    return doctor()


if __name__ == "__main__":
    sys.exit(main())
