"""`head_loss` under FSDP2, with the head in every kind of group: on two processes, and HSDP."""

import pytest
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytest.importorskip("transformers")
from engine_cases import CASES, EMPTY, OWN, Case, assert_same, decoder, refusal, results, train
from ranks import spawn

CHOSEN = [*CASES, *OWN, *EMPTY]


def sharded(*, layers=True, head=None, **root):
    """`fully_shard` of the layers, of the head alone or with the last norm, and of the rest."""

    def wrap(model):
        mesh = init_device_mesh("cpu", (2,))
        inner = decoder(model)
        if layers:
            for layer in inner.transformer.h:
                fully_shard(layer, mesh=mesh)
        if head == "alone":
            fully_shard(inner.lm_head, mesh=mesh)
        elif head == "tail":
            fully_shard([inner.transformer.ln_f, inner.lm_head], mesh=mesh)
        return fully_shard(model, mesh=mesh, **root)

    return wrap


ENGINES = {
    "layers and root": sharded(),
    "root alone": sharded(layers=False),
    "root that reshards": sharded(reshard_after_forward=True),
    "head alone": sharded(head="alone"),
    "head and norm": sharded(head="tail"),
}
# a tied weight belongs to one group: that of the embedding, hence the root's
PAIRS = [
    (engine, case)
    for engine in ENGINES
    for case in CHOSEN
    if not (case.model == "tied" and engine.startswith("head"))
]


def in_parts(model):
    fully_shard(model.lm_head[1], mesh=init_device_mesh("cpu", (2,)))
    return sharded()(model)


def ranks_results(rank, group):
    with pytest.raises(TypeError) as error:
        train(Case("own head", "ce"), in_parts)
    found: dict = results(PAIRS, ENGINES)
    return found | {"head_logits": refusal(sharded()), "in parts": str(error.value)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return spawn(ranks_results, tmp_path_factory.mktemp("fsdp2"))


@pytest.mark.parametrize("engine, case", PAIRS, ids=str)
def test_gradients_are_those_of_one_process(found, engine, case):
    for rank in found:
        assert_same(rank[engine, str(case)], case)


def test_head_logits_name_the_call_that_serves(found):
    for rank in found:
        assert "sharded by FSDP" in rank["head_logits"] and "head_loss" in rank["head_logits"]


def test_a_head_in_parts_is_refused(found):
    for rank in found:
        assert "gathers the parts one by one; make the head one unit" in rank["in parts"]
