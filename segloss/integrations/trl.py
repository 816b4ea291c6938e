"""TRL's trainers with segloss: `SFTTrainer` with any loss; `DPOTrainer`, `KTOTrainer`,
`GRPOTrainer` and `RLOOTrainer` with their own losses, whose log-probabilities `head_loss` makes.

B sequences of T tokens.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import trl
from torch import Tensor, nn
from trl.trainer import sft_trainer

from segloss.integrations.forward import auxiliary_loss, model_inputs
from segloss.integrations.fuse import InPlace
from segloss.integrations.trainer import LossMixin
from segloss.integrations.window import IGNORE, next_tokens
from segloss.losses import CrossEntropyLoss, DFTLoss, Loss
from segloss.sources import LinearLogits, logit_statistics

__all__ = [
    "DPOTrainer",
    "GRPOTrainer",
    "KTOTrainer",
    "RLOOTrainer",
    "SFTTrainer",
    "add_fused_lm_head",
]

# ---------------------------------------------------------------------- supervised fine-tuning


class SFTTrainer(LossMixin, trl.SFTTrainer):
    """`trl.SFTTrainer` with any loss, without logits, and with LoRA on the head too::

        from segloss.integrations.trl import SFTTrainer

        SFTTrainer(model, args=SFTConfig(...), train_dataset=..., loss=FocalLoss())

    Takes what `trl.SFTTrainer` takes and what `LossMixin` adds, whose columns are kept through
    TRL's collators; `packing` drops every column, and is refused beside them. Without `loss` it is
    the config's `loss_type`, "nll" or "dft".

    Logs what TRL logs: num_tokens, and mean_token_accuracy and entropy, here over all tokens since
    the last line, where TRL averages over micro-batches.
    """

    def __init__(self, *args: Any, loss: Loss | None = None, **kwargs: Any):
        with head_adapters_accepted(sft_trainer):
            super().__init__(*args, loss=loss, **kwargs)
        if self.args.loss_type == "dft":
            if loss is not None:
                raise ValueError("loss_type is 'dft' and loss is given; it takes one of the two")
            self.loss = DFTLoss()
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            mask = inputs.get("attention_mask")
            self._num_tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            tokens = self.accelerator.reduce(self._num_tokens).item()
            logs["num_tokens"] = tokens // self.get_tp_size()
        super().log(logs, start_time)


@contextlib.contextmanager
def head_adapters_accepted(module: Any) -> Iterator[None]:
    """TRL refuses an adapter on the head, which its own head would bypass; ours does not."""
    refused = getattr(module, "BaseTunerLayer", None)
    try:
        module.BaseTunerLayer = ()  # isinstance(..., ()) is False
        yield
    finally:
        module.BaseTunerLayer = refused


# ------------------------------------------------------------- preferences and reinforcement


class OwnHead:
    """Put before a trainer of TRL that calls `add_fused_lm_head` on its models: ours is taken."""

    def __init__(self, *args: Any, **kwargs: Any):
        theirs = next(c for c in type(self).__mro__ if c.__module__.startswith("trl."))
        module = sys.modules[theirs.__module__]
        original = getattr(module, "add_fused_lm_head", None)
        if original is None:
            raise ImportError(
                f"trl {trl.__version__} has no fused head in {theirs.__name__}; "
                "segloss.integrations.trl takes trl >= 1.16"
            )
        module.add_fused_lm_head = add_fused_lm_head  # type: ignore[attr-defined]
        try:
            with head_adapters_accepted(module):
                super().__init__(*args, **kwargs)
        finally:
            module.add_fused_lm_head = original  # type: ignore[attr-defined]


class DPOTrainer(OwnHead, trl.DPOTrainer):
    """`trl.DPOTrainer`, its log-probabilities made by `head_loss`; see `add_fused_lm_head`."""


class KTOTrainer(OwnHead, trl.KTOTrainer):
    """`trl.KTOTrainer`, its log-probabilities made by `head_loss`; see `add_fused_lm_head`."""


class GRPOTrainer(OwnHead, trl.GRPOTrainer):
    """`trl.GRPOTrainer`, its log-probabilities made by `head_loss`; see `add_fused_lm_head`."""


class RLOOTrainer(OwnHead, trl.RLOOTrainer):
    """`trl.RLOOTrainer`, its log-probabilities made by `head_loss`; see `add_fused_lm_head`."""


def add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """TRL's `add_fused_lm_head`: `model(..., labels=labels, fused_lm_head=True)` returns a
    `FusedCausalLMOutput` of numbers per token, the logits never made::

        z = model(...).logits[:, :-1].float() / temperature
        log_p = torch.log_softmax(z, -1)
        log_probs = log_p.gather(-1, labels[:, 1:, None])[..., 0]      # 0 where labels are -100
        entropy = -(log_p.exp() * log_p).sum(-1)
        log_sum_sq_probs = torch.logsumexp(2 * log_p, -1)               # without a gradient
        mean_logits = z.mean(-1)                                       # without a gradient
        is_top1 = log_p.argmax(-1) == labels[:, 1:]

    Beside TRL's own it serves LoRA on the head, every model and every engine that `head_loss` does.
    `log_sum_sq_probs` and `mean_logits` cost a further pass over the logits each. Without
    `fused_lm_head` the forward is the model's.

    Args and errors: as TRL's, and those of `head_loss`.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it takes a number above 0")
    known = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    for name in outputs:
        if name not in known:
            raise ValueError(f"outputs has {name!r}; it takes {', '.join(known)}")
    LogProbs(model, temperature, cast_lm_head_to_fp32, tuple(outputs))


class LogProbs(InPlace):
    """The forward of a model with our fused head; see `add_fused_lm_head`."""

    def __init__(self, model: Any, temperature: float, in_float32: bool, outputs: tuple[str, ...]):
        super().__init__(model)
        self.temperature, self.in_float32, self.outputs = temperature, in_float32, outputs

    def __call__(self, *arguments, fused_lm_head: bool = False, **keywords) -> Any:
        if not fused_lm_head:
            return self.original(*arguments, **keywords)
        from trl.trainer.utils import FusedCausalLMOutput

        batch = self.named(arguments, keywords)
        shifted, labels = batch.get("shift_labels"), batch.get("labels")
        if shifted is not None:
            target = shifted
        elif labels is not None:
            target = next_tokens(labels)
        else:
            raise ValueError("labels are None; with fused_lm_head=True the model takes labels")
        with self.head_in_float32():
            fields, outputs = self.loss_of(self.fields, target, model_inputs(self.model, batch))
        mask = target != IGNORE
        total = batch.get("num_items_in_batch")
        log_probs = fields["log_probs"]
        loss = -log_probs.sum() / (mask.sum().clamp(min=1) if total is None else total)
        auxiliary = auxiliary_loss(self.model, outputs)
        if auxiliary is not None:
            loss = loss + auxiliary.to(loss.device)
        fields["label_mask"] = mask
        if shifted is None:  # the last place predicts nothing
            fields = {name: value[:, :-1] for name, value in fields.items()}
        return FusedCausalLMOutput(loss=loss, aux_loss=getattr(outputs, "aux_loss", None), **fields)

    def fields(self, source: LinearLogits, target: Tensor) -> dict[str, Tensor]:
        """(B, T) each of the outputs, 0 where there is no label."""
        source = heated(source, self.temperature)
        with torch.autocast(source.device.type, enabled=not self.in_float32 and autocast(source)):
            found: Any = logit_statistics(
                source, target, entropy="entropy" in self.outputs, argmax="is_top1" in self.outputs
            )
            fields = {"log_probs": found.log_prob}
            if "entropy" in self.outputs:
                fields["entropy"] = found.entropy
            if "is_top1" in self.outputs:
                fields["is_top1"] = found.valid & (found.argmax == target)
            with torch.no_grad():
                if "log_sum_sq_probs" in self.outputs:
                    # of p^2: the same logits, doubled
                    double = logit_statistics(heated(source, 0.5), target).lse
                    fields["log_sum_sq_probs"] = double - 2 * found.lse.detach()
                if "mean_logits" in self.outputs:
                    # wholly smoothed cross-entropy is the distance of the mean logit from lse
                    smoothed = CrossEntropyLoss(label_smoothing=1.0, reduction="none")
                    fields["mean_logits"] = found.lse.detach() - smoothed(source, target)
        return fields

    @contextlib.contextmanager
    def head_in_float32(self) -> Iterator[None]:
        """TRL has made the head's weights float32 where its config asks for that."""
        if not self.in_float32:
            yield
            return
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda module, given: (given[0].float(),))
        try:
            yield
        finally:
            handle.remove()


def autocast(source: LinearLogits) -> bool:
    return torch.is_autocast_enabled(source.device.type)


def heated(source: LinearLogits, temperature: float) -> LinearLogits:
    """The logits divided by a temperature."""
    cap = source.softcap
    return replace(
        source,
        scale=source.scale / temperature,
        softcap=None if cap is None else cap / temperature,
    )
