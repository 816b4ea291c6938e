"""`head_loss` under DDP: three steps on two processes are those of one."""

import pytest
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")
from engine_cases import CASES, EMPTY, OWN, assert_same, results
from ranks import spawn

CHOSEN = [*CASES, *OWN, *EMPTY]
ENGINES = {
    "DDP": DistributedDataParallel,
    "DDP, unused parameters looked for": lambda model: DistributedDataParallel(
        model, find_unused_parameters=True
    ),
}


PAIRS = [(engine, case) for engine in ENGINES for case in CHOSEN]


def ranks_results(rank, group):
    return results(PAIRS, ENGINES)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return spawn(ranks_results, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("engine, case", PAIRS, ids=str)
def test_gradients_are_those_of_one_process(found, engine, case):
    for rank in found:
        assert_same(rank[engine, str(case)], case)
