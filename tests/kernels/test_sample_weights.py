"""The sample kernel against its twin, its twin's tests being in tests/weighting."""

import pytest
import torch
from kernel_helpers import assert_close, on_both

from segloss.kernels.sample_weights import (
    Scheme,
    Tokens,
    sample_means,
    sample_means_and_weights,
    sample_weights,
)

SCHEMES = [
    Scheme("uniform"),
    Scheme("irdro", 0.7),
    Scheme("linupper", 0.7),
    Scheme("quadratic", 0.3),
    Scheme("extremes", 2.0),
    Scheme("rank", fraction=0.25, band=1.0),
    Scheme("rank", fraction=0.3, band=0.5),
    Scheme("rank", fraction=0.9, band=5.0),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)

# B: none, a lone sample, one above a power of two; 33 leave float64 ranks tiles of 16 at a time
NUMS = (0, 1, 9, 33)


def losses_of(b, dtype=torch.float64):
    """Ties, a sample without tokens, an infinite loss."""
    generator = torch.Generator().manual_seed(b)
    losses = torch.randint(0, 2 * b + 2, (b,), generator=generator).to(dtype) / 4
    losses[3::7] = torch.nan
    if b > 20:
        losses[11] = torch.inf
    return losses


def tokens_of(b, dtype=torch.float64, n=157):
    """Samples of different lengths, in no order; some tokens of none; sample 1 is empty."""
    generator = torch.Generator().manual_seed(b)
    log_prob = -3 * torch.rand(n, generator=generator, dtype=torch.float64)
    sample = torch.randint(-1, max(b, 1), (n,), generator=generator)
    sample = torch.minimum(sample, torch.randint(-1, max(b, 1), (n,), generator=generator))
    if b == 0:
        sample.fill_(-1)
    sample[sample == 1] = 0
    return Tokens.of(log_prob.to(dtype), sample, b)


def agree(results):
    ours, theirs = results
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, size=4.0)


@every_scheme
def test_weights(scheme):
    for b in NUMS:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            agree(on_both(sample_weights, losses_of(b, dtype), scheme))
    agree(on_both(sample_weights, torch.full((5,), torch.nan), scheme))
    agree(on_both(sample_weights, torch.full((6,), 1 / 3), scheme))


@pytest.mark.parametrize("scheme", [SCHEMES[1], SCHEMES[6]], ids=str)
def test_weights_of_many_samples(scheme):
    """300 are 512 lanes, and ranks are compared two (float64) or four losses at a time."""
    for dtype in (torch.float64, torch.float32):
        agree(on_both(sample_weights, losses_of(300, dtype), scheme))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_means(dtype, memory):
    alive = []  # what is forbidden must not be given to the next tensors
    for b in NUMS:
        tokens = tokens_of(b, dtype)
        alive.append(tokens)
        for index in range(int(tokens.first[0])):  # tokens of no sample are not read
            memory.forbid(tokens.log_prob[tokens.order[index]])
        ours, theirs = on_both(sample_means, tokens)
        assert_close(ours, theirs)
        assert ours.numel() < 2 or ours[1].isnan()


@every_scheme
def test_means_and_weights_in_one_launch(scheme, memory):
    for b in NUMS[1:]:
        for dtype in (torch.float64, torch.float32):
            tokens = tokens_of(b, dtype)
            before = memory.launches
            agree(on_both(sample_means_and_weights, tokens, scheme))
            assert memory.launches == before + 1


def test_no_token():
    tokens = Tokens.of(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 3)
    for losses, weights, size in on_both(sample_means_and_weights, tokens, SCHEMES[1]):
        assert losses.isnan().all() and not weights.any() and size == 0


def test_losses_with_gaps_in_memory():
    wide = tokens_of(5).log_prob.repeat_interleave(2)
    wide[1::2] = torch.nan
    sample = torch.arange(157) % 5
    agree(on_both(sample_means_and_weights, Tokens.of(wide[::2], sample, 5), SCHEMES[1]))
    agree(on_both(sample_weights, wide[::2], SCHEMES[6]))


def test_a_sample_longer_than_the_tile():
    tokens = Tokens.of(-torch.rand(5000).double(), torch.arange(5000) % 2, 2)
    agree(on_both(sample_means_and_weights, tokens, SCHEMES[1]))
