"""`bench/gradex.py`, small: estimates rank subsets as retraining does, in less time."""

import pytest

from bench.gradex import QUICK, lines, run


@pytest.fixture(scope="module")
def result():
    return run(QUICK)


def test_estimates_rank_subsets_as_retraining_does(result):
    assert len(result.comparison.subsets) == 12
    assert result.comparison.spearman >= 0.9


def test_an_estimate_is_a_small_part_of_a_retraining(result):
    ratio = next(line for line in lines(QUICK, result) if line.what.startswith("an estimate"))
    assert ratio.value <= 1 / 30
    assert result.pays_from > 0
