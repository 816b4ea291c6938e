"""`segloss select`: which tasks to fine-tune on for one of them, by GradEx.

One model is trained on all tasks, every sample's gradient is taken once, and the loss after
fine-tuning on any subset is estimated from them; `--check` fine-tunes on some after all.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from pandas import DataFrame
from torch import Tensor
from tqdm.auto import tqdm

from segloss.integrations.forward import loss_of
from segloss.selection import Comparison, GradEx, Sample, Selection

from .config import Options, Settings, doc
from .errors import UserError
from .evaluation import batch_of, evaluate
from .report import METRICS, SELECTION, aligned, subsets
from .run import Run, require_new
from .trainer import Trainer


@dataclass
class SelectOptions(Options):
    """What `segloss select` adds to the settings of training, or has another default for."""

    LEAST = Options.LEAST | {
        "items": 1, "validation_items": 1, "dim": 1, "penalty": 0, "subsets": 1, "check": 0
    }  # fmt: skip

    target: list[str] | None = doc(None, "the tasks whose mean loss is to be low (default: all)")
    items: int = doc(48, "training rows of each task that gradients are taken of")
    validation_items: int = doc(48, "items of each task that the loss is estimated for")
    dim: int = doc(400, "dimensions that gradients are projected to")
    penalty: float | None = doc(
        None, "on the length of a change of weights (default: 0.003 x gradients' squared length)"
    )
    score: Literal["estimated", "measured"] = doc(
        "estimated", "by gradients alone, or by the model with its weights moved, as published"
    )
    method: Literal["auto", "exhaustive", "ensemble", "forward"] = doc(
        "auto", "every subset, random ones, or the best task added until none helps"
    )
    subsets: int = doc(200, "subsets that are estimated at most, or drawn")
    smallest: int | None = doc(None, "tasks that a choice holds at least (default: half)")
    check: int = doc(0, "fine-tune on so many subsets, from best to worst estimate, and compare")
    gradients: str = doc("", "their folder, which a next command goes on with (default: in output)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.equal_tasks = True  # which the estimates take for granted
        self.eval_items = self.eval_items or 0


def select(settings: Settings) -> None:
    """Choose tasks, write the folder, and print the choice and the command that trains on it."""
    require_new(settings)
    settings.training.save_strategy = "no"
    if "use_peft" not in settings.given:
        settings.model.use_peft, settings.model.lora_dropout = True, 0.0
    run = Run(settings)
    options, tasks = settings.options, run.data.tasks
    target = options.target or tasks
    for name in target:
        if name not in tasks:
            raise UserError(f"--target has {name!r}; the tasks are {' '.join(tasks)}")
    if len(tasks) < 2:
        raise UserError("there is 1 task; a selection takes at least 2")
    if options.smallest is not None and not 1 <= options.smallest <= len(tasks):
        raise UserError(f"--smallest is {options.smallest}; it takes 1 to {len(tasks)}, the tasks")
    run.open()
    choose(run, target)


def choose(run: Run, target: Sequence[str]) -> None:
    """From the loaded model to the printed command."""
    options, named = run.settings.options, run.trainer.model.named_parameters()
    begin = {name: p.detach().clone() for name, p in named if p.requires_grad}
    items = [row for row in run.trainer.validation if row["task"] in target]
    samples = [Sample(f"{row['task']}-{i}", row["task"], [row]) for i, row in enumerate(items)]
    losses = {"before": loss_on(run, items)}
    with run.timed("training on all tasks"):
        train_on(run, run.data.tasks)
    losses["all_tasks"] = loss_on(run, items)
    with run.timed("gradients"):
        gradex = gradients(run, samples)
    with run.timed("subsets"):
        found = gradex.select(
            target, method=options.method, subsets=options.subsets, smallest=options.smallest,
            samples=samples if options.score == "measured" else None,
        )  # fmt: skip
    last, count = len(found.subsets) - 1, min(options.check, len(found.subsets))
    true: dict[tuple[str, ...], float] = {}  # of subsets spread evenly over the estimates
    for place in np.linspace(0, last, count).round().astype(int):
        names = found.subsets[place][0]
        run.trainer.model.load_state_dict(begin, strict=False)
        train_on(run, names, f"check {len(true) + 1} of {count}, ")
        true[names] = loss_on(run, items)
    leave(run, found, losses, true)


def train_on(run: Run, names: Sequence[str], title: str = "") -> None:
    """All steps on some tasks, from the weights that the model has; logged if without a title."""
    first, kept = run.trainer, {run.data.tasks.index(name) for name in names}
    trainer = Trainer(
        model=first.model, args=first.args, processing_class=first.processing_class,
        train_dataset=first.train_dataset.filter(lambda i: i in kept, input_columns="task_ids"),
        loss=first.loss, head=first.head,
    )  # fmt: skip
    trainer.title = title
    if not title and trainer.args.should_save:  # that of all tasks is the log
        trainer.metrics = run.output / METRICS
    trainer.train()
    gc.collect()  # a Trainer refers to itself, and holds the optimizer's moments


def loss_on(run: Run, items: Sequence[dict]) -> float:
    """Cross-entropy per token, averaged over the items' tasks."""
    found = DataFrame(evaluate(run.trainer, items, "evaluating", precise=True))
    sums = found.groupby("task")[["nll", "tokens"]].sum()
    return float((sums.nll / sums.tokens).mean())


def gradients(run: Run, samples: Sequence[Sample]) -> GradEx:
    """Of some rows of every task to train on, and of the target's samples."""
    options, trainer, train = run.settings.options, run.trainer, []
    for name in run.data.tasks:
        of_task = [row for row in trainer.train_dataset if row["task"] == name]
        rows = list({tuple(row["input_ids"]): row for row in of_task}.values())
        rng = random.Random(f"{trainer.args.seed} gradients {name}")
        some = sorted(rng.sample(range(len(rows)), min(options.items, len(rows))))
        train += [Sample(f"{name}-{i}", name, [rows[i]]) for i in some]

    def outputs(model: Any, rows: Sequence[dict]) -> tuple[Any, Tensor]:
        """In float32 whatever the training's precision: a gradient's small part is what counts."""
        inputs, target = batch_of(trainer, rows)
        return loss_of(model, lambda *both: both, target, inputs, trainer.head == "fused")[0]

    try:
        # relative: the model has been trained on all tasks for as long, and of each as much
        gradex = GradEx(
            trainer.model, dim=options.dim, seed=trainer.args.seed, penalty=options.penalty,
            relative=True, balance=True, outputs=outputs,
            store=options.gradients or str(run.output / "gradients"),
        )  # fmt: skip
        with tqdm(total=len(train) + len(samples), desc="gradients", disable=None) as bar:
            gradex.collect(train, progress=bar.update)
            gradex.collect(samples, role="target", progress=bar.update)
    except (OSError, ValueError) as error:  # what a full disk has left is used by the next call
        raise UserError(f"--gradients: {error}") from None
    return gradex


def leave(run: Run, found: Selection, losses: dict[str, float], true: dict) -> None:
    """Write and print what came out; `true` are the losses of the subsets that were checked."""
    settings, estimated, checked = run.settings, dict(found.subsets), ""
    seconds = {name: round(value, 1) for name, value in run.timing.items()}
    result = asdict(found) | {
        "score": settings.options.score, "loss": losses, "seconds": seconds, "relative_error": None,
        "subsets": [{"tasks": n, "estimated": e, "true": true.get(n)} for n, e in found.subsets],
    }  # fmt: skip
    if true:
        compared = Comparison(list(true), [estimated[n] for n in true], list(true.values()))
        checked = f"checked by fine-tuning, from the model as it was:\n{compared}\n\n"
        result["relative_error"] = compared.relative_error
    run.save(SELECTION, result)
    own = {*SelectOptions.__annotations__, "output_dir"}
    given = {name: value for name, value in settings.given.items() if name not in own}
    given |= {name: getattr(settings.model, name) for name in ("use_peft", "lora_dropout")}
    run.save("chosen.json", given | {"tasks": list(found.chosen)})
    run.finish(
        f"objective: {found.objective}, on {settings.options.validation_items} items of each\n"
        f"before training {losses['before']:.4f}, after training on all tasks "
        f"{losses['all_tasks']:.4f}\n\n{aligned(subsets(result), words=(0,))}\n\n{checked}"
        f"{', '.join(f'{name} {value} s' for name, value in seconds.items())}\n\n"
        f"chosen: {' '.join(found.chosen)}\ntrain on them with\n"
        f"    segloss train --config {run.output / 'chosen.json'}\n"
    )
