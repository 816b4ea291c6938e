"""`head_loss` under FSDP1, which flattens the head's weight, on two processes."""

import functools

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

pytest.importorskip("transformers")
from engine_cases import CASES, EMPTY, assert_same, gradients, results
from ranks import spawn

CHOSEN = [*CASES, *EMPTY]


def sharded(model, kinds=None):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    policy = ModuleWrapPolicy({LlamaDecoderLayer, *(kinds or [])})
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
    if not (case.model == "tied" and engine.startswith("every"))
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
    return results(PAIRS, ENGINES, read=whole)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return spawn(ranks_results, tmp_path_factory.mktemp("fsdp1"))


@pytest.mark.parametrize("engine, case", PAIRS, ids=str)
def test_gradients_are_those_of_one_process(found, engine, case):
    for rank in found:
        assert_same(rank[engine, str(case)], case)
