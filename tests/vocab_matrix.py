"""What the tests of each mesh share: every case and loss on its ranks, in one spawn."""

import functools

import pytest
import ranks
import vocab_cases


def found_on(shape: tuple[int, int]):
    """A fixture: `vocab_cases.results` of every rank."""

    @pytest.fixture(scope="module")
    def found(tmp_path_factory):
        run = functools.partial(results, shape=shape)
        return ranks.spawn(run, tmp_path_factory.mktemp("vocab"), shape[0] * shape[1])

    return found


def results(rank, group, shape):
    return vocab_cases.results(shape)


def matrix(shape: tuple[int, int]):
    """Parametrisation over cases and losses."""
    pairs = [(c, n) for c in vocab_cases.cases(shape[1]) for n in vocab_cases.chosen(c)]
    return pytest.mark.parametrize("case, name", pairs, ids=str)
