"""Weights over a process group: every rank has those of the whole batch, or its part of them."""

from __future__ import annotations

import pytest
import ranks
import torch
import weighting_worker
from helpers import assert_near

import segloss


@pytest.fixture(scope="module")
def per_rank(tmp_path_factory):
    return ranks.spawn(weighting_worker.results, tmp_path_factory.mktemp("ranks"))


def test_ranks_have_the_weights_of_all_tokens(per_rank):
    """Numerators and denominators are summed: ranks of few tokens count little."""
    for mode in ("paper", "published"):
        losses, counts = weighting_worker.validation()
        there = counts > 0
        total = torch.where(there, losses, 0).mul(counts).sum(0) / counts.sum(0)
        alone = weighting_worker.coba(mode)
        for row in total:
            alone.update(row)
        for rank in per_rank:
            assert torch.equal(rank["coba", mode], per_rank[0]["coba", mode])
            assert_near(rank["coba", mode], alone.weights())


def test_ranks_without_counts_are_averaged_alike(per_rank):
    losses, counts = weighting_worker.validation()
    losses = losses.masked_fill(counts == 0, torch.nan)
    alone = weighting_worker.coba("paper")
    for row in losses.nanmean(0):
        alone.update(row)
    assert_near(per_rank[1]["coba", "no counts"], alone.weights())


def test_ranks_share_sample_weights(per_rank):
    for scheme in weighting_worker.SCHEMES:
        alone = segloss.SampleWeighting(scheme)
        weights = alone(weighting_worker.sample_loss())
        shards = [rank["samples", scheme] for rank in per_rank]
        assert [len(shard) for shard in shards] == [3, 5]
        assert_near(torch.cat(shards), weights)
        for rank in per_rank:
            assert rank["effective", scheme] == alone.effective_sample_size


def test_ranks_share_token_weights(per_rank):
    num_tokens, options = weighting_worker.tokens()
    whole = segloss.token_weights(num_tokens, **options)
    assert_near(torch.cat([rank["tokens"] for rank in per_rank]), whole)
    plain = torch.cat([rank["tokens", "mean"] for rank in per_rank])
    assert_near(plain, segloss.token_weights(num_tokens))
