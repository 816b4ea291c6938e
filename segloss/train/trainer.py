"""The driver's trainer: transformers' `Trainer` with a segloss loss, its state in our checkpoints.

B samples of a step in all its micro-batches, K tasks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler

import segloss
from segloss.integrations.transformers import CoBaCallback, LossMixin, SavedState
from segloss.losses import Loss

from .checkpoint import TRAINER, Checkpoint
from .config import TrainConfig
from .data import Encoded, TaskData, training_batch, training_order
from .errors import UserError, first_line
from .forward import autocast, logits_of, token_sums
from .record import WEIGHT_EDGES


class Trainer(LossMixin, transformers.Trainer):
    """Trains `model` in place with `train()`, or `resume(checkpoint)`.

    The arithmetic of a step, its task and sample weights are those of `LossMixin`. What is logged
    after a step, to callbacks and not kept, is its line of metrics. Instead of the Trainer's own
    files, which are pickles, a checkpoint holds `tensors()` and `numbers()`; a callback writes it.

    Args:
        model: a causal language model on its device.
        tasks: what to train on, in the order that indices of tasks mean.
        loss: a segloss loss.
        config: the resolved settings.
        pad_id: the token that fills rows up.
        dtype: of the forward pass, None for that of the weights.
        evaluator: the `Evaluator` that `evaluate()` reads the loss of the validation items with.
        callbacks: of transformers.
    """

    control: Any
    lr_scheduler: Any
    task_weights: Any  # a CoBa or None
    sample_weights: Any  # a SampleWeighting or None

    def __init__(
        self,
        model: Any,
        tasks: Sequence[TaskData],
        loss: Loss,
        config: TrainConfig,
        pad_id: int,
        dtype: torch.dtype | None = None,
        evaluator: Any = None,
        callbacks: Sequence[transformers.TrainerCallback] = (),
    ):
        self.config, self.tasks, self.pad_id, self.dtype = config, tasks, pad_id, dtype
        self.evaluator = evaluator
        self.names = [task.task for task in tasks]
        device = next(model.parameters()).device
        use_cache = getattr(model.config, "use_cache", True)
        super().__init__(
            model,
            arguments(config, device),
            data_collator=self.batch,
            train_dataset=training_order(
                tasks, config.steps * config.batch_size * config.accumulation, config.seed
            ),
            callbacks=list(callbacks),
            loss=loss,
            head=config.head,
            task_weights=coba(config, len(tasks), device),
            sample_weights=sample_weighting(config),
        )
        model.config.use_cache = use_cache  # which the Trainer turns off, for answers too
        self.remove_callback(transformers.PrinterCallback)
        self.remove_callback(SavedState)
        if self.task_weights is not None:
            self.validation = Validation(self, self.task_weights)
            self.add_callback(self.validation)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.seconds = 0.0  # of all steps
        self.begun = 0.0  # the step that goes on
        self._resumed: Any = None  # the checkpoint, while it is read
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._tally = torch.zeros(len(tasks), 4, dtype=torch.float64, device=device)

    # ------------------------------------------------------------------------ what a step is of

    def batch(self, items: Sequence[Encoded]) -> dict[str, Tensor]:
        task = [self.names.index(item.example.task) for item in items]
        return {**training_batch(items, self.pad_id), "task_ids": torch.tensor(task)}

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.begun = time.monotonic()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        # the Trainer's own linear one makes a first step of size 0
        if self.lr_scheduler is None:
            share = lambda step: rate_share(step, num_training_steps)  # noqa: E731
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _autocast(self):
        # accelerate's own would copy logits to float32
        return autocast(self.args.device, self.dtype)

    def floating_point_ops(self, inputs) -> int:
        return 0  # nobody reads it, and counting takes milliseconds

    def validation_batches(self) -> Iterator[dict[str, Tensor]]:
        """Of some items of each task, every item once."""
        count = self.config.validation_batch
        for i in range(0, max(len(task.validation) for task in self.tasks), count):
            yield self.batch([item for t in self.tasks for item in t.validation[i : i + count]])

    # ---------------------------------------------------------------------------------- metrics

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._task = inputs["task_ids"].to(self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss += loss
        return loss

    def _record(self, mode: str, statistics: Any, target: Tensor) -> None:
        self._tally.index_add_(0, self._task, token_sums(statistics, target).sum(1))

    def _weigh(self, window, losses):
        if self.task_weights is not None:
            # as they are now: CoBa is updated before the step is logged
            self._used = self.task_weights.weights(), self.task_weights.divergence_factor
        return super()._weigh(window, losses)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "loss" not in logs:  # the Trainer's summary at the end
            return
        self.seconds += time.monotonic() - self.begun
        total = self._tally.sum(0)
        row = {
            "step": self.state.global_step,
            "seconds": round(self.seconds, 3),
            "loss": self._loss.item(),
            "token_accuracy": (total[1] / total[3]).item(),
            "entropy": (total[2] / total[3]).item(),
            "task_loss": self._by_task(self._tally[:, 0] / self._tally[:, 3]),
            **self._weight_row(),
            **{name: float(logs[name]) for name in ("grad_norm", "learning_rate")},
        }
        self._loss.zero_()
        self._tally.zero_()
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, row)

    def _weight_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {}
        if self.task_weights is not None:
            weights, divergence = self._used
            row |= {
                "task_weight": self._by_task(weights),
                "divergence_factor": divergence.item(),
                "validation_loss": self._by_task(self.validation.losses),
            }
        if self.sample_weights is not None:
            weights = self.sample_weights.weights
            relative = weights.double().cpu() * len(weights)
            place = torch.bucketize(relative, torch.tensor(WEIGHT_EDGES, dtype=torch.float64))
            row |= {
                "samples": len(weights),
                "effective_sample_size": self.sample_weights.effective_sample_size.item(),
                "largest_sample_weight": float(weights.max()),
                # how many lie below the first of WEIGHT_EDGES, between each two, above the last
                "sample_weight_counts": place.bincount(minlength=len(WEIGHT_EDGES) + 1).tolist(),
            }
        return row

    def _by_task(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.names, values.tolist(), strict=True))

    def evaluate(self, *args, **kwargs) -> dict[str, Any]:
        """The tasks' validation losses and their mean, for `patience`."""
        losses = {t.task: self.evaluator.loss(self.model, t.validation) for t in self.tasks}
        mean = sum(losses.values()) / len(losses)
        metrics = {"mean_validation_loss": mean, "all_validation_loss": losses}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # ------------------------------------------------------------------------------ checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, by name, not copied."""
        tensors = self.weights()
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors["random.cpu"] = torch.get_rng_state()
        if self.args.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.args.device)
        for name, stateful in self._stateful():
            for key, value in stateful.state_dict().items():
                if isinstance(value, Tensor):
                    tensors[f"{name}.{key}"] = value
        return tensors

    def weights(self) -> dict[str, Tensor]:
        return {f"model.{name}": p.detach() for name, p in self.parameters.items()}

    def numbers(self) -> dict[str, Any]:
        """The rest of what it depends on, for JSON."""
        state: dict[str, Any] = {"step": self.state.global_step, "seconds": self.seconds}
        schedule = self.lr_scheduler.state_dict()
        state["schedule"] = {k: schedule[k] for k in ("last_epoch", "_step_count", "_last_lr")}
        for name, stateful in self._stateful():
            values = stateful.state_dict().items()
            state[name] = {key: v for key, v in values if not isinstance(v, Tensor)}
        return state

    def resume(self, found: Checkpoint, done: bool = False) -> None:
        """Go on after the checkpoint's step; `done`: its weights are the last.

        Raises `UserError` where it is of another model, or of a transformers that kept other state.
        """
        self._resumed = found
        self.seconds = found.state["seconds"]
        try:
            state = transformers.TrainerState.load_from_json(str(found.path / TRAINER))
        except TypeError as error:
            raise UserError(
                f"{found.path / TRAINER} is of another release of transformers than "
                f"{transformers.__version__} ({first_line(error)}); the run's config.json names it"
            ) from None
        if done:
            self.state = state
            self.load_weights(found)
        else:
            self.train(resume_from_checkpoint=str(found.path))

    def _save_checkpoint(self, model, trial=None) -> None:
        """Nothing: it would pickle. Callbacks hear of it by `on_save`."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        self.load_weights(self._resumed)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None:
            return
        tensors, state = self._resumed.tensors, self._resumed.state
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        groups = self.optimizer.state_dict()["param_groups"]
        for group, rate in zip(groups, state["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
        moments = {
            index: part(tensors, f"optimizer.{names[id(parameter)]}.")
            for index, parameter in enumerate(
                p for group in self.optimizer.param_groups for p in group["params"]
            )
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.lr_scheduler.load_state_dict(self.lr_scheduler.state_dict() | state["schedule"])
        for name, stateful in self._stateful():
            own = {k: v.to(self.args.device) for k, v in part(tensors, f"{name}.").items()}
            stateful.load_state_dict(own | state[name])

    def _load_scaler(self, checkpoint) -> None:
        """Nothing: none is used, and the Trainer's would be a pickle."""

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is None:
            return
        tensors = self._resumed.tensors
        torch.set_rng_state(tensors["random.cpu"])
        if self.args.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.args.device)
        self._resumed = None  # this is the last that reads it

    def load_weights(self, found: Checkpoint) -> None:
        shapes = {name: p.shape for name, p in self.weights().items()}
        theirs = {name: v.shape for name, v in found.tensors.items() if name.startswith("model.")}
        if shapes != theirs:
            name = min(set(shapes.items()) ^ set(theirs.items()))[0].removeprefix("model.")
            raise UserError(f"{found.path} is of another model: {name} differs")
        for name, parameter in self.weights().items():
            parameter.copy_(found.tensors[name])

    def _stateful(self) -> list[tuple[str, Any]]:
        pairs = [("coba", self.task_weights), ("samples", self.sample_weights)]
        return [(name, value) for name, value in pairs if value is not None]


class Validation(CoBaCallback):
    """Tells CoBa the losses of the trainer's validation items, in the trainer's arithmetic."""

    def __init__(self, trainer: Trainer, coba: segloss.CoBa):
        self.trainer = trainer
        super().__init__(coba, trainer.validation_batches())

    def _logits(self, args, model, inputs):
        return logits_of(model, inputs, self.trainer.head, self.trainer.dtype)

    def _read(self, args, state) -> None:
        """Nothing: it is in the trainer's checkpoint."""

    def _write(self, args, state) -> None:
        """Nothing, for the same reason."""


class EachRow(transformers.TrainerCallback):
    """Calls `take` with the metrics of every step."""

    def __init__(self, take: Callable[[dict[str, Any]], None]):
        self.take = take

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.take(logs)


def arguments(config: TrainConfig, device: torch.device) -> transformers.TrainingArguments:
    """The Trainer's settings; it writes no file itself."""
    found = transformers.TrainingArguments(
        output_dir=config.output or ".",
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
    )
    found._n_gpu = min(found.n_gpu, 1)  # of several GPUs one is used
    found.mixed_precision = "no"  # `--precision` says, whatever accelerate's environment does
    return found


def coba(config: TrainConfig, num_tasks: int, device: torch.device) -> segloss.CoBa | None:
    if config.task_weights == "none":
        return None
    return segloss.CoBa(
        num_tasks,
        warmup=config.coba_warmup or 0,
        history=config.coba_history or 2,
        tau=config.coba_tau,
        mode=config.coba_mode,
        divergence_window=config.steps + 1,
        device=device,
    )


def sample_weighting(config: TrainConfig) -> segloss.SampleWeighting | None:
    if config.sample_weights == "none":
        return None
    return segloss.SampleWeighting(
        *(config.sample_weights, config.sample_temperature, config.sample_burn_in),
        fraction=config.sample_fraction,
        band=config.sample_band,
    )


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name is the prefix and one more word, under that word."""
    names = {key: key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
    return {name: tensors[key] for key, name in names.items() if "." not in name}


def rate_share(step: int, steps: int) -> float:
    """Of the peak learning rate, after `step` steps: up over the first tenth, then down to 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup + 1)
