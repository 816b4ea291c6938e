"""GradEx: the loss after fine-tuning on any subset of tasks, estimated without fine-tuning.

Near the weights theta* of one model trained on all tasks, a sample's margin is nearly linear in the
weights, so fine-tuning on a subset is nearly a logistic regression on gradients, and those are
computed once, in a few hundred random dimensions.

R rows (a sample's margins), D dimensions.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segloss.kernels.projection import back_project
from segloss.selection.gradients import (
    Collector,
    Outputs,
    Sample,
    causal_lm,
    evaluating,
    fingerprint,
    margins_of,
    norm_of,
)
from segloss.selection.regression import fit_logistic, fit_published
from segloss.selection.search import Comparison, Selection, search
from segloss.selection.store import Rows, Store

# of the mean squared length of the gradients
RELATIVE_PENALTY = 3e-3

Subset = Collection[str]


class GradEx:
    """Estimates the loss after fine-tuning on any subset of tasks, from one set of gradients.

        gradex = GradEx(model)                      # trained on all tasks a little: theta*
        gradex.collect(train_samples)               # Sample(id, task, inputs), once
        gradex.collect(held_out, role="target")     # whose loss is to be estimated
        gradex.estimate(["boolq", "siqa"])          # in well under a second, for any subset
        gradex.measure(["boolq", "siqa"], held_out) # the model's own loss, its weights moved there
        gradex.select().chosen

    With f the margin of a sample at theta* (`answer_margin`) and g its gradient times a random sign
    matrix, a subset's fine-tuning is the regression

        w = argmin_w mean_i ln(1 + exp(-(f_i + g_i.w))) + penalty ||w||^2       i in the subset

    (less that of all tasks with `relative`) and the estimate the cross-entropy
    `ln(1 + exp(-(f_j + g_j.w)))` of the target samples j, per token, averaged over the target's
    tasks. `measure` is the published score: the loss of the model itself at theta* + P w, P the
    sign matrix.

    Args:
        model: its parameters with `requires_grad` (the LoRA adapter, say) are what is fine-tuned.
        dim: dimensions D of the projection. The rms error of a cosine is 1 / sqrt(D).
        seed: of the projection and of `select`.
        offset: False for the published objective: f_i left out of the regression, labels drawn with
            probability 0.7 and an intercept, `penalty` 1 / (2 C R) with C = 1e-4.
        penalty: lambda. None: 0.003 times the mean of ||g_i||^2 over the training samples, which
            does not change with the scale of the gradients. Less of it is more training.
        radius: rescale w so that the weights move by this share of their own length (the published
            code uses 0.02 to 0.5). None: as the regression has it.
        unit: "answer", one margin per sample, exact for the sum of its tokens' cross-entropies; or
            "token", one per predicted token: closer where answers are long, at T times the
            gradients and rows.
        relative: True if the model is what fine-tuning on all tasks gives, for as long as
            fine-tuning on a subset would take. The weights of all tasks are then subtracted, w(S) -
            w(all), and the estimate of all tasks is the model's own loss; the penalty then says how
            far from it the others are. False: w as it is, which is training on top of what the
            model has had. Not with `radius` or without `offset`.
        balance: every task of a subset counts the same, however many samples it has.
        outputs: (model, inputs) -> (logits (..., V) or a logits source, target (...)) of one
            sample; by default a transformers causal model and a dict of tensors.
        store: a folder; with it, a collection that was killed goes on where it was.

    Source: Li et al., "Scalable Fine-tuning from Multiple Data Sources: A First-Order Approximation
    Approach" (2409.19458). The published code leaves f out of the regression, which turns w (cosine
    0.76 to 0.82 where f depends on the task), and averages the margins of an answer's tokens, which
    understates the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dim: int = 400,
        seed: int = 0,
        offset: bool = True,
        penalty: float | None = None,
        radius: float | None = None,
        unit: Literal["answer", "token"] = "answer",
        relative: bool = False,
        balance: bool = False,
        outputs: Outputs | None = None,
        store: str | os.PathLike | None = None,
    ):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("model has no parameter with requires_grad; it takes at least one")
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim is {dim!r}; it takes a whole number from 1 up")
        if unit not in ("answer", "token"):
            raise ValueError(f"unit is {unit!r}; it takes 'answer' or 'token'")
        for name, value in (("penalty", penalty), ("radius", radius)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}; it takes a number from 0 up, or None")
        if relative and (radius is not None or not offset):
            raise ValueError(
                f"relative is True with offset={offset!r} and radius={radius!r}; it takes "
                "offset=True and radius=None"
            )
        self.model, self.dim, self.seed = model, dim, seed
        self.offset, self.penalty, self.radius = offset, penalty, radius
        self.unit, self.relative, self.balance = unit, relative, balance
        self.outputs = outputs or causal_lm
        self.named = dict(named)
        self.parameters = list(self.named.values())
        self.num_parameters = sum(p.numel() for p in self.parameters)
        self.norm = norm_of(self.parameters)
        identity = {"version": 1, "dim": dim, "seed": seed, "unit": unit}
        self.store = Store(store, identity | {"weights": fingerprint(named)})

    # ------------------------------------------------------------------------------ collecting

    def collect(
        self,
        samples: Iterable[Sample],
        role: Literal["train", "target"] = "train",
        progress: Callable[[int], Any] = lambda samples: None,
    ) -> None:
        """Margins and projected gradients of samples, added to the store; known ids are skipped.

        `role="target"` marks the samples whose loss is estimated. The model runs in eval mode, one
        sample at a time, so a sample's numbers do not depend on the others'. `progress` is called
        with the number of samples done.
        """
        if role not in ("train", "target"):
            raise ValueError(f"role is {role!r}; it takes 'train' or 'target'")
        collector = Collector(self.store, self.parameters, self.unit, self.dim, self.seed)
        with evaluating(self.model):
            for sample in samples:
                if not collector.has(role, sample):
                    collector.add(role, sample, self._margins(sample))
                progress(1)
            collector.flush()

    def _margins(self, sample: Sample) -> Tensor:
        return margins_of(self.model, sample, self.outputs)

    def rows(self, role: str) -> Rows:
        """All rows with a role."""
        return self.store.rows(role)

    def tasks(self, role: str = "train") -> tuple[str, ...]:
        """The tasks with samples of a role, in the order they came."""
        return tuple(dict.fromkeys(self.rows(role).task.tolist()))

    def tokens(self, task: str) -> int:
        """Predicted tokens of a task's target samples."""
        return self.store.tokens(task)

    # ------------------------------------------------------------------------------ estimating

    def fit(self, subset: Subset) -> Tensor:
        """w (D,) of a subset of tasks: where fine-tuning on it would take the projected weights.

        Nowhere for an empty one, and with `relative` for all tasks.
        """
        if not len(subset):
            return torch.zeros(self.dim, dtype=torch.float64)
        names = self._checked(subset, "subset", "train")
        w = self._regression(names)
        if self.relative:
            w = w - self._regression(self.tasks())
        if self.radius is not None and w.norm() > 0:
            # the length of P w, in expectation; w is itself a projection, of what P w holds a share
            length = (1 + self.num_parameters / self.dim) ** 0.5 * w.norm()
            w = w * (self.radius * self.norm / length)
        return w

    def _regression(self, names: Sequence[str]) -> Tensor:
        """The minimum (D,) of the subset's penalised logistic loss."""
        every = self.rows("train")
        rows = every.take(np.isin(every.task, names))
        weight = self._weights(rows.task)
        if not self.offset:
            return fit_published(rows.gradient, weight, self.penalty, self.seed)
        scale = float(every.gradient.square().sum(1).mean())
        penalty = RELATIVE_PENALTY * scale if self.penalty is None else self.penalty
        return fit_logistic(rows.gradient, rows.margin, weight, penalty)

    def estimate(self, subset: Subset, target: Subset | None = None) -> float:
        """Estimated cross-entropy per token after fine-tuning on the tasks of `subset`.

        `target`: the tasks whose held-out loss it is, averaged over them; all of them by default.
        An empty subset is the model as it is, whose loss is exact.
        """
        names = self._checked(
            self.tasks("target") if target is None else target, "target", "target"
        )
        rows = self.rows("target")
        losses = F.softplus(-(rows.margin + rows.gradient @ self.fit(subset))).numpy()
        return float(np.mean([losses[rows.task == t].sum() / self.tokens(t) for t in names]))

    def _weights(self, task: np.ndarray) -> Tensor:
        if not self.balance:
            return torch.full((len(task),), 1 / len(task), dtype=torch.float64)
        names, place, count = np.unique(task, return_inverse=True, return_counts=True)
        return torch.from_numpy(1 / (len(names) * count[place]))

    def _checked(self, names: Subset, argument: str, role: str) -> list[str]:
        known = self.tasks(role)
        if isinstance(names, str):
            raise TypeError(f"{argument} is {names!r}; it takes a collection of task names")
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            what = f"{unknown[0]!r}, of which there are no {role} samples" if unknown else "empty"
            raise ValueError(f"{argument} holds {what}; it takes some of {', '.join(known)}")
        return list(dict.fromkeys(names))

    # ------------------------------------------------------------------------------- measuring

    def shift(self, subset: Subset) -> dict[str, Tensor]:
        """How fine-tuning on `subset` would move each parameter, by name, in float32::

            P = sign_matrix(num_parameters, dim, seed)                      # never stored
            torch.cat([m.flatten() for m in shift.values()]) == P @ fit(subset)

        With `radius` the length of it all is exactly that share of the weights'.
        """
        w, first, moves = self.fit(subset), 0, {}
        for name, p in self.named.items():
            move = back_project(w, p.numel(), self.seed, first_column=first, device=p.device)
            moves[name] = move.view(p.shape)
            first += p.numel()
        if self.radius is not None and w.norm() > 0:
            length = math.hypot(*(float(move.norm()) for move in moves.values()))
            moves = {n: move * (self.radius * self.norm / length) for n, move in moves.items()}
        return moves

    @contextlib.contextmanager
    def moved(self, subset: Subset) -> Iterator[nn.Module]:
        """The model, for the length of a `with`, with its weights moved by `shift(subset)`."""
        # the order of a sum depends on threads and devices, so not to the last bit
        if not math.isclose(norm_of(self.parameters), self.norm, rel_tol=1e-12):
            raise RuntimeError(
                "the model's weights are not those that its gradients were taken at; load them "
                "again first"
            )
        moves = self.shift(subset)
        before = [p.detach().clone() for p in self.parameters]
        try:
            with torch.no_grad():
                for name, p in self.named.items():
                    p.add_(moves[name])
            yield self.model
        finally:
            with torch.no_grad():
                for p, value in zip(self.parameters, before, strict=True):
                    p.copy_(value)

    def measure(self, subset: Subset, samples: Iterable[Sample]) -> float:
        """Cross-entropy per token of samples with the weights moved by `shift(subset)`, averaged
        over their tasks: the published score.

        Like `estimate`, but by the model itself, so without what a first order leaves out, at a
        forward pass of every sample, in eval mode. Errors: RuntimeError if the model was trained
        meanwhile.
        """
        nll: dict[str, list[float]] = {}
        tokens: dict[str, int] = {}
        with evaluating(self.model), self.moved(subset), torch.no_grad():
            for sample in samples:
                margins = self._margins(sample)
                nll.setdefault(sample.task, []).append(F.softplus(-margins).sum().item())
                tokens[sample.task] = tokens.get(sample.task, 0) + margins.numel()
        if not nll:
            raise ValueError("samples is empty; it takes those whose loss is to be measured")
        return float(np.mean([sum(nll[task]) / tokens[task] for task in nll]))

    # ------------------------------------------------------------------------------- selecting

    def select(
        self,
        target: Subset | None = None,
        *,
        method: Literal["auto", "exhaustive", "ensemble", "forward"] = "auto",
        subsets: int = 200,
        size: int | None = None,
        smallest: int | None = None,
        samples: Iterable[Sample] | None = None,
    ) -> Selection:
        """The tasks to fine-tune on for the least estimated, or measured, loss of `target`.

        Args:
            target: as for `estimate`.
            method: "exhaustive" estimates every subset allowed; "ensemble" draws `subsets` random
                ones of `size` tasks, scores a task by the mean estimate of those that hold it, and
                takes the best start of the ranking; "forward" adds the task that helps most until
                none does. "auto": exhaustive where that takes no more than `subsets` estimates,
                else ensemble.
            size: tasks of a random subset; None for half of them.
            smallest: tasks that a choice holds at least; None for half of them, rounded up. An
                estimate is a first-order one around a model trained on all tasks, and one task
                alone leads far away from there (see bench/NOTES.md for how wrong it is then).
            samples: the target's; a subset's loss is then that of `measure` on them, as published,
                at a pass over them for every subset.
        """
        tasks = self.tasks()
        smallest = (len(tasks) + 1) // 2 if smallest is None else smallest
        if not 1 <= smallest <= len(tasks):
            raise ValueError(f"smallest is {smallest}; it takes 1 to {len(tasks)}")
        sizes = range(smallest, len(tasks) + 1)
        if method == "auto":
            count = sum(math.comb(len(tasks), k) for k in sizes)
            method = "exhaustive" if count <= subsets else "ensemble"
        names = self._checked(
            self.tasks("target") if target is None else target, "target", "target"
        )
        measured = None if samples is None else [s for s in samples if s.task in names]
        if measured is not None and (left_out := set(names) - {s.task for s in measured}):
            raise ValueError(f"samples has none of {', '.join(sorted(left_out))}; target names it")

        def loss(subset: tuple[str, ...]) -> float:
            if measured is None:
                return self.estimate(subset, target)
            return self.measure(subset, measured)

        ordered, scores = search(
            loss, tasks, method, subsets=subsets, size=size, smallest=smallest, seed=self.seed
        )
        objective = f"cross-entropy per token of {' '.join(names)}"
        return Selection(objective, method, *ordered[0], ordered, scores)

    def compare(self, true: Mapping[Subset, float], target: Subset | None = None) -> Comparison:
        """Estimates beside the true losses of subsets that were fine-tuned."""
        subsets = [tuple(subset) for subset in true]
        estimated = [self.estimate(subset, target) for subset in subsets]
        return Comparison(subsets, estimated, [float(value) for value in true.values()])
