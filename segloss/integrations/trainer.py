"""`LossMixin`: any `Trainer` of transformers, with a segloss loss.

B rows of T tokens, K tasks.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from segloss.checks import check_choice, describe
from segloss.distributed import sum_over
from segloss.integrations.callbacks import SavedState
from segloss.integrations.columns import KeepColumns, columns_of
from segloss.integrations.forward import (
    auxiliary_loss,
    before,
    has_head,
    loss_of,
    model_inputs,
    virtual_tokens,
)
from segloss.integrations.fuse import check_mean
from segloss.integrations.labels import Shift
from segloss.integrations.window import (
    LOSS_COLUMNS,
    TEACHER_COLUMNS,
    Samples,
    Weighed,
    packed_index,
    stored_teacher,
    target_of,
    weigh,
)
from segloss.kernels.common import widest
from segloss.losses import CrossEntropyLoss, Loss
from segloss.models.head import innermost
from segloss.sources import TopK
from segloss.sources.beside import RESTS
from segloss.weighting import CoBa, SampleWeighting

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

PLACE = "place_in_window"  # of a micro-batch among those of its step
WAYS = "give a causal model, or rows with the columns teacher_ids and teacher_log_prob"


class LossMixin(Trainer):
    """Put before a `Trainer` class: its loss is a segloss loss, from hidden states::

        class LossTrainer(LossMixin, Trainer):
            pass

        LossTrainer(model, arguments, train_dataset=..., loss=FocalLoss(), ...)

    Every micro-batch is divided by the tokens of the whole accumulated batch over all processes,
    counted here, so that a token loss has the value and gradient of that one large batch. A region
    or ranking loss is a value of a set of tokens: the tokens of a micro-batch on *all* processes,
    so that it does not depend on their number, and micro-batches count with their share of the
    tokens. Evaluation gives the same loss of each process's batches, without weights.

    Columns of the data set that reach the loss and not the model, with a number per row or, in
    packed rows, per token; they pass by the collator:

        task_ids        integers 0 to K - 1, for `task_weights`
        sample_weights  floats; the loss is then the mean of the samples' losses, so weighed
        token_weight    floats, one per label: weight 2 is the token listed twice
        sample_ids      integers that tell packed sequences apart; default: where position_ids
                        start again or cu_seq_lens_q says so, or one per row
        teacher_ids, teacher_log_prob
                        a stored teacher: per label a list of class ids and one of their
                        log-probabilities, empty where the label is -100, for `DistillationLoss`

    Args:
        loss: a segloss loss; default cross-entropy, with `label_smoothing_factor`. Its `group` is
            set while it trains to the processes that have other tokens, unless it has one.
        head: "fused" never makes the logits; "logits" takes the model's own, for a model that
            `head_loss` refuses. Classifiers, which have no vocabulary, always take "logits".
        shift: whether labels are the next tokens' (causal models) or stand at their places
            (encoder-decoders, masked models, classifiers). Default: what the model's class or its
            own loss says; refused where neither does.
        teacher: a causal model that `loss` distils from (`DistillationLoss`, alone or in a sum). It
            is moved to the device, frozen, and runs on the same inputs without making its logits.
            Without it, such a loss takes the columns of a stored one.
        teacher_rest: `TopK`'s `rest` of a stored teacher.
        task_weights: (K,) constants, or a `CoBa`, which `CoBaCallback` keeps up to date. The loss
            is the sum of weight x loss per token of each task, wherever its tokens are.
        sample_weights: a `SampleWeighting`, of the samples of the whole accumulated batch over all
            processes: with several micro-batches it costs a forward pass without gradients.
        log_statistics: log nll and perplexity, which compare runs whatever loss they train on,
            mean_token_accuracy and entropy (nats per token): means over the tokens that have a
            loss, of the same pass; in evaluation under the prefix of the call.

    A mixture-of-experts model whose config has `output_router_logits` gets its router loss added.
    """

    loss_is_scaled_for_ga = True
    _signature_columns: Any
    data_collator: Any
    compute_loss_func: Any

    def __init__(
        self,
        *args,
        loss: Loss | None = None,
        head: str = "fused",
        shift: bool | None = None,
        teacher: torch.nn.Module | None = None,
        teacher_rest: str = "renormalise",
        task_weights: CoBa | Tensor | None = None,
        sample_weights: SampleWeighting | None = None,
        log_statistics: bool = True,
        **kwargs,
    ):
        if head not in ("fused", "logits"):
            raise ValueError(f"head is {head!r}; it takes 'fused' or 'logits'")
        check_choice("teacher_rest", teacher_rest, RESTS)
        check_task_weights(task_weights)
        self._shift = Shift(shift)
        given = given_columns(super().__init__, args, kwargs)
        super().__init__(*args, **kwargs)
        smoothing = self.args.label_smoothing_factor
        if loss is not None and smoothing:
            raise ValueError(
                f"label_smoothing_factor is {smoothing} and loss is given; "
                "give the loss its label_smoothing"
            )
        if callable(self.compute_loss_func):
            raise ValueError("compute_loss_func is given to a LossMixin; it takes loss")
        self.compute_loss_func = None  # what TRL puts there for older releases of transformers
        if self.args.n_gpu > 1:
            raise ValueError(
                f"n_gpu is {self.args.n_gpu}: one process with several GPUs wraps the model in "
                "DataParallel, which LossMixin does not take; start one process per GPU"
            )
        loss = CrossEntropyLoss(label_smoothing=smoothing) if loss is None else loss
        check_mean(loss)
        self.loss = loss.to(self.args.device)
        self.head = head
        check_teacher(loss, teacher, given, teacher_rest)
        self.teacher = None if teacher is None else frozen(teacher, self.args.device)
        self.teacher_rest = teacher_rest
        self.task_weights = task_weights
        self.sample_weights = sample_weights
        self.log_statistics = log_statistics
        self.data_collator = KeepColumns(self.data_collator)
        # tasks that have no weights change nothing, nor does a teacher that nothing reads
        unread = set() if loss.reads_teacher else set(TEACHER_COLUMNS)
        unread |= {"task_ids"} if task_weights is None else set()
        self._columns = [name for name in given or () if name not in unread]
        check_columns(self._columns, columns_of(self.train_dataset), "the trainer's own")
        self._spread = Spread.of(self)
        if sample_weights is not None:
            self.add_callback(SavedState("sample_weighting", sample_weights))
            if sample_weights.group is None:
                sample_weights.group = self._spread.group
        self._sums: dict[str, Tensor] = {}
        self._window: list[dict] = []
        self._weighed: Sequence[Weighed | None] = []
        # Trainers of several releases divide by the number of micro-batches what is not counted,
        # and accelerate a second time
        self.model_accepts_loss_kwargs = True
        self.accelerator.gradient_accumulation_steps = 1

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As the Trainer's; what callbacks saved is read from the checkpoint that is resumed."""
        given = isinstance(resume_from_checkpoint, (str, os.PathLike))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SavedState):
                callback.resumed_from = os.fspath(resume_from_checkpoint) if given else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # the loss of a micro-batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        place = inputs.pop(PLACE, None)
        training = model.training
        shift = self._shifts(inputs)
        batch = self._label_side(inputs)
        target = target_of(batch, shift, self.loss.ignore_index)
        weighed = None if place is None else self._weighed_at(place)
        stored = self._stored_teacher(batch, target, shift)
        statistics: Any = None

        def criterion(source, target, **given):
            nonlocal statistics
            single = self._weigh_single(inputs, source) if place is None and training else weighed
            normalizer = num_items_in_batch if training else None
            if stored is not None:
                given["teacher"] = replace(
                    stored,
                    ids=stored.ids.to(source.device),
                    log_prob=stored.log_prob.to(source.device),
                )
            found = self.loss(
                source,
                target,
                token_weight=None if single is None else single.token_weight,
                sample_ids=self._spread.sample_ids(packed_index(batch, target.shape), target)
                if training
                else packed_index(batch, target.shape),
                normalizer=normalizer if single is None else single.normalizer,
                return_statistics=self.log_statistics,
                **given,
            )
            if self.log_statistics:
                found, statistics = found
            return found

        group = self._spread.group if training else None
        with self._autocast(), grouped(self.loss, group):
            loss, outputs = self._forward(
                model, inputs, criterion, target, return_outputs, self.teacher
            )
        if statistics is not None:
            self._record("train" if training else "eval", statistics, target.to(loss.device))
        if training and group is not None:
            loss = _Scaled.apply(loss, self._spread.size)
        auxiliary = auxiliary_loss(innermost(self.model), outputs)
        if auxiliary is not None:
            steps = getattr(self, "current_gradient_accumulation_steps", 1) if training else 1
            # a mean of each micro-batch, so averaged over those of a step
            loss = loss + auxiliary.to(loss.device) / steps
        self._computed = True
        return (loss, outputs) if return_outputs else loss

    def _forward(
        self, model, inputs, criterion, target, make_logits: bool, teacher=None
    ) -> tuple[Any, Any]:
        """(the criterion of the logits or of what stands for them, the model's outputs)."""
        inner = innermost(self.model)
        fused = self.head == "fused" and not make_logits and has_head(inner)
        return loss_of(model, criterion, target, model_inputs(inner, inputs), fused, teacher)

    def _stored_teacher(self, batch: Mapping[str, Any], target: Tensor, shift: bool) -> TopK | None:
        """The columns of a stored teacher at the places of the targets, if the loss reads them."""
        if not self.loss.reads_teacher or self.teacher is not None:
            return None
        found = stored_teacher(batch, target, self.teacher_rest, shift, self.loss.ignore_index)
        if found is None:
            raise TypeError(f"teacher is missing: {WAYS}")
        self.loss.check_teacher(found)
        return found

    def _autocast(self):
        return self.accelerator.autocast()

    def _shifts(self, batch: Mapping[str, Any]) -> bool:
        @torch.no_grad()
        def call(batch):
            devices = [self.args.device] if self.args.device.type == "cuda" else []
            known = {k: v for k, v in batch.items() if k not in (*LOSS_COLUMNS, PLACE)}
            with torch.random.fork_rng(devices), self._autocast():
                return self.model_wrapped(**known)

        return self._shift.of(innermost(self.model), batch, call, self.accelerator.reduce)

    def _label_side(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a batch says of its labels, at the places of the logits.

        An encoder's positions say nothing of a decoder's, and prompt tuning puts places before.
        """
        inner, prompt = innermost(self.model), virtual_tokens(self.model)
        decodes = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
        if not (decodes or prompt):
            return batch
        own = {k: v for k, v in batch.items() if k in ("labels", "shift_labels", *LOSS_COLUMNS)}
        if decodes:
            return own
        ignore = self.loss.ignore_index
        fill = {"labels": ignore, "shift_labels": ignore, **TEACHER_COLUMNS}
        return {
            name: before(value, prompt, fill.get(name, 0)) if value.dim() > 1 else value
            for name, value in own.items()
            if value is not None
        }

    def _samples(self, batch: Mapping[str, Any]) -> Samples:
        return Samples.of(self._label_side(batch), self._shifts(batch), self.loss.ignore_index)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if not prediction_loss_only:
            self._computed = False
            found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            if self._computed or found[0] is None:
                return found
            # it took the model's own loss, as one that generates does
            _, *predicted = found
            return (*self.prediction_step(model, inputs, True)[:1], *predicted)
        # the Trainer's own asks for outputs, and so for logits, even here
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    # the step's micro-batches: their number of tokens, their weights

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns = [*self._signature_columns, *LOSS_COLUMNS]
        self._signature_columns = list(dict.fromkeys(columns))

    def _get_num_items_in_batch(self, batch_samples, device):
        return None  # `get_batch_samples` counts

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        check_columns(self._columns, batches[0], "a batch's")
        if len(batches) > 1:
            self._window = [self._prepare_inputs(batch) for batch in batches]
            batches = [{**batch, PLACE: place} for place, batch in enumerate(self._window)]
        return batches, self._num_targets(batches, device)

    def _num_targets(self, batches: Sequence[Mapping[str, Any]], device) -> Tensor:
        """() tokens with a loss in all micro-batches, on all processes that have other tokens."""
        ignore = self.loss.ignore_index
        total = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            batch = self._prepare_inputs(batch)
            target = target_of(self._label_side(batch), self._shifts(batch), ignore)
            total += (target != ignore).sum()
        # before context parallelism splits them, its processes have the same tokens
        return sum_over(total, self._spread.group) / self._spread.copies

    def _weighed_at(self, place: int) -> Weighed | None:
        """Of the window's micro-batch at a place; weighed with the first of them, when a run that
        is resumed has its random state back."""
        if place == 0:
            self._weighed = self._weigh_window(self._window)
        return self._weighed[place]

    def _weigh_window(self, batches: list[dict]) -> Sequence[Weighed | None]:
        """What each micro-batch's tokens weigh, None where all count alike."""
        window = [self._samples(batch) for batch in batches]
        losses = None
        if self.sample_weights is not None:
            devices = [self.args.device] if self.args.device.type == "cuda" else []
            # the same dropout as in the pass that is trained on
            with torch.no_grad(), torch.random.fork_rng(devices), self._autocast():
                losses = torch.cat(
                    [
                        self._forward(
                            self.model_wrapped,
                            batch,
                            lambda source, target, samples=samples: samples.losses(source),
                            samples.target,
                            False,
                        )[0]
                        for samples, batch in zip(window, batches, strict=True)
                    ]
                )
        return self._weigh(window, losses) or [None] * len(batches)

    def _weigh_single(self, batch: Mapping[str, Tensor], source) -> Weighed | None:
        """Of a step's only micro-batch: the pass that sample weights read is the trained one."""
        samples, losses = self._samples(batch), None
        if self.sample_weights is not None:
            with torch.no_grad():
                losses = samples.losses(source)
        weighed = self._weigh([samples], losses)
        return None if weighed is None else weighed[0]

    def _weigh(self, window: list[Samples], losses: Tensor | None) -> list[Weighed] | None:
        given = any(samples.are_weighed for samples in window)
        if self.task_weights is None and self.sample_weights is None and not given:
            return None
        weights = self.task_weights
        if isinstance(weights, CoBa):
            if weights.step is None and self.state.global_step:
                raise RuntimeError("task_weights was never updated; add a CoBaCallback")
            weights = weights.weights()
        if weights is not None:
            weights = weights.to(self.args.device)
        return weigh(
            window,
            losses=losses,
            sample_weighting=self.sample_weights,
            task_weights=weights,
            group=self._spread.group,
        )

    # what is logged

    def _record(self, mode: str, statistics: Any, target: Tensor) -> None:
        """Add a micro-batch to the sums (4,) of hits, entropy, nll and tokens."""
        valid = statistics.valid
        hits = (statistics.argmax == target) & valid
        wide = widest(valid.device)
        parts = (hits, statistics.entropy, -statistics.log_prob, valid)
        sums = torch.stack([torch.where(valid, part, 0).to(wide) for part in parts], -1)
        sums = sums.reshape(len(target), -1, len(parts)).sum(1)
        if mode == "eval" and self.accelerator.num_processes > 1:
            # without the rows that were repeated to give every process as many
            sums = self.accelerator.gather_for_metrics(sums)
        self._sums[mode] = self._sums.get(mode, 0) + sums.sum(0)

    def _statistics(self, mode: str) -> dict[str, float]:
        """What is logged of a mode's sums; they begin anew. NaN where no token had a loss."""
        if mode not in self._sums:
            return {}
        sums = self._sums.pop(mode)
        if mode == "train":
            sums = self.accelerator.reduce(sums)
        accuracy, entropy, nll = (sums[:3] / sums[3]).tolist()
        return {
            "mean_token_accuracy": accuracy,
            "entropy": entropy,
            "nll": nll,
            "perplexity": sums[2].div(sums[3]).exp().item(),
        }

    def evaluation_loop(
        self,
        dataloader,
        description,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix="eval",
    ):
        self._sums.pop("eval", None)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        for name, value in self._statistics("eval").items():
            output.metrics.setdefault(f"{metric_key_prefix}_{name}", value)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs |= self._statistics("train")
            if isinstance(self.task_weights, CoBa):
                weights = self.task_weights.weights().tolist()
                logs |= {f"task_weight_{i}": weight for i, weight in enumerate(weights)}
            size = getattr(self.sample_weights, "effective_sample_size", None)
            if size is not None:
                logs["effective_sample_size"] = size.item()
        super().log(logs, start_time)


def frozen(teacher: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A teacher as it is used: evaluating, untrained, on the device (unless it is spread out)."""
    teacher.requires_grad_(False).eval()
    return teacher if hasattr(teacher, "hf_device_map") else teacher.to(device)


# ------------------------------------------------------------------------- tokens on many ranks


class Spread:
    """The processes that hold other tokens of a step: data parallel and context parallel ones.

    `group` is None where there is one such process, or where each takes the mean of its own
    (`average_tokens_across_devices=False`). Engines average gradients over its `size` processes, of
    which `copies` read the same rows and `rank` is the place among those that read others.
    """

    def __init__(self, group: Any, size: int, copies: int, rank: int):
        self.group, self.size, self.copies, self.rank = group, size, copies, rank

    @classmethod
    def of(cls, trainer: Any) -> Spread:
        tensor = size_of(trainer, "tp")
        size = trainer.accelerator.num_processes // tensor
        if size == 1 or not trainer.args.average_tokens_across_devices:
            return cls(None, 1, 1, 0)
        # the loader of sequence parallelism gives each its part of the rows
        copies = size_of(trainer, "cp")
        group = dist.group.WORLD
        if tensor > 1:
            group = across(trainer.args.device, size, tensor)
        rank = dist.get_rank(group) // (copies * size_of(trainer, "sp"))
        return cls(group, size, copies, rank)

    def sample_ids(self, packed: Tensor | None, target: Tensor) -> Tensor | None:
        """(B, T) ids that no other process has, where the loss spans several."""
        if self.group is None:
            return packed
        if packed is None:
            rows = torch.arange(len(target), device=target.device)
            packed = rows.view(-1, *[1] * (target.dim() - 1)).expand(target.shape)
        else:
            packed = torch.unique(packed, return_inverse=True)[1].view(target.shape)
        return packed + (self.rank << 32)


def size_of(trainer: Any, name: str) -> int:
    """How many processes share a row of the batch by tensor, context or sequence parallelism."""
    get = getattr(trainer, f"get_{name}_size", None)
    return 1 if get is None else max(get(), 1)


def across(device: torch.device, size: int, tensor: int) -> Any:
    """The group of processes at the same place of tensor parallelism, whose processes are
    neighbours in every mesh of accelerate, transformers and DeepSpeed."""
    mesh = init_device_mesh(device.type, (size, tensor), mesh_dim_names=("tokens", "tensor"))
    return mesh["tokens"].get_group()


class _Scaled(torch.autograd.Function):
    """A number as it is, with its gradient times `factor`: engines average those of processes."""

    @staticmethod
    def forward(ctx, loss, factor):
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


@contextlib.contextmanager
def grouped(loss: Loss, group: Any) -> Iterator[None]:
    """The loss over a process group while it is called, unless it has one of its own."""
    parts = [part for part in loss.modules() if isinstance(part, Loss)]
    if group is None or any(part.group is not None for part in parts):
        yield
        return
    try:
        for part in parts:
            part.group = group
        yield
    finally:
        for part in parts:
            part.group = None


# --------------------------------------------------------------------------------------- checks


def check_task_weights(weights: Any) -> None:
    if weights is None or isinstance(weights, CoBa):
        return
    if not isinstance(weights, Tensor) or weights.dim() != 1:
        raise TypeError(f"task_weights is {describe(weights)}; it takes a CoBa or a tensor (K,)")
    if not bool((weights >= 0).all() & weights.isfinite().all()):
        raise ValueError(f"task_weights is {weights.tolist()}; it takes numbers >= 0")


def given_columns(init: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[str] | None:
    """The loss's columns of the data set that a trainer is given; None where it does not say."""
    try:
        given = inspect.signature(init).bind_partial(*args, **kwargs).arguments
    except TypeError:
        return None
    return columns_of(given.get("train_dataset", kwargs.get("train_dataset")))


def check_teacher(loss: Loss, teacher: Any, columns: Sequence[str] | None, rest: str) -> None:
    """A loss that distils takes a model or the columns of a stored teacher, no other loss a model.

    Whether a data set that does not say its columns has them is seen when its batches come.
    """
    if teacher is not None or not loss.reads_teacher:
        loss.check_teacher(teacher)
    if not loss.reads_teacher or columns is None:
        return
    stored = [name for name in TEACHER_COLUMNS if name in columns]
    if not stored:
        if teacher is None:
            raise TypeError(f"teacher is missing: {WAYS}")
        return
    if teacher is not None:
        raise ValueError(
            f"teacher is given, and train_dataset has {', '.join(stored)}; it takes one of the two"
        )
    if len(stored) < len(TEACHER_COLUMNS):
        missing = next(name for name in TEACHER_COLUMNS if name not in stored)
        raise ValueError(f"train_dataset has the column {stored[0]} and no {missing}")
    loss.check_teacher(TopK(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), rest))


def check_columns(expected: Sequence[str], found: Any, whose: str) -> None:
    lost = [] if found is None else [name for name in expected if name not in found]
    if lost:
        raise ValueError(
            f"{', '.join(lost)} is a column of train_dataset, but not among {whose} columns: what "
            "prepares the data (packing, a collator of the trainer's own) drops it; prepare the "
            "data set with it, or remove the column"
        )
