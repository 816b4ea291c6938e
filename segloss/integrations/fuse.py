"""A segloss loss as the loss of a model, or as `compute_loss_func` of a `Trainer`.

B sequences of T tokens.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from segloss.integrations.forward import (
    auxiliary_loss,
    before,
    has_head,
    loss_of,
    model_inputs,
    reads_labels,
    virtual_tokens,
)
from segloss.integrations.labels import Shift, calls_loss_function, shifts_labels, standard_loss
from segloss.integrations.window import (
    IGNORE,
    at_predictions,
    check_classes,
    packed_index,
    target_of,
)
from segloss.losses import Loss
from segloss.models.head import check_no_loss, innermost, read, replaced

# of the loss, among the arguments of a model's forward
OPTIONS = ("num_items_in_batch", "token_weight", "sample_ids")


# ----------------------------------------------------------------------- logits are never made


def fuse_loss(model: nn.Module, criterion: Callable, *, shift: bool | None = None) -> Fused:
    """Make `model(..., labels=labels).loss` be `criterion`, its logits never made::

        outputs = model(input_ids=ids)                      # as ever, with logits
        outputs = model(input_ids=ids, labels=labels)       # logits: None
        outputs.loss == criterion(logits, next_tokens(labels)) + the model's auxiliary losses

    under any trainer that reads the model's loss: `Trainer` and its subclasses, a loop, and with
    every engine that `head_loss` serves. `num_items_in_batch` (the divisor) and `shift_labels` are
    honoured; `token_weight` (B, T), of the labels, and `sample_ids` (B, T) reach a segloss loss as
    further arguments of the model's forward. With labels there are no predictions for a Trainer's
    `compute_metrics`; `LossMixin` makes them.

    The model can be pickled, copied and saved as before. `.remove()` of what is returned, which
    is also `model.forward`, gives the model its own loss back.

    Under torch.compile the pass with labels is not compiled; that of `LossMixin`, and of
    `head_loss` on the compiled model, is.

    A `Trainer` with `label_smoothing_factor` does not ask the model for its loss and is refused:
    give the criterion its `label_smoothing`. TRL's trainers form theirs from log-probabilities and
    never read the model's: there a fused model raises, and segloss.integrations.trl has trainers.

    Args:
        criterion: a segloss loss, or a callable of (logits source, target (B, T)) that returns a
            scalar; with an argument `normalizer` it is given `num_items_in_batch`, and without it
            a trainer is told to average the micro-batches of a step.
        shift: as of `LossMixin`.

    Errors: TypeError for a model without a head over its vocabulary, such as a classifier, whose
    few logits are made anyway: `compute_loss_func`.
    """
    inner = innermost(model)
    if not has_head(inner):
        raise TypeError(
            f"{type(inner).__name__} has no output embeddings to fuse a loss with; take its logits:"
            " compute_loss_func(loss), or LossMixin"
        )
    if isinstance(criterion, Loss):
        check_mean(criterion)
    elif not callable(criterion):
        raise TypeError(f"criterion is a {type(criterion).__name__}; it takes a segloss loss")
    current = vars(inner).get("forward")
    if isinstance(current, Fused):
        current.remove()
    return Fused(inner, criterion, Shift(shift))


class InPlace:
    """Lies in the place of a model's forward, whose hooks have run when it is called."""

    def __init__(self, model: Any):
        self.model = model
        self.previous = vars(model).get("forward")
        vars(model)["forward"] = self

    @property
    def original(self) -> Callable:
        if self.previous is not None:
            return self.previous
        return type(self.model).forward.__get__(self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def named(self, arguments: tuple, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call by their names."""
        given = inspect.signature(self.original).bind_partial(*arguments).arguments
        return {**given, **keywords}

    def loss_of(self, criterion: Callable, target: Tensor, inputs: dict) -> tuple[Any, Any]:
        with replaced(self.model, "forward", self.original):
            return loss_of(Direct(self.model), criterion, target, inputs, fused=True)


class Direct:
    """A call of a model's forward within its own call."""

    def __init__(self, model: nn.Module):
        self.module = model

    def __call__(self, **inputs) -> Any:
        return self.module.forward(**inputs)


class Fused(InPlace):
    """The forward of a fused model; see `fuse_loss`."""

    def __init__(self, model: Any, criterion: Callable, shift: Shift):
        super().__init__(model)
        self.criterion, self.shift = criterion, shift
        self.active = self.removed = False
        self.takes_normalizer = isinstance(criterion, Loss) or (
            "normalizer" in inspect.signature(criterion).parameters
        )
        if shift.known is None:
            shift.known = shifts_labels(model)
        # what Trainer asks to know whether the loss is divided by num_items_in_batch, and which
        # labels it is to count for that
        self.settings: dict[str, Any] = {"accepts_loss_kwargs": self.takes_normalizer}
        if shift.known and standard_loss(model) is standard_loss(None):
            self.settings["loss_type"] = "ForCausalLM"
        self.before = {k: vars(model)[k] for k in self.settings if k in vars(model)}
        vars(model).update(self.settings)
        backbone = getattr(model, "base_model", model)
        self.guard = None
        if isinstance(backbone, nn.Module) and backbone is not model:
            self.guard = backbone.register_forward_pre_hook(Guard(self))

    def remove(self) -> None:
        """Give the model its own loss back."""
        self.removed = True
        if self.guard is not None:
            self.guard.remove()
        if vars(self.model).get("forward") is not self:
            return  # something else lies over it: it then only passes on
        for name in self.settings:
            vars(self.model).pop(name, None)
        vars(self.model).update(self.before)
        del vars(self.model)["forward"]
        if self.previous is not None:
            vars(self.model)["forward"] = self.previous

    @property
    def __signature__(self) -> inspect.Signature:
        """With the loss's arguments, so that a Trainer keeps these columns."""
        signature = super().__signature__
        parameters = list(signature.parameters.values())
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in ("token_weight", "sample_ids")
            if name not in signature.parameters
        ]
        place = len(parameters)
        if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
            place -= 1
        return signature.replace(parameters=parameters[:place] + added + parameters[place:])

    def __call__(self, *arguments, **keywords) -> Any:
        self.active = True
        try:
            if self.removed:
                return self.original(*arguments, **keywords)
            if keywords.get("fused_lm_head"):
                raise TypeError(FUSED_LM_HEAD)
            batch = self.named(arguments, keywords)
            if batch.get("labels") is None and batch.get("shift_labels") is None:
                check_labels_kept(batch)
                return self.original(*arguments, **keywords)
            check_no_sample_weights(batch)
            with_loss = self.with_loss
            if "torch._dynamo" in sys.modules:  # a compiled model: nothing of ours can be traced
                with_loss = torch.compiler.disable(with_loss)
            return with_loss(batch)
        finally:
            self.active = False

    def with_loss(self, batch: dict[str, Any]) -> Any:
        model, options = self.model, {name: batch.pop(name, None) for name in OPTIONS}
        as_tuple = batch.get("return_dict") is False
        if as_tuple:
            batch["return_dict"] = True
        shift = self.shift.of(model, batch, self.own_outputs)
        of_labels = {**batch, "sample_ids": options["sample_ids"]}
        if getattr(model.config, "is_encoder_decoder", False):  # its positions are the encoder's
            of_labels = {k: of_labels.get(k) for k in ("labels", "shift_labels", "sample_ids")}
        target = target_of(of_labels, shift, getattr(self.criterion, "ignore_index", IGNORE))
        extras = self.keywords(options, of_labels, target, shift)

        def criterion(source, target):
            if isinstance(self.criterion, nn.Module):
                self.criterion.to(source.device)
            return self.criterion(source, target, **extras)

        loss, outputs = self.loss_of(criterion, target, model_inputs(model, batch))
        auxiliary = auxiliary_loss(model, outputs)
        if auxiliary is not None:
            loss = loss + auxiliary.to(loss.device)
        fields = {name: value for name, value in outputs.items() if name not in ("loss", "logits")}
        outputs = type(outputs)(loss=loss, **fields)
        return outputs.to_tuple() if as_tuple else outputs

    def keywords(self, options, of_labels, target: Tensor, shift: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if options["num_items_in_batch"] is not None and self.takes_normalizer:
            found["normalizer"] = options["num_items_in_batch"]
        if isinstance(self.criterion, Loss):
            found["sample_ids"] = packed_index(of_labels, target.shape)
            found["token_weight"] = at_predictions(options["token_weight"], target.shape, shift)
        return found

    @torch.no_grad()
    def own_outputs(self, batch: Mapping[str, Any]) -> Any:
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices):
            return self.original(**batch)


def check_labels_kept(batch: Mapping[str, Any]) -> None:
    """Refuse the call of a Trainer that makes a loss of its own of logits and labels."""
    labels = any(batch.get(name) is not None for name in ("labels", "shift_labels"))
    if batch.get("num_items_in_batch") is not None and not labels:
        raise ValueError(
            "the model was given num_items_in_batch and no labels: its trainer makes the loss "
            "itself (label_smoothing_factor, compute_loss_func) and would not read the model's; "
            "set label_smoothing_factor to 0 and give the loss its label_smoothing"
        )


def check_no_sample_weights(batch: Mapping[str, Any]) -> None:
    if batch.get("sample_weights") is not None:
        raise TypeError(
            "the batch has sample_weights, which weigh the samples of a whole step: take LossMixin,"
            " or token_weight"
        )


FUSED_LM_HEAD = (
    "a model with fuse_loss was called with fused_lm_head=True: TRL's trainers make their loss of "
    "log-probabilities and never read the model's; take segloss.integrations.trl.SFTTrainer(..., "
    "loss=...) and leave fuse_loss out"
)


class Guard:
    """Raises where TRL's fused head calls the backbone around the fused loss."""

    def __init__(self, fused: Fused):
        self.fused = fused

    def __call__(self, module, arguments) -> None:
        forward = vars(self.fused.model).get("forward")
        code = getattr(getattr(forward, "__func__", forward), "__code__", None)
        if not self.fused.active and "fused_lm_head" in getattr(code, "co_varnames", ()):
            raise TypeError(FUSED_LM_HEAD)


# ------------------------------------------------------------ from logits that the model makes


def compute_loss_func(loss: Loss, *, shift: bool | None = None) -> ComputeLoss:
    """For `Trainer(..., compute_loss_func=...)`, from the model's logits (B, T, V)::

        loss(outputs.logits, next_tokens(labels), normalizer=num_items_in_batch)

    or at the labels themselves, for masked models and for classifiers of tokens and of rows; and
    the router loss of a mixture of experts, as the model adds it. The mean runs over the tokens of
    the whole accumulated batch, as the Trainer counts them. `LossMixin` does without logits.

    A Trainer hands on its model's outputs alone. The model and its inputs, which say where labels
    and packed samples stand, are read where it calls: in the nearest function, through wrappers,
    whose `outputs` are these and which has a `model` and `inputs`, as `Trainer.compute_loss` does.

    A column `token_weight` (B, T), of the labels, reaches the loss where `remove_unused_columns` is
    off and the model's forward lets it pass.

    Args:
        shift: whether labels are the next tokens'. Default: what the model's class says.

    Errors: TypeError where no such function calls, and for sample_weights; ValueError under
    `label_smoothing_factor`, where nothing says where labels
    stand, and for an encoder-decoder whose batch has no decoder_input_ids, which its collator makes
    (DataCollatorForSeq2Seq(model=model)).
    """
    check_mean(loss)
    return ComputeLoss(loss, shift)


class ComputeLoss:
    def __init__(self, loss: Loss, shift: bool | None):
        self.loss = loss
        self.shift = Shift(shift).known

    def __call__(self, outputs, labels, num_items_in_batch=None) -> Tensor:
        trainer, outer, inputs = caller_of(outputs, sys._getframe(1))
        model = innermost(outer)
        if getattr(trainer, "label_smoother", None) is not None:
            raise ValueError(
                "label_smoothing_factor is given beside compute_loss_func, with which a Trainer "
                "smooths nothing; set it to 0 and give the loss its label_smoothing"
            )
        check_no_sample_weights(inputs)
        logits = read(outputs, "logits")
        if not isinstance(labels, Tensor) or not isinstance(logits, Tensor):
            raise TypeError(
                f"labels are a {type(labels).__name__} and logits a {type(logits).__name__}; "
                "compute_loss_func takes a batch with labels and a model that returns logits"
            )
        check_classes(labels)
        check_no_loss(model, outputs)
        labels = labels.to(logits.device)
        weight = at_predictions(inputs.get("token_weight"), labels.shape, False)
        if labels.dim() > 1:
            prompt = virtual_tokens(outer)
            labels = before(labels, prompt, self.loss.ignore_index)
            weight = None if weight is None else before(weight.to(logits.device), prompt, 0)
        self.loss.to(logits.device)
        of_labels = {"labels": labels}
        if not decodes(model, inputs, labels):  # where positions are not those of the labels
            of_labels = {**inputs, **of_labels}
        shift = labels.dim() > 1 and self.shifts(model, outputs)
        target = target_of(of_labels, shift, self.loss.ignore_index)
        value = self.loss(
            logits,
            target,
            token_weight=at_predictions(weight, target.shape, shift),
            sample_ids=packed_index(of_labels, target.shape),
            normalizer=num_items_in_batch,
        )
        auxiliary = auxiliary_loss(model, outputs)
        return value if auxiliary is None else value + auxiliary.to(value.device)

    def shifts(self, model: Any, outputs: Any) -> bool:
        if self.shift is not None:
            return self.shift
        found = shifts_labels(model)
        if found is not None:
            return found
        name = type(outputs).__name__
        if any(part in name for part in ("MaskedLM", "TokenClassifier", "SequenceClassifier")):
            return False
        raise ValueError(
            f"{type(model).__name__} does not say whether labels are the next tokens'; give "
            "compute_loss_func shift=True, or False (labels at their places); LossMixin finds out"
        )


def caller_of(outputs: Any, frame: Any) -> tuple[Any, nn.Module, Mapping[str, Any]]:
    """(the trainer, the model that made the outputs, its inputs) by the names of who calls."""
    while frame is not None:
        local = frame.f_locals
        model, inputs = local.get("model"), local.get("inputs")
        known = isinstance(model, nn.Module) and isinstance(inputs, Mapping)
        if known and local.get("outputs") is outputs:
            return local.get("self"), model, inputs
        frame = frame.f_back
    raise TypeError(
        "compute_loss_func reads a model and its inputs where a Trainer calls it, after "
        "outputs = model(**inputs), and nobody who called has these outputs, a model and inputs; "
        "call the loss itself: loss(outputs.logits, next_tokens(labels), normalizer=...)"
    )


def decodes(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> bool:
    """Whether the logits are a decoder's, which then has to have read the labels."""
    if labels.dim() < 2 or not reads_labels(model):
        return False
    names = ("decoder_input_ids", "decoder_inputs_embeds")
    if all(inputs.get(name) is None for name in names):
        raise ValueError(
            f"{type(model).__name__} was given no decoder_input_ids, so its decoder does not read "
            "the labels; take DataCollatorForSeq2Seq(tokenizer, model=model), or LossMixin"
        )
    return True


def set_loss_function(model: nn.Module, loss: Loss) -> None:
    """Make `loss` the one that `model(..., labels=labels).loss` is, of the model's logits.

    For transformers models that call `self.loss_function` on logits of tokens or rows; `fuse_loss`
    is for any causal model, and makes no logits. `num_items_in_batch` and `shift_labels` are
    honoured; `token_weight` (B, T), of the labels, and `sample_ids` (B, T) reach the loss as
    further arguments of the model's forward. The first label of a packed sample is predicted by
    nothing, as with `fuse_loss`.

    Errors: TypeError for a model that computes its loss itself (T5, BART, Whisper, BERT's
    classifiers and many more), here or at its first call with labels.
    """
    check_mean(loss)
    inner = innermost(model)
    standard = standard_loss(inner)
    name, of = type(inner).__name__, getattr(standard, "__name__", None)
    if not any(calls_loss_function(part, inner) for part in type(inner).__mro__):
        raise TypeError(COMPUTES_ITSELF.format(name))
    if of not in ("ForCausalLMLoss", "ForMaskedLMLoss", *CLASSIFIERS):
        raise TypeError(
            f"the loss of {name} is {of}; set_loss_function takes models of tokens and classifiers"
        )
    current = getattr(inner, "loss_function", None)
    if isinstance(current, LossFunction):
        for handle in current.handles:
            handle.remove()
    function = LossFunction(loss, name, list(inspect.signature(standard).parameters))
    function.shift = of == "ForCausalLMLoss"
    function.handles = [
        inner.register_forward_pre_hook(Columns(function), with_kwargs=True),
        inner.register_forward_hook(WasCalled(function), with_kwargs=True),
    ]
    inner.loss_function = function


CLASSIFIERS = ("ForSequenceClassificationLoss", "ForTokenClassification")
COMPUTES_ITSELF = (
    "{} computes its loss itself and never calls loss_function; take "
    "compute_loss_func(loss) with Trainer, LossMixin, or fuse_loss where it has a vocabulary"
)


class LossFunction:
    """In the place of `model.loss_function`, with the arguments of the standard one."""

    handles: list
    shift: bool

    def __init__(self, loss: Loss, name: str, parameters: list[str]):
        self.loss, self.name, self.parameters = loss, name, parameters
        self.calls = 0
        self.columns: dict[str, Any] = {}  # of this call, that tell packed samples apart

    def __call__(self, *arguments, **keywords) -> Tensor:
        self.calls += 1
        given = dict(zip(self.parameters, arguments, strict=False)) | keywords
        logits = given.get("pooled_logits")
        logits = given["logits"] if logits is None else logits
        kind = getattr(given.get("config"), "problem_type", None)
        if kind in ("regression", "multi_label_classification"):
            raise ValueError(
                f"{self.name} has problem_type {kind!r}; the loss takes one class per row"
            )
        ignore = given.get("ignore_index", self.loss.ignore_index)
        labels = given["labels"] if given.get("shift_labels") is None else given["shift_labels"]
        shift = self.shift and given.get("shift_labels") is None and labels.dim() > 1
        check_no_sample_weights(given)
        weight = at_predictions(given.get("token_weight"), labels.shape, shift)
        self.loss.to(logits.device)
        of_labels = {**self.columns, **given}
        target = target_of(of_labels, shift, ignore)
        samples = packed_index(of_labels, labels.shape)
        return self.loss(
            logits,
            target.to(logits.device),
            token_weight=None if weight is None else weight.to(logits.device),
            sample_ids=None if samples is None else samples.to(logits.device),
            normalizer=given.get("num_items_in_batch"),
        )


class Columns:
    """What a forward is given and does not hand on to its loss function."""

    def __init__(self, function: LossFunction):
        self.function = function

    def __call__(self, module, arguments, keywords) -> None:
        named = inspect.signature(module.forward).bind_partial(*arguments).arguments
        given = {**named, **keywords}
        check_labels_kept(given)
        names = ("position_ids", "attention_mask")
        self.function.columns = {name: given[name] for name in names if name in given}


class WasCalled:
    """Raises after a forward with labels in which the model did not call its loss function."""

    def __init__(self, function: LossFunction):
        self.function, self.calls = function, 0

    def __call__(self, module, arguments, keywords, outputs) -> None:
        if keywords.get("labels") is not None and self.function.calls == self.calls:
            raise TypeError(COMPUTES_ITSELF.format(self.function.name))
        self.calls = self.function.calls
        self.function.columns = {}


def check_mean(loss: Any) -> None:
    if not isinstance(loss, Loss):
        raise TypeError(f"loss is a {type(loss).__name__}; it takes a segloss loss")
    if loss.reduction != "mean":
        raise ValueError(
            f"loss has reduction={loss.reduction!r}; what a trainer divides by the tokens of the "
            "whole accumulated batch is a mean: it takes 'mean'"
        )
