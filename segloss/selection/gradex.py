"""GradEx: the loss after fine-tuning on any subset of tasks, estimated without fine-tuning.

Near the weights theta* of one model trained on all tasks, a sample's margin is nearly linear in the
weights, so fine-tuning on a subset is nearly a logistic regression on gradients, and those are
computed once, in a few hundred random dimensions.

S samples, R rows (a sample's margins), D dimensions, C trainable parameters.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segloss.kernels.common import widest
from segloss.kernels.projection import back_project, project
from segloss.selection.margins import answer_margin, output_margin

# gradients waiting for their projection: one pass over the signs serves all of them
BUFFER_BYTES = 128 << 20
SHARD_SAMPLES = 64  # what a kill can cost
# of the mean squared length of the gradients
RELATIVE_PENALTY = 3e-3
# scikit-learn's C in the published code
PUBLISHED_C = 1e-4

Outputs = Callable[[nn.Module, Any], tuple[Any, Tensor]]


class Sample(NamedTuple):
    """One example: a name that is unique and lasts, its task, and what the model takes."""

    id: str
    task: str
    inputs: Any


def causal_lm(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
    """(logits source, targets) of a transformers causal model on one sample, logits not made.

    `inputs` holds input_ids, labels (-100 where nothing is to be predicted) and maybe more, (1, T)
    or (T,).
    """
    from segloss.integrations.transformers import head_logits

    device = next(model.parameters()).device
    batch = {key: value.view(-1, value.shape[-1]).to(device) for key, value in inputs.items()}
    labels = batch.pop("labels")
    target = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    return head_logits(model, **batch, use_cache=False), target


# --------------------------------------------------------------------------------- the gradients


@dataclass
class Rows:
    """Margins and projected gradients of some samples, a row each (or one per token)."""

    margin: Tensor  # (R,) float64
    gradient: Tensor  # (R, D) float64
    task: np.ndarray  # (R,) str
    tokens: int  # predicted tokens of these samples

    def take(self, mask: np.ndarray) -> Rows:
        kept = torch.from_numpy(mask)
        return Rows(self.margin[kept], self.gradient[kept], self.task[mask], self.tokens)


@dataclass
class Shard:
    """Some samples as they lie in a file."""

    id: list[str] = field(default_factory=list)
    task: list[str] = field(default_factory=list)
    role: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # how many of the rows below are the sample's
    margin: np.ndarray = field(default_factory=lambda: np.zeros(0))
    gradient: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        text = {name: np.array(getattr(self, name), dtype=str) for name in ("id", "task", "role")}
        numbers = {
            name: np.array(getattr(self, name), dtype=np.int64) for name in ("tokens", "rows")
        }
        assert self.gradient is not None
        return text | numbers | {"margin": self.margin, "gradient": self.gradient}


class Store:
    """Shards by sample id, in memory and, given a folder, on disk: NumPy files without pickles.

    A file is there whole or not at all, so that a collection may be killed at any time; the next
    one goes on with the samples that are missing.
    """

    def __init__(self, folder: str | os.PathLike | None, identity: dict):
        self.shards: list[Shard] = []
        self.ids: set[str] = set()
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_identity(identity)
            for path in sorted(self.folder.glob("rows-*.npz")):
                self._keep(self._read(path))

    def add(self, shard: Shard) -> None:
        if self.folder is not None:
            number = 1 + max(
                (int(p.stem.partition("-")[2]) for p in self.folder.glob("rows-*.npz")), default=-1
            )
            arrays: dict[str, Any] = shard.arrays()
            write_whole(
                self.folder / f"rows-{number:05d}.npz", lambda file: np.savez(file, **arrays)
            )
        self._keep(shard)

    def _keep(self, shard: Shard) -> None:
        self.shards.append(shard)
        self.ids.update(shard.id)

    def _check_identity(self, identity: dict) -> None:
        assert self.folder is not None
        path = self.folder / "store.json"
        if not path.exists():
            text = json.dumps(identity, indent=2) + "\n"
            write_whole(path, lambda file: file.write(text.encode()))
            return
        found = json.loads(path.read_text())
        different = [key for key in identity if found.get(key) != identity[key]]
        if different:
            key = different[0]
            raise ValueError(
                f"store {self.folder} holds gradients with {key}={found.get(key)!r}, not "
                f"{identity[key]!r}; give another folder, or remove this one"
            )

    @staticmethod
    def _read(path: Path) -> Shard:
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            lists = {
                name: arrays[name].tolist() for name in ("id", "task", "role", "tokens", "rows")
            }
            return Shard(**lists, margin=arrays["margin"], gradient=arrays["gradient"])
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it and collect again") from None
        except Exception as error:
            if type(error).__name__ != "BadZipFile":
                raise
            raise ValueError(f"{path} is damaged ({error}); remove it and collect again") from None


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """A file that is complete on disk before it has its name."""
    partial = path.with_name(f"partial-{path.name}")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


# ------------------------------------------------------------------------------------ regression


def fit_logistic(
    gradient: Tensor,  # (R, D)
    offset: Tensor,  # (R,)
    weight: Tensor,  # (R,), sum 1
    penalty: float,
    *,
    start: Tensor | None = None,  # (D,)
    steps: int = 100,
) -> Tensor:
    """`argmin_w sum_i weight_i ln(1 + exp(-(offset_i + g_i.w))) + penalty ||w||^2` by Newton."""
    w = torch.zeros_like(gradient[0]) if start is None else start.clone()
    identity = torch.eye(w.numel(), dtype=w.dtype, device=w.device)

    def value(w: Tensor) -> float:
        losses = F.softplus(-(offset + gradient @ w))
        return float(weight @ losses + penalty * w.square().sum())

    current = value(w)
    for _ in range(steps):
        wrong = torch.sigmoid(-(offset + gradient @ w))  # the probability of the other side
        slope = 2 * penalty * w - gradient.T @ (weight * wrong)
        curvature = (weight * wrong * (1 - wrong))[:, None] * gradient
        hessian = gradient.T @ curvature + 2 * penalty * identity
        # without a penalty, directions that no row has are left alone
        hessian.diagonal().add_(1e-12 * hessian.diagonal().mean())
        step = torch.cholesky_solve(slope[:, None], torch.linalg.cholesky(hessian))[:, 0]
        decrease = float(slope @ step)
        if decrease <= 1e-12 * (1 + abs(current)):
            break
        size = 1.0
        while (new := value(w - size * step)) > current - 1e-4 * size * decrease:
            size /= 2
            if size < 1e-8:
                return w
        w, current = w - size * step, new
    return w


# ----------------------------------------------------------------------------------------- GradEx


Subset = Collection[str]


@dataclass
class Selection:
    """What `GradEx.select` found."""

    objective: str
    method: str
    chosen: tuple[str, ...]
    estimated: float
    """Of the chosen subset."""
    subsets: list[tuple[tuple[str, ...], float]]
    """Every subset that was looked at and is allowed, with its estimated loss, best first."""
    scores: dict[str, float]
    """Ensemble: the mean estimate of the subsets that hold the task; lower is better."""


@dataclass
class Comparison:
    """Estimated against true losses of the same subsets."""

    subsets: list[tuple[str, ...]]
    estimated: list[float]
    true: list[float]

    @property
    def spearman(self) -> float:
        """Rank correlation; NaN for fewer than two subsets."""
        return spearman(self.estimated, self.true)

    @property
    def relative_error(self) -> float:
        """Mean of |estimated - true| / true."""
        pairs = zip(self.estimated, self.true, strict=True)
        return float(np.mean([abs(e - t) / abs(t) for e, t in pairs]))

    def __str__(self) -> str:
        width = max(len(" ".join(tasks)) for tasks in self.subsets)
        lines = [f"{'subset':<{width}}  estimated    true   error"]
        for tasks, e, t in zip(self.subsets, self.estimated, self.true, strict=True):
            lines.append(f"{' '.join(tasks):<{width}}  {e:9.4f} {t:7.4f} {(e - t) / t:+7.1%}")
        lines.append(
            f"mean |error| {self.relative_error:.1%}, rank correlation {self.spearman:.2f}"
        )
        return "\n".join(lines)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank."""
    if len(a) < 2:
        return math.nan
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (a, b)]
    if any(np.ptp(r) == 0 for r in ranks):
        return math.nan
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


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
        self._rows: dict[str, Rows] = {}

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
        was_training = self.model.training
        self.model.eval()
        shard, waiting = Shard(), []
        row_bytes = 4 * self.num_parameters
        try:
            for sample in samples:
                if f"{role}:{sample.id}" in self.store.ids or f"{role}:{sample.id}" in shard.id:
                    progress(1)
                    continue
                margins = self._margins(sample)
                shard.id.append(f"{role}:{sample.id}")
                shard.task.append(sample.task)
                shard.role.append(role)
                shard.tokens.append(margins.numel())
                rows = [answer_margin(margins)] if self.unit == "answer" else list(margins)
                shard.rows.append(len(rows))
                values = [float(row.detach()) for row in rows]
                shard.margin = np.append(shard.margin, values)
                for number, row in enumerate(rows):
                    waiting.append(self._gradient(row, number + 1 < len(rows)))
                    if len(waiting) * row_bytes >= BUFFER_BYTES:
                        self._project(shard, waiting)
                if len(shard.id) >= SHARD_SAMPLES:
                    self._flush(shard, waiting)
                    shard = Shard()
                progress(1)
            self._flush(shard, waiting)
        finally:
            self.model.train(was_training)

    def _margins(self, sample: Sample) -> Tensor:
        """Margins (T,) of the sample's predicted tokens."""
        logits, target = self.outputs(self.model, sample.inputs)
        margins = output_margin(logits, target)[target != -100]
        if not margins.numel():
            raise ValueError(f"sample {sample.id!r} has no token to predict: every target is -100")
        return margins

    def _gradient(self, margin: Tensor, again: bool) -> list[Tensor]:
        grads = torch.autograd.grad(margin, self.parameters, retain_graph=again, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(grads, self.parameters, strict=True)
        ]

    def _project(self, shard: Shard, waiting: list[list[Tensor]]) -> None:
        if not waiting:
            return
        if len(waiting) == 1:  # no copy: it may be all of a large model's
            pieces = [g.reshape(1, -1) for g in waiting[0]]
        else:
            per_parameter = zip(*waiting, strict=True)
            pieces = [torch.stack([g.flatten() for g in piece]) for piece in per_parameter]
        waiting.clear()
        new = project(pieces, self.dim, self.seed).cpu().numpy()
        shard.gradient = new if shard.gradient is None else np.concatenate([shard.gradient, new])

    def _flush(self, shard: Shard, waiting: list[list[Tensor]]) -> None:
        self._project(shard, waiting)
        if shard.id:
            self.store.add(shard)
            self._rows.clear()

    def rows(self, role: str) -> Rows:
        """All rows with a role."""
        if role not in self._rows:
            shards = [shard for shard in self.store.shards if role in shard.role]
            if not shards:
                raise ValueError(f"no samples yet: call collect(samples, role={role!r}) first")
            margin = np.concatenate([shard.margin for shard in shards])
            gradient = np.concatenate([shard.gradient for shard in shards])
            repeat = np.concatenate([shard.rows for shard in shards])
            task = np.repeat(np.concatenate([shard.task for shard in shards]), repeat)
            mine = np.repeat(np.concatenate([shard.role for shard in shards]), repeat) == role
            rows = Rows(
                torch.from_numpy(margin), torch.from_numpy(gradient).double(), task, 0
            ).take(mine)
            if not (rows.margin.isfinite().all() and rows.gradient.isfinite().all()):
                raise ValueError(
                    f"the {role} samples hold margins or gradients that are no numbers"
                )
            self._rows[role] = rows
        return self._rows[role]

    def tasks(self, role: str = "train") -> tuple[str, ...]:
        """The tasks with samples of a role, in the order they came."""
        return tuple(dict.fromkeys(self.rows(role).task.tolist()))

    def tokens(self, task: str) -> int:
        """Predicted tokens of a task's target samples."""
        return sum(
            tokens
            for shard in self.store.shards
            for name, role, tokens in zip(shard.task, shard.role, shard.tokens, strict=True)
            if name == task and role == "target"
        )

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
        gradient, offset = rows.gradient, rows.margin
        if self.offset:
            scale = float(every.gradient.square().sum(1).mean())
            penalty = RELATIVE_PENALTY * scale if self.penalty is None else self.penalty
            return fit_logistic(gradient, offset, weight, penalty)
        count = len(rows.task)
        penalty = 1 / (2 * PUBLISHED_C * count) if self.penalty is None else self.penalty
        labels = np.random.default_rng(self.seed).random(count) < 0.7
        side = torch.from_numpy(np.where(labels, 1.0, -1.0))
        with_intercept = torch.cat([gradient, side[:, None]], 1)
        return fit_logistic(with_intercept, torch.zeros_like(offset), weight, penalty)[:-1]

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
        was_training = self.model.training
        self.model.eval()
        try:
            with self.moved(subset), torch.no_grad():
                for sample in samples:
                    margins = self._margins(sample)
                    nll.setdefault(sample.task, []).append(F.softplus(-margins).sum().item())
                    tokens[sample.task] = tokens.get(sample.task, 0) + margins.numel()
        finally:
            self.model.train(was_training)
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
        looked_at: dict[tuple[str, ...], float] = {}
        names = self._checked(
            self.tasks("target") if target is None else target, "target", "target"
        )
        measured = None if samples is None else [s for s in samples if s.task in names]
        if measured is not None and (left_out := set(names) - {s.task for s in measured}):
            raise ValueError(f"samples has none of {', '.join(sorted(left_out))}; target names it")

        def estimate(subset: Collection[str]) -> float:
            key = tuple(task for task in tasks if task in subset)
            if key not in looked_at:
                looked_at[key] = (
                    self.estimate(key, target) if measured is None else self.measure(key, measured)
                )
            return looked_at[key]

        scores: dict[str, float] = {}
        if method == "exhaustive":
            for count in sizes:
                for subset in itertools.combinations(tasks, count):
                    estimate(subset)
        elif method == "ensemble":
            drawn = list(self._random_subsets(tasks, subsets, size))
            for task in tasks:
                holding = [estimate(subset) for subset in drawn if task in subset]
                scores[task] = float(np.mean(holding)) if holding else math.nan
            ranking = sorted(tasks, key=lambda task: (math.isnan(scores[task]), scores[task]))
            for count in sizes:
                estimate(ranking[:count])
        elif method == "forward":
            chosen: list[str] = []
            while len(chosen) < len(tasks):
                rest = [task for task in tasks if task not in chosen]
                best = min(rest, key=lambda task: estimate([*chosen, task]))
                enough = len(chosen) >= smallest
                if enough and estimate([*chosen, best]) >= estimate(chosen):
                    break
                chosen.append(best)
        else:
            raise ValueError(
                f"method is {method!r}; it takes 'auto', 'exhaustive', 'ensemble' or 'forward'"
            )
        allowed = [item for item in looked_at.items() if len(item[0]) >= smallest]
        ordered = sorted(allowed, key=lambda item: item[1])
        objective = f"cross-entropy per token of {' '.join(names)}"
        return Selection(objective, method, *ordered[0], ordered, scores)

    def _random_subsets(
        self, tasks: Sequence[str], count: int, size: int | None
    ) -> Iterator[tuple[str, ...]]:
        size = max(1, len(tasks) // 2) if size is None else size
        if not 1 <= size <= len(tasks):
            raise ValueError(f"size is {size}; it takes 1 to {len(tasks)}, the number of tasks")
        rng = random.Random(self.seed)
        for _ in range(count):
            yield tuple(rng.sample(tasks, size))

    def compare(self, true: Mapping[Subset, float], target: Subset | None = None) -> Comparison:
        """Estimates beside the true losses of subsets that were fine-tuned."""
        subsets = [tuple(subset) for subset in true]
        estimated = [self.estimate(subset, target) for subset in subsets]
        return Comparison(subsets, estimated, [float(value) for value in true.values()])


def norm_of(parameters: Iterable[Tensor]) -> float:
    """Their length as one vector."""
    squares = [p.detach().to(widest(p.device)).square().sum().item() for p in parameters]
    return math.fsum(squares) ** 0.5


def fingerprint(named: Sequence[tuple[str, Tensor]]) -> str:
    """Of names, shapes and values: gradients at other weights are other gradients."""
    digest = hashlib.sha256()
    for name, parameter in named:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        data = parameter.detach().contiguous().flatten().view(torch.uint8)
        digest.update(data.cpu().numpy().tobytes())
    return digest.hexdigest()
