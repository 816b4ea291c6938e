"""The training loop, one optimizer step at a time, with task and sample weights.

A loop of its own, not transformers' `Trainer`: sample weights need a pass over all micro-batches of
a step before the first gradient, and a run has to go on from a checkpoint bit for bit without
unpickling anything, where the `Trainer` reads optimizer, schedule and random state with torch.load.

B samples of a step in all its micro-batches, b in one of them, T tokens of a row, K tasks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import segloss
from segloss.integrations.window import next_tokens

from .checkpoint import Checkpoint
from .config import TrainConfig
from .data import IGNORE, Encoded, TaskData, training_batch, training_order
from .errors import UserError
from .forward import logits_of, token_sums
from .record import WEIGHT_EDGES


@dataclass
class MicroBatch:
    """What one forward pass reads, on the device."""

    inputs: dict[str, Tensor]
    target: Tensor  # (b, T) next tokens, IGNORE where there is no loss
    task: Tensor  # (b,) index of the sample's task
    num_tokens: Tensor  # (b,) tokens of the sample that carry loss


class Trainer:
    """Trains `model` in place; `step()` is one optimizer step and returns its line of metrics.

    A step's loss is `sum_tokens w * loss(token)`, summed over its micro-batches, with

        w = 1 / (tokens of the step)                  without task and sample weights
        w = segloss.token_weights(...)                with them, over the whole step

    so a token loss does not depend on how a step is cut into micro-batches. A region or ranking
    loss is a value of a set of tokens and does not add up: each micro-batch counts with its share
    of the weight. Sample weights read the losses of all samples first, in a pass without gradients
    that draws the same dropout as the one with them.

    Args:
        model: a causal language model on its device.
        tasks: what to train on, in the order that indices of tasks mean.
        loss: a segloss loss.
        config: the resolved settings.
        pad_id: the token that fills rows up.
        dtype: of the forward pass, None for that of the weights.
    """

    def __init__(
        self,
        model: Any,
        tasks: Sequence[TaskData],
        loss: torch.nn.Module,
        config: TrainConfig,
        pad_id: int,
        dtype: torch.dtype | None = None,
    ):
        self.model, self.loss, self.config = model, loss, config
        self.pad_id, self.dtype = pad_id, dtype
        self.device = next(model.parameters()).device
        self.tasks = tasks
        self.task_index = {task.task: index for index, task in enumerate(tasks)}
        self.step_size = config.batch_size * config.accumulation
        self.order = training_order(tasks, config.steps * self.step_size, config.seed)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = self._make_optimizer()
        self.coba = self._make_coba()
        self.samples = self._make_sample_weighting()
        self.num_steps = 0
        self.seconds = 0.0
        torch.manual_seed(config.seed)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        groups = [
            {"params": matrices, "weight_decay": decay}
            for matrices, decay in (
                ([p for p in self.parameters.values() if p.dim() >= 2], self.config.weight_decay),
                ([p for p in self.parameters.values() if p.dim() < 2], 0.0),
            )
            if matrices
        ]
        return torch.optim.AdamW(groups, lr=self.config.lr, fused=True)

    def _make_coba(self, baseline: Tensor | None = None):
        config = self.config
        if config.task_weights == "none":
            return None
        return segloss.CoBa(
            len(self.tasks),
            warmup=config.coba_warmup or 0,
            history=config.coba_history or 2,
            tau=config.coba_tau,
            mode=config.coba_mode,
            baseline=baseline,
            divergence_window=config.steps,
            device=self.device,
        )

    def _make_sample_weighting(self):
        config = self.config
        if config.sample_weights == "none":
            return None
        return segloss.SampleWeighting(
            *(config.sample_weights, config.sample_temperature, config.sample_burn_in),
            fraction=config.sample_fraction,
            band=config.sample_band,
        )

    # --------------------------------------------------------------------------------- a step

    def step(self) -> dict[str, Any]:
        """One optimizer step; its row of metrics."""
        begun = time.monotonic()
        rate = learning_rate(self.config, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.coba is not None and self.num_steps == 0:
            self.coba = self._make_coba(baseline=self.validation_losses(all_items=True))
        row = self.backward()
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        row |= {"grad_norm": norm.item(), "learning_rate": rate}
        if self.coba is not None:
            losses = self.validation_losses()
            self.coba.update(losses, step=self.num_steps)
            row["validation_loss"] = self._by_task(losses)
        self.seconds += time.monotonic() - begun
        return {"step": self.num_steps, "seconds": round(self.seconds, 3), **row}

    def backward(self) -> dict[str, Any]:
        """The gradients of a step, into the parameters' `grad`; its row of metrics."""
        self.model.train()
        batches = list(self._micro_batches())
        # with one micro-batch the pass that sample weights read is the one that is trained on
        sources = [self._logits(batches[0])] if len(batches) == 1 else None
        weights, row = self._token_weights(batches, sources)
        num_tokens = torch.cat([batch.num_tokens for batch in batches]).sum()
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        tallies = []
        for index, batch in enumerate(batches):
            source = sources.pop() if sources else self._logits(batch)
            loss, statistics = self.loss(
                source,
                batch.target,
                token_weight=None if weights is None else weights[index],
                normalizer=num_tokens,
                return_statistics=True,
            )
            loss.backward()
            total += loss.detach()
            tallies.append(token_sums(statistics, batch.target).sum(1))
        return {"loss": total.item(), **self._statistics_row(batches, torch.cat(tallies)), **row}

    def _micro_batches(self) -> Iterator[MicroBatch]:
        start = self.num_steps * self.step_size
        for i in range(start, start + self.step_size, self.config.batch_size):
            yield self._micro_batch(self.order[i : i + self.config.batch_size])

    def _micro_batch(self, items: Sequence[Encoded]) -> MicroBatch:
        batch = training_batch(items, self.pad_id)
        target = next_tokens(batch.pop("labels"))
        task = torch.tensor([self.task_index[item.example.task] for item in items])
        return MicroBatch(
            inputs={key: value.to(self.device) for key, value in batch.items()},
            target=target.to(self.device),
            task=task.to(self.device),
            num_tokens=(target != IGNORE).sum(1).to(self.device),
        )

    def _logits(self, batch: MicroBatch):
        return logits_of(self.model, batch.inputs, self.config.head, self.dtype)

    # -------------------------------------------------------------------------------- weights

    def _token_weights(self, batches: list[MicroBatch], sources: list | None):
        """(per micro-batch the weights (b, T), or None for equal ones; their part of the row)."""
        if self.coba is None and self.samples is None:
            return None, {}
        num_tokens = torch.cat([batch.num_tokens for batch in batches])
        task_weights = None if self.coba is None else self.coba.weights()
        sample_weights = None
        if self.samples is not None:
            sample_weights = self.samples(self._sample_losses(batches, sources))
        weights = segloss.token_weights(
            num_tokens,
            sample_weights=sample_weights,
            task_ids=None if self.coba is None else torch.cat([batch.task for batch in batches]),
            task_weights=task_weights,
        )
        # of mean 1 and divided by the number of tokens again, so that the smoothing of a region
        # loss keeps its size beside the sums
        weights = weights * num_tokens.sum()
        rows = weights.split([len(batch.num_tokens) for batch in batches])
        spread = [
            row[:, None].expand(batch.target.shape)
            for row, batch in zip(rows, batches, strict=True)
        ]
        return spread, self._weight_row(task_weights, sample_weights)

    def _sample_losses(self, batches: list[MicroBatch], sources: list | None) -> Tensor:
        """(B,) mean cross-entropy of each sample, without gradients."""
        with torch.no_grad():
            if sources is not None:
                pairs = zip(sources, batches, strict=True)
                return torch.cat([self._losses_of(source, batch) for source, batch in pairs])
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                return torch.cat([self._losses_of(self._logits(b), b) for b in batches])

    @staticmethod
    def _losses_of(source, batch: MicroBatch) -> Tensor:
        statistics = segloss.logit_statistics(source, batch.target)
        return segloss.sample_losses(statistics.log_prob, valid=statistics.valid)

    @torch.no_grad()
    def validation_losses(self, all_items: bool = False) -> Tensor:
        """(K,) cross-entropy per token on each task's validation items: all, or the step's few.

        Which few depends on the number of the step alone, so a resumed run reads the same.
        """
        was_training = self.model.training
        self.model.eval()
        count = self.config.validation_batch
        totals = torch.zeros(2, len(self.tasks), device=self.device, dtype=torch.float64)
        for items in self._validation_batches(count, all_items):
            batch = self._micro_batch(items)
            log_prob = segloss.logit_statistics(self._logits(batch), batch.target).log_prob
            totals[0].index_add_(0, batch.task, -log_prob.sum(1).double())
            totals[1].index_add_(0, batch.task, batch.num_tokens.double())
        self.model.train(was_training)
        return totals[0] / totals[1]  # 0 / 0 is the NaN of a task without items

    def _validation_batches(self, count: int, all_items: bool) -> Iterator[list[Encoded]]:
        if not all_items:
            first = self.num_steps * count
            yield [
                task.validation[i % len(task.validation)]
                for task in self.tasks
                for i in range(first, first + min(count, len(task.validation)))
            ]
            return
        items = [item for task in self.tasks for item in task.validation]
        items.sort(key=lambda item: len(item.prompt_ids))  # less padding
        for start in range(0, len(items), self.config.batch_size):
            yield items[start : start + self.config.batch_size]

    # -------------------------------------------------------------------------------- metrics

    def _statistics_row(self, batches: list[MicroBatch], tally: Tensor) -> dict[str, Any]:
        """Token accuracy, entropy and the loss per task, from sums per sample (B, 4)."""
        task = torch.cat([batch.task for batch in batches])
        by_task = torch.zeros(len(self.tasks), 4, device=self.device, dtype=torch.float64)
        by_task.index_add_(0, task, tally)
        total = by_task.sum(0)
        return {
            "token_accuracy": (total[1] / total[3]).item(),
            "entropy": (total[2] / total[3]).item(),
            "task_loss": self._by_task(by_task[:, 0] / by_task[:, 3]),
        }

    def _weight_row(self, task_weights: Tensor | None, sample_weights: Tensor | None) -> dict:
        row: dict[str, Any] = {}
        if task_weights is not None:
            row["task_weight"] = self._by_task(task_weights)
            row["divergence_factor"] = self.coba.divergence_factor.item()
        if sample_weights is not None:
            relative = sample_weights.double().cpu() * len(sample_weights)
            place = torch.bucketize(relative, torch.tensor(WEIGHT_EDGES, dtype=torch.float64))
            row |= {
                "samples": len(sample_weights),
                "effective_sample_size": self.samples.effective_sample_size.item(),
                "largest_sample_weight": float(sample_weights.max()),
                # how many lie below the first of WEIGHT_EDGES, between each two, above the last
                "sample_weight_counts": place.bincount(minlength=len(WEIGHT_EDGES) + 1).tolist(),
            }
        return row

    def _by_task(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.task_index, values.tolist(), strict=True))

    # ---------------------------------------------------------------------------------- state

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, by name, not copied."""
        tensors = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        for name, stateful in self._stateful():
            for key, value in stateful.state_dict().items():
                if isinstance(value, Tensor):
                    tensors[f"{name}.{key}"] = value
        return tensors

    def state(self) -> dict[str, Any]:
        """The rest of what it depends on, for JSON."""
        state: dict[str, Any] = {"step": self.num_steps, "seconds": self.seconds}
        for name, stateful in self._stateful():
            values = stateful.state_dict().items()
            state[name] = {key: v for key, v in values if not isinstance(v, Tensor)}
        return state

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on after the checkpoint's step. Raises `UserError` where it is of another model."""
        tensors, state = checkpoint.tensors, checkpoint.state
        self.load_weights(checkpoint)
        moments = {}
        for index, name in enumerate(self._optimizer_order()):
            prefix = f"optimizer.{name}."
            moments[index] = {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix) and "." not in key.removeprefix(prefix)
            }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for name, stateful in self._stateful():
            own = {
                key.removeprefix(f"{name}."): value.to(self.device)
                for key, value in tensors.items()
                if key.startswith(f"{name}.")
            }
            stateful.load_state_dict(own | state[name])
        self.num_steps, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)

    def load_weights(self, checkpoint: Checkpoint) -> None:
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        found = {
            name.removeprefix("model."): tuple(value.shape)
            for name, value in checkpoint.tensors.items()
            if name.startswith("model.")
        }
        if shapes != found:
            name = min(set(shapes.items()) ^ set(found.items()))[0]
            raise UserError(f"{checkpoint.path} is of another model: {name} differs")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(checkpoint.tensors[f"model.{name}"])

    def _stateful(self) -> list[tuple[str, Any]]:
        pairs = [("coba", self.coba), ("samples", self.samples)]
        return [(name, value) for name, value in pairs if value is not None]

    def _optimizer_order(self) -> list[str]:
        """Names of the parameters as the optimizer counts them."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the step after `step` others: up over the first tenth of the steps, then down to 0."""
    warmup = max(1, config.steps // 10)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * (config.steps - step) / (config.steps - warmup + 1)


# -------------------------------------------------------------------------------- early stopping


@dataclass
class Patience:
    """Counts validations without a lower loss."""

    limit: int
    best: float = math.inf
    best_step: int = 0
    waited: int = 0

    def update(self, loss: float, step: int) -> bool:
        """Whether the loss is the lowest so far."""
        if loss < self.best:
            self.best, self.best_step, self.waited = loss, step, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        return 0 < self.limit <= self.waited

    def state(self) -> dict[str, Any]:
        values = asdict(self)
        return values | {"best": None if math.isinf(self.best) else self.best}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Patience:
        return cls(**(state | {"best": math.inf if state["best"] is None else state["best"]}))
