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
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from segloss.integrations.transform import Transform, learnt, probes
from segloss.logits import LinearLogits

__all__ = ["head_logits", "head_loss"]


# -------------------------------------------------------------------------------------- public


def head_loss(model: nn.Module, criterion: Callable, target: Tensor, **inputs) -> tuple[Any, Any]:
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
        target: (B, T) the class each place predicts, -100 for none; nothing is shifted.
        inputs: of the model's forward, `labels` left out.

    Returns what `criterion` does, and the model's outputs: `logits` are those of the last place
    (B, 1, V), without a gradient, and `loss` is the loss.

    What the model does to the logits of its head (a scale, a cap, a bias, padded or masked classes)
    is learnt by a pass without gradients on the model's first call, and compared with what the
    model returns then and on every call whose number is a power of two (over 1,024 on every
    1,024th).

    Errors: TypeError for a model whose head is not found or not called once; ValueError for
    `labels`, and for logits that the head's differ from.
    """
    check_inputs(model, inputs)
    inner = unwrapped(model)
    head = head_of(inner)
    state = learnt_state(model, inner, head, inputs)
    state.calls += 1
    checking = is_due(state.calls)

    def inside(hidden: Tensor) -> tuple[Any, Tensor]:
        source = source_of(head, hidden, state.transform)
        on = target.to(hidden.device) if isinstance(target, Tensor) else target
        return criterion(source, on), last_logits(head, hidden)

    with Call(inner, head, inside, checking) as call:
        outputs = model(**inputs)
    call.check_called()
    value = call.value
    if call.carried:
        value = put_back(value, iter(outputs["loss"]))
    call.tidy(outputs, value)
    if checking:
        check_logits(inner, state, call, outputs.logits)
    return value, outputs


def head_logits(model: nn.Module, **inputs) -> LinearLogits:
    """`LinearLogits` that stand for `model(**inputs).logits` (B, T, V).

    For one process, DDP and ZeRO-1 and 2, where the head's weights stay what they are after the
    model's forward; `head_loss`, which this otherwise behaves as, serves the rest.

    Errors: those of `head_loss`; TypeError under FSDP, ZeRO-3 and tensor parallelism.
    """
    return head_outputs(model, **inputs)[0]


def head_outputs(model: nn.Module, **inputs) -> tuple[LinearLogits, Any]:
    """`head_logits`, and what the model returned, with the last place's logits."""
    engine = sharding_engine(model)
    if engine is not None:
        raise TypeError(
            f"the head's weights are sharded by {engine} and are whole only while the model runs; "
            "call head_loss(model, criterion, target, **inputs) in place of head_logits"
        )
    return head_loss(model, lambda source, target: source, None, **inputs)  # type: ignore[arg-type]


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


def unwrapped(model: Any) -> Any:
    """The transformers model inside DDP, FSDP, DeepSpeed, a compiled module and peft."""
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
            # a copy that is trained in full
            module = module.modules_to_save[active_adapter(module)]


def active_adapter(layer: Any) -> str:
    active = layer.active_adapters if hasattr(layer, "active_adapters") else layer.active_adapter
    names = [active] if isinstance(active, str) else list(active)
    if len(names) != 1:
        raise ValueError(f"the head has the active adapters {names}; LinearLogits takes one")
    return names[0]


def is_adapted(core: Any) -> bool:
    """Whether a LoRA adapter of peft is in use."""
    return hasattr(core, "lora_A") and not (core.merged or core.disable_adapters)


def owners(head: nn.Module) -> list[Any]:
    """The modules that own the head's tensors, outermost first."""
    core = core_of(head)
    if not hasattr(core, "lora_A"):
        return [head]
    base = [head, core.get_base_layer()]
    if not is_adapted(core):
        return base
    name = active_adapter(core)
    return [*base, core.lora_A[name], core.lora_B[name]]


def head_tensors(head: nn.Module) -> tuple[Tensor, Tensor | None, tuple | None]:
    """(weight (V, D), bias (V,) or None, (A (r, D), B (V, r), scaling) or None)."""
    core: Any = core_of(head)
    if not hasattr(core, "lora_A"):
        return core.weight, getattr(core, "bias", None), None
    base = core_of(core.get_base_layer())
    weight, bias = base.weight, getattr(base, "bias", None)
    if not is_adapted(core):
        return weight, bias, None
    name = active_adapter(core)
    dropout = getattr(core.lora_dropout[name], "p", 0.0)
    if dropout:
        raise ValueError(
            f"the head's LoRA adapter has lora_dropout={dropout}; LinearLogits takes 0: leave the "
            "head out of the adapter's target modules or set lora_dropout=0"
        )
    if getattr(core, "use_dora", {}).get(name):
        raise ValueError("the head's adapter is DoRA; LinearLogits takes plain LoRA")
    a, b = core_of(core.lora_A[name]), core_of(core.lora_B[name])
    return weight, bias, (a.weight, b.weight, core.scaling[name])


def source_of(head: nn.Module, hidden: Tensor, transform: Transform) -> LinearLogits:
    """The logits of the model: those of its head at `hidden`, and what the model does to them."""
    weight, bias, lora = head_tensors(head)
    return transform.source(hidden, weight, bias, lora)


def sharding_engine(model: Any) -> str | None:
    """What splits the model's weights over processes, None if nothing does."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            return "FSDP"
        if isinstance(module, FSDPModule):
            return "FSDP2"
    for parameter in unwrapped(model).parameters():
        if hasattr(parameter, "ds_id"):
            return "ZeRO-3"
        if isinstance(parameter, DTensor):
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
        self.calls = 0
        self.value: Any = None
        self.own: Tensor | None = None  # the head's logits of the last place, by its own forward
        self.ours: Tensor | None = None
        self.carried: tuple[Tensor, ...] = ()
        self.exits = contextlib.ExitStack()

    def __enter__(self) -> Call:
        first, *self.within = owners(self.head)
        core = core_of(first)
        self.original = getattr(core, forward_name(core))
        forward = self.inner.forward

        def model_forward(*arguments, **keywords):
            outputs = forward(*arguments, **keywords)
            self.check_outputs(outputs)
            outputs["loss"] = self.carried
            return outputs

        self.exits.enter_context(replaced(core, forward_name(core), self.head_forward))
        self.exits.enter_context(replaced(self.inner, "forward", model_forward))
        # the engine's hooks on the head have seen the loss before
        handle = self.head.register_forward_hook(self.take)
        self.exits.callback(handle.remove)
        return self

    def __exit__(self, *exception) -> None:
        self.exits.close()

    def head_forward(self, hidden: Tensor, *arguments, **keywords) -> Any:
        self.calls += 1
        if self.checking:
            with torch.no_grad():
                self.own = self.original(hidden[..., -1:, :], *arguments, **keywords)
        self.value, last = nested(self.within, self.inside, hidden)
        self.ours = last
        tensors = tuple(differentiable(self.value)) if torch.is_grad_enabled() else ()
        return (tensors, last) if tensors else last

    def take(self, module, arguments, output):
        if isinstance(output, tuple):
            self.carried, output = output
        return output

    def check_outputs(self, outputs: Any) -> None:
        self.check_called()
        if not hasattr(outputs, "logits") or not hasattr(outputs, "keys"):
            raise TypeError(
                f"{type(self.inner).__name__} returned a {type(outputs).__name__}; head_loss takes "
                "a model whose outputs have logits (return_dict=True)"
            )
        if torch.is_grad_enabled() and outputs.logits.requires_grad:
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


def forward_name(module: Any) -> str:
    """Where the forward is that accelerate's hooks of a placed model (device_map) call."""
    return "_old_forward" if "_hf_hook" in vars(module) else "forward"


@contextlib.contextmanager
def replaced(module: nn.Module, name: str, function: Callable) -> Iterator[None]:
    """A method of one object replaced."""
    before = vars(module).get(name)
    setattr(module, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


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
    transform: Transform
    calls: int = 0


STATES: WeakKeyDictionary = WeakKeyDictionary()  # of unwrapped models


def learnt_state(model: Any, inner: Any, head: nn.Module, inputs: dict) -> State:
    """Learn, on the model's first call and when it has another head, what it does to logits."""
    state = STATES.get(inner)
    if state is None or state.head() is not core_of(head):
        state = STATES[inner] = State(ref(core_of(head)), learn(model, inner, head, inputs))
    return state


@torch.no_grad()
def learn(model: Any, inner: Any, head: nn.Module, inputs: dict) -> Transform:
    """Run the model with a head that gives probes for logits, and look at what becomes of them."""
    given: list[Tensor] = []

    def inside(hidden: Tensor) -> tuple[Any, Tensor]:
        num_classes = head_tensors(head)[0].shape[0]
        given.extend((probes(num_classes, hidden), hidden))
        return None, given[0].expand(*hidden.shape[:-2], *given[0].shape).clone()

    if inputs.get("past_key_values") is not None:  # which the pass would add to
        inputs = {**inputs, "past_key_values": copy.deepcopy(inputs["past_key_values"])}
    devices = {p.device for p in inner.parameters() if p.device.type not in ("cpu", "meta")}
    with (
        torch.random.fork_rng(devices, device_type=next(iter(devices)).type if devices else "cuda"),
        Call(inner, head, inside, checking=False) as call,
    ):
        outputs = model(**inputs)
    call.check_called()
    return learnt(type(inner).__name__, given[0], outputs.logits, given[1].dtype)


def is_due(calls: int) -> bool:
    """Whether this call's logits are compared: the first, and then ever more rarely."""
    return calls & (calls - 1) == 0 if calls < 1024 else calls % 1024 == 0


@torch.no_grad()
def last_logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """The head's logits (B, 1, V) of the last place, before the model does anything to them."""
    from segloss.linear import Head

    last = source_of(head, hidden[..., -1:, :].detach(), Transform())
    with torch.autocast(hidden.device.type, enabled=False):
        rows = Head.of(last, None).logits()
    return rows.data.reshape(*last.leading_shape, -1)


def check_logits(inner: Any, state: State, call: Call, logits: Tensor) -> None:
    """Compare the logits of the last place: ours with the head's, and the model's with both."""
    name, own, ours = type(inner).__name__, call.own.double(), call.ours.double()  # type: ignore
    eps = max(torch.finfo(t.dtype).eps for t in (call.own, call.ours, logits))  # type: ignore
    wide = torch.float64 if eps == torch.finfo(torch.float64).eps else torch.float32
    tolerance = max(4 * eps, 256 * torch.finfo(wide).eps)
    try:
        if state.calls == 1 and (own.isnan() | (own == torch.inf)).any():
            raise ValueError(
                f"the logits of {name} are not finite: its weights or hidden states are not, or "
                f"are too large for {call.own.dtype}"  # type: ignore
            )
        check_close(name, "its head's tensors", ours, own, tolerance)
        check_close(name, "its head", state.transform(own), logits.double(), tolerance)
    except ValueError:
        STATES.pop(inner, None)  # the next call learns anew
        raise


def check_close(name: str, what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    if ours.shape == theirs.shape:
        both = ours.isfinite() & theirs.isfinite()
        ours, theirs = ours[both], theirs[both]
        if theirs.numel() == 0:
            return
        error = float((ours - theirs).abs().amax() / theirs.abs().amax().clamp(min=1e-30))
        if error <= tolerance:
            return
        by = f"by {error:.1%} of the largest"
    else:
        by = f"in shape: {tuple(theirs.shape)}, not {tuple(ours.shape)}"
    raise ValueError(
        f"the logits of {name} differ from those of {what} {by}: it does more than was learnt on "
        'its first call; give the loss model(...).logits (LossMixin: head="logits")'
    )
