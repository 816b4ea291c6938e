"""`head_loss` under HSDP on four processes, and under transformers' own FSDP2 on two."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytest.importorskip("transformers")
from engine_cases import Case, V, assert_same, results
from ranks import spawn

CHOSEN = [
    *(Case("trainable", loss) for loss in ("ce", "dice", "lovasz", "sum")),
    *(Case(model, "sum") for model in ("frozen", "lora", "head alone", "tied", "soft-capped")),
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
    trains = model.lm_head.weight.requires_grad
    loaded.lm_head.requires_grad_(trains)
    return loaded.train()


# what a folder of weights and a switch can say; a tied head is untied by transformers
LOADED = [case for case in CHOSEN if case.model in ("trainable", "frozen")]


def hybrid_results(rank, group):
    return results([("HSDP", case) for case in CHOSEN], {"HSDP": hybrid})


def loaded_results(rank, group):
    found: dict = results([("loaded", case) for case in LOADED], {"loaded": by_transformers})
    return found | {"tensor parallel": refusal(head_logits_of)}


def tensor_parallel():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    return by_transformers(LlamaForCausalLM(config).double(), tp_size=2)


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


def test_head_logits_under_tensor_parallelism_names_head_loss(loaded):
    for rank in loaded:
        text = rank["tensor parallel"]
        assert "sharded by tensor parallelism" in text and "call head_loss(" in text
