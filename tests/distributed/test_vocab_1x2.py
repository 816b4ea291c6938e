"""A head cut by vocabulary on 1 x 2 ranks (tokens x vocabulary) equals the head in one process."""

from vocab_cases import assert_as_table, assert_same
from vocab_matrix import found_on, matrix

SHAPE = (1, 2)
found = found_on(SHAPE)


@matrix(SHAPE)
def test_values_and_gradients(found, case, name):
    assert_same([rank[case.name, name] for rank in found], case, name, SHAPE)


@matrix(SHAPE)
def test_collectives(found, case, name):
    assert_as_table([rank[case.name, name] for rank in found], case, name, SHAPE)
