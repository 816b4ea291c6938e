"""The loss of a causal model is computed where its head is, while the model runs.

    loss, outputs = head_loss(model, criterion, target, input_ids=..., attention_mask=...)

For one call the head's `forward` is replaced: it makes the loss of the hidden states it receives,
with the weights that the engine around the model hands it, and the loss leaves through that
engine's own hooks. Whatever FSDP, DeepSpeed or DDP do for a linear layer they then do for the loss.

B sequences of T tokens, D hidden size, V vocabulary, P probes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import Cache

from segloss.checks import describe, is_dtensor
from segloss.models.tensor_parallel import (
    gathered_logits,
    on_mesh,
    placed,
    takes_dtensors,
    whole,
    wrapped_by_transformers,
)
from segloss.models.transform import MASKED, Transform, learnt, probes
from segloss.sources.module import ModuleLogits, Repeatable, check_one_unit

__all__ = ["head_logits", "head_loss"]


# -------------------------------------------------------------------------------------- public


def head_loss(
    model: nn.Module,
    criterion: Callable,
    target: Tensor | None,
    *,
    teacher: nn.Module | None = None,
    **inputs,
) -> tuple[Any, Any]:
    """`(criterion(model(**inputs).logits, target), outputs)`, the logits never made::

        loss, outputs = head_loss(model, DiceLoss(), next_tokens(labels), input_ids=input_ids)
        loss.backward()

    On one process and under DDP, FSDP1, FSDP2, HSDP, DeepSpeed's ZeRO-1, 2 and 3, with activation
    checkpointing, whether the head is tied, frozen, soft-capped, scaled, biased or has an adapter.
    With `group=` in a segloss loss it is that of all ranks; engines that average gradients then
    want the loss multiplied by the world size.

    Args:
        model: a transformers causal model, as its engine wrapped it.
        criterion: a segloss loss, or any callable of (logits source, target) that returns a loss,
            `Statistics`, or a tuple, list or dict of them.
        target: (B, T) the class each place predicts, -100 for none; nothing is shifted. With prompt
            tuning also (B, virtual tokens + T), whose last virtual token predicts the first token.
        teacher: another causal model, in evaluation mode: it runs on the same inputs, without
            gradients and without logits, and `criterion` is called with `teacher=` a source of
            its logits, as `DistillationLoss` takes it. Each head is computed in its own model.
        inputs: of the model's forward, `labels` left out.

    Returns what `criterion` does, and the model's outputs: `logits` are those of the last place
    (B, 1, V), without a gradient, and `loss` is the loss.

    What the model does to the logits of its head (a scale, a cap, a bias, padded or masked classes)
    is learnt by a pass without gradients on the model's first call, and compared with what the
    model returns then and on every call whose number is a power of two (over 1,024 on every
    1,024th).

    Errors: TypeError for a model whose head is not found or not called once; ValueError for
    `labels`, for a teacher in training mode, and for logits that the head's differ from.
    """
    if teacher is None:
        return loss_at_head(model, criterion, target, inputs)
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher is {describe(teacher)}; it takes a transformers causal model")
    if teacher.training:
        raise ValueError("teacher is in training mode, with its dropout; call teacher.eval()")
    differentiates = torch.is_grad_enabled()
    found = []

    def teach(source, _) -> None:
        """Runs where the teacher's head has its weights, and the student's within it."""
        with torch.set_grad_enabled(differentiates):
            taught = functools.partial(criterion, teacher=source)
            found.append(loss_at_head(model, taught, target, inputs))

    with torch.no_grad():
        loss_at_head(teacher, teach, None, inputs)
    return found[0]


def loss_at_head(
    model: nn.Module, criterion: Callable, target: Tensor | None, inputs: dict
) -> tuple[Any, Any]:
    """`head_loss` of one model."""
    if not callable(criterion):
        raise TypeError(
            f"criterion is {describe(criterion)}; it takes a segloss loss or a callable of "
            "(source, target)"
        )
    if target is not None and not isinstance(target, Tensor):
        raise TypeError(f"target is {describe(target)}; it takes a tensor (B, T)")
    check_inputs(model, inputs)
    inner = unwrapped(model)
    head = head_of(inner)
    state = learnt_state(model, inner, head, inputs)
    state.calls += 1
    due = is_due(state, inner.training)
    state.modes.add(inner.training)

    prompt = prompt_length(model, inputs)

    def inside(call: Call, hidden: Tensor) -> tuple[Any, Tensor]:
        places = hidden
        if prompt is not None and (target is None or target.shape != hidden.shape[:-1]):
            places = hidden[..., hidden.shape[-2] - prompt :, :]
        source = source_of(head, call.kind, call.original, places, state.transform)
        if target is None:
            return criterion(source, target), call.last_logits(hidden)
        if target.shape != source.leading_shape:
            given = tuple(source.leading_shape)
            more = ", or give the loss model(...).logits" if len(given) > target.dim() else ""
            raise ValueError(
                f"target is {describe(target)}, but the head of {type(inner).__name__} gives "
                f"logits for {given} places; it takes a target of that shape{more}"
            )
        return criterion(source, target.to(hidden.device)), call.last_logits(hidden)

    with Call(inner, head, inside, due) as call:
        outputs = model(**inputs)
    call.check_called()
    value = call.value
    if call.carried:
        value = put_back(value, iter(outputs["loss"]))
    call.tidy(outputs, value)
    if call.checking:
        try:
            check_logits(type(inner).__name__, state, call, whole(outputs.logits))
        except ValueError:
            STATES.pop(inner, None)  # the next call learns anew
            raise
    return value, outputs


def head_logits(model: nn.Module, **inputs) -> Any:
    """A logits source that stands for `model(**inputs).logits` (B, T, V).

    For one process, DDP and ZeRO-1 and 2, where the head's weights stay what they are after the
    model's forward; `head_loss`, which this otherwise behaves as, serves the rest.

    Errors: those of `head_loss`; TypeError under FSDP, ZeRO-3 and tensor parallelism.
    """
    return head_outputs(model, **inputs)[0]


def head_outputs(model: nn.Module, **inputs) -> tuple[Any, Any]:
    """`head_logits`, and what the model returned, with the last place's logits."""
    engine = sharding_engine(model)
    if engine is not None:
        raise TypeError(
            f"the head's weights are sharded by {engine} and are whole only while the model runs; "
            "call head_loss(model, criterion, target, **inputs) in place of head_logits"
        )
    return head_loss(model, lambda source, target: source, None, **inputs)


# ---------------------------------------------------------------------------- model and head


def check_inputs(model: Any, inputs: dict) -> None:
    for name in ("labels", "shift_labels"):
        if inputs.get(name) is not None:
            raise ValueError(
                f"{name} is among the model's inputs, with which it makes a loss and logits of its "
                "own; leave it out and give the target, next_tokens(labels) for a causal model"
            )
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "model is a DataParallel, which splits the inputs but not the target; start one "
            "process per GPU with DistributedDataParallel"
        )


def innermost(model: Any) -> Any:
    """The model inside DDP, FSDP, DeepSpeed, a compiled module and peft."""
    while True:
        if isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def unwrapped(model: Any) -> Any:
    """The innermost model, which has to be one of transformers."""
    model = innermost(model)
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"model is a {type(model).__name__}; it takes a transformers causal LM")
    return model


def prompt_length(model: Any, inputs: dict) -> int | None:
    """T, where peft puts virtual tokens before it (prompt tuning); else None."""
    while model is not None:
        config = getattr(model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            given = inputs.get("input_ids")
            return (inputs["inputs_embeds"] if given is None else given).shape[1]
        model = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
    return None


def head_of(inner: Any) -> nn.Module:
    head = inner.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"{type(inner).__name__} has no output embeddings: give the loss model(...).logits"
        )
    return head


def core_of(module: Any) -> Any:
    """The module inside FSDP1, activation checkpointing, compilation and peft's saved copies."""
    while True:
        for name in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"):
            if isinstance(getattr(module, name, None), nn.Module):
                module = getattr(module, name)
                break
        else:
            if not hasattr(module, "modules_to_save"):
                return module
            # copies that are trained in full, and the module itself
            names = [name for name in adapters_of(module) if name in module.modules_to_save]
            module = module.modules_to_save[names[0]] if names else module.original_module


def adapters_of(core: Any) -> list[str]:
    """The active adapters of a layer of peft's, those that it has."""
    active = core.active_adapters if hasattr(core, "active_adapters") else core.active_adapter
    return [active] if isinstance(active, str) else list(active)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a head is used: `owners`, outermost first, hold the tensors of a linear head, with or
    without LoRA; None for a head that is used by its own forward."""

    owners: tuple[Any, ...] | None

    @property
    def within(self) -> tuple[Any, ...]:
        return () if self.owners is None else self.owners[1:]


def kind_of(head: nn.Module) -> Kind:
    core = core_of(head)
    if is_linear(core):
        return Kind((head,))
    if not is_lora(core):
        return Kind(None)
    base = core.get_base_layer()
    if not is_linear(core_of(base)):
        return Kind(None)
    if core.merged or core.disable_adapters:
        return Kind((head, base))
    names = [name for name in adapters_of(core) if name in core.lora_A]
    if not names:
        return Kind((head, base))
    name = names[0]
    dropout = core.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
    parts = core.lora_A[name], core.lora_B[name]
    plain = all(is_linear(core_of(p)) and getattr(core_of(p), "bias", None) is None for p in parts)
    if len(names) > 1 or drops or not plain or name in getattr(core, "lora_variant", {}):
        return Kind(None)
    return Kind((head, base, *parts))


def is_linear(core: Any) -> bool:
    """Whether a module is `F.linear(hidden, weight, bias)` and nothing else."""
    own_forward = type(core).forward is nn.Linear.forward
    replaced = "forward" in vars(core) and forward_name(core) == "forward"
    cut = wrapped_by_transformers(vars(core).get("forward")) is not None
    weight = getattr(core, "weight", None)
    return own_forward and (cut or not replaced) and is_ordinary(weight)


def is_ordinary(weight: Any) -> bool:
    """No quantised or otherwise packed weight. A DTensor is whole while the model runs."""
    from torch.distributed.tensor import DTensor

    kind = type(weight)
    plain = (
        kind in (Tensor, nn.Parameter) or isinstance(weight, DTensor) or hasattr(weight, "ds_id")
    )
    return plain and weight.is_floating_point() and weight.dtype.itemsize > 1


def is_lora(core: Any) -> bool:
    """peft's LoRA on a linear layer, its forward unchanged."""
    if not hasattr(core, "lora_A"):
        return False
    from peft.tuners.lora import Linear

    return type(core).forward is Linear.forward and not getattr(core, "fan_in_fan_out", False)


def head_tensors(kind: Kind) -> tuple[Tensor, Tensor | None, tuple | None]:
    """(weight (V, D), bias (V,) or None, (A (r, D), B (V, r), scaling) or None)."""
    head, *parts = kind.owners  # type: ignore[misc]
    core = core_of(head)
    base = core_of(parts[0]) if parts else core
    lora = None
    if len(parts) > 1:
        name = next(name for name in core.lora_A if core.lora_A[name] is parts[1])
        a, b = (core_of(part).weight for part in parts[1:])
        lora = a, b, core.scaling[name]
    return base.weight, getattr(base, "bias", None), lora


def source_of(head: nn.Module, kind: Kind, forward: Callable, hidden: Tensor, does: Transform):
    """The logits of the model: those of its head at `hidden`, and what the model does to them."""
    if kind.owners is not None:
        weight, bias, lora = head_tensors(kind)
        if is_dtensor(weight):
            hidden = placed(hidden, forward, weight)
        return does.source(hidden, weight, bias, lora)
    if any(is_dtensor(parameter) for parameter in core_of(head).parameters()):
        raise TypeError(
            "the head is cut by classes (tensor parallelism) and more than a linear layer, which "
            'head_loss does not take; give the loss model(...).logits (LossMixin: head="logits")'
        )
    bias = None if does.bias is None else does.bias / does.scale
    return ModuleLogits(
        hidden, core_of(head), forward, does.softcap, does.scale, bias, does.num_classes
    )


def sharding_engine(model: Any) -> str | None:
    """What splits the model's weights over processes, None if nothing does."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            return "FSDP"
        if isinstance(module, FSDPModule):
            return "FSDP2"
    for parameter in unwrapped(model).parameters():
        if hasattr(parameter, "ds_id"):
            return "ZeRO-3"
        if is_dtensor(parameter):
            return "tensor parallelism"
    return None


# ------------------------------------------------------------------------------- the one call


class Call:
    """Replaces the head's `forward` within a `with` block.

    `inside(hidden) -> (value, last place's logits)` runs in its place, within the modules that own
    the head's tensors, one within the other, so that an engine has all of them gathered. The
    tensors of `value` leave as `outputs["loss"]`.
    """

    def __init__(self, inner: Any, head: nn.Module, inside: Callable, checking: bool):
        self.inner, self.head, self.inside, self.checking = inner, head, inside, checking
        self.kind = kind_of(head)
        if self.kind.owners is None:
            check_one_unit(core_of(head))
        self.check_hooks()
        self.calls = 0
        self.value: Any = None
        self.own: Tensor | None = None  # the head's logits of the last place, by its own forward
        self.ours: Tensor | None = None
        self.carried: tuple[Tensor, ...] = ()
        self.exits = contextlib.ExitStack()

    def __enter__(self) -> Call:
        core = core_of(self.head)
        self.original = getattr(core, forward_name(core))
        forward = self.inner.forward

        def model_forward(*arguments, **keywords):
            outputs = forward(*arguments, **keywords)
            self.check_outputs(outputs)
            outputs["loss"] = self.carried
            return outputs

        head_forward: Callable = self.head_forward
        if "torch._dynamo" in sys.modules:  # nothing is compiled before it is imported
            head_forward = torch.compiler.disable(head_forward)
            model_forward = torch.compiler.disable(model_forward, recursive=False)
        self.exits.enter_context(replaced(core, forward_name(core), head_forward))
        self.exits.enter_context(replaced(self.inner, "forward", model_forward))
        # the engine's hooks on the head have seen the loss before; those of parallelize_module
        # take no loss
        first = takes_dtensors(self.head)
        if first:
            self.check_group()
            self.exits.callback(self.head.register_forward_hook(self.check_whole).remove)
        handle = self.head.register_forward_hook(self.take, prepend=first)
        self.exits.callback(handle.remove)
        return self

    def __exit__(self, *exception) -> None:
        self.exits.close()

    def head_forward(self, hidden: Tensor, *arguments, **keywords) -> Any:
        self.calls += 1
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"the head of {type(self.inner).__name__} receives a {type(hidden).__name__}, not "
                'hidden states; give the loss model(...).logits (LossMixin: head="logits")'
            )
        if self.checking:
            self.own = self.own_logits(hidden)
            if self.kind.owners is None:
                self.check_rows(hidden)
        within = functools.partial(self.inside, self)
        self.value, last = nested(self.kind.within, within, hidden)
        self.ours = last
        tensors = tuple(differentiable(self.value)) if torch.is_grad_enabled() else ()
        if takes_dtensors(self.head):
            last = on_mesh(last, core_of(self.head).weight)
        return (tensors, last) if tensors else last

    def check_hooks(self) -> None:
        for module in (self.head, core_of(self.head)):
            if module._backward_hooks or module._backward_pre_hooks:
                raise TypeError(
                    f"a backward hook on the head of {type(self.inner).__name__} waits for the "
                    "gradient of its logits, which are never made; remove the hook, or give the "
                    'loss model(...).logits (LossMixin: head="logits")'
                )

    def check_group(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        if isinstance(self.head, FSDPModule):
            raise TypeError(
                "the head is cut by parallelize_module and is an FSDP2 group of its own, whose "
                "hooks would not see the loss; call fully_shard on the model alone, or on the "
                "layers and the model"
            )

    def check_whole(self, module, arguments, output) -> None:
        classes = core_of(module).weight.shape[0]
        if not is_dtensor(output) and output.shape[-1] != classes:
            raise TypeError(
                f"the head gives each rank {output.shape[-1]} of the logits of {classes} classes; "
                "head_loss takes ColwiseParallel(output_layouts=Replicate()) of it, or "
                "use_local_output=False"
            )

    @torch.no_grad()
    def own_logits(self, hidden: Tensor, places: int = 1) -> Tensor:
        """The head's logits (B, places, V) of the last places, by its own forward."""
        with Repeatable(hidden.device):
            return whole(self.original(hidden[..., -places:, :]))

    def check_rows(self, hidden: Tensor) -> None:
        """A head that is used by its own forward has to treat each place by itself."""
        with evaluating(core_of(self.head)):
            alone = self.own_logits(hidden)
            among = self.own_logits(hidden, 4)[..., -1:, :]
        error = (among - alone).abs().amax()
        if error > max(8 * torch.finfo(alone.dtype).eps, 2e-7) * alone.abs().amax():
            raise TypeError(
                f"what the head of {type(self.inner).__name__} gives a place depends on the other "
                "places, and head_loss makes the logits of some places at a time; give the loss "
                'model(...).logits (LossMixin: head="logits")'
            )

    @torch.no_grad()
    def last_logits(self, hidden: Tensor) -> Tensor:
        """The same, as the loss makes them."""
        if self.kind.owners is None:
            return self.own_logits(hidden) if self.own is None else self.own
        last = hidden[..., -1:, :].detach()
        weight, bias, _ = head_tensors(self.kind)
        if is_dtensor(weight):
            return gathered_logits(placed(last, self.original, weight), weight, bias)
        source = source_of(self.head, self.kind, self.original, last, Transform())
        index = torch.arange(last.numel() // last.shape[-1], device=last.device)
        with torch.autocast(last.device.type, enabled=False):
            return source.rows(index).reshape(*last.shape[:-1], -1)

    def take(self, module, arguments, output):
        if isinstance(output, tuple):
            if len(output) != 2:
                raise TypeError(
                    f"a forward hook on the head of {type(self.inner).__name__} changes its "
                    'logits; give the loss model(...).logits (LossMixin: head="logits")'
                )
            self.carried, output = output
        return output

    def check_outputs(self, outputs: Any) -> None:
        self.check_called()
        logits = getattr(outputs, "logits", None)
        if not isinstance(logits, Tensor) or not hasattr(outputs, "keys"):
            raise TypeError(
                f"{type(self.inner).__name__} returned a {type(outputs).__name__}; head_loss takes "
                "a model whose outputs have logits (return_dict=True)"
            )
        check_no_loss(self.inner, outputs)
        if torch.is_grad_enabled() and logits.requires_grad:
            raise TypeError(
                f"{type(self.inner).__name__} trains parameters behind its head, which head_loss "
                "would not; give the loss model(...).logits"
            )

    def check_called(self) -> None:
        if self.calls != 1:
            raise TypeError(
                f"{type(self.inner).__name__} called its head {self.calls} times; head_loss takes "
                "a model that calls it once: give the loss model(...).logits"
            )

    def tidy(self, outputs: Any, value: Any) -> None:
        """`outputs.loss` is the loss, first among the outputs as transformers has it."""
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        outputs["loss"] = first if isinstance(first, Tensor) else None
        if hasattr(outputs, "move_to_end"):
            outputs.move_to_end("loss", last=False)


def check_no_loss(model: Any, outputs: Any) -> None:
    """Refuse what a model made a loss of though it was given no labels: it would be left out."""
    if isinstance(read(outputs, "loss"), Tensor):
        raise TypeError(
            f"{type(innermost(model)).__name__} returned a loss of its own without labels, of "
            "another of its inputs, which would be left out; leave out that input, or keep its loss"
        )


def read(outputs: Any, name: str) -> Any:
    """A field of a model's outputs, None where they have none."""
    # releases before 5 keep what is set as an attribute, and was None, from the items
    value = getattr(outputs, name, None)
    return outputs.get(name) if value is None and isinstance(outputs, Mapping) else value


def forward_name(module: Any) -> str:
    """Where the forward is that accelerate's hooks of a placed model (device_map) call."""
    return "_old_forward" if "_hf_hook" in vars(module) else "forward"


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """A method or an attribute of one object replaced."""
    before = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every module below in evaluation mode, and then as it was."""
    training = [part for part in module.modules() if part.training]
    try:
        module.eval()
        yield
    finally:
        for part in training:
            part.training = True


def nested(modules: Sequence[nn.Module], function: Callable, hidden: Tensor) -> Any:
    """`function(hidden)` as the forward of each of the modules, one within the other."""
    if not modules:
        return function(hidden)
    first, *rest = modules
    core = core_of(first)

    def forward(hidden, *arguments, **keywords):
        return nested(rest, function, hidden)

    with replaced(core, forward_name(core), forward):
        return first(hidden)


def differentiable(value: Any) -> Iterator[Tensor]:
    """The tensors with a gradient within tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from differentiable(part)
    elif isinstance(value, dict):
        yield from differentiable(list(value.values()))
    elif dataclasses.is_dataclass(value):
        yield from differentiable([getattr(value, f.name) for f in dataclasses.fields(value)])


def put_back(value: Any, tensors: Iterator[Tensor]) -> Any:
    """`value` with `tensors` in place of what `differentiable` yields of it."""
    if isinstance(value, Tensor):
        return next(tensors) if value.requires_grad else value
    if isinstance(value, (tuple, list)):
        parts = [put_back(part, tensors) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: put_back(part, tensors) for key, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {}
        for field in dataclasses.fields(value):
            before = getattr(value, field.name)
            after = put_back(before, tensors)
            if field.init and after is not before:
                changed[field.name] = after
        return dataclasses.replace(value, **changed) if changed else value
    return value


# --------------------------------------------------------------- what the model does to its logits


@dataclasses.dataclass
class State:
    """What was learnt of a model."""

    head: ref
    rows: int | None  # of its weight
    transform: Transform
    calls: int = 0
    modes: set[bool] = dataclasses.field(default_factory=set)  # training or not, compared in


STATES: WeakKeyDictionary = WeakKeyDictionary()  # of unwrapped models


def learnt_state(model: Any, inner: Any, head: nn.Module, inputs: dict) -> State:
    """Learn, on the model's first call and when it has another head, what it does to logits."""
    state, core = STATES.get(inner), core_of(head)
    rows = rows_of(core)
    resized = state is not None and None not in (rows, state.rows) and rows != state.rows
    if state is None or resized or state.head() is not core:
        state = STATES[inner] = State(ref(core), rows, learn(model, inner, head, inputs))
    return state


def rows_of(core: Any) -> int | None:
    """Of the head's weight, which may be resized in its place; None where an engine hides it."""
    weight = getattr(core, "weight", None)
    shape: Any = getattr(weight, "ds_shape", getattr(weight, "shape", ()))
    return shape[0] if len(shape) == 2 else None


@torch.no_grad()
def learn(model: Any, inner: Any, head: nn.Module, inputs: dict) -> Transform:
    """Run the model with a head that gives probes for logits, and look at what becomes of them."""
    given: list[Tensor] = []

    def inside(call: Call, hidden: Tensor) -> tuple[Any, Tensor]:
        given.extend((probes(call.last_logits(hidden).shape[-1], hidden), hidden))
        return None, given[0].expand(*hidden.shape[:-2], *given[0].shape).clone()

    # the pass would add to a cache
    inputs = {n: copied(v) if isinstance(v, Cache) else v for n, v in inputs.items()}
    devices = {p.device for p in inner.parameters() if p.device.type not in ("cpu", "meta")}
    with (
        torch.random.fork_rng(devices, device_type=next(iter(devices)).type if devices else "cuda"),
        Call(inner, head, inside, checking=False) as call,
    ):
        try:
            outputs = model(**inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, LookupError) as error:
            if not call.calls:
                raise
            raise TypeError(
                f"{type(inner).__name__} fails with logits of a few places ({error}); give the "
                'loss model(...).logits (LossMixin: head="logits")'
            ) from error
    call.check_called()
    return learnt(type(inner).__name__, given[0], whole(outputs.logits), given[1].dtype)


def copied(cache: Any) -> Any:
    """A cache whose tensors may have a gradient, which a plain copy refuses."""
    tensors = [t for layer in getattr(cache, "layers", []) for t in vars(layer).values()]
    graded = (t for t in tensors if isinstance(t, Tensor) and t.requires_grad)
    return copy.deepcopy(cache, {id(t): t.detach() for t in graded})


def is_due(state: State, training: bool) -> bool:
    """Whether this call's logits are compared: the first of each mode, then ever more rarely."""
    calls = state.calls
    often = calls & (calls - 1) == 0 if calls < 1024 else calls % 1024 == 0
    return often or training not in state.modes


def check_logits(name: str, state: State, call: Call, logits: Tensor) -> None:
    """Compare the logits of the last place: ours with the head's, and the model's with those."""
    own, ours = call.own, call.ours
    assert own is not None and ours is not None
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (own, ours, logits))
    wide = torch.float64 if eps == torch.finfo(torch.float64).eps else torch.float32
    tolerance = max(4 * eps, 256 * torch.finfo(wide).eps)
    if state.calls == 1 and bool((own.isnan() | (own == torch.inf)).any()):
        raise ValueError(
            f"the logits of {name} are not finite: its weights or hidden states are not, or the "
            f"products are too large for {own.dtype}"
        )
    check_close(name, "its head's weights", ours, own, tolerance)
    expected = state.transform(own)
    cut = logits[..., expected.shape[-1] :]
    if cut.numel() and bool((cut <= MASKED).all()):  # classes that were learnt not to exist
        logits = logits[..., : expected.shape[-1]]
    check_close(name, "its head, transformed", expected, logits, tolerance)


def check_close(name: str, what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    if ours.shape == theirs.shape:
        both = ours.isfinite() & theirs.isfinite()
        ours, theirs = ours[both].cpu().double(), theirs[both].cpu().double()
        if theirs.numel() == 0:
            return
        error = float((ours - theirs).abs().amax() / theirs.abs().amax().clamp(min=1e-30))
        if error <= tolerance:
            return
        by = f"by {error:.1%} of the largest"
    else:
        by = f"in shape, {tuple(theirs.shape)} and {tuple(ours.shape)}"
    raise ValueError(
        f"the logits of {name} differ from those of {what} {by}: it does more to them than it did "
        'on its first call; give the loss model(...).logits (LossMixin: head="logits")'
    )
