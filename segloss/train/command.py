"""The `segloss` command."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence

from .errors import UserError, first_line

USAGE = """\
usage: segloss COMMAND ...

  train     fine-tune a language model with any loss, task weights and sample weights
  evaluate  held-out loss, exact match, accuracy and macro-F1 of a run's model, or of any model
  compare   train variants with several seeds, and say whether they differ
  select    choose the tasks to fine-tune on, from gradients instead of trials
  report    one web page and pictures of one or several runs, side by side
  doctor    show versions, device and backend, and check each family of losses

segloss COMMAND --help lists a command's options; segloss --version says which this is.
"""

TRAIN = """\
TRL's SFTTrainer with any loss, task weights and sample weights, and with honest tables. Every
option of SFTConfig and TrainingArguments, and of `trl sft`'s script and model arguments, works
under its own name, hyphened or underscored, here or in the YAML or JSON file of --config. Short
names: --model --steps --epochs --batch-size --accumulation --lr --output --save-every --keep
--lora-rank --lora-targets --validate-every. --resume RUN goes on with an interrupted run, with its
own settings; besides it only --time-limit is taken."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 with one message on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(words)
    except UserError as error:
        print(f"segloss: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"segloss: {interrupt or 'interrupted'}", file=sys.stderr)
        return 130


def run(words: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": train, "evaluate": evaluate, "select": select, "report": report,
        "compare": compare,
    }  # fmt: skip
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        import segloss

        print(f"segloss {segloss.__version__}")
    elif name == "doctor":
        from segloss.doctor import doctor

        return doctor()
    elif name in commands:
        in_memory(commands[name], rest)
    else:
        near = difflib.get_close_matches(name, [*commands, "doctor", "--version"], n=1)
        hint = f"did you mean {near[0]}?" if near else "segloss --help lists them"
        raise UserError(f"there is no command {name}; {hint}")
    return 0


def train(words: list[str]) -> None:
    from .run import require_packages, stored
    from .run import train as fine_tune

    words, folder = taken(words, "--resume")
    require_packages()
    from .config import settings

    if folder is None:
        found = settings(words, description=TRAIN)
        if "output_dir" not in found.given:
            found.training.output_dir = shared_name()
        fine_tune(found)
        return
    found = settings(words)
    extra = set(found.given) - {"time_limit", "use_cpu", "bf16", "logging_nan_inf_filter"}
    if extra:
        raise UserError("--resume takes the run's own settings; only --time-limit goes with it")
    past = stored(folder)
    if "target" in past:
        raise UserError(f"{folder} is a run of segloss select, which leaves no model")
    from .run import RESULTS, TABLE, TRAINED, Path

    if all((Path(folder) / name).exists() for name in (RESULTS, TRAINED)):
        raise UserError(f"--resume {folder}: the run is finished, its results are in {TABLE}")
    fine_tune(settings(words, past), resumed=True)


def evaluate(words: list[str]) -> None:
    from . import run

    run.require_packages()
    from .config import build_parser, settings

    words, json_path = taken(words, "--json")
    if not words or words[0].startswith("-"):
        build_parser(prog="segloss evaluate").parse_args(words)  # --help
        raise UserError("segloss evaluate takes a run folder or a model, then options")
    target, *words = words
    if (run.Path(target) / run.SETTINGS).is_file():
        past = run.stored(target)
        if "target" in past:
            raise UserError(f"{target} is a run of segloss select, which leaves no model")
        if not (run.Path(target) / run.TRAINED).is_file():
            raise UserError(f"{target} has no model yet; segloss train --resume goes on with it")
        merged = run.Path(target) / "merged"
        past |= {"model_name_or_path": str(merged if merged.is_dir() else target)}
        for name in ("use_peft", "output_dir", "task_weights", "resume_from_checkpoint"):
            past.pop(name, None)
        named = {word.partition("=")[0] for word in words}
        if named & {"--data", "--dataset_name", "--dataset-name"}:  # other rows than the run's
            past = {k: v for k, v in past.items() if k not in ("data", "dataset_name", "datasets")}
    else:
        past = {"model_name_or_path": target}
    import tempfile

    with tempfile.TemporaryDirectory() as unused:  # the Trainer makes one
        past["output_dir"] = unused
        run.evaluate(settings(words, past, prog="segloss evaluate"), json_path or "")


def select(words: list[str]) -> None:
    from .run import require_packages

    require_packages()
    from .config import settings
    from .select import SelectOptions
    from .select import select as choose

    found = settings(words, options=SelectOptions, prog="segloss select")
    if "output_dir" not in found.given:
        found.training.output_dir = shared_name()
    choose(found)


def compare(words: list[str]) -> None:
    from .run import require_packages

    require_packages()
    from segloss.compare.command import compare as run_and_compare

    run_and_compare(words)


def report(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="segloss report",
        description="Write report.html, which needs no other file and no network, and its pictures "
        "as PNG: results, losses, task weights, sample weights, and estimated against true losses "
        "where a run selected tasks.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, also unfinished")
    parser.add_argument(
        "--output", metavar="FOLDER", default="", help="(default: report/ in the first run folder)"
    )
    parser.error = refuse  # type: ignore[method-assign, assignment]
    arguments = parser.parse_args(words)
    from .page import report as write

    write(arguments.runs, arguments.output)


def refuse(message: str) -> None:
    raise UserError(f"{message} (segloss report --help lists the options)")


def taken(words: list[str], option: str) -> tuple[list[str], str | None]:
    """The words without an option that is not TRL's, and its value."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == option:
            if not equals and place + 1 == len(words):
                raise UserError(f"{option} takes a name")
            end = place + (1 if equals else 2)
            return words[:place] + words[end:], value if equals else words[place + 1]
    return words, None


def shared_name() -> str:
    """A new folder's name, the same on every process."""
    import time

    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    names = [time.strftime("runs/%Y%m%d-%H%M%S")]
    if PartialState().num_processes > 1:
        broadcast_object_list(names)
    return names[0]


def in_memory(action: Callable[[list[str]], None], words: list[str]) -> None:
    """Call it; being out of memory is a message, as any other thing the user can put right."""
    try:
        action(words)
    except (RuntimeError, MemoryError) as error:
        memory = isinstance(error, MemoryError)
        if not memory and not any(sign in str(error) for sign in ("out of memory", "t allocate")):
            raise
        raise UserError(
            f"out of memory ({first_line(error)}); lower --batch-size and raise --accumulation"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
