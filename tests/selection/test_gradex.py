"""GradEx: exact where the model is linear, right on what is known, resumable."""

import itertools
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segloss.kernels.projection import back_project
from segloss.selection import Comparison, GradEx, Sample, gradex, gradients
from segloss.selection.regression import fit_logistic
from segloss.selection.search import random_subsets, spearman

FEATURES = 6


class Linear(nn.Module):
    """Two classes, whose margin is linear in the weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(FEATURES, dtype=torch.float64))

    def forward(self, x):
        return torch.stack([torch.zeros(len(x), dtype=x.dtype), x @ self.weight], -1)


def outputs(model, inputs):
    x, y = inputs
    return model(x[None]), y[None]


def tasks_of(names, count=30, seed=0):
    """{task: [(x, y)]}, each task with its own rule and 20 % noise, so that none is separable."""
    data = {}
    for index, name in enumerate(names):
        rng = torch.Generator().manual_seed(seed + index)
        rule = torch.randn(FEATURES, generator=rng, dtype=torch.float64)
        x = torch.randn(count, FEATURES, generator=rng, dtype=torch.float64)
        noise = torch.rand(count, generator=rng) < 0.2
        data[name] = list(zip(x, ((x @ rule > 0) ^ noise).long(), strict=True))
    return data


def samples_of(data):
    return [Sample(f"{t}-{i}", t, row) for t, rows in data.items() for i, row in enumerate(rows)]


@pytest.fixture
def data():
    return tasks_of("abc")


@pytest.fixture
def held_out():
    return tasks_of("ab", count=12, seed=100)


def collected(data, held_out, model=None, **options):
    model = model or Linear()
    explorer = GradEx(model, outputs=outputs, **({"dim": 32} | options))
    explorer.collect(samples_of(data))
    explorer.collect(samples_of(held_out), role="target")
    return explorer


def loss_at(weight, rows):
    x, y = torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])
    return F.cross_entropy(torch.stack([torch.zeros(len(x)), x @ weight], -1).double(), y)


def trained(rows, penalty=0.0, back=None):
    """Weights of the least mean loss (+ penalty |w|^2, weights + back @ w), by L-BFGS."""
    start = Linear().weight.detach()
    back = torch.eye(FEATURES, dtype=torch.float64) if back is None else back
    w = torch.zeros(back.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_at(start + back @ w, rows) + penalty * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return start + back @ w.detach()


@pytest.mark.parametrize("subset", ["a", "ab", "cb", "abc"])
def test_a_linear_model_is_predicted_exactly(subset, data, held_out):
    """Retraining it to convergence gives the estimate, to the rounding of float32 gradients."""
    explorer = collected(data, held_out, penalty=1e-9)
    weight = trained([row for task in subset for row in data[task]])
    true = torch.stack([loss_at(weight, held_out[task]) for task in "ab"]).mean()
    assert explorer.estimate(subset_of(subset)) == pytest.approx(true.item(), rel=1e-5)
    only_b = loss_at(weight, held_out["b"]).item()
    assert explorer.estimate(subset_of(subset), ["b"]) == pytest.approx(only_b, rel=1e-5)


def subset_of(letters):
    return list(letters)


def test_so_is_a_penalised_one(data, held_out):
    """With the penalty on the projected weights, through the explicit matrix."""
    from segloss.kernels.projection import sign_matrix

    explorer = collected(data, held_out, penalty=0.05)
    back = sign_matrix(FEATURES, 32).double()
    weight = trained(data["a"] + data["c"], 0.05, back)
    true = torch.stack([loss_at(weight, held_out[task]) for task in "ab"]).mean().item()
    assert explorer.estimate(["a", "c"]) == pytest.approx(true, rel=1e-6)


def test_no_training_is_the_model_as_it_is(data, held_out):
    explorer = collected(data, held_out)
    weight = Linear().weight.detach()
    true = torch.stack([loss_at(weight, held_out[task]) for task in "ab"]).mean().item()
    assert explorer.estimate([]) == pytest.approx(true, rel=1e-12)


def test_relative_to_all_tasks(data, held_out):
    """All tasks are the model as it is; any other subset is as far from them as before."""
    plain = collected(data, held_out)
    relative = collected(data, held_out, relative=True)
    assert plain.fit(subset_of("cab")).norm() > 0.1 * plain.fit(subset_of("a")).norm()
    assert torch.equal(relative.fit(subset_of("cab")), torch.zeros(32, dtype=torch.float64))
    assert relative.estimate(subset_of("abc")) == plain.estimate([]) == relative.estimate([])

    def moved_by(w):
        return back_project(w, FEATURES, relative.seed)

    for subset in (["a"], ["b", "c"]):
        difference = plain.fit(subset) - plain.fit(subset_of("abc"))
        assert torch.equal(relative.fit(subset), difference)
        assert torch.equal(relative.shift(subset)["weight"], moved_by(difference))
    samples = samples_of(held_out)
    everything = relative.measure(subset_of("abc"), samples)
    assert everything == pytest.approx(plain.estimate([]), rel=1e-12)
    relative.penalty = plain.penalty = 0.5
    assert torch.equal(relative.fit(["a"]), plain.fit(["a"]) - plain.fit(subset_of("abc")))

    new = tasks_of("d", seed=7)
    relative.collect(samples_of(new))
    plain.collect(samples_of(new))
    assert torch.equal(relative.fit(subset_of("abcd")), torch.zeros(32, dtype=torch.float64))
    assert torch.equal(
        relative.fit(subset_of("a")), plain.fit(subset_of("a")) - plain.fit(subset_of("abcd"))
    )


def test_a_task_listed_under_two_names_is_one(data, held_out):
    explorer = collected(data | {"twin": data["a"]}, held_out)
    assert explorer.estimate(["a"]) == pytest.approx(explorer.estimate(["twin"]), rel=1e-9)
    assert explorer.estimate(["a", "twin"]) == pytest.approx(explorer.estimate(["a"]), rel=1e-9)
    assert explorer.estimate(["b", "a"]) == explorer.estimate(["a", "b"])


def test_balance_counts_tasks_not_samples(data, held_out):
    long = data | {"a": data["a"] * 3}
    for balance in (True, False):
        explorer = collected(long, held_out, balance=balance)
        plain = collected(data, held_out, penalty=penalty_of(explorer)).estimate(["a", "b"])
        assert (explorer.estimate(["a", "b"]) == pytest.approx(plain, rel=1e-9)) == balance


def penalty_of(explorer):
    gradient = explorer.rows("train").gradient
    return gradex.RELATIVE_PENALTY * float(gradient.square().sum(1).mean())


def test_published_objective(data, held_out):
    """Against its formula, .5 (|w|^2 + b^2) + C sum ln(1 + exp(-(g.w + s b))), by L-BFGS."""
    explorer = collected(data, held_out, offset=False, seed=4)
    rows = explorer.rows("train")
    mine = rows.take(np.isin(rows.task, ["a", "c"]))
    side = torch.from_numpy(np.where(np.random.default_rng(4).random(60) < 0.7, 1.0, -1.0))
    w = torch.zeros(33, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=300, tolerance_grad=1e-14, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        score = mine.gradient @ w[:-1] + side * w[-1]
        value = 0.5 * w.square().sum() + 1e-4 * F.softplus(-score).sum()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(explorer.fit(["a", "c"]), w.detach()[:-1], rtol=1e-5, atol=1e-9)
    # next to the mean gradient, as derived
    cosine = F.cosine_similarity(explorer.fit(["a", "c"]), mine.gradient.mean(0), dim=0)
    assert cosine > 0.999


def test_radius_is_a_share_of_the_weights_length(data, held_out):
    from segloss.kernels.projection import sign_matrix

    model = Linear()
    explorer = collected(data, held_out, model, dim=1000, radius=0.1)
    moved = sign_matrix(FEATURES, 1000).double() @ explorer.fit(["a"])
    assert float(moved.norm() / model.weight.detach().norm()) == pytest.approx(0.1, rel=0.1)


# ----------------------------------------------------------------------------- moved weights


def test_the_shift_of_a_linear_model_is_the_direct_solution(data, held_out):
    """Weights and loss are those of L-BFGS on P w, P the explicit matrix."""
    from segloss import reference

    model = Linear()
    explorer = collected(data, held_out, model, penalty=0.05, seed=2)
    back = reference.sign_matrix(FEATURES, 32, 2, dtype=torch.float64)
    weight = trained(data["a"] + data["c"], 0.05, back)
    shift = explorer.shift(["a", "c"])
    assert list(shift) == ["weight"] and shift["weight"].dtype == torch.float32
    moved = weight - model.weight.detach()
    torch.testing.assert_close(shift["weight"].double(), moved, rtol=1e-5, atol=1e-6)

    before = model.weight.detach().clone()
    for rows in ("ab", "b"):
        samples = samples_of({task: held_out[task] for task in rows})
        true = torch.stack([loss_at(weight, held_out[task]) for task in rows]).mean().item()
        assert explorer.measure(["a", "c"], samples) == pytest.approx(true, rel=1e-6)
        assert explorer.estimate(["a", "c"], list(rows)) == pytest.approx(true, rel=1e-6)
    assert torch.equal(model.weight, before)
    assert explorer.measure([], samples_of(held_out)) == pytest.approx(
        explorer.estimate([]), rel=1e-12
    )


@pytest.mark.parametrize("offset", [True, False])
def test_the_published_score(offset, data, held_out):
    """Delta = P w at `radius` times the weights' length, the loss by the model with it."""
    from segloss import reference

    model = Linear()
    explorer = collected(data, held_out, model, offset=offset, radius=0.3)
    start = model.weight.detach().clone()
    delta = reference.sign_matrix(FEATURES, 32, dtype=torch.float64) @ explorer.fit(["b"])
    delta *= 0.3 * start.norm() / delta.norm()
    torch.testing.assert_close(explorer.shift(["b"])["weight"].double(), delta)
    with explorer.moved(["b"]) as moved:
        torch.testing.assert_close(moved.weight, start + delta, rtol=1e-6, atol=1e-7)
    assert torch.equal(model.weight, start)
    true = torch.stack([loss_at(start + delta, held_out[task]) for task in "ab"]).mean().item()
    assert explorer.measure(["b"], samples_of(held_out)) == pytest.approx(true, rel=1e-6)
    assert not explorer.shift([])["weight"].any()


def test_weights_are_put_back_whatever_happens(data, held_out):
    model = Linear().train()
    explorer = collected(data, held_out, model)
    before = model.weight.detach().clone()
    with pytest.raises(KeyError), explorer.moved(["a"]):
        raise KeyError
    assert torch.equal(model.weight, before)
    nothing = (torch.zeros(FEATURES, dtype=torch.float64), torch.tensor(-100))
    with pytest.raises(ValueError, match="sample 'x' has no token to predict"):
        explorer.measure(["a"], [Sample("x", "a", nothing)])
    assert torch.equal(model.weight, before) and model.training
    with pytest.raises(ValueError, match="samples is empty; it takes those"):
        explorer.measure(["a"], [])
    with torch.no_grad():
        model.weight[0] += 1e-9
    with pytest.raises(RuntimeError, match="weights are not those that its gradients were taken"):
        explorer.measure(["a"], samples_of(held_out))


def test_measured_with_several_parameters_and_a_curved_model(tmp_path):
    """A language model in bfloat16: the parts of P w go to the parameters that they are of."""
    from train.tiny import build_model

    from segloss.kernels.projection import sign_matrix

    model = build_model().bfloat16()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "norm" in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.tensor([5, 9, 2, 7, 7])
    sample = Sample("1", "t", {"input_ids": ids, "labels": ids})
    explorer = GradEx(model, dim=16, radius=0.05)
    explorer.collect([sample])
    shift = explorer.shift(["t"])
    flat = torch.cat([move.flatten() for move in shift.values()])
    direct = sign_matrix(explorer.num_parameters, 16).double() @ explorer.fit(["t"])
    direct *= 0.05 * explorer.norm / direct.norm()
    torch.testing.assert_close(flat.double(), direct)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(shift) == trained and len(trained) > 2
    with explorer.moved(["t"]):
        for name, parameter in model.named_parameters():
            expected = before[name].float() + shift.get(name, 0)
            assert torch.equal(parameter, expected.bfloat16())
        loss = model(input_ids=ids[None], labels=ids[None]).loss.item()
    assert explorer.measure(["t"], [sample]) == pytest.approx(loss, rel=1e-2)


def test_newton_finds_the_minimum():
    gradient, offset = torch.randn(50, 8).double(), 5 * torch.randn(50).double()
    weight = torch.rand(50).double()
    w = fit_logistic(gradient, offset, weight, 1e-3).requires_grad_()
    value = weight @ F.softplus(-(offset + gradient @ w)) + 1e-3 * w.square().sum()
    (slope,) = torch.autograd.grad(value, w)
    assert slope.norm() < 1e-6


# ---------------------------------------------------------------------------------- selection


def additive(explorer, monkeypatch, worth):
    """Estimates that are the mean of their tasks' worths."""
    monkeypatch.setattr(
        explorer, "estimate", lambda subset, target=None: float(np.mean([worth[t] for t in subset]))
    )


WORTH = {"a": 3.0, "b": 1.0, "c": 2.0}


def test_ensemble_scores_are_means_over_subsets(data, held_out, monkeypatch):
    explorer = collected(data, held_out)
    additive(explorer, monkeypatch, WORTH)
    found = explorer.select(method="ensemble", subsets=300, size=2, smallest=1)
    drawn = list(random_subsets(tuple("abc"), 300, 2, seed=0))
    for task in "abc":
        holding = [np.mean([WORTH[t] for t in s]) for s in drawn if task in s]
        assert found.scores[task] == pytest.approx(np.mean(holding))
    assert found.chosen == ("b",) and found.estimated == 1.0


@pytest.mark.parametrize("method", ["auto", "exhaustive", "ensemble", "forward"])
def test_every_method_finds_the_best(method, data, held_out, monkeypatch):
    explorer = collected(data, held_out)
    additive(explorer, monkeypatch, WORTH)
    assert explorer.select(method=method, smallest=1).chosen == ("b",)
    assert explorer.select(method=method).chosen == ("b", "c")  # half of them at least


def test_exhaustive_looks_at_every_subset(data, held_out):
    explorer = collected(data, held_out)
    found = explorer.select(["a"], method="exhaustive", smallest=1)
    every = {s for k in (1, 2, 3) for s in itertools.combinations("abc", k)}
    assert {subset for subset, _ in found.subsets} == every
    for subset, value in found.subsets:
        assert value == explorer.estimate(subset, ["a"])
    assert found.estimated == min(value for _, value in found.subsets)
    assert found.objective == "cross-entropy per token of a"


def test_selection_by_the_measured_loss(data, held_out):
    """Of a linear model it is the estimate; only the target's samples are read."""
    explorer = collected(data, held_out)
    samples = samples_of(held_out)
    by_estimate = explorer.select(["a"], smallest=1)
    measured = explorer.select(["a"], smallest=1, samples=iter(samples))
    assert measured.chosen == by_estimate.chosen
    assert [s for s, _ in measured.subsets] == [s for s, _ in by_estimate.subsets]
    for subset, value in measured.subsets:
        assert value == explorer.measure(subset, samples[:12])
        assert value == pytest.approx(explorer.estimate(subset, ["a"]), rel=1e-5)


def test_forward_adds_while_it_helps(data, held_out, monkeypatch):
    explorer = collected(data, held_out)
    best = {("a", "c"): 1.0, ("a",): 2.0}
    monkeypatch.setattr(explorer, "estimate", lambda s, target=None: best.get(tuple(s), 3.0))
    found = explorer.select(method="forward", smallest=1)
    assert found.chosen == ("a", "c") and len(found.subsets) == 6


def test_comparison():
    two = [("a",), ("b", "c"), ("c",)]
    comparison = Comparison(two, [1.1, 2.0, 3.0], [1.0, 2.0, 2.5])
    assert comparison.relative_error == pytest.approx((0.1 + 0 + 0.2) / 3)
    assert comparison.spearman == 1.0
    assert "mean |error| 10.0%, rank correlation 1.00" in str(comparison)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert spearman([1, 1, 2], [1, 1, 3]) == pytest.approx(1.0)
    assert np.isnan(spearman([1.0], [1.0])) and np.isnan(spearman([1, 1], [1, 2]))


def test_compare_takes_true_losses(data, held_out):
    explorer = collected(data, held_out)
    comparison = explorer.compare({("a",): 0.5, ("b", "c"): 0.7})
    assert comparison.true == [0.5, 0.7]
    assert comparison.estimated == [explorer.estimate(["a"]), explorer.estimate(["b", "c"])]


# -------------------------------------------------------------------------------------- store


def numbers(explorer):
    rows = [explorer.rows(role) for role in ("train", "target")]
    return [part for r in rows for part in (r.margin, r.gradient)]


def test_a_store_holds_the_same_numbers_however_it_was_filled(
    data, held_out, tmp_path, monkeypatch
):
    whole = collected(data, held_out)
    monkeypatch.setattr(gradients, "SHARD_SAMPLES", 7)
    monkeypatch.setattr(gradients, "BUFFER_BYTES", 5 * 4 * FEATURES)
    first = GradEx(Linear(), outputs=outputs, dim=32, store=tmp_path / "store")
    first.collect(samples_of(data)[:40])
    (tmp_path / "store" / "partial-rows-00099.npz").write_bytes(b"a kill while it was written")
    taken = []
    second = GradEx(Linear(), outputs=outputs, dim=32, store=tmp_path / "store")
    monkeypatch.setattr(
        second, "_margins", lambda s, of=second._margins: taken.append(s.id) or of(s)
    )
    second.collect(samples_of(data))
    second.collect(samples_of(held_out), role="target")
    assert taken == [s.id for s in samples_of(data)[40:] + samples_of(held_out)]
    for a, b in zip(numbers(whole), numbers(second), strict=True):
        assert torch.equal(a, b)
    third = GradEx(Linear(), outputs=outputs, dim=32, store=tmp_path / "store")
    assert third.estimate(["a", "b"]) == whole.estimate(["a", "b"])
    for path in (tmp_path / "store").glob("rows-*.npz"):
        with np.load(path, allow_pickle=False) as file:
            assert {"id", "task", "role", "tokens", "rows", "margin", "gradient"} == set(file.files)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from selection import test_gradex as t
from segloss.selection import GradEx, gradients
gradients.SHARD_SAMPLES = 2
def slow(model, inputs):
    time.sleep(0.02)
    return t.outputs(model, inputs)
explorer = GradEx(t.Linear(), outputs=slow, dim=32, store={store!r})
explorer.collect(t.samples_of(t.tasks_of("abc")), progress=lambda n: print(n, flush=True))
"""


def test_a_collection_killed_with_sigkill_goes_on(data, held_out, tmp_path):
    tests = str(__import__("pathlib").Path(__file__).resolve().parents[1])
    code = KILLED.format(tests=tests, store=str(tmp_path / "store"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(11):
        assert process.stdout.readline() == "1\n"
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    explorer = GradEx(Linear(), outputs=outputs, dim=32, store=tmp_path / "store")
    assert 8 <= len(explorer.store.ids) < 90
    explorer.collect(samples_of(data))
    explorer.collect(samples_of(held_out), role="target")
    for a, b in zip(numbers(collected(data, held_out)), numbers(explorer), strict=True):
        assert torch.equal(a, b)


def test_a_store_of_another_model_is_refused(data, tmp_path):
    GradEx(Linear(), outputs=outputs, dim=32, store=tmp_path).collect(samples_of(data)[:2])
    other = Linear()
    with torch.no_grad():
        other.weight[0] += 1e-9
    with pytest.raises(ValueError, match="holds gradients with weights="):
        GradEx(other, outputs=outputs, dim=32, store=tmp_path)
    with pytest.raises(ValueError, match="holds gradients with dim=32, not 16"):
        GradEx(Linear(), outputs=outputs, dim=16, store=tmp_path)
    assert json.loads((tmp_path / "store.json").read_text())["seed"] == 0


def test_a_damaged_file_is_named(data, tmp_path):
    GradEx(Linear(), outputs=outputs, dim=32, store=tmp_path).collect(samples_of(data)[:2])
    (path,) = tmp_path.glob("rows-*.npz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"rows-00000.npz is damaged .* remove it"):
        GradEx(Linear(), outputs=outputs, dim=32, store=tmp_path)


# ------------------------------------------------------------------------------------- models


class Tokens(nn.Module):
    """Three tokens' logits from an embedding of a position, with dropout and an unused weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(3, 5)
        self.unused = nn.Parameter(torch.ones(2))
        self.drop = nn.Dropout(0.5)

    def forward(self):
        return self.drop(self.table.weight)


def three(model, target):
    return model(), target


def test_one_row_per_answer_or_per_token():
    target = torch.tensor([1, -100, 4])
    for unit, rows in (("answer", 1), ("token", 2)):
        model = Tokens().train()
        explorer = GradEx(model, outputs=three, dim=8, unit=unit)
        explorer.collect([Sample("s", "t", target)])
        explorer.collect([Sample("s", "t", target)], role="target")
        assert model.training and len(explorer.rows("train").task) == rows
        loss = F.cross_entropy(model.table.weight, target).item()
        assert explorer.estimate([]) == pytest.approx(loss, rel=1e-5)


def test_a_causal_language_model_by_default(tmp_path):
    from train.tiny import build_model

    model = build_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    ids = torch.tensor([5, 9, 2, 7, 7])
    labels = torch.tensor([-100, -100, 2, 7, -100])
    explorer = GradEx(model, dim=16)
    explorer.collect([Sample("1", "t", {"input_ids": ids, "labels": labels})])
    explorer.collect([Sample("1", "t", {"input_ids": ids[None], "labels": labels[None]})], "target")
    assert torch.equal(explorer.rows("train").gradient, explorer.rows("target").gradient)
    model.eval()
    loss = model(input_ids=ids[None], labels=labels[None]).loss.item()
    assert explorer.estimate([]) == pytest.approx(loss, rel=1e-5)
    assert explorer.estimate(["t"]) < loss


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GradEx(nn.Identity()), ValueError, "model has no parameter with requires_grad"),
        (lambda: GradEx(Linear(), dim=0), ValueError, "dim is 0; it takes a whole number"),
        (lambda: GradEx(Linear(), unit="word"), ValueError, "unit is 'word'; it takes 'answer'"),
        (lambda: GradEx(Linear(), penalty=-1.0), ValueError, "penalty is -1.0; it takes"),
        (lambda: GradEx(Linear(), relative=True, radius=0.1), ValueError, "radius=0.1; it takes"),
        (lambda: GradEx(Linear(), relative=True, offset=False), ValueError, "offset=False and"),
        (lambda: GradEx(Linear()).estimate(["a"]), ValueError, "no samples yet: call collect"),
        (lambda: GradEx(Linear()).collect([], role="test"), ValueError, "role is 'test'"),
    ],
)
def test_wrong_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_wrong_tasks(data, held_out):
    explorer = collected(data, held_out)
    with pytest.raises(ValueError, match="subset holds 'z', of which there are no train samples"):
        explorer.estimate(["a", "z"])
    with pytest.raises(TypeError, match="subset is 'a'; it takes a collection of task names"):
        explorer.estimate("a")
    with pytest.raises(ValueError, match="target holds 'c', of which there are no target samples"):
        explorer.estimate(["a"], ["c"])
    with pytest.raises(ValueError, match="method is 'luck'"):
        explorer.select(method="luck")
    nothing = (torch.zeros(FEATURES, dtype=torch.float64), torch.tensor(-100))
    with pytest.raises(ValueError, match="sample 'x' has no token to predict"):
        explorer.collect([Sample("x", "a", nothing)])
