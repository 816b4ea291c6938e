"""`head_loss` under HSDP on four processes, and under transformers' own FSDP2 on two."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytest.importorskip("transformers")
from engine_cases import (
    CASES,
    EMPTY,
    EVEN,
    LR,
    V,
    assert_close,
    assert_same,
    decoder,
    gradients,
    results,
    true_loss,
)
from ranks import spawn

# four processes take their time: those that the other engines of FSDP2 do not settle
MODELS = ("trainable", "frozen", "lora", "tied", "soft-capped")
CHOSEN = [case for case in (*CASES, *EMPTY) if case.model in MODELS or case.loss == "sum"]


def hybrid(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in decoder(model).transformer.h:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_transformers(model, **sizes):
    """What a folder of weights says, then the adapters, and what is trained."""
    import peft
    from transformers.distributed import DistributedConfig

    own = {name.removeprefix(BY_PEFT): p for name, p in model.named_parameters()}
    own = {name: (p.detach().clone(), p.requires_grad) for name, p in own.items()}
    adapters = getattr(model, "peft_config", {})
    plain = model.unload() if adapters else model
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        if dist.get_rank() == 0:
            plain.save_pretrained(folder)
        dist.barrier()
        options = {"dtype": torch.float64, "attn_implementation": "eager"}
        sharding = DistributedConfig(**(sizes or {"fsdp_size": 2}))
        loaded = type(plain).from_pretrained(shared[0], distributed_config=sharding, **options)
        dist.barrier()
    for config in adapters.values():
        loaded = peft.inject_adapter_in_model(config, loaded)
    for name, parameter in loaded.named_parameters():
        value, trains = own[name]
        parameter.requires_grad_(trains)
        if "lora_" in name:
            parameter.data = value
    return loaded.train()


BY_PEFT = "base_model.model."


def of_adapters(model) -> dict:
    """An adapter comes beside what is sharded already: it is whole on every rank, and nobody but
    its user averages its gradients."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    return {BY_PEFT + name: grad for name, grad in gradients(model).items()}


# a folder of weights does not say what is checkpointed
LOADED = [case for case in (*CASES, *EVEN, *EMPTY) if case.model != "checkpointed"]


def assert_half_tied(found: list, case) -> None:
    """transformers ties embedding and head after FSDP2 has cut each, and FSDP2 copies a part that
    it has to pad: of classes that do not divide by the ranks, the last rank's embeddings stay as
    they were loaded, while the gradients of both go to the one weight that is trained."""
    model = case.make()
    head, kept = model.lm_head.weight, -(-V // 2)
    embedding = model.transformer.wte.weight = torch.nn.Parameter(head.detach().clone())
    for step, (value, grads) in enumerate(found):
        ids, target = case.data(step)
        valid = target != -100
        loss = true_loss(case.loss, model(input_ids=ids).logits[valid], target[valid])
        model.zero_grad()
        loss.backward()
        head.grad += embedding.grad
        true = gradients(model)
        true["transformer.wte.weight"] = true.pop("lm_head.weight")
        assert abs(value - loss.item()) <= 1e-12 * abs(loss.item())
        assert_close(grads, true, 1e-12)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.grad
            embedding[:kept] = head[:kept]
            embedding[kept:] += LR * embedding.grad[kept:]


def hybrid_results(rank, group):
    return results([("HSDP", case) for case in CHOSEN], {"HSDP": hybrid})


def loaded_results(rank, group):
    found: dict = {}
    for case in LOADED:
        read = of_adapters if "lora" in case.model else gradients
        found |= results([("loaded", case)], {"loaded": by_transformers}, read=read)
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
        check = assert_half_tied if case.model == "tied" else assert_same
        check(rank["loaded", str(case)], case)


def test_head_logits_under_tensor_parallelism_names_head_loss(loaded):
    for rank in loaded:
        text = rank["tensor parallel"]
        assert "sharded by tensor parallelism" in text and "call head_loss(" in text
