"""Segloss losses in transformers: for `Trainer`, for a model's own loss, for a loop of your own.

    class LossTrainer(LossMixin, Trainer): ...                     # without logits
    Trainer(..., compute_loss_func=compute_loss_func(loss))        # from the model's logits
    set_loss_function(model, loss)                                 # model(..., labels=...).loss
    loss(head_logits(model, input_ids=...), next_tokens(labels))   # a loop of your own

B sequences of T tokens, D hidden size, V vocabulary, K tasks.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from segloss.head.matrices import Head
from segloss.integrations.window import (
    IGNORE,
    LOSS_COLUMNS,
    Samples,
    Weighed,
    next_tokens,
    packed_index,
    target_of,
    weigh,
)
from segloss.kernels.common import widest
from segloss.losses import CrossEntropyLoss, Loss
from segloss.sources import LinearLogits, logit_statistics
from segloss.weighting import CoBa, SampleWeighting

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

__all__ = [
    "CoBaCallback",
    "LossMixin",
    "compute_loss_func",
    "head_logits",
    "next_tokens",
    "set_loss_function",
]

# ------------------------------------------------------------------------- logits never made


def head_logits(model: nn.Module, **inputs) -> LinearLogits:
    """`LinearLogits` that stand for `model(**inputs).logits` (B, T, V).

    Works for causal models whose head is `get_output_embeddings()`, with the config's soft-cap and
    logit scale, and with a LoRA adapter (peft) on the head. The model's own forward runs, wrapped
    by DDP or not, but is asked for the last position's logits only; on a model's first call these
    are compared with what the head gives, so that a model that does more to its logits is refused
    rather than trained on the wrong ones.

    Errors: TypeError for a model without a head or a decoder; ValueError for adapter dropout on the
    head, several active adapters, or logits that are not the head's.
    """
    return head_outputs(model, **inputs)[0]


def head_outputs(model: nn.Module, **inputs) -> tuple[LinearLogits, Any]:
    """`head_logits`, and what the model returned, with the last position's logits."""
    inner = unwrapped(model)
    decoder, head = decoder_of(inner), inner.get_output_embeddings()
    if head is None:
        raise TypeError(f"{type(inner).__name__} has no output embeddings: it is no causal LM")
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs = {**inputs, "logits_to_keep": 1}
    captured: list[Tensor] = []

    def keep(module, arguments, output):
        captured.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    handle = decoder.register_forward_hook(keep)
    try:
        outputs = model(**inputs)
    finally:
        handle.remove()
    weight, bias, lora = head_tensors(head)
    softcap, scale = logit_transform(inner.config)
    source = LinearLogits(captured[0], weight, bias, softcap=softcap, scale=scale, lora=lora)
    check_once(inner, source, outputs.logits)
    return source, outputs


def unwrapped(model: Any) -> Any:
    """The transformers model inside DDP, a compiled module and peft."""
    while True:
        if isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            break
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"model is a {type(model).__name__}; it takes a transformers causal LM")
    return model


def decoder_of(model: Any) -> nn.Module:
    """What computes the last hidden states."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model:
        decoder = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise TypeError(f"{type(model).__name__} has no decoder below its head")
    return decoder


def head_tensors(head: Any) -> tuple[Tensor, Tensor | None, tuple | None]:
    """(weight (V, D), bias (V,) or None, (A (r, D), B (V, r), scaling) or None)."""
    if hasattr(head, "modules_to_save"):  # peft's copy of a module that is trained in full
        head = head.modules_to_save[active_adapter(head)]
    if not hasattr(head, "lora_A"):
        return head.weight, getattr(head, "bias", None), None
    base = head.get_base_layer()
    if head.merged or head.disable_adapters:
        return base.weight, getattr(base, "bias", None), None
    name = active_adapter(head)
    dropout = getattr(head.lora_dropout[name], "p", 0.0)
    if dropout:
        raise ValueError(
            f"the head's LoRA adapter has lora_dropout={dropout}; LinearLogits takes 0: leave the "
            "head out of the adapter's target modules or set lora_dropout=0"
        )
    if getattr(head, "use_dora", {}).get(name):
        raise ValueError("the head's adapter is DoRA; LinearLogits takes plain LoRA")
    a, b = head.lora_A[name], head.lora_B[name]
    return base.weight, getattr(base, "bias", None), (a.weight, b.weight, head.scaling[name])


def active_adapter(layer: Any) -> str:
    active = layer.active_adapters if hasattr(layer, "active_adapters") else layer.active_adapter
    names = [active] if isinstance(active, str) else list(active)
    if len(names) != 1:
        raise ValueError(f"the head has the active adapters {names}; LinearLogits takes one")
    return names[0]


def logit_transform(config) -> tuple[float | None, float]:
    """(softcap, scale) by the names model families use for them."""
    config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= float(getattr(config, name, None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return getattr(config, "final_logit_softcapping", None), scale


def check_once(model: Any, source: LinearLogits, logits: Tensor) -> None:
    """Compare with the model's own logits, the first time only: it costs a synchronisation."""
    if getattr(model, "_segloss_head_checked", False):
        return
    last = source.hidden[:, -1:].detach()
    head = Head.of(replace(source, hidden=last).inputs(), None)
    with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
        rows = head.logits()
        ours = rows.load(rows.data)[0]
        theirs = logits[:, -1].to(ours.dtype)
        error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
    if not error < 0.05:
        raise ValueError(
            f"the logits of {type(model).__name__} differ from those of its head by {error:.0%}: "
            "it does more than soft-cap and scale; give the loss model(...).logits instead"
        )
    model._segloss_head_checked = True


# ------------------------------------------------------------ from logits that the model makes


def compute_loss_func(loss: Loss) -> Callable:
    """For `Trainer(..., compute_loss_func=...)`, from the model's logits (B, T, V)::

        loss(outputs.logits, next_tokens(labels), normalizer=num_items_in_batch)

    The mean runs over the tokens of the whole accumulated batch. `LossMixin` does without logits.
    """

    def compute_loss(outputs, labels, num_items_in_batch=None) -> Tensor:
        return loss(outputs.logits, next_tokens(labels), normalizer=num_items_in_batch)

    return compute_loss


def set_loss_function(model: nn.Module, loss: Loss) -> None:
    """Make `loss` the one that `model(..., labels=labels).loss` is, under any trainer.

    `num_items_in_batch` and `shift_labels` are honoured; `token_weight` (B, T), of the labels, and
    `sample_ids` (B, T) reach the loss as further arguments of the model's forward.
    """

    def loss_function(
        logits,
        labels,
        vocab_size=None,
        num_items_in_batch=None,
        ignore_index=IGNORE,
        shift_labels=None,
        token_weight=None,
        sample_ids=None,
        **kwargs,
    ) -> Tensor:
        target = next_tokens(labels, ignore_index) if shift_labels is None else shift_labels
        return loss(
            logits,
            target.to(logits.device),
            token_weight=None if token_weight is None else next_tokens(token_weight, 0),
            sample_ids=sample_ids,
            normalizer=num_items_in_batch,
        )

    unwrapped(model).loss_function = loss_function


# --------------------------------------------------------------------------------- the Trainer


PLACE = "place_in_window"  # of a micro-batch among those of its step


class LossMixin(Trainer):
    """Put before a `Trainer` class: its loss is a segloss loss, from hidden states::

        class LossTrainer(LossMixin, Trainer):
            pass

        LossTrainer(model, arguments, train_dataset=..., loss=FocalLoss(), ...)

    Every micro-batch is divided by the tokens of the whole accumulated batch over all processes
    (`num_items_in_batch`), so that a token loss has the value and gradient of that one large batch.
    A region or ranking loss is a value of a set of tokens and does not add up: micro-batches count
    with their share of the tokens. Evaluation gives the same loss of each batch, without weights.

    Columns of the data set that reach the loss and not the model, with a number per row or, in
    packed rows, per token; a collator has to keep them (transformers' own do):

        task_ids        integers 0 to K - 1, for `task_weights`
        sample_weights  floats; the loss is then the mean of the samples' losses, so weighed
        token_weight    floats of the labels' shape: weight 2 is the token listed twice
        sample_ids      integers that tell packed sequences apart; default: where position_ids
                        start again, or one per row

    Args:
        loss: a segloss loss; default cross-entropy, with `label_smoothing_factor`.
        head: "fused" never makes the logits; "logits" takes the model's own, for a model that
            `head_logits` refuses.
        task_weights: (K,) constants, or a `CoBa`, which `CoBaCallback` keeps up to date. The loss
            is the sum of weight x loss per token of each task, wherever its tokens are.
        sample_weights: a `SampleWeighting`, of the samples of the whole accumulated batch: with
            several micro-batches it costs a forward pass without gradients over them. On several
            processes it needs `group=`.
        log_statistics: log mean_token_accuracy and entropy (nats per token), from the same pass.

    A mixture-of-experts model whose config has `output_router_logits` gets its router loss added.
    """

    loss_is_scaled_for_ga = True
    _signature_columns: Any

    def __init__(
        self,
        *args,
        loss: Loss | None = None,
        head: str = "fused",
        task_weights: CoBa | Tensor | None = None,
        sample_weights: SampleWeighting | None = None,
        log_statistics: bool = True,
        **kwargs,
    ):
        if head not in ("fused", "logits"):
            raise ValueError(f"head is {head!r}; it takes 'fused' or 'logits'")
        super().__init__(*args, **kwargs)
        smoothing = self.args.label_smoothing_factor
        if loss is not None and smoothing:
            raise ValueError(
                f"label_smoothing_factor is {smoothing} and loss is given; "
                "give the loss its label_smoothing"
            )
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func is given to a LossMixin; it takes loss")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"n_gpu is {self.args.n_gpu}: one process with several GPUs wraps the model in "
                "DataParallel, which LossMixin does not take; start one process per GPU"
            )
        group = getattr(sample_weights, "group", None)
        if sample_weights is not None and self.accelerator.num_processes > 1 and group is None:
            raise ValueError(
                "sample_weights has group=None, but the batch is spread over "
                f"{self.accelerator.num_processes} processes; give it torch.distributed.group.WORLD"
            )
        loss = CrossEntropyLoss(label_smoothing=smoothing) if loss is None else loss
        self.loss = loss.to(self.args.device)
        self.head = head
        self.task_weights = task_weights
        self.sample_weights = sample_weights
        self.log_statistics = log_statistics
        self._sums: dict[str, Tensor] = {}
        self._window: list[dict] = []
        self._weighed: Sequence[Weighed | None] = []
        if sample_weights is not None:
            self.add_callback(SavedState("sample_weighting", sample_weights))
        # the Trainer counts the tokens of a batch only for models said to use the count
        self.model_accepts_loss_kwargs = True

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As the Trainer's; what callbacks saved is read from the checkpoint that is resumed."""
        given = isinstance(resume_from_checkpoint, (str, os.PathLike))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SavedState):
                callback.resumed_from = os.fspath(resume_from_checkpoint) if given else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        place = inputs.pop(PLACE, None)
        columns = {name: inputs.pop(name) for name in LOSS_COLUMNS if name in inputs}
        batch = {**inputs, **columns}
        target = target_of(batch)
        for name in ("labels", "shift_labels"):
            inputs.pop(name, None)
        weighed = None if place is None else self._weighed_at(place)
        source, outputs = self._logits(model, inputs, self.head == "logits" or return_outputs)
        if place is None and model.training:
            weighed = self._weigh_single(batch, source)
        normalizer, token_weight = num_items_in_batch, None
        scale = 1
        if self.args.average_tokens_across_devices:
            scale = self.accelerator.num_processes // self.get_tp_size()
        if weighed is not None:
            token_weight, normalizer = weighed.token_weight, weighed.normalizer
            scale = self.accelerator.num_processes
        loss = self.loss(
            source,
            target,
            token_weight=token_weight,
            sample_ids=packed_index(batch, target),
            normalizer=normalizer,
            return_statistics=self.log_statistics,
        )
        if self.log_statistics:
            loss, statistics = loss
            self._record("train" if model.training else "eval", statistics, target)
        if normalizer is not None:
            # processes average their gradients, but the normaliser spans all of them
            loss = loss * scale
        loss = loss + self._router_loss(model, outputs)
        return (loss, outputs) if return_outputs else loss

    def _logits(self, model, inputs: Mapping[str, Any], make_logits: bool) -> tuple[Any, Any]:
        """(logits or what stands for them (B, T, V), the model's outputs)."""
        with self._autocast():
            if not make_logits:
                return head_outputs(model, **inputs, use_cache=False)
            outputs = model(**inputs, use_cache=False)
            return outputs.logits, outputs

    def _autocast(self):
        return self.accelerator.autocast()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # the Trainer's own asks for outputs, and so for logits, even here
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    # weights

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns = [*self._signature_columns, *LOSS_COLUMNS]
        self._signature_columns = list(dict.fromkeys(columns))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) > 1:
            self._window = [self._prepare_inputs(batch) for batch in batches]
            batches = [{**batch, PLACE: place} for place, batch in enumerate(self._window)]
        return batches, num_items

    def _weighed_at(self, place: int) -> Weighed | None:
        """Of the window's micro-batch at a place; weighed with the first of them, when a run that
        is resumed has its random state back."""
        if place == 0:
            self._weighed = self._weigh_window(self._window)
        return self._weighed[place]

    def _weigh_window(self, batches: list[dict]) -> Sequence[Weighed | None]:
        """What each micro-batch's tokens weigh, None where all count alike."""
        window = [Samples.of(batch) for batch in batches]
        losses = None
        if self.sample_weights is not None:
            devices = [self.args.device] if self.args.device.type == "cuda" else []
            # the same dropout as in the pass that is trained on
            with torch.no_grad(), torch.random.fork_rng(devices):
                losses = torch.cat(
                    [
                        samples.losses(
                            self._logits(
                                self.model_wrapped, model_inputs(batch), self.head == "logits"
                            )[0]
                        )
                        for samples, batch in zip(window, batches, strict=True)
                    ]
                )
        return self._weigh(window, losses) or [None] * len(batches)

    def _weigh_single(self, batch: Mapping[str, Tensor], source) -> Weighed | None:
        """Of a step's only micro-batch: the pass that sample weights read is the trained one."""
        samples, losses = Samples.of(batch), None
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
        group = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
        return weigh(
            window,
            losses=losses,
            sample_weighting=self.sample_weights,
            task_weights=weights,
            group=group,
        )

    def _router_loss(self, model, outputs) -> Tensor | float:
        """Of a mixture of experts: a mean per micro-batch, so averaged over those of a step."""
        router_loss = getattr(outputs, "aux_loss", None)
        if router_loss is None:
            return 0.0
        share = getattr(unwrapped(model).config.get_text_config(), "router_aux_loss_coef", 0.0)
        steps = getattr(self, "current_gradient_accumulation_steps", 1) if model.training else 1
        return share / steps * router_loss

    # what is logged

    def _record(self, mode: str, statistics: Any, target: Tensor) -> None:
        hits = (statistics.argmax == target) & statistics.valid
        sums = torch.stack([hits.sum(), statistics.entropy.sum(), statistics.valid.sum()])
        sums = sums.to(widest(sums.device))
        self._sums[mode] = self._sums.get(mode, 0) + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if mode in self._sums:
            hits, entropy, number = self.accelerator.reduce(self._sums.pop(mode)).tolist()
            prefix = "" if mode == "train" else "eval_"
            logs[f"{prefix}mean_token_accuracy"] = hits / max(number, 1)
            logs[f"{prefix}entropy"] = entropy / max(number, 1)
        if mode == "train" and isinstance(self.task_weights, CoBa):
            weights = self.task_weights.weights().tolist()
            logs |= {f"task_weight_{i}": weight for i, weight in enumerate(weights)}
        size = getattr(self.sample_weights, "effective_sample_size", None)
        if mode == "train" and size is not None:
            logs["effective_sample_size"] = size.item()
        super().log(logs, start_time)


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's forward takes of a batch: without labels it computes no loss of its own."""
    not_for_it = (*LOSS_COLUMNS, "labels", "shift_labels")
    return {name: value for name, value in batch.items() if name not in not_for_it}


# ----------------------------------------------------------------------------------- callbacks


class SavedState(TrainerCallback):
    """Keeps what a run depends on beside its checkpoints and reads it when one is resumed.

    From the folder that `LossMixin.train` is given, or the checkpoint in the output folder.
    """

    resumed_from: str | None = None

    def __init__(self, name: str, stateful: Any):
        self.name = name
        self.stateful = stateful

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self._read(args, state)

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            self._write(args, state)

    def _read(self, args, state) -> None:
        path = self._path(args, state)
        if self.resumed_from is not None:
            path = os.path.join(self.resumed_from, f"{self.name}.pt")
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint is of a run without {self.name}, or lies in "
                "another folder; give LossMixin.train the folder, or begin from its model alone"
            )
        self.stateful.load_state_dict(torch.load(path, map_location=args.device))

    def _write(self, args, state) -> None:
        torch.save(self.stateful.state_dict(), self._path(args, state))

    def _path(self, args, state) -> str:
        folder = f"checkpoint-{state.global_step}"
        return os.path.join(args.output_dir, folder, f"{self.name}.pt")


class CoBaCallback(SavedState):
    """Measures the tasks' validation losses and tells them to CoBa: all of them before training,
    then one batch after each step.

    CoBa's state is saved with checkpoints, as coba.pt, and read when training resumes from one.

    Args:
        coba: as given to the trainer as `task_weights`. On several processes, with `group=` each
            measures a part of the batches, and without it each measures all of them.
        batches: with input_ids, labels and task_ids, such as a DataLoader that shuffles the tasks'
            validation items; kept in memory and taken in turn.
        every: steps between two updates.

    `losses` (K,) are those that CoBa was told last, NaN for a task without tokens.
    """

    losses: Tensor

    def __init__(self, coba: CoBa, batches: Iterable[Mapping[str, Tensor]], every: int = 1):
        super().__init__("coba", coba)
        self.coba = coba
        self.batches = [dict(batch) for batch in batches]
        self.every = every
        if not self.batches:
            raise ValueError("batches is empty; it takes at least one batch of validation items")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control)
        if self.coba.step is None:
            self._update(args, model, self._own(args), step=0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        batches = self._own(args)
        number = state.global_step // self.every - 1
        self._update(args, model, [batches[number % len(batches)]], step=state.global_step)

    def _own(self, args) -> list[dict]:
        if self.coba.group is None:
            return self.batches
        if len(self.batches) < args.world_size:
            raise ValueError(
                f"batches has {len(self.batches)} batches; it takes at least one for each of the "
                f"{args.world_size} processes"
            )
        return self.batches[args.process_index :: args.world_size]

    def _update(self, args, model, batches: list[dict], step: int) -> None:
        logits = partial(self._logits, args, model)
        was_training = model.training
        model.eval()
        self.losses, counts = task_losses(logits, batches, self.coba.num_tasks, args.device)
        model.train(was_training)
        self.coba.update(self.losses, step=step, counts=counts)

    def _logits(self, args, model, inputs: Mapping[str, Any]) -> Any:
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16):
            return head_logits(model, **inputs, use_cache=False)


@torch.no_grad()
def task_losses(
    logits: Callable, batches: Iterable[Mapping], num_tasks: int, device
) -> tuple[Tensor, Tensor]:
    """(cross-entropy per token of each task (K,), NaN without tokens; tokens (K,))."""
    totals = torch.zeros(2, num_tasks, dtype=widest(torch.device(device)), device=device)
    for batch in batches:
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        samples = Samples.of(batch)
        if samples.task is None:
            raise ValueError(f"a batch has the columns {', '.join(batch)}; CoBa needs task_ids")
        log_prob = logit_statistics(logits(model_inputs(batch)), samples.target).log_prob
        sums = totals.new_zeros(2, samples.num_samples)
        index = samples.index.reshape(-1)
        sums[0].index_add_(0, index, -log_prob.reshape(-1).to(sums.dtype))
        sums[1] = samples.num_tokens(weighed=False)
        totals.index_add_(1, samples.task, sums)
    return totals[0] / totals[1], totals[1]
