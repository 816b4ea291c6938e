"""Which processes hold other tokens, where tensor or context parallelism shares them."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
from ranks import spawn

# (tensor, context, sequence parallel sizes): of each of four processes the others with its place
# of tensor parallelism, how many read the same rows before they are split, and its place in data
LAYOUTS = {
    (1, 1, 1): ([[0, 1, 2, 3]] * 4, 1, [0, 1, 2, 3]),
    (2, 1, 1): ([[0, 2], [1, 3], [0, 2], [1, 3]], 1, [0, 0, 1, 1]),
    (1, 2, 1): ([[0, 1, 2, 3]] * 4, 2, [0, 0, 1, 1]),
    (1, 1, 4): ([[0, 1, 2, 3]] * 4, 1, [0, 0, 0, 0]),
    (2, 2, 1): ([[0, 2], [1, 3], [0, 2], [1, 3]], 2, [0, 0, 0, 0]),
    (4, 1, 1): ([None] * 4, 1, [0, 0, 0, 0]),
}


def trainer(tensor, context, sequence, average=True):
    return SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=4),
        args=SimpleNamespace(device=torch.device("cpu"), average_tokens_across_devices=average),
        get_tp_size=lambda: tensor,
        get_cp_size=lambda: context,
        get_sp_size=lambda: sequence,
    )


def results(rank, group):
    from segloss.integrations.trainer import Spread

    target = torch.zeros(2, 3, dtype=torch.int64)
    found = {}
    for layout in LAYOUTS:
        spread = Spread.of(trainer(*layout))
        ranks = None if spread.group is None else dist.get_process_group_ranks(spread.group)
        ids = spread.sample_ids(None, target), spread.sample_ids(target + 40, target)
        found[layout] = ranks, spread.size, spread.copies, spread.rank, ids
    found["apart"] = Spread.of(trainer(1, 1, 1, average=False)).group
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return spawn(results, tmp_path_factory.mktemp("spread"), ranks=4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(layout, found):
    groups, copies, places = LAYOUTS[layout]
    for rank in range(4):
        ranks, size, found_copies, place, ids = found[rank][layout]
        assert ranks == groups[rank]
        assert size == (1 if ranks is None else len(ranks))
        assert (found_copies, place) == (copies, places[rank])
        if ranks is None:
            assert ids[0] is None
            continue
        assert (ids[0] - (place << 32)).tolist() == [[0, 0, 0], [1, 1, 1]]
        assert (ids[1] - (place << 32)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_processes_that_each_take_their_own_mean(found):
    assert all(rank["apart"] is None for rank in found)
