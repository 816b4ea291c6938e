"""The `segloss` command."""

from __future__ import annotations

import argparse
import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import Timeout

import segloss
from segloss.train.errors import UserError, first_line, nearest

REPORT = "Write report.html, which needs no other file and no network, and its pictures as PNG."
HELP = "segloss COMMAND --help lists a command's options; segloss --version says which this is."
TRAIN = """\
TRL's SFTTrainer with any loss, task and sample weights, and honest tables. All its options and
those of `trl sft` work under their own names, here or in the file of --config. Short names: --model
--steps --epochs --batch-size --accumulation --lr --output --save-every --keep --lora-rank
--lora-targets --validate-every. Beside --resume RUN only --time-limit is taken."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 with one message on stderr."""
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        code, text = 2, f"error: {error}"
    except Timeout as error:  # of a lock
        code, text = (
            2,
            f"error: {Path(error.lock_file).parent} is still going on in another process",
        )
    except pickle.UnpicklingError as error:
        code, text = 2, f"error: a checkpoint's pickle is not loaded: {first_line(error)}"
    except ImportError as error:
        name, text = error.name or "", " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError) and name.isidentifier():
            text = f"{name} is not installed: pip install {'pyyaml' if name == 'yaml' else name}"
        elif "install" not in text and "is required" not in text:
            raise
        code, text = 2, f"error: {text}"
    except KeyboardInterrupt as interrupt:
        code, text = 130, str(interrupt) or "interrupted"
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, MemoryError) or "out of memory" in str(error)
        if not known and "t allocate" not in str(error):
            raise
        advice = "lower --batch-size and raise --accumulation"
        code, text = 2, f"error: out of memory ({first_line(error)}); {advice}"
    print(f"segloss: {text}", file=sys.stderr)
    return code


def run(words: list[str]) -> int:
    listed = (train, evaluate, compare, select, report, doctor)
    commands: dict[str, Callable[[list[str]], int | None]] = {c.__name__: c for c in listed}
    if not words or words[0] in ("-h", "--help"):
        about = "".join(f"  {name:9} {c.__doc__}\n" for name, c in commands.items())
        print(f"usage: segloss COMMAND ...\n\n{about}\n{HELP}")
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        print(f"segloss {segloss.__version__}")
        return 0
    if name not in commands:
        hint = nearest(name, [*commands, "--version"], "segloss --help lists them")
        raise UserError(f"there is no command {name}; {hint}")
    return commands[name](rest) or 0


def train(words: list[str]) -> None:
    """fine-tune a language model with any loss, task weights and sample weights"""
    from segloss.train import run
    from segloss.train.config import TrainOptions, settings

    found = settings(words, options=TrainOptions, description=TRAIN)
    folder = found.options.resume
    if folder is None:
        return run.train(found)
    named = {word.partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    if named - {"__resume", "__time_limit"}:
        raise UserError("--resume takes the run's own settings; only --time-limit goes with it")
    run.train(settings(words, run.stored(folder), options=TrainOptions), resumed=True)


def evaluate(words: list[str]) -> None:
    """held-out loss, exact match, accuracy and macro-F1 of a run's model, or of any model"""
    from segloss.train import run
    from segloss.train.config import EvaluateOptions, settings

    target, words = ("", words) if not words or words[0].startswith("-") else (words[0], words[1:])
    told = settings(words, options=EvaluateOptions, prog="segloss evaluate").given
    if not target:
        raise UserError("segloss evaluate takes a run folder or a model, then options")
    with tempfile.TemporaryDirectory() as unused:  # the Trainer makes one
        past = run.evaluated(target, told) | {"output_dir": unused}
        run.evaluate(settings(words, past, options=EvaluateOptions, prog="segloss evaluate"))


def compare(words: list[str]) -> None:
    """train variants with several seeds, and say whether they differ"""
    from segloss.compare.command import compare as run_and_compare

    run_and_compare(words)


def select(words: list[str]) -> None:
    """choose the tasks to fine-tune on, from gradients instead of trials"""
    from segloss.train.config import settings
    from segloss.train.select import SelectOptions
    from segloss.train.select import select as choose

    choose(settings(words, options=SelectOptions, prog="segloss select"))


def report(words: list[str]) -> None:
    """one web page and pictures of one or several runs, side by side"""
    parser = argparse.ArgumentParser("segloss report", description=REPORT, allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, also unfinished")
    parser.add_argument("--output", metavar="FOLDER", help="(default: report/ in the first run)")
    parser.error = refuse  # type: ignore[method-assign, assignment]
    arguments = parser.parse_args(words)
    from segloss.train.page import report as write

    write(arguments.runs, arguments.output)


def doctor(words: list[str]) -> int:
    """show versions, device and backend, and check each family of losses"""
    from segloss.doctor import doctor

    return doctor()


def refuse(message: str) -> None:
    raise UserError(f"{message} (segloss report --help lists the options)")


if __name__ == "__main__":
    sys.exit(main())
