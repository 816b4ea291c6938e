"""The `segloss` command."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from segloss.train.errors import UserError, first_line

PACKAGES = ("trl", "transformers", "datasets", "accelerate", "peft", "safetensors", "yaml")
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
    except pickle.UnpicklingError as error:
        code, text = 2, f"error: a checkpoint's pickle is not loaded: {first_line(error)}"
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
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "train": train, "evaluate": evaluate, "select": select, "report": report,
        "compare": compare, "doctor": doctor, "--version": version,
    }  # fmt: skip
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    name, *rest = words
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else "segloss --help lists them"
        raise UserError(f"there is no command {name}; {hint}")
    return commands[name](rest) or 0


def version(words: list[str]) -> None:
    import segloss

    print(f"segloss {segloss.__version__}")


def doctor(words: list[str]) -> int:
    from segloss.doctor import doctor

    return doctor()


def train(words: list[str]) -> None:
    require_packages()
    from segloss.train import run
    from segloss.train.config import TrainOptions, settings

    found = settings(words, options=TrainOptions, description=TRAIN)
    folder = found.options.resume
    if folder is None:
        run.train(with_folder(found))
        return
    machine = {"use_cpu", "bf16", "logging_nan_inf_filter"}
    if set(found.given) - machine - {"resume", "time_limit"}:
        raise UserError("--resume takes the run's own settings; only --time-limit goes with it")
    past = run.stored(folder)
    if all((Path(folder) / name).exists() for name in (run.RESULTS, run.TRAINED)):
        raise UserError(f"--resume {folder}: the run is finished, its results are in {run.TABLE}")
    run.train(settings(words, past, options=TrainOptions), resumed=True)


def evaluate(words: list[str]) -> None:
    require_packages()
    from segloss.train import run
    from segloss.train.config import EvaluateOptions, settings

    if not words or words[0].startswith("-"):
        settings(words, options=EvaluateOptions, prog="segloss evaluate")  # --help
        raise UserError("segloss evaluate takes a run folder or a model, then options")
    target, *words = words
    past = {"model_name_or_path": target}
    if (Path(target) / run.SETTINGS).is_file():
        past = run.stored(target)
        if not (Path(target) / run.TRAINED).is_file():
            raise UserError(f"{target} has no model yet; segloss train --resume goes on with it")
        merged = Path(target) / "merged"
        past["model_name_or_path"] = str(merged if merged.is_dir() else target)
        unread = {"use_peft", "task_weights", "resume_from_checkpoint"}
        unread |= {"fsdp", "fsdp_config", "deepspeed"}  # of several processes
        named = {word.partition("=")[0] for word in words}
        if named & {"--data", "--dataset_name", "--dataset-name"}:  # other rows than the run's
            unread |= {"data", "dataset_name", "datasets"}
        past = {name: value for name, value in past.items() if name not in unread}
    with tempfile.TemporaryDirectory() as unused:  # the Trainer makes one
        past["output_dir"] = unused
        run.evaluate(settings(words, past, options=EvaluateOptions, prog="segloss evaluate"))


def select(words: list[str]) -> None:
    require_packages()
    from segloss.train.config import settings
    from segloss.train.select import SelectOptions
    from segloss.train.select import select as choose

    choose(with_folder(settings(words, options=SelectOptions, prog="segloss select")))


def compare(words: list[str]) -> None:
    require_packages()
    from segloss.compare.command import compare as run_and_compare

    run_and_compare(words)


def report(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="segloss report",
        description="Write report.html, which needs no other file and no network, and its pictures "
        "as PNG: results, losses, task and sample weights, and what a selection estimated.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, also unfinished")
    parser.add_argument(
        "--output", metavar="FOLDER", default="", help="(default: report/ in the first run folder)"
    )
    parser.error = refuse  # type: ignore[method-assign, assignment]
    arguments = parser.parse_args(words)
    from segloss.train.page import report as write

    write(arguments.runs, arguments.output)


def refuse(message: str) -> None:
    raise UserError(f"{message} (segloss report --help lists the options)")


def require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        needed = " ".join("pyyaml" if name == "yaml" else name for name in missing)
        raise UserError(f"{', '.join(missing)} not installed: pip install {needed}")


def with_folder(found):
    """The settings with a folder for the run, a new one unless it is given, on every process."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    if "output_dir" not in found.given:
        PartialState()
        names = [time.strftime("runs/%Y%m%d-%H%M%S")]
        found.training.output_dir = broadcast_object_list(names)[0]
    return found


if __name__ == "__main__":
    sys.exit(main())
