"""Sample losses and weights against NumPy, closed forms, and what must hold of any weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import assert_near, example

import segloss

SCHEMES = ("irdro", "linupper", "quadratic", "extremes", "rank")
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)

# one outlier of 6 among seven losses of 2.1 to 3.6
OUTLIER = torch.tensor([6.0, 2.1, 2.35, 2.6, 2.85, 3.1, 3.35, 3.6], dtype=torch.float64)


# ----------------------------------------------------------------------------------- oracle


def naive_weights(losses, scheme, temperature, fraction, band):
    there = [i for i, loss in enumerate(losses) if not math.isnan(loss)]
    weights = np.zeros(len(losses))
    if not there:
        return weights
    own = np.array([losses[i] for i in there])
    if scheme == "rank":
        weights[there] = naive_band(own, fraction, band)
        return weights
    span = own.max() - own.min()
    h = (2 * own - own.max() - own.min()) / span if span else np.zeros(len(own))
    f = {
        "irdro": own - own.max(),
        "linupper": np.minimum(h + 1, 1),
        "quadratic": 1 - h**2,
        "extremes": np.abs(h),
    }[scheme]
    e = np.exp(f / temperature)
    weights[there] = e / e.sum()
    return weights


def naive_band(own, fraction, band):
    """Sort, cut out the band, and share it among equal losses."""
    order = np.argsort(-own, kind="stable")
    capacity = min(max(1, int(fraction * len(own))), len(own))
    low = min(int(band * capacity), len(own) - capacity)
    in_band = np.zeros(len(own))
    in_band[order[low : low + capacity]] = 1 / capacity
    return np.array([in_band[own == value].mean() for value in own])


def random_losses(seed):
    random = np.random.default_rng(seed)
    losses = random.gamma(2, 1, int(random.integers(1, 40)))
    if seed % 3 == 0:
        losses = losses.round(0)  # ties
    losses[random.random(len(losses)) < random.choice([0, 0.3])] = np.nan
    return losses


@every_scheme
def test_equals_the_formulas_over_random_batches(scheme):
    for seed in range(1000):
        losses, random = random_losses(seed), np.random.default_rng(seed + 1)
        options = {
            "temperature": float(random.choice([0.1, 1.0, 10.0])),
            "fraction": float(random.choice([0.125, 0.25, 0.5, 1.0])),
            "band": float(random.choice([0, 0.5, 1, 9])),
        }
        weighting = segloss.SampleWeighting(scheme, **options)
        weights = weighting(torch.from_numpy(losses))
        truth = naive_weights(losses, scheme, **options)
        assert weights.dtype == torch.float64
        assert np.abs(weights.numpy() - truth).max() <= 1e-13, f"batch {seed}: {losses}, {options}"
        size = 1 / (truth**2).sum() if truth.any() else 0.0
        assert float(weighting.effective_sample_size) == pytest.approx(size, rel=1e-12)


@pytest.mark.parametrize(
    "scheme, weight", [("irdro", 0.75), ("linupper", 0.20), ("quadratic", 0.07)]
)
def test_weight_of_an_outlier(scheme, weight):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert float(segloss.SampleWeighting(scheme)(OUTLIER.to(dtype))[0]) == pytest.approx(
            weight, abs=0.02
        )


def test_the_band_holds_the_second_hardest_quarter_by_default():
    weights = segloss.SampleWeighting("rank")(OUTLIER)
    assert weights.tolist() == [0, 0, 0, 0, 0, 0.5, 0.5, 0]  # 3.35 and 3.1, after 6.0 and 3.6
    hardest = segloss.SampleWeighting("rank", fraction=0.125, band=0)(OUTLIER)
    assert hardest.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_irdro_has_the_gradient_of_the_log_mean_exp(temperature):
    """Of the logits, through the losses of real tokens."""
    logits, target = example(8, 11, 23, ignored=0.3)
    grads = []
    for robust in (False, True):
        leaf = logits.clone().requires_grad_()
        stats = segloss.logit_statistics(leaf, target)
        losses = segloss.sample_losses(stats.log_prob, valid=stats.valid)
        if robust:
            mean = torch.logsumexp(losses / temperature, 0) - math.log(8)
            loss = temperature * mean
        else:
            loss = (segloss.SampleWeighting(temperature=temperature)(losses) * losses).sum()
        grads += torch.autograd.grad(loss, leaf)
    assert_near(grads[0], grads[1], 1e-10)


def test_the_same_gradient_through_token_weights():
    logits, target = example(8, 11, 23, ignored=0.3)
    leaf = logits.clone().requires_grad_()
    stats = segloss.logit_statistics(leaf, target)
    losses, w = segloss.SampleWeighting().from_tokens(stats.log_prob, valid=stats.valid)
    per_token = segloss.token_weights(stats.valid.sum(1), sample_weights=w)
    loss = segloss.cross_entropy(
        leaf, target, token_weight=per_token[:, None].expand_as(target), normalizer=1
    )
    (grad,) = torch.autograd.grad(loss, leaf)
    robust = segloss.logit_statistics(leaf, target)
    own = segloss.sample_losses(robust.log_prob, valid=robust.valid)
    (truth,) = torch.autograd.grad(torch.logsumexp(own, 0), leaf)
    assert_near(grad, truth, 1e-10)
    assert_near(loss, (w * losses).sum())


# ------------------------------------------------------------------------------- invariants


@every_scheme
def test_order_and_samples_without_tokens_change_nothing(scheme):
    weighting = segloss.SampleWeighting(scheme)
    weights, order = weighting(OUTLIER), torch.randperm(8)
    assert_near(weighting(OUTLIER[order]), weights[order])
    empty = torch.tensor([torch.nan], dtype=torch.float64)
    with_empty = weighting(torch.cat([empty, OUTLIER, empty]))
    assert_near(with_empty, torch.cat([torch.zeros(1), weights, torch.zeros(1)]))
    assert_near(weights.sum(), torch.tensor(1.0).double())


@every_scheme
def test_equal_losses_are_uniform(scheme):
    for number in (1, 4, 7):
        for value in (0.0, 2.7):
            weighting = segloss.SampleWeighting(scheme)
            weights = weighting(torch.full((number,), value, dtype=torch.float64))
            assert_near(weights, torch.full((number,), 1 / number, dtype=torch.float64))
            assert float(weighting.effective_sample_size) == pytest.approx(number)


@every_scheme
def test_no_sample_and_no_token(scheme):
    weighting = segloss.SampleWeighting(scheme)
    assert weighting(torch.zeros(0)).shape == (0,)
    assert weighting.effective_sample_size == 0
    assert torch.equal(weighting(torch.full((3,), torch.nan)), torch.zeros(3))
    assert weighting.effective_sample_size == 0


@every_scheme
def test_extreme_losses_give_numbers(scheme):
    losses = torch.tensor([1.0, math.inf, 2.0, math.inf, 1e30, -1e30])
    for temperature in (1e-3, 1.0, 1e6):
        weights = segloss.SampleWeighting(scheme, temperature)(losses)
        assert weights.isfinite().all() and float(weights.sum()) == pytest.approx(1)
    if scheme == "irdro":
        assert weights.tolist() == [0, 0.5, 0, 0.5, 0, 0]


def test_limits_of_the_temperature():
    hot, cold = segloss.SampleWeighting(temperature=1e9), segloss.SampleWeighting(temperature=1e-3)
    assert_near(hot(OUTLIER), torch.full((8,), 1 / 8, dtype=torch.float64), 1e-8)
    assert_near(cold(OUTLIER), torch.eye(8, dtype=torch.float64)[0])


@pytest.mark.parametrize("scheme", ["linupper", "quadratic", "extremes"])
def test_bounded_schemes_bound_the_ratio_of_weights(scheme):
    losses = torch.cat([OUTLIER, torch.tensor([1e6]).double()])
    for temperature in (0.5, 1.0):
        weights = segloss.SampleWeighting(scheme, temperature)(losses)
        assert weights.max() / weights.min() <= math.exp(1 / temperature) * (1 + 1e-12)


def test_nothing_is_read_back_from_the_device(no_synchronisation):
    weighting = segloss.SampleWeighting()
    log_prob, valid = -torch.rand(8, 5), torch.rand(8, 5) < 0.8
    with no_synchronisation:
        weighting(segloss.sample_losses(log_prob, valid=valid))
        weighting.from_tokens(log_prob, valid=valid)
        assert weighting.effective_sample_size.shape == ()


# -------------------------------------------------------------------------------- the object


def test_burn_in_is_uniform_and_resumes():
    weighting = segloss.SampleWeighting(burn_in=3)
    empty = torch.cat([OUTLIER, torch.tensor([torch.nan]).double()])
    first = [weighting(empty) for _ in range(2)]
    resumed = segloss.SampleWeighting(burn_in=3)
    resumed.load_state_dict(weighting.state_dict())
    first.append(resumed(empty))
    for weights in first:
        assert_near(weights, torch.tensor([1 / 8] * 8 + [0.0]).double())
    assert_near(resumed(OUTLIER), segloss.SampleWeighting()(OUTLIER))
    with pytest.raises(ValueError, match="scheme='irdro', but this SampleWeighting has scheme='r"):
        segloss.SampleWeighting("rank").load_state_dict(weighting.state_dict())


def test_weights_are_constants_in_the_losses_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        losses = OUTLIER.to(dtype).requires_grad_()
        weights = segloss.SampleWeighting()(losses)
        assert weights.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert not weights.requires_grad


def test_wrong_arguments_are_named():
    for options, error, text in [
        ({"scheme": "dro"}, ValueError, "scheme is 'dro'; it takes one of irdro"),
        ({"temperature": 0}, ValueError, "temperature is 0"),
        ({"temperature": "1"}, TypeError, "temperature is '1'"),
        ({"burn_in": -1}, ValueError, "burn_in is -1"),
        ({"fraction": 1.5}, ValueError, "fraction is 1.5; it takes a number > 0 and <= 1"),
        ({"band": -1}, ValueError, "band is -1"),
    ]:
        with pytest.raises(error, match=text):
            segloss.SampleWeighting(**options)
    with pytest.raises(ValueError, match=r"sample_loss has shape \(2, 2\); it takes \(B,\)"):
        segloss.SampleWeighting()(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"sample_loss is a torch.int64"):
        segloss.SampleWeighting()(torch.ones(2, dtype=torch.int64))


# ------------------------------------------------------------------------------ sample losses


def packed(n=60, samples=7, dtype=torch.float64):
    """Tokens of samples in any order; sample 3 has none that counts."""
    generator = torch.Generator().manual_seed(n)
    log_prob = -4 * torch.rand(n, generator=generator, dtype=torch.float64)
    ids = torch.randint(samples, (n,), generator=generator)
    valid = (torch.rand(n, generator=generator) < 0.7) & (ids != 3)
    return log_prob.to(dtype), ids, valid


def naive_losses(log_prob, ids, valid, samples):
    return torch.stack([-log_prob[(ids == b) & valid].double().mean() for b in samples])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_losses_are_means_over_each_sample_s_tokens(dtype):
    log_prob, ids, valid = packed(dtype=dtype)
    truth = naive_losses(log_prob, ids, valid, range(7))
    losses = segloss.sample_losses(log_prob, ids, valid=valid, num_samples=7)
    assert losses.dtype == (dtype if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        losses.double(), truth, rtol=tolerance, atol=tolerance, equal_nan=True
    )
    # the same without being told the number, by any ids, in ascending order of them
    by_id = segloss.sample_losses(log_prob, 100 - 3 * ids, valid=valid)
    torch.testing.assert_close(by_id, losses.flip(0), rtol=0, atol=0, equal_nan=True)


def test_losses_of_rows_and_of_packed_tokens_are_the_same():
    log_prob = -torch.rand(4, 9)
    valid = torch.rand(4, 9) < 0.6
    rows = segloss.sample_losses(log_prob, valid=valid)
    ids = torch.arange(4)[:, None].expand(4, 9)
    ids = torch.where(valid, ids, -1)  # of no sample
    assert torch.equal(rows, segloss.sample_losses(log_prob.flatten(), ids.flatten()))
    assert_near(
        rows, naive_losses(log_prob.flatten(), ids.flatten(), valid.flatten(), range(4)), 1e-6
    )


def test_gradient_of_the_losses():
    log_prob, ids, valid = packed()
    keep = torch.arange(7) != 3
    upstream = torch.arange(1, 8).double()
    grads = []
    for naive in (True, False):
        leaf = log_prob.clone().requires_grad_()
        if naive:
            losses = naive_losses(leaf, ids, valid, range(7))
        else:
            losses = segloss.sample_losses(leaf, ids, valid=valid, num_samples=7)
        grads += torch.autograd.grad((upstream * losses)[keep].sum(), leaf)
    assert_near(grads[1], grads[0], 1e-14)
    leaf = log_prob.clone().requires_grad_()
    losses = segloss.sample_losses(leaf, ids, valid=valid, num_samples=7)
    (grad,) = torch.autograd.grad((segloss.SampleWeighting()(losses) * losses).nansum(), leaf)
    assert grad.isfinite().all() and (grad[~valid] == 0).all() and (grad[valid] != 0).all()


def test_one_launch_gives_losses_and_weights():
    log_prob, ids, valid = packed()
    for scheme in SCHEMES:
        weighting = segloss.SampleWeighting(scheme)
        losses, weights = weighting.from_tokens(log_prob, ids, valid=valid, num_samples=7)
        size = weighting.effective_sample_size
        assert not losses.requires_grad and weights[3] == 0
        alone = segloss.sample_losses(log_prob, ids, valid=valid, num_samples=7)
        torch.testing.assert_close(losses, alone, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(weights, weighting(alone))
        assert size == weighting.effective_sample_size


def test_no_token_at_all():
    assert segloss.sample_losses(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    losses = segloss.sample_losses(torch.zeros(2, 0, requires_grad=True))
    assert losses.shape == (2,) and losses.isnan().all()
    losses.nansum().backward()


def test_wrong_tokens_are_named():
    log_prob = torch.zeros(3)
    for arguments, options, error, text in [
        ((log_prob,), {}, ValueError, "without sample_ids it takes"),
        ((log_prob, torch.zeros(3)), {}, TypeError, "sample_ids is a torch.float32"),
        ((log_prob, torch.zeros(2).long()), {}, ValueError, "sample_ids is a torch.int64"),
        ((log_prob.long(),), {}, TypeError, "log_prob is a torch.int64"),
        ((log_prob[None],), {"valid": torch.ones(1, 3)}, TypeError, "valid is a torch.float32"),
        ((log_prob[None],), {"num_samples": 2}, ValueError, "num_samples is 2"),
        (
            (log_prob, torch.tensor([0, 1, 5])),
            {"num_samples": 2},
            ValueError,
            "sample_ids has 5; with num_samples=2",
        ),
    ]:
        with pytest.raises(error, match=text):
            segloss.sample_losses(*arguments, **options)
