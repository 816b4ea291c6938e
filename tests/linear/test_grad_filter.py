"""`grad_filter`: small columns of dlogits become one rank-1 term per 256 rows."""

import pytest
import torch
from helpers import random_weights, relative_error
from linear_helpers import (
    CASES,
    TOKEN_CASES,
    TOKENS,
    assert_equal_to_truth,
    assert_same_bits,
    both,
    problem,
    source,
    value_and_grads,
)

import segloss

ROWS = 256  # of a block
EPSILON = 2.0**-12
NAMES = ("hidden", "weight")


@pytest.fixture(scope="module")
def peaked():
    """Peaked predictions of a head whose rows share a large common direction, as real ones do."""
    draw = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)  # noqa: E731
    n, v, d = 600, 3000, 32
    frequency = -1.5 * torch.arange(1, v + 1).double().log()  # Zipf's law, as a feature
    common = random(d)
    common = common / common.norm()
    weight = random(v, d) / d**0.5 + common
    weight = torch.cat([weight, frequency[:, None]], 1)
    target = torch.multinomial(frequency.exp(), n, replacement=True, generator=draw)
    lean = 4 + 6 * torch.rand((n, 1), generator=draw, dtype=torch.float64)
    hidden = lean * (weight[target, :d] - common) + 0.5 * random(n, d)
    hidden = torch.cat([hidden, torch.ones(n, 1).double()], 1)
    target[::5] = target[::5].flip(0)  # wrong about one in five
    return {"hidden": hidden, "weight": weight}, target


def dlogits_of(tensors, target, weight=None):
    """d(sum of weighted losses) / d logits, (N, V): what the threshold is compared with."""
    p = (tensors["hidden"] @ tensors["weight"].T).softmax(-1)
    grad = p.scatter_add(1, target[:, None], -torch.ones(len(target), 1).double())
    return grad if weight is None else grad * weight[:, None]


def small_columns(dlogits, epsilon):
    """(N, V) bool: entries of the columns that are small in their whole block of rows."""
    return torch.cat(
        [(block.abs().amax(0) < epsilon).expand_as(block) for block in dlogits.split(ROWS)]
    )


def merged_by_hand(tensors, dlogits, small, rank_one=True):
    """dhidden and dweight of the sum; without the rank-1 term what is small is dropped."""
    hidden, weight = tensors["hidden"], tensors["weight"]
    large = dlogits.masked_fill(small, 0)
    hidden_grad, weight_grad = large @ weight, large.T @ hidden
    if rank_one:
        for first in range(0, len(dlogits), ROWS):
            here = slice(first, first + ROWS)
            rest = dlogits[here] * small[here]
            r = rest.sum(1)
            q = r.sign() @ rest / r.abs().sum()
            hidden_grad[here] += torch.outer(r, q @ weight)
            weight_grad += torch.outer(q, r @ hidden[here])
    return {"hidden": hidden_grad, "weight": weight_grad}


def filtered(tensors, target, epsilon=EPSILON, upstream=torch.ones_like, **options):
    """(value, gradients, the dropped mass), reduction "sum" unless asked otherwise."""
    made = {}

    def of(t):
        made["source"] = source(t, grad_filter=epsilon)
        return made["source"]

    options = {"reduction": "sum"} | options
    value, grads = value_and_grads(
        segloss.cross_entropy, of, tensors, target, NAMES, upstream, **options
    )
    return value, grads, made["source"].report


def test_the_merged_gradients_and_the_reported_mass_by_hand(peaked):
    tensors, target = peaked
    dlogits = dlogits_of(tensors, target)
    small = small_columns(dlogits, EPSILON)
    assert 0.5 < small.double().mean() < 0.9  # enough to merge, and enough to keep
    value, grads, report = filtered(tensors, target)
    expected = merged_by_hand(tensors, dlogits, small)
    exact = segloss.cross_entropy(source(tensors), target, reduction="sum")
    assert relative_error(value, exact) < 1e-14
    for name in NAMES:
        assert relative_error(grads[name], expected[name]) < 1e-10
    mass = dlogits[small].abs().sum() / dlogits.abs().sum()
    assert report["dropped_mass"] == pytest.approx(mass.item(), rel=1e-8)
    assert 0.001 < mass < 0.5


def test_five_times_closer_than_dropping(peaked):
    tensors, target = peaked
    dlogits = dlogits_of(tensors, target)
    small = small_columns(dlogits, EPSILON)
    exact = merged_by_hand(tensors, dlogits, torch.zeros_like(small), rank_one=False)
    dropped = merged_by_hand(tensors, dlogits, small, rank_one=False)
    _, grads, _ = filtered(tensors, target)
    errors = {n: relative_error(grads[n], exact[n]) for n in NAMES}
    of_dropping = {n: relative_error(dropped[n], exact[n]) for n in NAMES}
    assert errors["hidden"] <= 0.002 and errors["weight"] <= 0.001, errors
    assert 5 * errors["hidden"] <= of_dropping["hidden"], (errors, of_dropping)
    assert errors["weight"] <= of_dropping["weight"]


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_both_signs_do_not_cancel(peaked, seed):
    # advantages of both signs, as reinforcement learning has them; with odd seeds the dropped mass
    # of every block sums to about 0
    tensors, target = peaked
    draw = torch.Generator().manual_seed(seed)
    upstream = torch.randn(len(target), generator=draw, dtype=torch.float64)
    dlogits = dlogits_of(tensors, target)
    if seed % 2:
        mass = (dlogits * small_columns(dlogits, EPSILON)).sum(1) * upstream.abs()
        for first in range(0, len(target), ROWS):
            total = 0.0
            for i in range(first, min(first + ROWS, len(target))):
                upstream[i] = upstream[i].abs() * (-1 if total > 0 else 1)
                total += mass[i].item() * (-1 if total > 0 else 1)
    _, grads, _ = filtered(tensors, target, upstream=lambda v: upstream, reduction="none")
    dlogits = dlogits * upstream[:, None]
    largest = 2.0 ** torch.ceil(torch.log2(upstream.abs().max()))
    small = small_columns(dlogits / largest, EPSILON)
    exact = merged_by_hand(tensors, dlogits, torch.zeros_like(small), rank_one=False)
    dropped = merged_by_hand(tensors, dlogits, small, rank_one=False)
    errors = {n: relative_error(grads[n], exact[n]) for n in NAMES}
    of_dropping = {n: relative_error(dropped[n], exact[n]) for n in NAMES}
    assert 5 * errors["hidden"] <= of_dropping["hidden"], (errors, of_dropping)
    assert errors["weight"] <= 2 * of_dropping["weight"], (errors, of_dropping)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_precision(peaked, dtype):
    tensors, target = peaked
    low = {n: t.to(dtype) for n, t in tensors.items()}
    again = {n: t.double() for n, t in low.items()}
    dlogits = dlogits_of(again, target)
    expected = merged_by_hand(again, dlogits, small_columns(dlogits, EPSILON))
    _, grads, report = filtered(low, target)
    limit = {torch.bfloat16: 0.01, torch.float32: 1e-3}[dtype]
    for name in NAMES:
        assert grads[name].dtype == dtype
        assert relative_error(grads[name], expected[name]) < limit
    small = small_columns(dlogits, EPSILON)
    mass = dlogits[small].abs().sum() / dlogits.abs().sum()
    assert report["dropped_mass"] == pytest.approx(mass.item(), rel=0.02)


@pytest.mark.parametrize("upstream", [torch.ones_like, lambda v: torch.full_like(v, 1e-3)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_threshold_is_before_the_mean_and_the_upstream_gradient(peaked, reduction, upstream):
    tensors, target = peaked
    _, grads, report = filtered(tensors, target, upstream=upstream, reduction=reduction)
    _, of_sum, report_of_sum = filtered(tensors, target)
    factor = upstream(torch.ones(1).double()).item() / (len(target) if reduction == "mean" else 1)
    for name in NAMES:
        assert relative_error(grads[name], factor * of_sum[name]) < 1e-10
    assert report["dropped_mass"] == pytest.approx(report_of_sum["dropped_mass"], rel=1e-9)


def test_the_threshold_is_after_the_token_weights(peaked):
    tensors, target = peaked
    weight = random_weights(len(target))
    dlogits = dlogits_of(tensors, target, weight)
    expected = merged_by_hand(tensors, dlogits, small_columns(dlogits, EPSILON))
    for normalizer, options in [(1, {}), (weight.sum(), {"reduction": "mean"})]:
        _, grads, _ = filtered(tensors, target, token_weight=weight, **options)
        for name in NAMES:
            assert relative_error(grads[name], expected[name] / normalizer) < 1e-10


def test_blocks_are_of_the_rows_that_count(peaked):
    tensors, target = peaked
    gone = torch.arange(len(target)) % 3 == 0
    _, grads, report = filtered(tensors, target.masked_fill(gone, -100))
    kept = tensors | {"hidden": tensors["hidden"][~gone]}
    dlogits = dlogits_of(kept, target[~gone])
    small = small_columns(dlogits, EPSILON)
    expected = merged_by_hand(kept, dlogits, small)
    assert relative_error(grads["weight"], expected["weight"]) < 1e-10
    assert relative_error(grads["hidden"][~gone], expected["hidden"]) < 1e-10
    assert (grads["hidden"][gone] == 0).all()
    mass = dlogits[small].abs().sum() / dlogits.abs().sum()
    assert report["dropped_mass"] == pytest.approx(mass.item(), rel=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_a_tiny_threshold_is_exact(name):
    tensors, target = problem(*TOKENS)
    for options in ({}, {"reduction": "none"}) if name != "0.6 ce + 0.4 lovasz" else ({},):
        ours, truth = both(name, tensors, target, source_options={"grad_filter": 1e-30}, **options)
        assert_equal_to_truth(ours, truth)


@pytest.mark.parametrize("name", CASES)
def test_every_loss_stays_close(peaked, name):
    tensors, target = peaked
    arguments = tensors, target, NAMES, torch.ones_like
    loss = CASES[name][0]
    _, exact = value_and_grads(loss, source, *arguments)
    _, grads = value_and_grads(loss, lambda t: source(t, grad_filter=EPSILON), *arguments)
    for n in NAMES:
        assert relative_error(grads[n], exact[n]) < 0.01
        assert not torch.equal(grads[n], exact[n])


@pytest.mark.parametrize("name", TOKEN_CASES)
def test_a_frozen_head_filters_too(peaked, name):
    tensors, target = peaked
    arguments = tensors, target
    _, whole = value_and_grads(
        CASES[name][0], lambda t: source(t, grad_filter=EPSILON), *arguments, NAMES
    )
    _, frozen = value_and_grads(
        CASES[name][0], lambda t: source(t, grad_filter=EPSILON), *arguments, ("hidden",)
    )
    assert relative_error(frozen["hidden"], whole["hidden"]) < 1e-10


@pytest.mark.parametrize("name", ["cross_entropy", "lovasz_softmax"])
def test_off_by_default_and_value_untouched(name):
    tensors, target = problem(*TOKENS)
    made = []

    def of(t, **options):
        made.append(source(t, **options))
        return made[-1]

    loss = CASES[name][0]
    default = value_and_grads(loss, of, tensors, target)
    assert made[0].grad_filter == 0.0 and made[0].report == {}
    assert_same_bits(
        default, value_and_grads(loss, lambda t: of(t, grad_filter=0.0), tensors, target)
    )
    value, _ = value_and_grads(loss, lambda t: of(t, grad_filter=0.1), tensors, target)
    assert torch.equal(value, default[0])
    assert 0 < made[-1].report["dropped_mass"] < 1


def test_more_classes_are_held_to_a_lower_limit():
    n, v, d = 40, 1 << 17, 4
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "hidden": torch.randn(n, d, generator=draw, dtype=torch.float64),
        "weight": 3 * torch.randn(v, d, generator=draw, dtype=torch.float64),
    }
    target = torch.randint(v, (n,), generator=draw)
    dlogits = dlogits_of(tensors, target)
    small = small_columns(dlogits, EPSILON / 2)
    assert (small != small_columns(dlogits, EPSILON)).any()
    _, grads, _ = filtered(tensors, target)
    expected = merged_by_hand(tensors, dlogits, small)
    for name in NAMES:
        assert relative_error(grads[name], expected[name]) < 1e-10


@pytest.mark.parametrize("name", ["cross_entropy", "lovasz_softmax"])
def test_no_valid_token(peaked, name):
    tensors, target = peaked
    loss, ignored = CASES[name][0], torch.full_like(target, -100)
    value, grads = value_and_grads(
        loss, lambda t: source(t, grad_filter=EPSILON), tensors, ignored, NAMES
    )
    assert value == 0 and not any(grad.any() for grad in grads.values())
