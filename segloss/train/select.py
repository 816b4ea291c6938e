"""`segloss select`: which tasks to fine-tune on for one of them, by GradEx.

One model is trained on all tasks, every sample's gradient is taken once, and the loss after
fine-tuning on any subset is then estimated in well under a second. `--check` says how good the
estimates are, by fine-tuning on some subsets after all.
"""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pandas import DataFrame
from torch import Tensor
from tqdm.auto import tqdm

from segloss.integrations.transformers import head_logits
from segloss.integrations.window import next_tokens
from segloss.selection import Comparison, GradEx, Sample, Selection

from .config import Options, Settings, doc
from .errors import UserError
from .evaluation import Evaluator, Item
from .report import SELECTION, aligned, json_lines, subsets
from .run import Run, prepare, require_new
from .trainer import Recorder, Trainer


@dataclass
class SelectOptions(Options):
    """What `segloss select` adds to the settings of training, or has another default for."""

    target: list[str] | None = doc(
        None, "the tasks whose loss is to be low; their mean if there are several (default: all)"
    )
    items: int = doc(48, "training rows of each task that gradients are taken of")
    validation_items: int | None = doc(48, "items of each task that the loss is estimated for")
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
        for name, least in {"items": 1, "dim": 1, "subsets": 1, "check": 0}.items():
            self._require_whole(name, least)
        self._require("validation_items", bool(self.validation_items), "a whole number from 1 up")
        self._require("penalty", (self.penalty or 0) >= 0, "a number from 0 up")
        self.equal_tasks = True  # which the estimates take for granted
        self.eval_items = self.eval_items or 0


def select(settings: Settings) -> None:
    """Choose tasks, write the folder, and print the choice and the command that trains on it."""
    require_new(settings)
    settings.training.save_strategy = "no"
    if "use_peft" not in settings.given:
        settings.model.use_peft, settings.model.lora_dropout = True, 0.0
    run = prepare(settings)
    options, tasks = settings.options, run.data.tasks
    for name in options.target or ():
        if name not in tasks:
            raise UserError(f"--target has {name!r}; the tasks are {' '.join(tasks)}")
    if len(tasks) < 2:
        raise UserError("there is 1 task; a selection takes at least 2")
    if options.smallest is not None and not 1 <= options.smallest <= len(tasks):
        raise UserError(f"--smallest is {options.smallest}; it takes 1 to {len(tasks)}, the tasks")
    run.open()
    Selecting(run, options).run_all()


class Selecting:
    """One selection, from the loaded model to the printed command."""

    def __init__(self, run: Run, options: Any):
        self.run, self.options, self.tasks = run, options, run.data.tasks
        self.model, self.rows = run.trainer.model, run.trainer.train_dataset
        self.target = list(options.target or self.tasks)
        read = [row for row in run.trainer.validation if row["task"] in self.target]
        self.items = [Item(row["task"], row["input_ids"], row["labels"]) for row in read]
        self.samples = [Sample(f"{r['task']}-{i}", r["task"], [r]) for i, r in enumerate(read)]

    def run_all(self) -> None:
        options, timed = self.options, self.run.timed
        named = self.model.named_parameters()
        begin = {name: p.detach().clone() for name, p in named if p.requires_grad}
        losses = {"before": self._target_loss()}
        with timed("training on all tasks"):
            self._train(self.tasks)
        losses["all_tasks"] = self._target_loss()
        with timed("gradients"):
            gradex = self._gradients()
        with timed("subsets"):
            found = gradex.select(
                self.target, method=options.method, subsets=options.subsets,
                smallest=options.smallest,
                samples=self.samples if options.score == "measured" else None,
            )  # fmt: skip
        self._write(found, self._check(found, begin) if options.check else None, losses)

    def _train(self, names: Sequence[str], title: str = "") -> None:
        """All steps on some tasks, from the weights that the model has."""
        first, kept = self.run.trainer, {self.tasks.index(name) for name in names}
        rows = self.rows.filter(lambda i: i in kept, input_columns="task_ids")
        trainer = Trainer(
            model=self.model, args=first.args, train_dataset=rows,
            processing_class=first.processing_class, loss=first.loss, head=first.head,
        )  # fmt: skip
        trainer.add_callback(Recorder(trainer, self.tasks, title=title))
        trainer.train()
        gc.collect()  # a Trainer refers to itself, and holds the optimizer's moments

    def _target_loss(self) -> float:
        """Cross-entropy per token of the target's validation items, averaged over its tasks."""
        Evaluator(self.run.trainer, precise=True)(self.items)
        found = DataFrame([{"task": item.task, **item.found} for item in self.items])
        sums = found.groupby("task").sum()
        return float((sums.nll / sums.tokens).mean())

    def _outputs(self, model: Any, items: Sequence[dict]) -> tuple[Any, Tensor]:
        """In float32 whatever the training's precision: a gradient's small part is what counts."""
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in items]
        collated = self.run.trainer.data_collator(rows)
        batch = {name: value.to(model.device) for name, value in collated.items()}
        target = next_tokens(batch.pop("labels"))
        if self.options.head == "logits":
            return model(**batch, use_cache=False).logits, target
        return head_logits(model, **batch, use_cache=False), target

    def _gradients(self) -> GradEx:
        options = self.options
        try:
            # relative: the model has been trained on all tasks for as long, and of each as much
            gradex = GradEx(
                self.model, dim=options.dim, seed=self.run.trainer.args.seed,
                penalty=options.penalty, relative=True, balance=True, outputs=self._outputs,
                store=options.gradients or str(self.run.output / "gradients"),
            )  # fmt: skip
            train = [sample for name in self.tasks for sample in self._samples(name)]
            with tqdm(total=len(train + self.samples), desc="gradients", disable=None) as bar:
                gradex.collect(train, progress=bar.update)
                gradex.collect(self.samples, role="target", progress=bar.update)
        except (OSError, ValueError) as error:  # what a full disk has left is used by the next call
            raise UserError(f"--gradients: {error}") from None
        return gradex

    def _samples(self, name: str) -> list[Sample]:
        rows = {json.dumps(row["input_ids"]): row for row in self.rows if row["task"] == name}
        rng = random.Random(f"{self.run.trainer.args.seed} gradients {name}")
        chosen = sorted(rng.sample(range(len(rows)), min(self.options.items, len(rows))))
        return [Sample(f"{name}-{i}", name, [list(rows.values())[i]]) for i in chosen]

    def _check(self, found: Selection, begin: dict[str, Tensor]) -> Comparison:
        """Fine-tune on subsets spread evenly over the estimates, from the model as it was."""
        count, last = min(self.options.check, len(found.subsets)), len(found.subsets) - 1
        places = [round(i * last / max(1, count - 1)) for i in range(count)]
        true = []
        for number, place in enumerate(places, start=1):
            self.model.load_state_dict(begin, strict=False)
            self._train(found.subsets[place][0], f"check {number} of {count}, ")
            true.append(self._target_loss())
        chosen = [found.subsets[place] for place in places]
        return Comparison([tasks for tasks, _ in chosen], [value for _, value in chosen], true)

    def _write(self, found: Selection, comparison: Comparison | None, losses: dict) -> None:
        seconds = {name: round(value, 1) for name, value in self.run.timing.items()}
        true = dict(zip(comparison.subsets, comparison.true, strict=True)) if comparison else {}
        result = {
            "objective": found.objective, "method": found.method, "score": self.options.score,
            "chosen": list(found.chosen), "estimated": found.estimated, "scores": found.scores,
            "loss": losses, "seconds": seconds,
            "relative_error": comparison and comparison.relative_error,
            "subsets": [
                {"tasks": list(tasks), "estimated": value, "true": true.get(tasks)}
                for tasks, value in found.subsets
            ],
        }  # fmt: skip
        run, config = self.run, self.run.output / "chosen.json"
        run.save(SELECTION, result)
        every = [*run.data.train, *run.data.held_out, *run.data.validation]
        rows = {row["where"]: row for row in every}
        kept = [row_of_user(row) for row in rows.values() if row["task"] in found.chosen]
        run.save("chosen.jsonl", json_lines(kept))
        run.save(config.name, self._settings())
        checked = f"checked by fine-tuning, from the model as it was:\n{comparison}\n\n"
        run.finish(
            f"objective: {found.objective}, on {self.options.validation_items} items of each\n"
            f"before training {losses['before']:.4f}, after training on all tasks "
            f"{losses['all_tasks']:.4f}\n\n{aligned(subsets(result), words=(0,))}\n\n"
            f"{checked if comparison else ''}"
            f"{', '.join(f'{name} {value} s' for name, value in seconds.items())}\n\n"
            f"chosen: {' '.join(found.chosen)}\ntrain on them with\n"
            f"    segloss train --config {config}\n"
        )

    def _settings(self) -> dict[str, Any]:
        """To train on the chosen rows with."""
        own = {f.name for f in fields(SelectOptions)} - {f.name for f in fields(Options)}
        own |= {"output_dir", "dataset_name", "datasets", "validation_items", "eval_items"}
        given = {k: v for k, v in self.run.settings.given.items() if k not in own}
        model = asdict(self.run.settings.model)
        given |= {name: model[name] for name in ("use_peft", "lora_dropout")}
        return given | {"data": [str(self.run.output / "chosen.jsonl")]}


def row_of_user(row: dict[str, Any]) -> dict[str, Any]:
    """As a file has it."""
    names = {"sample_weights": "weight", "answer": None, "task_ids": None, "where": None}
    named = {names.get(name, name): value for name, value in row.items() if value is not None}
    return {name: value for name, value in named.items() if name is not None}
