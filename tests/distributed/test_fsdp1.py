"""`head_loss` under FSDP1, which flattens the head's weight, on two processes."""

import functools

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

pytest.importorskip("transformers")
from engine_cases import (
    CASES,
    EMPTY,
    OWN,
    assert_same,
    gradients,
    refusal,
    refusal_of_weight,
    results,
    train,
)
from ranks import spawn

CHOSEN = [*CASES, *OWN, *EMPTY]


def sharded(model, kinds=None):
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    policy = ModuleWrapPolicy({GPT2Block, *(kinds or [])})
    return FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


ENGINES = {
    "layers and root": sharded,
    "every linear layer": functools.partial(sharded, kinds=[torch.nn.Linear]),
}
# a tied weight belongs to one group: that of the embedding, hence the root's
PAIRS = [
    (engine, case)
    for engine in ENGINES
    for case in CHOSEN
    if engine == "layers and root" or case not in [*OWN, *(c for c in CASES if c.model == "tied")]
]


def whole(model):
    # a rank whose part of a unit is frozen sends zeros of torch's own dtype for its gradient
    torch.set_default_dtype(torch.float64)
    try:
        with FSDP.summon_full_params(model, with_grads=True):
            return gradients(model)
    finally:
        torch.set_default_dtype(torch.float32)


def ranks_results(rank, group):
    found: dict = results(PAIRS, ENGINES, read=whole)
    with pytest.raises(TypeError) as error:
        train(OWN[0], ENGINES["every linear layer"])
    weight = refusal_of_weight(sharded(CASES[0].make()))
    return found | {"head_logits": refusal(sharded), "in parts": str(error.value), "weight": weight}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return spawn(ranks_results, tmp_path_factory.mktemp("fsdp1"))


@pytest.mark.parametrize("engine, case", PAIRS, ids=str)
def test_gradients_are_those_of_one_process(found, engine, case):
    for rank in found:
        assert_same(rank[engine, str(case)], case)


def test_head_logits_name_the_call_that_serves(found):
    for rank in found:
        assert "sharded by FSDP" in rank["head_logits"] and "head_loss" in rank["head_logits"]


def test_a_part_of_the_weight_names_the_call_that_serves(found):
    for rank in found:
        assert "weight is a part of a flat parameter of FSDP1" in rank["weight"]
        assert "head_loss(model, loss, target, **inputs)" in rank["weight"]


def test_a_head_in_parts_is_refused(found):
    for rank in found:
        assert "gathers the parts one by one; make the head one unit" in rank["in parts"]
