"""The reference against what is known without it: F.cross_entropy, limits, hand sums, papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LOSSES,
    SET_LOSSES,
    TOKEN_LOSSES,
    assert_near,
    example,
    naive,
    random_weights,
    value_and_grad,
)

from segloss import reference

V = 11


# ------------------------------------------------------------------------- known equalities


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_cross_entropy_is_that_of_torch(reduction, smoothing, weighted, ignore_index):
    logits, target = example(9, V, ignored=0.0 if ignore_index == 3 else 0.3)
    options = {
        "reduction": reduction,
        "label_smoothing": smoothing,
        "weight": random_weights(V) if weighted else None,
        "ignore_index": ignore_index,
    }
    ours = value_and_grad(reference.cross_entropy, logits, target, **options)
    torchs = value_and_grad(F.cross_entropy, logits, target, **options)
    assert_near(ours[0], torchs[0], 1e-14)
    assert_near(ours[1], torchs[1], 1e-14)


@pytest.mark.parametrize(
    "name, options, tolerance",
    [
        ("focal_loss", {"gamma": 0.0}, 1e-14),
        ("poly_loss", {"epsilon": 0.0}, 1e-14),
        ("generalized_cross_entropy", {"q": 1e-9}, 1e-7),
    ],
)
def test_limit_is_cross_entropy(name, options, tolerance):
    logits, target = example(2, 5, V)
    limit = value_and_grad(naive(name), logits, target, **options)
    truth = value_and_grad(F.cross_entropy, logits.flatten(0, 1), target.flatten())
    assert_near(limit[0], truth[0], tolerance)
    assert_near(limit[1].flatten(0, 1), truth[1], tolerance)


def test_token_losses_are_their_formulas():
    logits, target = example(8, V, ignored=0.0)
    p = logits.softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    q = (1 - p) ** 0.1 * p
    for name, expected in {
        "focal_loss": -((1 - p) ** 2) * p.log(),
        "poly_loss": -p.log() + (1 - p),
        "generalized_cross_entropy": (1 - p**0.7) / 0.7,
        "dft_loss": -p * p.log(),
        "self_adjusting_dice_loss": 1 - (2 * q + 1) / (q + 2),
    }.items():
        assert_near(naive(name)(logits, target, reduction="none"), expected, 1e-13, name)
    assert_near(reference.generalized_cross_entropy(logits, target, q=1.0), (1 - p).mean(), 1e-13)


def test_z_loss_adds_the_squared_logsumexp():
    logits, target = example(8, V, ignored=0.0)
    expected = F.cross_entropy(logits, target) + 0.3 * (logits.logsumexp(-1) ** 2).mean()
    assert_near(reference.cross_entropy(logits, target, z_loss=0.3), expected, 1e-14)


def test_dft_slope_treats_its_factor_as_constant():
    logits, target = example(8, V, ignored=0.0)
    _, grad = value_and_grad(reference.dft_loss, logits, target, reduction="sum")
    p = logits.softmax(-1)
    own = p.gather(-1, target[:, None])
    expected = own * (p - F.one_hot(target, V))
    upstream = grad.norm() / expected.norm()
    assert_near(grad.abs(), upstream * expected.abs(), 1e-13)


def slope_in_log_prob(name, log_prob, **options):
    """d loss / d log p through two logits whose log-softmax is (log p, log(1-p))."""
    logits = torch.tensor([[log_prob, math.log(-math.expm1(log_prob))]], dtype=torch.float64)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(naive(name)(logits, torch.tensor([0]), **options), logits)
    return grad[0, 0].item() / -math.expm1(log_prob)


def test_dft_of_an_impossible_target_is_zero():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0]], dtype=torch.float64)
    value, grad = value_and_grad(reference.dft_loss, logits, torch.tensor([0]))
    assert value == 0 and torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_slope_is_the_closed_form(gamma):
    p = 0.3
    nll = -math.log(p)
    expected = -((1 - p) ** gamma) * (1 + gamma * p * nll / (1 - p)) * -1
    assert slope_in_log_prob("focal_loss", -nll, gamma=gamma) == pytest.approx(-expected, rel=1e-12)


def test_detached_self_adjusting_dice_never_reverses():
    # h'(p) = -(2 + g) (1-p)^a / (q + 1 + g)^2
    for p in (0.1, 0.5, 0.9, 0.99):
        q = (1 - p) * p
        expected = -3 * (1 - p) / (q + 2) ** 2 * p
        slope = slope_in_log_prob("self_adjusting_dice_loss", math.log(p), alpha=1.0, detach=True)
        assert slope == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("p, expected", [(1e-300, 0.5), (0.5, 1 / 3), (1 - 1e-15, 0.5)])
def test_self_adjusting_dice_with_alpha_one_is_lowest_at_one_half(p, expected):
    logits = torch.tensor([[math.log(p), math.log1p(-p)]], dtype=torch.float64)
    loss = reference.self_adjusting_dice_loss(logits, torch.tensor([0]), alpha=1.0)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert slope_in_log_prob("self_adjusting_dice_loss", math.log(0.5), alpha=1.0) == pytest.approx(
        0, abs=1e-14
    )


# ---------------------------------------------------------------------------- region losses


def hand_sums(logits, target, classes):
    p = logits.softmax(-1)
    return [
        (
            sum(p[i, c] for i in range(len(target)) if target[i] == c),
            sum(p[i, c] for i in range(len(target)) if target[i] != -100),
            sum(target[i] == c for i in range(len(target))),
        )
        for c in classes
    ]


@pytest.mark.parametrize("classes", ["present", "all"])
def test_region_losses_are_their_formulas(classes):
    logits, target = example(9, V)
    columns = target[target != -100].unique().tolist() if classes == "present" else range(V)
    s = 1e-5
    sums = hand_sums(logits, target, columns)
    tversky = [1 - (tp + s) / (tp + 0.3 * (p - tp) + 0.7 * (n - tp) + s) for tp, p, n in sums]
    expected = {
        "dice_loss": [1 - (2 * tp + s) / (p + n + s) for tp, p, n in sums],
        "jaccard_loss": [1 - (tp + s) / (p + n - tp + s) for tp, p, n in sums],
        "tversky_loss": tversky,
        "focal_tversky_loss": [t**0.75 for t in tversky],
    }
    for name, values in expected.items():
        loss = naive(name)(logits, target, classes=classes)
        assert_near(loss, sum(values) / len(values), 1e-12, name)
        loss = naive(name)(logits, target, classes=classes, reduction="none")
        assert_near(loss, torch.stack(values), 1e-12, name)


def test_generalized_dice_is_its_formula():
    logits, target = example(9, V)
    sums = [(tp, p, n) for tp, p, n in hand_sums(logits, target, range(V)) if n > 0]
    overlap = 2 * sum(tp / n**2 for tp, _, n in sums) + 1e-5
    union = sum((p + n) / n**2 for _, p, n in sums) + 1e-5
    assert_near(reference.generalized_dice_loss(logits, target), 1 - overlap / union, 1e-12)


def test_micro_sums_over_the_classes_first():
    logits, target = example(9, V)
    tp, p, n = (sum(column) for column in zip(*hand_sums(logits, target, range(V)), strict=True))
    micro = reference.dice_loss(logits, target, classes="all", average="micro")
    assert_near(micro, 1 - (2 * tp + 1e-5) / (p + n + 1e-5), 1e-12)
    assert p.item() == pytest.approx(n.item()), "all classes together get one token's probability"


@pytest.mark.parametrize("alpha, name", [(0.5, "dice_loss"), (1.0, "jaccard_loss")])
def test_tversky_contains_dice_and_jaccard(alpha, name):
    logits, target = example(9, V)
    tversky = reference.tversky_loss(logits, target, alpha=alpha, beta=alpha, smooth=0.0)
    assert_near(tversky, naive(name)(logits, target, smooth=0.0), 1e-14)


@pytest.mark.parametrize("name", SET_LOSSES)
def test_per_sample_is_the_mean_over_the_samples_alone(name):
    logits, target = example(3, 5, V)
    target[1] = -100
    alone = [naive(name)(logits[i], target[i]) for i in (0, 2)]
    assert_near(naive(name)(logits, target, per_sample=True), sum(alone) / 2, 1e-14)
    each = naive(name)(logits, target, per_sample=True, reduction="none")
    assert_near(each, torch.stack([alone[0], torch.zeros(()), alone[1]]), 1e-14)
    ids = torch.tensor([7, 0, 3])[:, None].expand(3, 5).flatten()
    flat = (logits.flatten(0, 1), target.flatten())
    by_id = naive(name)(*flat, per_sample=True, sample_ids=ids, reduction="none")
    assert_near(by_id, each[[1, 2, 0]], 1e-14)
    with pytest.raises(ValueError, match="sample_ids"):
        naive(name)(*flat, per_sample=True)


@pytest.mark.parametrize("name", sorted(set(SET_LOSSES) - {"generalized_dice_loss"}))
def test_class_weights_weigh_the_mean_over_classes(name):
    logits, target = example(9, V)
    weight = random_weights(V)
    values = naive(name)(logits, target, classes="all", reduction="none")
    loss = naive(name)(logits, target, classes="all", weight=weight)
    assert_near(loss, (weight * values).sum() / weight.sum(), 1e-14)


@pytest.mark.parametrize("name", SET_LOSSES)
def test_normalizer_multiplies_by_the_share_of_the_tokens(name):
    logits, target = example(9, V)
    weight = random_weights(9)
    loss = naive(name)(logits, target, token_weight=weight)
    share = weight[target != -100].sum() / 40
    scaled = naive(name)(logits, target, token_weight=weight, normalizer=40)
    assert_near(scaled, loss * share, 1e-14)


# ----------------------------------------------------------------------------------- Lovász


def lovasz_as_berman(probabilities, target, weight=None):
    """The published loop over the present classes, one sort each."""
    losses = []
    for c in target.unique():
        foreground = (target == c).double()
        errors, order = (foreground - probabilities[:, c]).abs().sort(descending=True)
        foreground = foreground[order]
        intersection = foreground.sum() - foreground.cumsum(0)
        union = foreground.sum() + (1 - foreground).cumsum(0)
        jaccard = 1 - intersection / union
        jaccard[1:] = jaccard[1:] - jaccard[:-1].clone()
        losses.append(errors @ jaccard)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(10))
def test_lovasz_is_the_published_loop(seed):
    logits, target = example(12, V, seed=seed, ignored=0.0)
    ours = value_and_grad(reference.lovasz_softmax, logits, target)
    loop = value_and_grad(lambda z, y: lovasz_as_berman(z.softmax(-1), y), logits, target)
    assert_near(ours[0], loop[0], 1e-14)
    assert_near(ours[1], loop[1], 1e-12)


def test_lovasz_of_one_token_is_its_error():
    logits, _ = example(1, V)
    p = logits.softmax(-1)[0, 4]
    assert_near(reference.lovasz_softmax(logits, torch.tensor([4])), 1 - p, 1e-14)


def test_lovasz_of_an_absent_class_is_its_largest_probability():
    logits, target = example(9, V, ignored=0.0)
    values = reference.lovasz_softmax(logits, target, classes="all", reduction="none")
    absent = [c for c in range(V) if c not in target]
    assert_near(values[absent], logits.softmax(-1).amax(0)[absent], 1e-14)


def test_lovasz_of_hard_predictions_is_the_jaccard_loss():
    # the extension's defining property: equal to the set function at the corners
    predicted = torch.tensor([0, 0, 1, 2, 1, 1, 0])
    target = torch.tensor([0, 1, 1, 2, 2, 1, 0])
    logits = torch.where(F.one_hot(predicted, 3) == 1, 0.0, -torch.inf).double()
    values = reference.lovasz_softmax(logits, target, reduction="none")
    for c in range(3):
        union = ((predicted == c) | (target == c)).sum().item()
        overlap = ((predicted == c) & (target == c)).sum().item()
        assert values[c].item() == pytest.approx(1 - overlap / union, abs=1e-15)


# ------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("name", LOSSES)
def test_weight_two_is_a_token_listed_twice(name):
    logits, target = example(9, V)
    times = torch.tensor([1, 2, 0, 3, 1, 1, 2, 0, 1])
    weighted = value_and_grad(naive(name), logits, target, token_weight=times.double())
    row = torch.arange(9).repeat_interleave(times)
    listed = value_and_grad(naive(name), logits[row], target[row])
    assert_near(weighted[0], listed[0], 1e-13)
    assert_near(weighted[1], torch.zeros_like(logits).index_add(0, row, listed[1]), 1e-13)


@pytest.mark.parametrize("classes", ["present", "all"])
@pytest.mark.parametrize("name", LOSSES)
def test_padding_with_minus_infinity_changes_nothing(name, classes):
    logits, target = example(9, V)
    options = {"classes": classes} if name in SET_LOSSES else {}
    if name == "cross_entropy":
        options["label_smoothing"] = 0.1
    plain = value_and_grad(naive(name), logits, target, **options)
    padded = F.pad(logits, (0, 5), value=-torch.inf)
    value, grad = value_and_grad(naive(name), padded, target, **options)
    assert_near(value, plain[0], 1e-14)
    assert_near(grad[:, :V], plain[1], 1e-14)
    assert (grad[:, V:] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_rows_may_hold_anything(name):
    logits, target = example(9, V)
    plain = value_and_grad(naive(name), logits, target)
    junk = torch.full((3, V), torch.nan, dtype=torch.float64)
    more = torch.cat([logits, junk]), F.pad(target, (0, 3), value=-100)
    value, grad = value_and_grad(naive(name), *more)
    assert torch.equal(value, plain[0]) and torch.equal(grad[:9], plain[1])
    assert (grad[9:] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tokens", [0, 4])
def test_without_a_valid_token_the_loss_is_zero_and_connected(name, tokens, reduction):
    logits = torch.randn(tokens, V, dtype=torch.float64)
    target = torch.full((tokens,), -100)
    value, grad = value_and_grad(naive(name), logits, target, reduction=reduction)
    assert (value == 0).all() and torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize(
    "options", [{}, {"per_sample": True}, {"classes": "all"}, {"weight": True}]
)
@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"dft_loss"}))  # it has a stopgrad
def test_gradcheck(name, options):
    if name in TOKEN_LOSSES:
        options = {key: value for key, value in options.items() if key == "weight"}
    if "weight" in options:
        options = {"weight": random_weights(5), "token_weight": random_weights(2, 3)}
    logits, target = example(2, 3, 5, classes=3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: naive(name)(z, target, **options), logits)


# -------------------------------------------------------------------------- saturated rows


SATURATED = {
    "cross_entropy": [{"label_smoothing": 0.1}, {"z_loss": 0.1}],
    "focal_loss": [{"gamma": 0.5}, {"gamma": 0.0}, {"gamma": 1.0}],
    "self_adjusting_dice_loss": [{}, {"alpha": 1.0}, {"detach": True}],
    "generalized_cross_entropy": [{"q": 0.3}],
    "focal_tversky_loss": [{}, {"smooth": 0.0}],
}
CASES = [(name, options) for name in LOSSES for options in SATURATED.get(name, [{}])]


@pytest.mark.parametrize("name, options", CASES)
@pytest.mark.parametrize("lift", [30.0, 36.5, 37.0, 1000.0])
def test_certain_tokens_have_finite_small_gradients(name, options, lift):
    # 36.7 is where 1 - p falls below half a unit in the last place of float64
    logits, target = example(6, V, ignored=0.0)
    logits = logits.scatter_add(-1, target[:, None], torch.full((6, 1), lift).double())
    value, grad = value_and_grad(naive(name), logits, target, **options)
    assert value.isfinite() and grad.isfinite().all()
    if name not in ("cross_entropy", "self_adjusting_dice_loss"):
        assert value.abs() < 1e-4 and grad.norm() < 1e-4


@pytest.mark.parametrize("name, options", CASES)
def test_hopeless_tokens_have_finite_gradients(name, options):
    logits, target = example(6, V, ignored=0.0)
    logits = logits.scatter_add(-1, target[:, None], torch.full((6, 1), -1000.0).double())
    value, grad = value_and_grad(naive(name), logits, target, **options)
    assert value.isfinite() and grad.isfinite().all()
    assert value.abs() > 0.4 or name == "dft_loss"  # stopgrad(p) = 0 silences it


# ------------------------------------------------------------------------------ the logits


def test_transform_is_scale_then_softcap():
    x = torch.tensor([-torch.inf, -3.0, 0.5, 40.0], dtype=torch.float64, requires_grad=True)
    capped = reference.transform(x, softcap=5.0, scale=2.0)
    assert capped[0] == -torch.inf
    assert_near(capped[1:], 5 * torch.tanh(2 * x[1:] / 5), 1e-15)
    assert_near(reference.transform(x, scale=2.0)[1:], 2 * x[1:], 1e-15)
    (grad,) = torch.autograd.grad(capped[1:].sum() + capped[0], x)
    assert_near(grad[1:], 2 * (1 - torch.tanh(2 * x[1:] / 5) ** 2), 1e-14)
    assert grad[0] == 0


def test_linear_logits_multiplies_and_adds():
    hidden, weight, bias = torch.randn(2, 3, 4), torch.randn(V, 4), torch.randn(V)
    a, b = torch.randn(2, 4), torch.randn(V, 2)
    expected = F.linear(hidden, weight + 0.5 * b @ a, bias)
    logits = reference.linear_logits(hidden, weight, bias, lora=(a, b, 0.5))
    assert_near(logits, expected, 1e-6)
    capped = reference.linear_logits(hidden, weight, softcap=3.0, scale=0.7)
    assert_near(capped, 3 * torch.tanh(0.7 * F.linear(hidden, weight) / 3), 1e-6)


def test_statistics_are_softmax_sums():
    logits, target = example(2, 5, V)
    valid = target != -100
    p = logits.softmax(-1)
    s = reference.logit_statistics(logits, target, entropy=True, argmax=True, classes="present")
    assert torch.equal(s.valid, valid)
    assert_near(s.log_prob[valid], p[valid, target[valid]].log(), 1e-14)
    assert_near(s.lse[valid], logits.exp().sum(-1).log()[valid], 1e-14)
    assert_near(s.entropy[valid], torch.distributions.Categorical(p[valid]).entropy(), 1e-14)
    assert torch.equal(s.argmax, logits.argmax(-1).masked_fill(~valid, -1))
    assert torch.equal(s.classes, target[valid].unique())
    assert_near(s.prob_sum, p[valid].sum(0)[s.classes], 1e-14)
    assert (torch.stack([s.log_prob, s.lse, s.entropy])[:, ~valid] == 0).all()
    every = reference.logit_statistics(logits, target, classes="all")
    assert_near(every.prob_sum.sum(), valid.sum(), 1e-14)
    some = reference.logit_statistics(logits, target, classes=torch.tensor([3, 1]))
    assert_near(some.prob_sum, every.prob_sum[[3, 1]], 1e-15)


def test_return_statistics_come_detached():
    logits, target = example(7, V)
    logits.requires_grad_()
    loss, s = reference.dice_loss(logits, target, return_statistics=True)
    assert torch.equal(loss, reference.dice_loss(logits, target))
    assert loss.requires_grad and not s.log_prob.requires_grad and not s.entropy.requires_grad
    assert_near(-s.log_prob.sum() / s.valid.sum(), F.cross_entropy(logits, target), 1e-14)


# ----------------------------------------------------------------------- the published code


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_published_focal_averages_the_ignored_tokens_in(gamma):
    # finding 2: (n_v * loss + n_m * (1 - 1/V)^g * ln V) / (n_v + n_m), gradient times n_v / n
    logits, target = example(9, V)
    valid = (target != -100).sum().item()
    assert 0 < valid < 9
    true = value_and_grad(reference.focal_loss, logits, target, gamma=gamma)
    published = value_and_grad(reference.focal_loss, logits, target, gamma=gamma, published=True)
    uniform = (1 - 1 / V) ** gamma * math.log(V)
    assert_near(published[0], (valid * true[0] + (9 - valid) * uniform) / 9, 1e-13)
    assert_near(published[1], true[1] * valid / 9, 1e-13)


def test_published_self_adjusting_dice_averages_the_ignored_tokens_in():
    logits, target = example(9, V)
    valid = (target != -100).sum().item()
    q = (1 - 1 / V) * (1 / V)
    bogus = 1 - (2 * q + 1) / (q + 2)
    true = reference.self_adjusting_dice_loss(logits, target, alpha=1.0)
    published = reference.self_adjusting_dice_loss(logits, target, alpha=1.0, published=True)
    assert_near(published, (valid * true + (9 - valid) * bogus) / 9, 1e-13)


def test_published_generalized_dice_has_no_gradient():
    # finding 1, at a vocabulary of 32,000 and float32 as in the paper's runs
    logits, target = example(2, 16, 32000, dtype=torch.float32, ignored=0.0)
    value, grad = value_and_grad(reference.generalized_dice_loss, logits, target, published=True)
    assert -1e-18 < value < 0
    assert grad.norm() < 1e-20
    _, present_only = value_and_grad(reference.generalized_dice_loss, logits, target)
    assert present_only.norm() > 1e-4


def test_published_generalized_dice_is_minus_two_overlaps():
    logits, target = example(2, 6, 3, ignored=0.0, classes=3)
    target[:, :3] = torch.arange(3)  # no class absent: only sign, factor and offset differ
    ours = reference.generalized_dice_loss(logits, target, per_sample=True, smooth=0.0)
    published = reference.generalized_dice_loss(logits, target, published=True, smooth=0.0)
    assert_near(published, ours - 1, 1e-9)
    with pytest.raises(ValueError, match="reduction"):
        reference.generalized_dice_loss(logits, target, published=True, reduction="sum")


def test_published_lovasz_gains_a_constant_class_zero():
    logits, target = example(9, V, seed=3)
    target[target == 0] = 1
    assert (target == -100).any()
    true = reference.lovasz_softmax(logits, target, reduction="none")
    published = reference.lovasz_softmax(logits, target, reduction="none", published=True)
    assert len(published) == len(true) + 1
    uniform = (target == -100).sum()
    masked = logits.masked_fill((target == -100)[:, None], 0), target.clamp(min=0)
    assert uniform > 0 and torch.equal(
        published, reference.lovasz_softmax(*masked, reduction="none")
    )


def test_published_answer_slice():
    # two rows of 8 tokens, left-padded; the answers start at positions 4 and 6
    labels = torch.arange(16).view(2, 8)
    logits = F.one_hot(labels, 16).double()
    z, y = reference.answer_slice(logits, labels, torch.tensor([4, 6]))
    assert y.tolist() == [[4, 5, 6], [-100, -100, 14]], "the last token is never a target"
    assert z.argmax(-1).tolist() == [[3, 4, 5], [11, 12, 13]]
