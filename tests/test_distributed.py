"""Tokens sharded over a process group: each rank has the global loss, its part of the gradient."""

import distributed_worker
import pytest
import ranks
import torch
from helpers import assert_near

CASES = [
    (batch, name)
    for batch in distributed_worker.batches()
    for name in distributed_worker.losses()
    if (batch, name) != ("normalizer", "cross_entropy, sum")
]


@pytest.fixture(scope="module")
def per_rank(tmp_path_factory):
    return ranks.spawn(distributed_worker.results, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("batch, name", CASES)
def test_ranks_together_equal_one_process(per_rank, batch, name):
    logits, target, options = distributed_worker.batches()[batch]
    loss = distributed_worker.losses()[name]
    value, grad = distributed_worker.value_and_grad(loss, logits, target, options)
    assert torch.equal(per_rank[0][batch, name][0], per_rank[1][batch, name][0])
    for rank, results in enumerate(per_rank):
        rank_value, rank_grad = results[batch, name]
        assert_near(rank_value, value, what=f"rank {rank} value")
        assert_near(rank_grad, distributed_worker.shard(grad, rank), what=f"rank {rank} gradient")
    if batch == "no valid token":
        assert value == 0 and (grad == 0).all()
