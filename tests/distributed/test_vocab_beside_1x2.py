"""Classes, teachers, probabilities beside a head on 1 x 2 ranks equal those of one process."""

import pytest
import ranks
import vocab_beside

SHAPE = (1, 2)
every_pair = pytest.mark.parametrize("case, name", vocab_beside.pairs(SHAPE), ids=str)


def results(rank, group):
    return vocab_beside.results(SHAPE)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.spawn(results, tmp_path_factory.mktemp("beside"), SHAPE[0] * SHAPE[1])


@every_pair
def test_values_and_gradients(found, case, name):
    vocab_beside.assert_same([rank[case.name, name] for rank in found], case, name, SHAPE)


@every_pair
def test_collectives(found, case, name):
    vocab_beside.assert_collectives([rank[case.name, name] for rank in found], SHAPE)
