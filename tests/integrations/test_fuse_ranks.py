"""A fused model within engines, on two processes: the gradients of one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")
from engine_cases import (
    LR,
    STEPS,
    Case,
    assert_same,
    decoder,
    gradients,
    loss_of,
)
from ranks import spawn

CASES = [Case("trainable", "sum"), Case("lora on the head", "dice"), Case("tied", "lovasz", True)]


def fsdp2(model):
    for layer in decoder(model).transformer.h:
        fully_shard(layer)
    return fully_shard(model)


def fsdp1(model):
    return FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))


def read_fsdp1(model):
    torch.set_default_dtype(torch.float64)  # of the zeros of frozen parts
    try:
        with FSDP.summon_full_params(model, with_grads=True):
            return gradients(model)
    finally:
        torch.set_default_dtype(torch.float32)


ENGINES = {
    "DDP": (DistributedDataParallel, gradients),
    "FSDP1": (fsdp1, read_fsdp1),
    "FSDP2": (fsdp2, gradients),
}
PAIRS = [(engine, case) for engine in ENGINES for case in CASES]


def train(engine: str, case: Case) -> list:
    from segloss.integrations.transformers import fuse_loss

    wrap, read = ENGINES[engine]
    rank, ranks, steps = dist.get_rank(), dist.get_world_size(), []
    model = case.make()
    fuse_loss(model, loss_of(case.loss, dist.group.WORLD))
    model = wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    for step in range(STEPS):
        ids, target = case.data(step, rank, ranks)
        outputs = model(input_ids=ids, shift_labels=target)
        optimizer.zero_grad()
        (outputs.loss * ranks).backward()
        steps.append((outputs.loss.item(), read(model)))
        optimizer.step()
    return steps


def results(rank, group):
    return {(engine, str(case)): train(engine, case) for engine, case in PAIRS}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return spawn(results, tmp_path_factory.mktemp("fused"))


@pytest.mark.parametrize(("engine", "case"), PAIRS, ids=str)
def test_gradients_are_those_of_one_process(found, engine, case):
    for rank in found:
        assert_same(rank[engine, str(case)], case)
