"""`segloss select`: which tasks to fine-tune on for one of them, by GradEx.

One model is trained on all tasks, every sample's gradient is taken once, and the loss after
fine-tuning on any subset is then estimated in well under a second. `--check` says how good the
estimates are, by fine-tuning on some subsets after all.
"""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .config import Options, Settings, doc
from .errors import UserError
from .run import Run, prepare, progress, require_new, write

if TYPE_CHECKING:
    import torch

    from segloss.selection import Comparison, GradEx, Sample, Selection


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
        for name, least in (("items", 1), ("dim", 1), ("subsets", 1), ("check", 0)):
            self._require(name, getattr(self, name) >= least, f"a whole number from {least} up")
        self._require("validation_items", bool(self.validation_items), "a whole number from 1 up")
        self._require("penalty", (self.penalty or 0) >= 0, "a number from 0 up")
        self.equal_tasks = True  # which the estimates take for granted
        self.eval_items = self.eval_items or 0


def select(settings: Settings) -> None:
    """Choose tasks, write the folder, and print the choice and the command that trains on it.

    Raises `UserError` for anything the user can put right.
    """
    output = Path(settings.training.output_dir)
    require_new(output, settings)
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
    run.open(resumed=False)
    Selecting(run, options, list(options.target or tasks), run.trainer.train_dataset).run_all()


@dataclass
class Selecting:
    """One selection, from the loaded model to the printed command."""

    run: Run
    options: Any
    target: list[str]
    rows: Any
    """Tokenised, of every task as many."""

    def run_all(self) -> None:
        options, seconds = self.options, {}
        begin = self._weights()
        losses = {"before": self._target_loss()}
        seconds["training on all tasks"] = self._train(self.run.data.tasks)
        losses["all_tasks"] = self._target_loss()
        start = time.monotonic()
        gradex = self._gradients()
        seconds["gradients"] = time.monotonic() - start
        start = time.monotonic()
        found = gradex.select(
            self.target,
            method=options.method,
            subsets=options.subsets,
            smallest=options.smallest,
            samples=self._target_samples() if options.score == "measured" else None,
        )
        seconds[f"{len(found.subsets)} subsets"] = time.monotonic() - start
        comparison = self._check(found, begin) if options.check else None
        self._write(found, comparison, losses, seconds)

    def _weights(self) -> dict[str, torch.Tensor]:
        named = self.run.trainer.model.named_parameters()
        return {name: p.detach().clone() for name, p in named if p.requires_grad}

    def _train(self, names: Sequence[str], title: str = "") -> float:
        """All steps on some tasks, from the weights that the model has; the seconds."""
        from .trainer import Recorder, Trainer

        start, first = time.monotonic(), self.run.trainer
        kept = {self.run.data.tasks.index(name) for name in names}
        trainer = Trainer(
            model=first.model,
            args=first.args,
            train_dataset=self.rows.filter(lambda i: i in kept, input_columns="task_ids"),
            processing_class=first.processing_class,
            loss=first.loss,
            head=first.head,
        )
        trainer.add_callback(Recorder(trainer, self.run.data.tasks, title=title))
        trainer.train()
        gc.collect()  # a Trainer refers to itself, and holds the optimizer's moments
        return time.monotonic() - start

    def _target_loss(self) -> float:
        """Cross-entropy per token of the target's validation items, averaged over its tasks."""
        losses = [self._loss([r for r in self._validation if r["task"] == n]) for n in self.target]
        return sum(losses) / len(losses)

    @property
    def _validation(self) -> list[dict]:
        return self.run.trainer.validation

    def _loss(self, items: Sequence[dict]) -> float:
        import torch

        import segloss

        model, total, count = self.run.trainer.model, 0.0, 0
        size = self.run.trainer.args.per_device_eval_batch_size
        model.eval()
        with torch.no_grad():
            for start in range(0, len(items), size):
                logits, target = self._outputs(model, items[start : start + size])
                total += segloss.cross_entropy(logits, target, reduction="sum").item()
                count += int((target != -100).sum())
        return total / count

    def _outputs(self, model: Any, items: Sequence[dict]) -> tuple[Any, torch.Tensor]:
        """In float32 whatever the training's precision: a gradient's small part is what counts."""
        from segloss.integrations.transformers import head_logits
        from segloss.integrations.window import next_tokens

        names = ("input_ids", "labels")
        collated = self.run.trainer.data_collator([{n: row[n] for n in names} for row in items])
        batch = {name: value.to(model.device) for name, value in collated.items()}
        target = next_tokens(batch.pop("labels"))
        if self.options.head == "logits":
            return model(**batch, use_cache=False).logits, target
        return head_logits(model, **batch, use_cache=False), target

    def _gradients(self) -> GradEx:
        from segloss.selection import GradEx

        options = self.options
        try:
            gradex = GradEx(
                self.run.trainer.model,
                dim=options.dim,
                seed=self.run.trainer.args.seed,
                penalty=options.penalty,
                relative=True,  # the model has been trained on all tasks for as long
                balance=True,  # of every task as much
                outputs=self._outputs,
                store=options.gradients or str(self.run.output / "gradients"),
            )
            train = [sample for name in self.run.data.tasks for sample in self._samples(name)]
            target = self._target_samples()
            with progress("gradients", len(train) + len(target), True) as report:
                gradex.collect(train, progress=report)
                gradex.collect(target, role="target", progress=report)
        except (OSError, ValueError) as error:  # what a full disk has left is used by the next call
            raise UserError(f"--gradients: {error}") from None
        return gradex

    def _samples(self, name: str) -> list[Sample]:
        rows = {json.dumps(row["input_ids"]): row for row in self.rows if row["task"] == name}
        rng = random.Random(f"{self.run.trainer.args.seed} gradients {name}")
        chosen = sorted(rng.sample(range(len(rows)), min(self.options.items, len(rows))))
        return [sample_of(name, i, list(rows.values())[i]) for i in chosen]

    def _target_samples(self) -> list[Sample]:
        rows = [row for row in self._validation if row["task"] in self.target]
        return [sample_of(row["task"], i, row) for i, row in enumerate(rows)]

    def _check(self, found: Selection, begin: dict[str, torch.Tensor]) -> Comparison:
        """Fine-tune on subsets spread evenly over the estimates, from the model as it was."""
        import torch

        from segloss.selection import Comparison

        count = min(self.options.check, len(found.subsets))
        places = [round(i * (len(found.subsets) - 1) / max(1, count - 1)) for i in range(count)]
        estimated = dict(found.subsets)
        true: dict[tuple[str, ...], float] = {}
        for number, place in enumerate(places, start=1):
            subset = found.subsets[place][0]
            with torch.no_grad():
                for name, parameter in self.run.trainer.model.named_parameters():
                    if name in begin:
                        parameter.copy_(begin[name])
            self._train(subset, f"check {number} of {count}, ")
            true[subset] = self._target_loss()
        return Comparison(list(true), [estimated[s] for s in true], list(true.values()))

    def _write(
        self, found: Selection, comparison: Comparison | None, losses: dict, seconds: dict
    ) -> None:
        true = dict(zip(comparison.subsets, comparison.true, strict=True)) if comparison else {}
        output = self.run.output
        result = {
            "objective": found.objective,
            "method": found.method,
            "score": self.options.score,
            "chosen": list(found.chosen),
            "estimated": found.estimated,
            "subsets": [
                {"tasks": list(tasks), "estimated": value, "true": true.get(tasks)}
                for tasks, value in found.subsets
            ],
            "scores": found.scores,
            "loss": losses,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "relative_error": None if comparison is None else comparison.relative_error,
        }
        self.run.save("selection.json", result)
        self.run.trainer.attempt("chosen.jsonl", lambda: self._write_chosen(found))
        lines = [
            f"objective: {found.objective}, on {self.options.validation_items} items of each",
            f"before training {losses['before']:.4f}, after training on all tasks "
            f"{losses['all_tasks']:.4f}",
            "",
            f"{self.options.score:<9}  tasks",
            *(f"{value:9.4f}  {' '.join(tasks)}" for tasks, value in found.subsets[:5]),
        ]
        if len(found.subsets) > 5:
            worst, value = found.subsets[-1]
            lines += [f"{'...':>9}  {len(found.subsets) - 6} more"]
            lines += [f"{value:9.4f}  {' '.join(worst)}"]
        if comparison is not None:
            lines += ["", "checked by fine-tuning, from the model as it was:", str(comparison)]
        lines += ["", ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())]
        lines += ["", f"chosen: {' '.join(found.chosen)}", "train on them with"]
        lines += [f"    segloss train --config {output / 'chosen.json'}"]
        text = "\n".join(lines) + "\n"
        self.run.trainer.attempt("results.md", lambda: (output / "results.md").write_text(text))
        print(f"\n{text}\n{output}", flush=True)
        if self.run.trainer.failures:
            raise UserError(f"could not write to {output}: {'; '.join(self.run.trainer.failures)}")

    def _write_chosen(self, found: Selection) -> None:
        """The rows of the chosen tasks, and the settings to train on them with."""
        data, output = self.run.data, self.run.output
        own = ("answer", "task_ids", "where")
        rows = {row["where"]: row for row in [*data.train, *data.held_out, *data.validation]}
        lines = [
            json.dumps({k: v for k, v in row.items() if v is not None and k not in own}) + "\n"
            for row in rows.values()
            if row["task"] in found.chosen
        ]
        (output / "chosen.jsonl").write_text("".join(lines).replace("sample_weights", "weight"))
        mine = {f.name for f in fields(SelectOptions)} - {f.name for f in fields(Options)}
        mine |= {"output_dir", "dataset_name", "datasets", "validation_items", "eval_items"}
        given = {k: v for k, v in self.run.settings.given.items() if k not in mine}
        model = asdict(self.run.settings.model)
        given |= {name: model[name] for name in ("use_peft", "lora_dropout")}
        write(output / "chosen.json", {**given, "data": [str(output / "chosen.jsonl")]})


def sample_of(task: str, index: int, row: dict) -> Sample:
    from segloss.selection import Sample

    return Sample(f"{task}-{index}", task, [row])
