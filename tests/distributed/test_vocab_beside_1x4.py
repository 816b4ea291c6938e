"""Classes, teachers, probabilities beside a head on 1 x 4 ranks equal those of one process."""

from vocab_beside import assert_collectives, assert_same, pairs, results
from vocab_matrix import found_on, matrix

SHAPE = (1, 4)
found = found_on(SHAPE, results)


@matrix(SHAPE, pairs(SHAPE))
def test_values_and_gradients(found, case, name):
    assert_same([rank[case.name, name] for rank in found], case, name, SHAPE)


@matrix(SHAPE, pairs(SHAPE))
def test_collectives(found, case, name):
    assert_collectives([rank[case.name, name] for rank in found], SHAPE)
