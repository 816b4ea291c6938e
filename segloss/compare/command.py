"""`segloss compare`: variants of one command line, each trained with several seeds."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

import segloss
from segloss.train.config import ALIASES, Options, Settings, doc, settings
from segloss.train.data import content_of, load, say
from segloss.train.errors import UserError
from segloss.train.report import read_json, write

from .page import write_page
from .paired import items_needed
from .result import LARGE, Outcome, compared, markdown, outcome, sentences
from .runs import Run, run_all

PROGRAM = "segloss compare"
DESCRIPTION = """\
Train every combination of the values of --vary with several seeds, on the same rows in the same
order and for the same steps, and say how they differ from the first one. All other options go to
segloss train."""
COMPARISON, RESULTS, TABLE = "compare.json", "results.json", "results.md"
OWN = ("vary", "seeds", "jobs", "keep_models", "output_dir")
LENGTH = ("max_steps", "num_train_epochs")
EARLY = ("patience", "time_limit")
UNVARIED = (*OWN, *LENGTH, *EARLY, "seed", "split_seed", "config", "resume")


@dataclass
class CompareOptions(Options):
    """What a comparison is told besides."""

    LEAST = Options.LEAST | {"seeds": 2, "jobs": 1}

    vary: list[str] | None = doc(
        None, "an option and two or more values; may be given again, for every combination"
    )
    seeds: int = doc(5, "runs of each variant, with the seeds --seed (42), 43 and so on")
    jobs: int = doc(1, "how many runs are under way at once")
    keep_models: bool = doc(False, "leave the models in the folders of the runs as well")


@dataclass(frozen=True)
class Variant:
    """Its name is made of what is varied; `settings` are those of its runs, but for the seed."""

    name: str
    settings: Settings


def compare(words: Sequence[str]) -> None:
    """Run the command line; prints the table and sentences. Raises `UserError`."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{PROGRAM} starts its runs itself: call it without torchrun")
    words, vary = varied(words)
    base = settings(words, options=CompareOptions, prog=PROGRAM, description=DESCRIPTION)
    if not base.model.model_name_or_path:
        raise UserError("there is no model: give --model, a folder, a hub id or a GGUF file")
    variants = variants_of(words, vary, base)
    data = examined(variants)
    folder = Path(base.training.output_dir)
    if "output_dir" not in base.given:
        folder = Path(time.strftime("runs/compare-%Y%m%d-%H%M%S"))
    options, runs = base.options, runs_of(folder, variants, base)
    opened(folder, runs, {"data": data, "keep_models": options.keep_models})
    found: dict[Run, Outcome] = {}

    def done(run: Run) -> None:
        found[run] = outcome(run)
        found[run].require_like(next(iter(found.values())))

    with FileLock(f"{folder / COMPARISON}.lock", timeout=0):
        try:
            failed = run_all(runs, options.jobs, options.keep_models, done)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; the same command with --output {folder} goes on with it"
            ) from None
        conclude(folder, runs, found, failed, options.min_class_items)


def conclude(
    folder: Path,
    runs: Sequence[Run],
    found: dict[Run, Outcome],
    failed: dict[Run, str],
    min_class_items: int,
) -> None:
    """Write and print what the variants whose runs are all there have come to."""
    names = list(dict.fromkeys(run.variant for run in runs))
    broken = [name for name in names if any(run.variant == name for run in failed)]
    whole = [name for name in names if name not in broken]
    trouble = "; ".join(f"{run} failed: {why}" for run, why in failed.items())
    if names[0] in broken or len(whole) < 2:
        raise UserError(f"there is nothing to compare with: {trouble}")
    outcomes = {name: [found[run] for run in runs if run.variant == name] for name in whole}
    scores = compared(outcomes, len(names) - 1, min_class_items)
    lines = sentences(scores)
    lines += [f"{name}: not compared, since runs of it failed." for name in broken]
    text = f"{markdown(scores)}\n\n" + "\n\n".join(lines) + "\n"
    try:
        write(folder / RESULTS, [score.as_json() for score in scores])
        (folder / TABLE).write_text(text, encoding="utf-8")
        page = write_page(folder, scores, lines, {r.variant: r.given for r in runs})
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    print(f"\n{text}\n{page}", flush=True)
    if failed:
        raise UserError(f"{trouble}; the same command tries again")


# ---------------------------------------------------------------------------- before anything runs


def varied(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words without --vary, and {option: its values}."""
    left, found, rest = list(words), {}, []
    while left:
        word = left.pop(0)
        if word != "--vary":
            rest.append(word)
            continue
        values = list(itertools.takewhile(lambda w: not w.startswith("--"), left))
        del left[: len(values)]
        if len(values) < 3 or len(set(values[1:])) < len(values) - 1:
            raise UserError(
                f"--vary {' '.join(values)}: it takes an option and two or more different values, "
                "as --vary loss ce focal"
            )
        name = values[0].replace("-", "_")
        name = ALIASES.get(name, name)
        if name in found:
            raise UserError(f"--vary {values[0]} is given twice; it takes all values at once")
        found[name] = values
    return rest, {name: [f"--{values[0]}", *values[1:]] for name, values in found.items()}


def variants_of(words: list[str], vary: dict[str, list[str]], base: Settings) -> list[Variant]:
    """Every combination, the first values first; all options and losses checked."""
    if not vary:
        raise UserError(f"{PROGRAM} takes an option to vary, as --vary loss ce focal")
    fixed = {word.partition("=")[0][2:].replace("-", "_") for word in words}
    fixed = {ALIASES.get(name, name) for name in fixed}
    for name in vary:
        if name in fixed:
            raise UserError(f"--{name} is given and varied; it takes one of them")
        if name in LENGTH:
            raise UserError(f"--vary {name}: variants are compared after equal numbers of steps")
        if name in UNVARIED:
            raise UserError(f"--vary {name}: it is the same for all variants")
    for name in EARLY:
        if base.given.get(name):
            raise UserError(f"--{name} may end runs after unequal numbers of steps; leave it out")
    found = []
    options, values = [v[0] for v in vary.values()], [v[1:] for v in vary.values()]
    for chosen in itertools.product(*values):
        own = [f"{option}={value}" for option, value in zip(options, chosen, strict=True)]
        environment = dict(os.environ)
        parsed = settings([*words, *own], options=CompareOptions, prog=PROGRAM)
        os.environ.clear()  # transformers notes options there, which the next variant would read
        os.environ.update(environment)
        try:
            if parsed.options.loss is not None:
                segloss.parse_loss(parsed.options.loss)
        except ValueError as error:
            raise UserError(f"--loss: {error}") from None
        name = " / ".join(word.removeprefix("--").removeprefix("loss=") for word in own)
        found.append(Variant(name, parsed))
    return found


def examined(variants: Sequence[Variant]) -> str:
    """Say what the held-out items can show; a hash of the rows of the first variant."""
    first = load(variants[0].settings, chat=True)
    counts = {t: sum(row["task"] == t for row in first.held_out) for t in first.tasks}
    counts = {task: count for task, count in counts.items() if count}
    if not counts:
        raise UserError(
            "nothing is held out to compare on: --eval_items N, or data with a test split"
        )
    for task, count in counts.items():
        if count < 2:
            raise UserError(f"only 1 item of task {task!r} is held out; --eval_items takes more")
    for variant in variants[1:]:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            other = load(variant.settings, chat=True)
        if list(map(content_of, other.held_out)) != list(map(content_of, first.held_out)):
            raise UserError(f"{variant.name} holds out other items than {variants[0].name}")
        if len(other.train) != len(first.train):
            say(
                f"note: {variant.name} trains on {len(other.train)} rows and {variants[0].name} on "
                f"{len(first.train)}; --validation_items N sets as many aside for all"
            )
    say_power(counts, len(variants) - 1)
    digest = hashlib.sha256()
    for row in (*first.held_out, *first.train):
        digest.update(content_of(row).encode())
    return digest.hexdigest()


def say_power(counts: dict[str, int], comparisons: int) -> None:
    """How many items two points need, and what those that there are can show."""
    needed = items_needed(LARGE, comparisons=comparisons)
    tenth = items_needed(LARGE, disagreement=0.1, comparisons=comparisons)
    say(
        f"To find a difference of {100 * LARGE:.0f} points in exact match or accuracy takes "
        f"{needed:,} held-out items at worst, where a variant and the first one disagree on every "
        f"other item, and {tenth:,} where they disagree on one in ten; both if seeds differ little."
    )
    for task, count in counts.items():
        worst, usual = (min(100.0, 100 * LARGE * (n / count) ** 0.5) for n in (needed, tenth))
        say(f"{task}: {count} are held out, for {worst:.1f} points at worst, {usual:.1f} then.")


def runs_of(folder: Path, variants: Sequence[Variant], base: Settings) -> list[Run]:
    """Seed by seed, so that what an interrupt leaves is balanced."""
    first = base.training.seed
    found = []
    for seed in range(first, first + base.options.seeds):
        for place, variant in enumerate(variants, start=1):
            given = {k: v for k, v in variant.settings.given.items() if k not in OWN}
            given.setdefault("split_seed", first)  # the same items are held out for all seeds
            given.setdefault("save_strategy", "no")
            given.setdefault("evaluate_before", False)
            where = folder / f"{place}-{slug(variant.name)}" / f"seed-{seed}"
            found.append(Run(variant.name, seed, where, given | {"seed": seed}))
    return found


def slug(name: str) -> str:
    return re.sub(r"[^\w.+=-]+", "-", name)[:80]


def opened(folder: Path, runs: Sequence[Run], others: dict[str, Any]) -> None:
    """Make the folder, or see that it is this comparison's."""
    now = others | {"runs": {str(run): run.given for run in runs}}
    then = read_json(folder / COMPARISON)
    if not then:
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and holds no comparison; give another --output")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / COMPARISON, now)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    elif then.get("runs") != json.loads(json.dumps(now["runs"])):
        raise UserError(
            f"{folder} is of another command line{changed(then, now)}; give another --output"
        )
    for name, value in others.items():
        if then and then.get(name) != value:
            raise UserError(f"{name} changed since {folder} began; give another --output")


def changed(then: dict, now: dict) -> str:
    """The first option that differs, where variants and seeds are the same."""
    for name, options in now["runs"].items():
        past = then.get("runs", {}).get(name)
        if past is None:
            return f", without {name}"
        for option in sorted({*options, *past}):
            if options.get(option) != past.get(option):
                return f", --{option} {past.get(option)} and not {options.get(option)}"
    return ", with other variants or seeds"
