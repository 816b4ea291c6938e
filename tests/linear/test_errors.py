"""Wrong arguments of the fused head: each named, with what came and what is taken."""

import re

import pytest
import torch
from helpers import LOSSES
from linear_helpers import D, V, problem

import segloss

TENSORS, TARGET = problem(7)
META = torch.device("meta")


def call(**changed):
    given = {
        "hidden": TENSORS["hidden"],
        "weight": TENSORS["weight"],
        "bias": TENSORS["bias"],
        "lora": (TENSORS["a"], TENSORS["b"], 0.5),
    }
    return segloss.LinearLogits(**(given | changed))


BAD = {
    # (what the message says, the argument)
    "hidden: a list": (r"hidden is a list \(1.0\)", {"hidden": [1.0]}),
    "hidden: integers": ("hidden .*int64.*takes float64", {"hidden": torch.zeros(7, D).long()}),
    "hidden: complex": ("hidden .*complex64", {"hidden": torch.zeros(7, D, dtype=torch.complex64)}),
    "hidden: 1-D": (r"hidden .*\(4,\).*\(\.\.\., D\)", {"hidden": torch.zeros(D).double()}),
    "hidden: no features": (
        r"hidden .*\(7, 0\)",
        {"hidden": torch.zeros(7, 0).double(), "weight": torch.zeros(V, 0).double(), "lora": None},
    ),
    "hidden: meta": ("hidden is on meta", {"hidden": TENSORS["hidden"].to(META)}),
    "weight: None": ("weight is None", {"weight": None}),
    "weight: integers": ("weight .*int32", {"weight": TENSORS["weight"].int()}),
    "weight: transposed": (
        rf"weight .*\({D}, {V}\).*\(V, {D}\)", {"weight": TENSORS["weight"].T},
    ),
    "weight: 1-D": (rf"weight .*\(V, {D}\)", {"weight": TENSORS["weight"][0]}),
    "weight: 3-D": (rf"weight .*\(V, {D}\)", {"weight": TENSORS["weight"][None]}),
    "weight: no classes": (r"weight .*\(0, 4\)", {"weight": TENSORS["weight"][:0]}),
    "weight: another dtype": (
        "weight is torch.float32, hidden torch.float64", {"weight": TENSORS["weight"].float()},
    ),
    "weight: meta": ("weight is on meta", {"weight": TENSORS["weight"].to(META)}),
    "bias: a number": ("bias is 0.5", {"bias": 0.5}),
    "bias: shape": (rf"bias .*\({V - 1},\).*\({V},\)", {"bias": TENSORS["bias"][1:]}),
    "bias: 2-D": (rf"bias .*\({V},\)", {"bias": TENSORS["bias"][None]}),
    "bias: another dtype": ("bias is torch.bfloat16", {"bias": TENSORS["bias"].bfloat16()}),
    "bias: meta": ("bias is on meta", {"bias": TENSORS["bias"].to(META)}),
    "lora: a tensor": ("lora is a torch", {"lora": TENSORS["a"]}),
    "lora: a list": (
        r"lora is a list .*\(A, B, scaling\)",
        {"lora": [TENSORS["a"], TENSORS["b"], 1.0]},
    ),
    "lora: two": (r"lora is a tuple .*\(A, B, scaling\)", {"lora": (TENSORS["a"], TENSORS["b"])}),
    "lora: swapped": ("lora's A .*takes shape", {"lora": (TENSORS["b"], TENSORS["a"], 1.0)}),
    "lora: A": (rf"lora's A .*\(r, {D}\)", {"lora": (TENSORS["a"][:, 1:], TENSORS["b"], 1.0)}),
    "lora: A, 1-D": (rf"lora's A .*\(r, {D}\)", {"lora": (TENSORS["a"][0], TENSORS["b"], 1.0)}),
    "lora: B's rank": (
        rf"lora's B .*\({V}, 1\).*\({V}, 2\)",
        {"lora": (TENSORS["a"], TENSORS["b"][:, 1:], 1.0)},
    ),
    "lora: B's classes": (
        rf"lora's B .*\({V}, 2\)", {"lora": (TENSORS["a"], TENSORS["b"][1:], 1.0)},
    ),
    "lora: A is None": ("lora's A is None", {"lora": (None, TENSORS["b"], 1.0)}),
    "lora: dtype": (
        "lora's B is torch.float16", {"lora": (TENSORS["a"], TENSORS["b"].half(), 1.0)},
    ),
    "lora: meta": (
        "lora's A is on meta", {"lora": (TENSORS["a"].to(META), TENSORS["b"], 1.0)},
    ),
    "lora: scaling": ("lora's scaling is 'large'", {"lora": (TENSORS["a"], TENSORS["b"], "large")}),
    "softcap: 0": ("softcap is 0.0.*positive", {"softcap": 0.0}),
    "softcap: negative": ("softcap is -3.0", {"softcap": -3.0}),
    "softcap: infinite": ("softcap is inf", {"softcap": float("inf")}),
    "softcap: NaN": ("softcap is nan", {"softcap": float("nan")}),
    "softcap: text": ("softcap is 'big'", {"softcap": "big"}),
    "scale: 0": ("scale is 0", {"scale": 0}),
    "scale: NaN": ("scale is nan", {"scale": float("nan")}),
    "scale: None": ("scale is None", {"scale": None}),
    "compact: a number": ("compact is 1.*True or False", {"compact": 1}),
    "compact: None": ("compact is None", {"compact": None}),
    "chunk_bytes: 0": ("chunk_bytes is 0.*positive", {"chunk_bytes": 0}),
    "chunk_bytes: negative": ("chunk_bytes is -1", {"chunk_bytes": -1}),
    "chunk_bytes: float": ("chunk_bytes is 1000000.0", {"chunk_bytes": 1e6}),
    "chunk_bytes: bool": ("chunk_bytes is True", {"chunk_bytes": True}),
    "memory_budget: negative": ("memory_budget is -5", {"memory_budget": -5}),
    "memory_budget: text": ("memory_budget is .all.", {"memory_budget": "all"}),
    "memory_budget: float": ("memory_budget is 0.5", {"memory_budget": 0.5}),
    "grad_filter: negative": (r"grad_filter is -0.1.*\[0, 1\)", {"grad_filter": -0.1}),
    "grad_filter: 1": ("grad_filter is 1", {"grad_filter": 1}),
    "grad_filter: NaN": ("grad_filter is nan", {"grad_filter": float("nan")}),
    "grad_filter: text": ("grad_filter is 'some'", {"grad_filter": "some"}),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_of_the_head_are_named(bad):
    message, changed = BAD[bad]
    with pytest.raises((TypeError, ValueError), match=message):
        call(**changed)


WRONG_TYPE = ["hidden: a list", "weight: None", "bias: a number", "lora: two", "chunk_bytes: float",
              "compact: None", "memory_budget: text", "bias: another dtype"]  # fmt: skip
WRONG_VALUE = ["weight: transposed", "bias: shape", "lora: B's rank", "chunk_bytes: 0",
               "memory_budget: negative", "grad_filter: 1", "softcap: 0",
               "hidden: meta"]  # fmt: skip


@pytest.mark.parametrize("bad", [*WRONG_TYPE, *WRONG_VALUE])
def test_the_kind_of_error(bad):
    with pytest.raises(TypeError if bad in WRONG_TYPE else ValueError):
        call(**BAD[bad][1])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "argument, message, given",
    [
        ("target", "target has shape", {"target": TARGET[1:]}),
        ("target", "target is .*float64", {"target": TARGET.double()}),
        ("target", "target is on meta", {"target": TARGET.to(META)}),
        ("token_weight", "token_weight has shape", {"token_weight": torch.ones(6)}),
        ("token_weight", "token_weight has a value of -1", {"token_weight": -torch.ones(7)}),
        ("weight", rf"weight has shape \({V + 1},\)", {"weight": torch.ones(V + 1)}),
        ("reduction", "reduction is 'avg'", {"reduction": "avg"}),
        ("normalizer", "normalizer", {"normalizer": 4, "reduction": "sum"}),
        ("linear_bias", "bias .*takes shape", {"linear_bias": torch.ones(V + 1).double()}),
        ("chunk_bytes", "chunk_bytes is 0", {"chunk_bytes": 0}),
        ("linear_weight", "weight .*takes shape", {"linear_weight": TENSORS["weight"].T}),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_linear_functions_are_named(name, argument, message, given):
    arguments = {"input": TENSORS["hidden"], "linear_weight": TENSORS["weight"], "target": TARGET}
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(segloss, f"linear_{name}")(**(arguments | given))


def test_meta_heads_are_refused_even_where_they_agree():
    with pytest.raises(ValueError, match=r"hidden is on meta.*real"):
        segloss.LinearLogits(TENSORS["hidden"].to(META), TENSORS["weight"].to(META))


def test_one_dtype_outside_autocast_any_inside():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = segloss.LinearLogits(TENSORS["hidden"].float(), TENSORS["weight"].bfloat16())
    assert mixed.product_dtype == torch.bfloat16
    with pytest.raises(
        TypeError, match=re.escape("weight is torch.bfloat16, hidden torch.float32")
    ):
        segloss.LinearLogits(TENSORS["hidden"].float(), TENSORS["weight"].bfloat16())


def test_what_the_head_says_of_itself():
    logits = call()
    assert logits.leading_shape == (7,) and logits.num_classes == V
    assert logits.device.type == "cpu" and logits.dtype == torch.float64
    half = segloss.LinearLogits(TENSORS["hidden"].half(), TENSORS["weight"].half())
    assert half.dtype == torch.float32 and half.product_dtype == torch.float16
    assert logits.softcap is None and logits.scale == 1.0 and logits.compact is True
    assert logits.chunk_bytes is None and logits.memory_budget is None and logits.grad_filter == 0.0
