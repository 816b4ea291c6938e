"""`head_loss` under DeepSpeed's ZeRO-1, 2 and 3, on two processes: `make test-deepspeed`."""

import dataclasses
import os

import pytest
import torch

pytest.importorskip("transformers")
from engine_cases import CASES, EMPTY, LR, STEPS, assert_same, loss_of
from ranks import spawn

pytestmark = pytest.mark.deepspeed

# an engine takes a second to start: every loss on one model, and every model with their sum
CHOSEN = [
    dataclasses.replace(case, dtype=torch.float32)
    for case in (*CASES, *EMPTY)
    if case.model == "trainable" or case.loss == "sum"
]
PAIRS = [(1, CHOSEN[0]), *((stage, case) for stage in (2, 3) for case in CHOSEN)]


def engine_of(model, stage: int):
    import deepspeed

    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,  # shards the smallest weights too
        "overlap_comm": False,
        "reduce_bucket_size": 100_000,
        "contiguous_gradients": False,
    }
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1.0 unless one says so
        "zero_optimization": zero,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(case, stage: int, rank: int, group) -> list:
    from deepspeed.utils import safe_get_full_grad

    from segloss.integrations.transformers import head_loss

    model = case.make()
    engine = engine_of(model, stage)
    criterion, steps = loss_of(case.loss, group), []
    for step in range(STEPS):
        ids, target = case.data(step, rank, group.size())
        loss, outputs = head_loss(engine, criterion, target, input_ids=ids)
        assert outputs.logits.shape[1] == 1
        engine.backward(loss * group.size())
        grads = {
            name: safe_get_full_grad(p).clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        steps.append((loss.item(), grads))
        engine.step()
    return steps


def ranks_results(rank, group):
    import deepspeed

    from segloss.integrations.transformers import head_logits

    deepspeed.init_distributed("gloo")
    found: dict = {(stage, str(case)): train(case, stage, rank, group) for stage, case in PAIRS}
    engine = engine_of(CHOSEN[0].make(), 3)
    with pytest.raises(TypeError) as error:
        head_logits(engine, input_ids=CHOSEN[0].data(0)[0])
    return found | {"head_logits": str(error.value)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    return spawn(ranks_results, tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("stage, case", PAIRS, ids=str)
def test_gradients_are_those_of_one_process(found, stage, case):
    for rank in found:
        assert_same(rank[stage, str(case)], case, 1e-5)


def test_head_logits_name_the_call_that_serves(found):
    for rank in found:
        assert "sharded by ZeRO-3" in rank["head_logits"] and "head_loss" in rank["head_logits"]
