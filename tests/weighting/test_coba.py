"""CoBa against its formulas written out naively, and what must hold of any weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import assert_near

import segloss

HISTORIES = 1000
NOTHING = float("nan")


# ----------------------------------------------------------------------------------- oracle


def line_slope(points):
    """Of the least-squares line through (x, y); None through fewer than two points."""
    if len(points) < 2:
        return None
    x, y = np.array(points).T
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def softmax(x):
    e = np.exp(np.array(x) - max(x))
    return e / e.sum()


def quotient(a, b):
    return a / b if b else 0.0


def ratios_of(losses):
    """Each task's losses over its first one."""
    first = {}
    rows = []
    for row in losses:
        for i, loss in enumerate(row):
            if not math.isnan(loss):
                first.setdefault(i, loss)
        rows.append(
            [loss / first[i] if not math.isnan(loss) else None for i, loss in enumerate(row)]
        )
    return rows


def paper_weights(steps, losses, warmup, history, tau, window):
    """Weights after every update by the paper's formulas, a task without a slope being 1 / K."""
    ratios, num_tasks = ratios_of(losses), len(losses[0])
    slopes, largest, every = [], [], []
    for t, step in enumerate(steps):
        last = range(max(0, t - history + 1), t + 1)
        now = [
            line_slope([(steps[s], ratios[s][i]) for s in last if ratios[s][i] is not None])
            for i in range(num_tasks)
        ]
        weights = np.full(num_tasks, 1 / num_tasks)
        if step >= warmup:
            slopes.append(now)
            known = [i for i in range(num_tasks) if now[i] is not None]
            largest.append(max((now[i] for i in known), default=None))
            if known:
                weights[known] = (
                    len(known)
                    / num_tasks
                    * np.array(paper_step(slopes[-history:], largest[-window:], known, tau))
                )
        every.append(weights)
    return every


def paper_step(slopes, largest, known, tau):
    now = slopes[-1]
    total = sum(abs(now[i]) for i in known)
    relative = softmax([len(known) * quotient(now[i], total) for i in known])
    absolute = []
    for i in known:
        own = [abs(row[i]) for row in slopes if row[i] is not None]
        absolute.append(-len(own) * quotient(now[i], sum(own)))
    absolute = softmax(absolute)
    seen = [a for a in largest if a is not None]
    total = sum(map(abs, seen))
    steps = softmax([-tau * len(seen) * quotient(a, total) for a in seen])
    factor = min(len(seen) * steps[-1], 1.0)
    return factor * relative + (1 - factor) * absolute


def published_weights(steps, losses, warmup, history, tau, window):
    """Weights after every update as the authors' code has them, without what makes it fail."""
    ratios, num_tasks = ratios_of(losses), len(losses[0])
    slopes, totals, every = [], [], []
    for t, step in enumerate(steps):
        last = ratios[max(0, t - history + 1) : t + 1]
        columns = [[row[i] for row in last if row[i] is not None] for i in range(num_tasks)]
        there = [[r for r in row if r is not None] for row in last]
        columns.append([max(row) for row in there if row])
        *now, total = [line_slope(list(enumerate(column))) or 0.0 for column in columns]
        weights = np.full(num_tasks, 1 / num_tasks)
        if step >= warmup:
            slopes.append(now)
            totals.append(total)
            size = sum(map(abs, now))
            relative = softmax([num_tasks * quotient(a, size) for a in now])
            kept = slopes[-max(1, history - warmup + 1) :]
            absolute = softmax(
                [
                    -len(kept) * quotient(now[i], sum(abs(row[i]) for row in kept))
                    for i in range(num_tasks)
                ]
            )
            seen = totals[-window:]
            size = sum(map(abs, seen))
            factor = len(seen) * softmax([-tau * len(seen) * quotient(a, size) for a in seen])[-1]
            weights = softmax(num_tasks * (factor * relative + (1 - factor) * absolute))
            if (weights < 1 / (10 * num_tasks)).any():
                weights = 0.9 * weights + 1 / (10 * num_tasks)
        every.append(weights)
    return every


def random_history(seed):
    """(steps, losses (T, K), settings): gaps in time, missing tasks, constants, absent tasks."""
    random = np.random.default_rng(seed)
    num_tasks, updates = int(random.integers(1, 6)), int(random.integers(4, 22))
    gap = int(random.choice([1, 1, 7]))
    steps = np.cumsum(random.integers(1, gap + 1, updates)) - 1
    rate, noise = random.uniform(-0.05, 0.2, num_tasks), random.choice([0.001, 0.1])
    losses = random.uniform(0.5, 4, num_tasks) * np.exp(-np.arange(updates)[:, None] * rate)
    losses *= np.exp(noise * random.standard_normal(losses.shape))
    if seed % 5 == 1:
        losses[:, 0] = 2.7
    losses[random.random(losses.shape) < random.choice([0, 0.3, 0.7])] = NOTHING
    if seed % 4 == 0:
        losses[:, -1] = NOTHING
    settings = {
        "warmup": int(random.integers(0, steps[-1] // 2 + 2)),
        "history": int(random.integers(2, 12)),
        "tau": float(random.choice([0.5, 5.0])),
        "window": int(random.choice([3, 1000])),
    }
    return [int(s) for s in steps], losses, settings


def make(num_tasks, mode, settings, **options):
    settings = dict(settings)
    window = settings.pop("window")
    return segloss.CoBa(num_tasks, mode=mode, divergence_window=window, **settings, **options)


@pytest.mark.parametrize("mode", ["paper", "published"])
def test_equals_the_formulas_over_random_histories(mode):
    """Each history is interrupted once and goes on from its state."""
    oracle = {"paper": paper_weights, "published": published_weights}[mode]
    worst = 0.0
    for seed in range(HISTORIES):
        steps, losses, settings = random_history(seed)
        truth = oracle(steps, losses.tolist(), **settings)
        coba = make(losses.shape[1], mode, settings)
        for t, step in enumerate(steps):
            if t == seed % len(steps):
                state = coba.state_dict()
                coba = make(losses.shape[1], mode, settings)
                coba.load_state_dict(state)
            coba.update(torch.from_numpy(losses[t]), step)
            weights = coba.weights()
            assert weights.dtype == torch.float64
            error = np.abs(weights.numpy() - truth[t]).max()
            assert error <= 1e-10, f"history {seed}, update {t}: {weights} is not {truth[t]}"
            worst = max(worst, error)
    assert worst > 0, "the two were not computed independently"


# ------------------------------------------------------------------------------- invariants


def smooth(updates=40, num_tasks=3, noise=0.02, seed=0):
    random = np.random.default_rng(seed)
    t = np.arange(updates)[:, None]
    losses = np.array([3.0, 2.0, 1.0])[:num_tasks] * np.exp(-t * [0.1, 0.05, 0.01][:num_tasks])
    return torch.from_numpy(losses * np.exp(noise * random.standard_normal(losses.shape)))


def trained(losses, steps=None, warmup=10, history=15, **options):
    coba = segloss.CoBa(losses.shape[1], warmup=warmup, history=history, **options)
    for t, row in enumerate(losses):
        coba.update(row, None if steps is None else steps[t])
    return coba


both_modes = pytest.mark.parametrize("mode", ["paper", "published"])


@both_modes
def test_order_of_the_tasks_changes_nothing(mode):
    losses, order = smooth(), torch.tensor([2, 0, 1])
    plain, permuted = trained(losses, mode=mode), trained(losses[:, order], mode=mode)
    assert_near(permuted.weights(), plain.weights()[order])


@both_modes
def test_scale_of_ratios_and_unit_of_time_change_nothing(mode):
    losses = smooth()
    plain = trained(losses, baseline=losses[0], mode=mode)
    scaled = trained(losses, baseline=losses[0] / 7, mode=mode)
    later = [50 * t for t in range(1, 41)]
    slower = trained(losses, later, warmup=500, baseline=losses[0], mode=mode)
    assert_near(scaled.weights(), plain.weights())
    if mode == "paper":  # the published window of the absolute scores depends on the warm-up
        assert_near(slower.weights(), plain.weights())


def test_the_first_weights_are_the_relative_scores():
    losses = smooth(updates=11)
    before, first = trained(losses[:10]), trained(losses)
    assert torch.equal(before.weights(), torch.full((3,), 1 / 3, dtype=torch.float64))
    assert first.divergence_factor == 1
    assert_near(first.weights(), first.relative_scores)
    assert (first.weights() - 1 / 3).abs().max() > 0.01


@both_modes
def test_equal_slopes_and_constant_losses_are_uniform(mode):
    line = 1 - 0.01 * torch.arange(30, dtype=torch.float64)
    coba = trained(line[:, None] * torch.tensor([1.0, 2.0, 0.3]).double(), mode=mode)
    assert_near(coba.weights(), torch.full((3,), 1 / 3, dtype=torch.float64))
    # constants at uneven times: no slope may come of rounding
    constant = torch.tensor([0.87, 1 / 3, 2.1], dtype=torch.float64).expand(30, 3)
    steps = [t * t * t for t in range(1, 31)]
    coba = trained(constant, steps, history=13, mode=mode, baseline=torch.tensor([3.0, 7.0, 0.9]))
    assert torch.equal(coba.slopes, torch.zeros(3).double())
    assert_near(coba.weights(), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_slow_tasks_gain_and_diverging_ones_lose():
    t = torch.arange(60, dtype=torch.float64)
    slow = trained(torch.stack([1 - 0.01 * t, 1 - 0.002 * t], 1))
    assert slow.weights()[1] > slow.weights()[0]
    overfit = torch.where(t < 30, 1 - 0.01 * t, 0.7 + 0.02 * (t - 30))
    diverging = trained(torch.stack([1 - 0.01 * t, overfit], 1))
    assert diverging.divergence_factor < 0.1
    assert diverging.weights()[1] < diverging.weights()[0]


def test_an_absent_task_keeps_its_share_and_leaves_the_others_theirs():
    losses = smooth()
    alone = trained(losses)
    absent = torch.cat([losses, torch.full((40, 1), NOTHING, dtype=torch.float64)], 1)
    weights = trained(absent).weights()
    assert weights[3] == 1 / 4
    assert_near(weights[:3], 0.75 * alone.weights())
    published = trained(absent, mode="published").weights()
    assert published.isfinite().all()
    assert_near(published.sum(), torch.tensor(1.0).double())


@both_modes
def test_nothing_measured_at_all_is_uniform(mode):
    weights = trained(torch.full((20, 2), NOTHING), mode=mode).weights()
    assert torch.equal(weights, torch.tensor([0.5, 0.5]))


def test_true_step_numbers_do_not_stretch_the_slope_of_a_task_often_missing():
    losses = (1 - 0.01 * torch.arange(40, dtype=torch.float64))[:, None].repeat(1, 2)
    losses[torch.arange(40) % 4 != 3, 1] = NOTHING
    losses[0] = 1
    slopes = trained(losses).slopes
    assert_near(slopes, torch.full((2,), -0.01, dtype=torch.float64))
    stretched = trained(losses, mode="published").slopes
    assert_near(stretched[1] / stretched[0], torch.tensor(4.0).double())


# -------------------------------------------------------------------------------- the object


def test_infinite_losses_are_missing_and_a_zero_is_no_baseline():
    losses = smooth()
    with_gaps = losses.clone()
    with_gaps[[0, 7, 20], [0, 1, 2]] = NOTHING
    odd = losses.clone()
    odd[[0, 7, 20], [0, 1, 2]] = torch.tensor([0.0, math.inf, -math.inf]).double()
    assert torch.equal(trained(odd).weights(), trained(with_gaps).weights())


def test_counts_of_zero_are_missing():
    losses = smooth()
    coba = segloss.CoBa(3, warmup=10, history=15)
    expected = segloss.CoBa(3, warmup=10, history=15)
    for t, row in enumerate(losses):
        counts = torch.tensor([5, t % 2, 3])
        coba.update(row, counts=counts)
        expected.update(torch.where(counts > 0, row, NOTHING))
    assert torch.equal(coba.weights(), expected.weights())


def test_float32_losses_give_float32_weights_that_nothing_changes():
    losses = smooth()
    coba = trained(losses.float())
    weights = coba.weights()
    assert weights.dtype == torch.float32 and not weights.requires_grad
    assert_near(weights, trained(losses).weights(), 1e-4)
    parts = (coba.relative_scores, coba.absolute_scores, coba.divergence_factor, coba.slopes)
    before = weights.clone()
    for part in (weights, *parts):
        part.zero_()
    assert torch.equal(coba.weights(), before)


def test_gradients_do_not_flow_into_weights():
    losses = smooth().requires_grad_()
    assert not trained(losses).weights().requires_grad


def test_state_survives_a_file(tmp_path):
    losses = smooth()
    half, whole = trained(losses[:20]), trained(losses)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = segloss.CoBa(3, warmup=10, history=15)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.weights(), half.weights()) and resumed.step == 19
    for row in losses[20:]:
        resumed.update(row)
    assert torch.equal(resumed.weights(), whole.weights())
    assert resumed.divergence_factor == whole.divergence_factor


@both_modes
def test_nothing_is_read_back_from_the_device(mode, no_synchronisation):
    losses = smooth()
    with no_synchronisation:
        coba = trained(losses, mode=mode)
        coba.update(losses[-1], counts=torch.ones(3))
        assert coba.weights().shape == (3,)
    with pytest.raises(AssertionError, match="reads a value back"), no_synchronisation:
        float(coba.weights()[0])


def test_a_state_is_a_copy():
    losses = smooth()
    coba = trained(losses[:20])
    state = coba.state_dict()
    twin = segloss.CoBa(3, warmup=10, history=15)
    twin.load_state_dict(state)
    for row in losses[20:]:
        coba.update(row)
    for row in losses[20:]:
        twin.update(row)
    assert torch.equal(coba.weights(), twin.weights())


def test_wrong_arguments_are_named():
    make_one = lambda **o: segloss.CoBa(2, **{"warmup": 1, "history": 2} | o)  # noqa: E731
    for options, error, text in [
        ({"warmup": -1}, ValueError, "warmup is -1"),
        ({"history": 1}, ValueError, "history is 1"),
        ({"history": 2.0}, TypeError, "history is 2.0"),
        ({"tau": -1}, ValueError, "tau is -1"),
        ({"tau": "5"}, TypeError, "tau is '5'"),
        ({"mode": "papr"}, ValueError, "mode is 'papr'"),
        ({"baseline": torch.ones(3)}, ValueError, "baseline has shape"),
        ({"divergence_window": 0}, ValueError, "divergence_window is 0"),
    ]:
        with pytest.raises(error, match=text):
            make_one(**options)
    coba = make_one()
    with pytest.raises(TypeError, match=r"losses is a torch\.int64"):
        coba.update(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"losses has shape \(3,\); it takes \(2,\)"):
        coba.update(torch.ones(3))
    coba.update(torch.ones(2), step=5)
    with pytest.raises(ValueError, match="step is 5; it takes more than 5"):
        coba.update(torch.ones(2), step=5)
    with pytest.raises(ValueError, match="counts is"):
        coba.update(torch.ones(2), counts=torch.ones(3))
    with pytest.raises(ValueError, match="state has warmup=1, but this CoBa has warmup=3"):
        make_one(warmup=3).load_state_dict(coba.state_dict())
