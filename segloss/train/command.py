"""The `segloss` command."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from .config import TrainConfig, add_arguments
from .errors import UserError, first_line

EPILOG = """\
prompts and masking:
  Prompt, completion and the tokenizer's end of text are joined verbatim (no chat template; begin a
  completion with a space if the prompt ends without one). Only the completion and the end of text
  carry loss. The built-in tasks:
    asdiv          Question: {passage} {question}\\nAnswer: 48 points
    boolq          {passage}\\nQuestion: {question}?\\nAnswer: Yes
    siqa           Question: {passage} {question}\\nOptions: a; b; c\\nAnswer: b
    commonsenseqa  the same without a passage
  Tasks take turns in a batch. Exact match compares the greedy answer with the completion after case
  folding, collapsing white space and removing surrounding punctuation.

examples:
  segloss train
  segloss train --loss "focal(gamma=1.5)" --tasks boolq siqa --steps 60
  segloss train --model path/to/model --data mine.jsonl --output runs/mine
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
        print("segloss: interrupted; what was finished is in the run folder", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option like any other wrong input."""

    def error(self, message: str):
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="segloss", description="Fused losses for language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="fine-tune a language model with any loss or weighted sum of losses",
        description="Fine-tune a causal language model on several tasks, with held-out loss and "
        "exact match before and after.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(train, TrainConfig)
    train.set_defaults(action=_train)
    doctor = commands.add_parser(
        "doctor", help="show versions, device and backend, and check each family of losses"
    )
    doctor.set_defaults(action=_doctor)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    settings = {
        field.name: getattr(arguments, field.name) for field in dataclasses.fields(TrainConfig)
    }
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    from .run import train

    try:
        train(TrainConfig(**(settings | lists)))
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
