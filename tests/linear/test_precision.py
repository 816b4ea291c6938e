"""Half and single precision: as close to float64 as plain PyTorch in the same dtype."""

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, random_weights, relative_error
from linear_helpers import (
    CASES,
    EVERYTHING,
    LORA_SCALE,
    TOKEN_CASES,
    D,
    problem,
    source,
    stored,
    value_and_grads,
)

import segloss

LOW = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", LOW, ids=str)


def float_logits(t):
    """What eager training code computes: the head in its own dtype, the loss on float32 logits."""
    logits = F.linear(t["hidden"], t["weight"], t.get("bias"))
    if "a" in t:
        logits = logits + LORA_SCALE * F.linear(F.linear(t["hidden"], t["a"]), t["b"])
    return logits.float()


def assert_as_close_as_eager(name, tensors, target, trainable, of_source=None, **options):
    """The rule of `helpers.assert_close_to_float64`, for every tensor of the head."""
    dtype = tensors["hidden"].dtype
    exact = {n: t.double() for n, t in tensors.items()}
    arguments = target, trainable
    ours = value_and_grads(
        CASES[name][0], lambda t: source(t, **(of_source or {})), tensors, *arguments, **options
    )
    truth = value_and_grads(CASES[name][1], stored, exact, *arguments, **options)
    eager = value_and_grads(CASES[name][1], float_logits, tensors, *arguments, **options)
    assert ours[0].dtype == torch.float32
    assert_within(ours[0], truth[0], eager[0], dtype, f"{name} value")
    largest = max(g.norm().item() for g in truth[1].values())
    for n, grad in ours[1].items():
        assert grad.dtype == dtype
        # the bias's gradient may be a sum that cancels
        floor = 0.02 * largest
        assert_within(grad, truth[1][n], eager[1][n], dtype, f"{name} {n}", floor)


def assert_within(ours, truth, eager, dtype, what, floor=0.0):
    scale = max(truth.norm().item(), floor, 1e-30)
    error, of_eager = ((x.double() - truth).norm().item() / scale for x in (ours, eager))
    allowed = 2 * of_eager + TOLERANCE[dtype]
    assert error <= allowed, f"{what} in {dtype}: {error:.3g} > {allowed:.3g}"


@each_dtype
@pytest.mark.parametrize("trainable", [EVERYTHING, ("hidden",)], ids=len)
@pytest.mark.parametrize("name", CASES)
def test_every_loss_is_as_close_as_eager(name, trainable, dtype):
    tensors, target = problem(3, 11, v=507, d=16, dtype=dtype)
    row = 507 * dtype.itemsize
    weights = {"token_weight": random_weights(3, 11).float(), "weight": random_weights(507).float()}
    assert_as_close_as_eager(name, tensors, target, trainable, {"chunk_bytes": 8 * row}, **weights)
    if name != "0.6 ce + 0.4 lovasz":
        none = {"reduction": "none", **weights}
        budget = {"chunk_bytes": 8 * row, "memory_budget": 17 * row}
        assert_as_close_as_eager(name, tensors, target, trainable, budget, **none)


@each_dtype
def test_smoothing_and_z_loss_are_as_close_as_eager(dtype):
    tensors, target = problem(33, v=507, d=16, dtype=dtype)
    for trainable in (EVERYTHING, ("hidden",)):
        for options in ({}, {"reduction": "none"}):
            assert_as_close_as_eager(
                "cross_entropy", tensors, target, trainable, {"chunk_bytes": 9000},
                label_smoothing=0.1, z_loss=1e-3, **options,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
def test_the_mean_of_many_tokens_flushes_no_gradient(options, dtype):
    # p / N is below float16's smallest number, 6e-8, for most entries: N = 8192, p about 1e-3
    n = 8192
    tensors, target = problem(n, v=1021, d=8, dtype=dtype, names=("hidden", "weight"), ignored=0.0)
    upstream = (lambda v: torch.full_like(v, 1 / n)) if options else torch.ones_like

    def run(tensors, **of_source):
        return value_and_grads(
            segloss.cross_entropy, lambda t: source(t, **of_source),
            tensors, target, ("hidden", "weight"), upstream, **options,
        )  # fmt: skip

    _, grads = run(tensors, chunk_bytes=1 << 20)
    _, true = run({n: t.double() for n, t in tensors.items()})  # held to the reference elsewhere
    # half precision resolves a part in 2000 (float16: 2^-11) or 250 (bfloat16: 2^-8) of an entry,
    # and float16's own smallest number bounds what dhidden can hold
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert relative_error(grads["weight"], true["weight"]) <= 3 * rounding
    denormal = 2.0**-24 if dtype == torch.float16 else 0.0
    flushed = 0.5 * denormal * grads["hidden"].numel() ** 0.5
    difference = (grads["hidden"].double() - true["hidden"]).norm()
    assert difference <= 3 * rounding * true["hidden"].norm() + flushed


def test_float16_in_chunks_where_eager_flushes():
    # the eager gradient of float16 logits, formed after the mean, loses most of its small entries
    n = 4096
    names = ("hidden", "weight")
    tensors, target = problem(
        n, v=4093, d=4, dtype=torch.float16, names=names, ignored=0.0, skill=0.0
    )
    tensors["hidden"] = tensors["hidden"] / 8  # p close to 1 / V
    arguments = target, ("weight",), torch.ones_like
    exact = {name: t.double() for name, t in tensors.items()}
    _, true = value_and_grads(CASES["cross_entropy"][0], source, exact, *arguments)
    _, ours = value_and_grads(CASES["cross_entropy"][0], source, tensors, *arguments)
    _, eager = value_and_grads(
        lambda z, y: F.cross_entropy(z, y),
        lambda t: F.linear(t["hidden"], t["weight"]).float(),
        tensors, *arguments,
    )  # fmt: skip
    absent = torch.ones(4093).index_fill_(0, target, 0).bool()  # only p / N there
    of_ours = relative_error(ours["weight"][absent], true["weight"][absent])
    of_eager = relative_error(eager["weight"][absent], true["weight"][absent])
    assert of_ours < 0.01 < 0.1 < of_eager


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "focal_loss", "token sum"])
def test_dweight_adds_up_in_float32_over_chunks(name, dtype):
    # 64 chunks: a sum kept in half precision would lose what is below 2^-8 of it each time
    tensors, target = problem(512, v=509, d=8, dtype=dtype, ignored=0.0)
    truth = value_and_grads(
        CASES[name][0], source, {n: t.double() for n, t in tensors.items()}, target
    )[1]
    errors = {}
    for chunks in (1, 16, 64):
        rows = 512 // chunks
        _, grads = value_and_grads(
            CASES[name][0],
            lambda t, r=rows: source(t, chunk_bytes=r * 509 * 2),
            tensors, target,
        )  # fmt: skip
        errors[chunks] = {n: relative_error(grads[n], truth[n]) for n in EVERYTHING}
    for n in EVERYTHING:
        assert errors[16][n] <= 1.5 * errors[1][n] + 1e-3, (n, errors)
        assert errors[64][n] <= 1.5 * errors[1][n] + 1e-3, (n, errors)
    rows = {"chunk_bytes": 32 * 509 * 2}
    assert_as_close_as_eager(name, tensors, target, EVERYTHING, rows)


@pytest.mark.parametrize("name", CASES)
def test_float16_grads_overflow_nowhere(name):
    # unscaled sums over tokens pass float16's 65504 long before the mean does
    tensors, target = problem(
        4096, v=16, d=4, dtype=torch.float16, names=("hidden", "weight"), ignored=0.0, classes=2
    )
    tensors["hidden"] = 20 + tensors["hidden"]
    for trainable in (("hidden", "weight"), ("weight",), ("hidden",)):
        value, grads = value_and_grads(
            CASES[name][0], source, tensors, target, trainable, torch.ones_like
        )
        exact = {n: t.double() for n, t in tensors.items()}
        _, true = value_and_grads(CASES[name][0], source, exact, target, trainable, torch.ones_like)
        assert value.isfinite()
        for n, grad in grads.items():
            assert grad.isfinite().all()
            assert (grad.double() - true[n]).norm() <= 0.02 * true[n].norm() + 1e-3 * D


@pytest.mark.parametrize("name", TOKEN_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sure_tokens_in_half_precision(name, dtype):
    # as p -> 1 the target's p - 1 and its p must not be rounded apart
    tensors, target = problem(32, v=101, d=8, dtype=dtype, names=("hidden", "weight"), ignored=0.0)
    tensors["hidden"] = tensors["weight"][target] * 2
    for trainable in (("hidden", "weight"), ("hidden",)):
        for options in ({}, {"reduction": "none"}):
            assert_as_close_as_eager(name, tensors, target, trainable, **options)


def test_float32_statistics_of_half_precision_heads():
    for dtype in LOW:
        tensors, target = problem(33, v=507, dtype=dtype)
        logits = stored({n: t.double() for n, t in tensors.items()})
        ours = segloss.logit_statistics(source(tensors), target, entropy=True, classes="present")
        true = segloss.logit_statistics(logits, target, entropy=True, classes="present")
        eager = segloss.logit_statistics(
            float_logits(tensors), target, entropy=True, classes="present"
        )
        for field in ("log_prob", "lse", "entropy", "prob_sum"):
            value = getattr(ours, field)
            assert value.dtype == torch.float32
            assert_within(value, getattr(true, field), getattr(eager, field), dtype, field)
