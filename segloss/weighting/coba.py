"""CoBa: task weights from how the tasks' validation losses converge.

K tasks.
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import Tensor

from segloss.checks import describe
from segloss.distributed import sum_over
from segloss.kernels.common import widest
from segloss.kernels.task_weights import Moment, TaskHistory, TaskWeights, task_weights

MODES = ("paper", "published")


class CoBa:
    """Weights of K tasks that let all of them converge at an even pace (arXiv:2410.06741).

    After every optimizer step (or every few), measure each task's validation loss on a mini-batch::

        coba.update(losses, step=step)
        loss = (coba.weights() * task_losses).sum()      # of the next step; see token_weights

    With `r_i(s)` the task's loss at step s over its first one, and `a_i(t)` the least-squares slope
    of `r_i` over the last `history` updates, fitted to their true step numbers::

        relative = softmax_i(K * a_i / sum_j |a_j|)              # slow tasks weigh more
        absolute = softmax_i(-n_i * a_i(t) / sum_s |a_i(s)|)     # diverging tasks weigh less
        DF       = min(1, n * softmax_s(-tau * n * A(s) / sum_s |A(s)|) at s = t),  A = max_i a_i
        weights  = DF * relative + (1 - DF) * absolute           # sum 1

    Slopes count from step `warmup` on; before it all weights are 1 / K. The sum over s in
    `absolute` runs over a task's `n_i` slopes in the last `history` updates. That in DF runs over
    the `n` of the last `divergence_window` updates, in any shorter run over all of them, as in the
    paper: the exponents change with n, so that no running sum would be exact. Constant losses give
    uniform scores. A task with fewer than two values in the window has no slope and weighs 1 / K;
    the others share the rest by the formula for them alone.

    `mode="published"` computes what the authors' code (MFTCoder) does with an update interval of 1:
    A is the slope of the largest ratio, DF is not capped, `absolute` looks at the last
    `history - warmup + 1` slopes, missing values close ranks on the time axis, fewer than two
    values are a slope of 0, and the weights are `softmax(K * weights)`, or, if any of these is
    below 1 / (10 K), 0.9 times that plus 1 / (10 K). Where that code divides 0 by 0, scores are
    uniform; where it is left without a slope, it gets the last one.

    Everything stays on the losses' device and nothing is read back: no synchronisation.

    Args:
        num_tasks: K.
        warmup: the step from which on tasks are weighed; about the number of validation batches.
        history: updates that a slope is fitted to, 2 to 5 times `warmup`.
        tau: how sharply DF reacts.
        mode: "paper" or "published".
        group: process group whose ranks each measure a part of the validation losses; they end
            with the same weights. Every rank must call `update` at the same steps.
        baseline: (K,) the losses that ratios are relative to, such as those of a full validation
            before training; by default, and where it is NaN, a task's first loss above 0.
        divergence_window: G, as above; its ring takes 8 G bytes.
        device: of the weights before the first update; later that of the losses.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        num_tasks: int,
        *,
        warmup: int,
        history: int,
        tau: float = 5.0,
        mode: str = "paper",
        group=None,
        baseline: Tensor | None = None,
        divergence_window: int = 65536,
        device: torch.device | str | None = None,
    ):
        check_integer("num_tasks", num_tasks, 1)
        check_integer("warmup", warmup, 0)
        check_integer("history", history, 2)
        check_integer("divergence_window", divergence_window, 1)
        if isinstance(tau, bool) or not isinstance(tau, (int, float)):
            raise TypeError(f"tau is {describe(tau)}; it takes a number")
        if not 0 <= tau < math.inf:
            raise ValueError(f"tau is {tau}; it takes a number >= 0")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it takes 'paper' or 'published'")
        self.num_tasks = num_tasks
        self.warmup = warmup
        self.history = history
        self.tau = float(tau)
        self.mode = mode
        self.group = group
        self.divergence_window = divergence_window
        self._updates = 0
        self._step: int | None = None
        self._dtype = torch.float32  # of the weights
        device = torch.get_default_device() if device is None else torch.device(device)
        self._history = TaskHistory.empty(
            num_tasks, history, self._scored(), divergence_window, device
        )
        self._last: TaskWeights | None = None
        self._has_baseline = baseline is not None
        if baseline is not None:
            self._check_losses("baseline", baseline)
            known = baseline.isfinite() & (baseline > 0)
            self._history.baseline.copy_(baseline.masked_fill(~known, torch.nan))

    def update(self, losses: Tensor, step: int | None = None, counts: Tensor | None = None) -> None:
        """Take in validation losses (K,), a float tensor; NaN or infinite: the task is missing.

        Args:
            step: after which training step they were measured, larger than in the update before.
                Default: one more; the first is 0, or 1 with a `baseline`, which then is step 0.
            counts: (K,) tokens each loss is the mean of, 0 for a missing task; ranks are averaged
                by them. Without counts every rank that has the task counts the same.
        """
        self._check_losses("losses", losses)
        step = self._next_step(step)
        if losses.device != self._history.baseline.device:
            self._move(losses.device)
        self._dtype = torch.float64 if losses.dtype == torch.float64 else torch.float32
        losses = self._averaged(losses.detach(), counts)
        self._last = task_weights(
            self._history,
            losses,
            Moment(self._updates, step, step >= self.warmup),
            tau=self.tau,
            published=self.mode == "published",
        )
        self._updates += 1
        self._step = step

    def weights(self) -> Tensor:
        """(K,) the tasks' weights after the last update, sum 1, detached.

        float32, or float64 if the losses are.
        """
        return self._part("weights")

    # the parts of the last weights, to be logged

    @property
    def relative_scores(self) -> Tensor:
        """(K,) the relative convergence scores, sum 1; uniform during the warm-up."""
        return self._part("relative")

    @property
    def absolute_scores(self) -> Tensor:
        """(K,) the absolute convergence scores, sum 1; uniform during the warm-up."""
        return self._part("absolute")

    @property
    def divergence_factor(self) -> Tensor:
        """() the share of the relative scores in the weights; 1 during the warm-up."""
        return self._part("divergence")

    @property
    def slopes(self) -> Tensor:
        """(K,) of the loss ratios, per step; NaN where a task has fewer than two values."""
        return self._part("slopes")

    @property
    def step(self) -> int | None:
        """Of the last update."""
        return self._step

    def _part(self, name: str) -> Tensor:
        if self._last is None:
            value = {"divergence": 1.0, "slopes": math.nan}.get(name, 1 / self.num_tasks)
            shape = () if name == "divergence" else (self.num_tasks,)
            device = self._history.baseline.device
            return torch.full(shape, value, dtype=self._dtype, device=device)
        return getattr(self._last, name).to(self._dtype, copy=True)

    # checkpoints

    def state_dict(self) -> dict:
        """Copies of all that a run needs to go on as if it had not stopped: tensors, numbers."""
        state = self._settings() | {
            "updates": self._updates,
            "step": self._step,
            "float64": self._dtype == torch.float64,
            "has_baseline": self._has_baseline,
        }
        for name, tensor in self._tensors().items():
            state[name] = tensor.clone()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict()`; another number of tasks, mode or other setting raises."""
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise ValueError(
                    f"state has {name}={state.get(name)!r}, but this CoBa has {name}={value!r}"
                )
        self._updates, self._step = state["updates"], state["step"]
        self._dtype = torch.float64 if state["float64"] else torch.float32
        self._has_baseline = state["has_baseline"]
        device = self._history.baseline.device
        dtype = widest(device)
        if self._updates:
            self._last = TaskWeights(
                *(
                    state[f"last_{name}"].to(device, dtype, copy=True)
                    for name in TaskWeights._fields
                )
            )
        else:
            self._last = None
        for field in fields(TaskHistory):
            getattr(self._history, field.name).copy_(state[field.name])

    def _settings(self) -> dict:
        names = ("num_tasks", "warmup", "history", "tau", "mode", "divergence_window")
        return {name: getattr(self, name) for name in names}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {field.name: getattr(self._history, field.name) for field in fields(TaskHistory)}
        if self._last is not None:
            tensors |= {f"last_{name}": part for name, part in self._last._asdict().items()}
        return tensors

    # details

    def _check_losses(self, name: str, losses: Tensor) -> None:
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            raise TypeError(f"{name} is {describe(losses)}; it takes a float tensor")
        if losses.shape != (self.num_tasks,):
            raise ValueError(
                f"{name} has shape {tuple(losses.shape)}; it takes ({self.num_tasks},), one loss "
                "per task"
            )

    def _next_step(self, step: int | None) -> int:
        if step is None:
            return int(self._has_baseline) if self._step is None else self._step + 1
        check_integer("step", step, 0)
        if self._step is not None and step <= self._step:
            raise ValueError(f"step is {step}; it takes more than {self._step}, the last update's")
        return step

    def _move(self, device: torch.device) -> None:
        dtype = widest(device)
        for name, tensor in vars(self._history).items():
            setattr(self._history, name, tensor.to(device, dtype))

    def _averaged(self, losses: Tensor, counts: Tensor | None) -> Tensor:
        """Over the ranks, numerators and denominators apart; NaN where no rank has the task."""
        losses = losses.to(self._history.baseline.dtype)
        there = losses.isfinite()
        if counts is not None:
            if not isinstance(counts, Tensor) or counts.shape != losses.shape:
                raise ValueError(
                    f"counts is {describe(counts)}; it takes a tensor of shape "
                    f"{tuple(losses.shape)}"
                )
            counts = counts.detach().to(losses.device, losses.dtype)
            there = there & (counts > 0)
        losses = losses.masked_fill(~there, torch.nan)
        if self.group is None:
            return losses
        count = there.to(losses.dtype) if counts is None else counts.masked_fill(~there, 0)
        numerator, denominator = sum_over(
            torch.stack([losses.nan_to_num(0) * count, count]), self.group
        )
        return numerator / denominator  # 0 / 0 is NaN: missing everywhere

    def _scored(self) -> int:
        """How many slopes the absolute scores look at."""
        return self.history if self.mode == "paper" else max(1, self.history - self.warmup + 1)


def check_integer(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {describe(value)}; it takes an integer")
    if value < least:
        raise ValueError(f"{name} is {value}; it takes an integer >= {least}")
