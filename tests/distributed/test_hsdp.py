"""`head_loss` under HSDP on four processes, and under transformers' own FSDP2 on two."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import segloss

pytest.importorskip("transformers")
from engine_cases import Case, V, assert_same, results
from ranks import spawn

CHOSEN = [
    *(Case("trainable", loss) for loss in ("ce", "dice", "lovasz", "sum")),
    *(Case(model, "sum") for model in ("frozen", "lora", "head alone", "soft-capped")),
    Case("trainable", "sum", True),
]


def hybrid(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.transformer.h:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_transformers(model, **sizes):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
        dist.barrier()
        options = {"dtype": torch.float64, "attn_implementation": "eager"}
        sharding = DistributedConfig(**(sizes or {"fsdp_size": 2}))
        loaded = AutoModelForCausalLM.from_pretrained(
            shared[0], distributed_config=sharding, **options
        )
        dist.barrier()
    return loaded.train()


LOADED = [case for case in CHOSEN if case.model == "trainable"]


def hybrid_results(rank, group):
    return results([("HSDP", case) for case in CHOSEN], {"HSDP": hybrid})


def loaded_results(rank, group):
    found: dict = results([("loaded", case) for case in LOADED], {"loaded": by_transformers})
    return found | {"tensor parallel": [refusal(call) for call in (head_loss_of, head_logits_of)]}


def tensor_parallel():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    return by_transformers(LlamaForCausalLM(config).double(), tp_size=2)


def head_loss_of():
    from segloss.integrations.transformers import head_loss

    ids, target = CHOSEN[0].data(0)
    head_loss(tensor_parallel(), segloss.CrossEntropyLoss(), target, input_ids=ids)


def head_logits_of():
    from segloss.integrations.transformers import head_logits

    head_logits(tensor_parallel(), input_ids=CHOSEN[0].data(0)[0])


def refusal(call) -> str:
    try:
        call()
    except TypeError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    return spawn(hybrid_results, tmp_path_factory.mktemp("hsdp"), ranks=4)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return spawn(loaded_results, tmp_path_factory.mktemp("loaded"))


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_hsdp(hybrids, case):
    for rank in hybrids:
        assert_same(rank["HSDP", str(case)], case)


@pytest.mark.parametrize("case", LOADED, ids=str)
def test_fsdp_size_of_transformers(loaded, case):
    for rank in loaded:
        assert_same(rank["loaded", str(case)], case)


def test_tensor_parallelism_is_refused(loaded):
    for rank in loaded:
        for text in rank["tensor parallel"]:
            assert "as under tensor parallelism, which head_loss does not take" in text
