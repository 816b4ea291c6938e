"""What the tests of each mesh share: every case and loss on its ranks, in one spawn."""

import functools
from collections.abc import Callable

import pytest
import ranks
import vocab_cases


def found_on(shape: tuple[int, int], of_rank: Callable[[tuple[int, int]], dict] | None = None):
    """A fixture: `of_rank(shape)` of every rank, by default `vocab_cases.results`."""

    @pytest.fixture(scope="module")
    def found(tmp_path_factory):
        run = functools.partial(results, shape=shape, of_rank=of_rank or vocab_cases.results)
        return ranks.spawn(run, tmp_path_factory.mktemp("vocab"), shape[0] * shape[1])

    return found


def results(rank, group, shape, of_rank):
    return of_rank(shape)


def matrix(shape: tuple[int, int], pairs: list | None = None):
    """Parametrisation over cases and losses, by default those of `vocab_cases`."""
    if pairs is None:
        pairs = [(c, n) for c in vocab_cases.cases(shape[1]) for n in vocab_cases.chosen(c)]
    return pytest.mark.parametrize("case, name", pairs, ids=str)
