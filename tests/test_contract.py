"""The contract, line by line: what every loss promises whatever it computes."""

import re

import pytest
import torch
from helpers import (
    LOSSES,
    SET_LOSSES,
    TOKEN_LOSSES,
    assert_matches_reference,
    assert_near,
    example,
    fused,
    module,
    naive,
    random_weights,
    upstream_like,
    value_and_grad,
)

import segloss
from segloss import reference

V = 11
every_loss = pytest.mark.parametrize("name", LOSSES)


def combined():
    return 0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.LovaszSoftmaxLoss()


# ------------------------------------------------------------------ 1. dtypes of the result


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_is_float32_or_float64(name, dtype):
    logits, target = example(2, 5, V, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    value, grad = value_and_grad(fused(name), logits, target)
    assert value.dtype == expected and value.shape == () and grad.dtype == dtype
    loss, statistics = fused(name)(logits, target, return_statistics=True)
    assert loss.dtype == statistics.log_prob.dtype == statistics.entropy.dtype == expected
    assert_near(loss, naive(name)(logits.double(), target), 1e-5)


@every_loss
def test_int32_targets_are_the_same(name):
    logits, target = example(7, V)
    of_int64 = value_and_grad(fused(name), logits, target)
    of_int32 = value_and_grad(fused(name), logits, target.int())
    assert torch.equal(of_int64[0], of_int32[0]) and torch.equal(of_int64[1], of_int32[1])


# ------------------------------------------------- 2. nothing is written, backward repeats


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_callers_tensors_are_never_written(name, dtype):
    logits, target = example(2, 5, V, dtype=dtype)
    given = {
        "logits": logits.requires_grad_(),
        "target": target,
        "token_weight": random_weights(2, 5).float(),
        "weight": random_weights(V).float(),
        "sample_ids": torch.arange(10).view(2, 5) % 3,
    }
    if name in SET_LOSSES:
        given["per_sample"] = True
    before = {k: v.detach().clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    loss = fused(name)(**given)
    upstream = torch.full_like(loss, 2.5)
    loss.backward(upstream)
    assert upstream == 2.5
    for key, value in before.items():
        assert torch.equal(given[key].detach(), value), key


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_gives_the_same_bits(name, reduction):
    logits, target = example(2, 5, V)
    logits.requires_grad_()
    loss = fused(name)(logits, target, reduction=reduction)
    upstream = upstream_like(loss)
    (first,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    (tripled,) = torch.autograd.grad(loss, logits, 3 * upstream)
    assert torch.equal(first, kept) and torch.equal(second, kept)
    assert_near(tripled, 3 * kept, 1e-14)
    assert_near(kept, value_and_grad(naive(name), logits, target, reduction=reduction)[1])


@every_loss
def test_double_backward_says_no(name):
    logits, target = example(7, V)
    logits.requires_grad_()
    with pytest.raises(RuntimeError, match=r"(?i)twice|double|second"):
        loss = fused(name)(logits, target)
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        # beside the loss: a gradient taken for a constant would leave the penalty out in silence
        (loss + grad.square().sum()).backward()


@every_loss
def test_without_grad_there_is_no_graph(name):
    logits, target = example(7, V)
    loss = fused(name)(logits, target)
    assert not loss.requires_grad
    logits.requires_grad_()
    with torch.no_grad():
        quiet = fused(name)(logits, target)
    assert not quiet.requires_grad and torch.equal(quiet, loss)
    assert_near(loss, naive(name)(logits, target).detach())


# --------------------------------------------------------------------- 3. no valid token


@every_loss
@pytest.mark.parametrize("how", ["ignored", "weight 0", "no rows", "no time"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_token_gives_zero_connected_to_the_graph(name, how, reduction):
    shape = {"no rows": (0, V), "no time": (2, 0, V)}.get(how, (2, 3, V))
    logits, target = example(*shape, ignored=0.0)
    options = {"reduction": reduction}
    if how == "ignored":
        target = torch.full_like(target, -100)
    if how == "weight 0":
        options["token_weight"] = torch.zeros(target.shape)
    value, grad = value_and_grad(fused(name), logits, target, **options)
    assert value.shape == naive(name)(logits, target, **options).shape
    assert (value == 0).all() and torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize("name", SET_LOSSES)
@pytest.mark.parametrize("options", [{"per_sample": True}, {"classes": "all"}, {"normalizer": 7}])
def test_no_valid_token_in_any_sample_or_class(name, options):
    logits, target = example(2, 3, V)
    target = torch.full_like(target, -100)
    value, grad = value_and_grad(fused(name), logits, target, **options)
    assert value == 0 and torch.equal(grad, torch.zeros_like(logits))
    if "normalizer" not in options:
        each = fused(name)(logits, target, reduction="none", **options)
        assert torch.equal(each, naive(name)(logits, target, reduction="none", **options))


# --------------------------------------------------------------------- 4. ignored tokens


@every_loss
@pytest.mark.parametrize("ignored_row", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_an_ignored_row_may_hold_anything(name, ignored_row):
    logits, target = example(9, V)
    where = target == -100
    assert where.any()
    plain = value_and_grad(fused(name), logits, target)
    spoilt = logits.masked_fill(where[:, None], ignored_row)
    value, grad = value_and_grad(fused(name), spoilt, target)
    assert torch.equal(value, plain[0]) and torch.equal(grad, plain[1])
    assert (grad[where] == 0).all()
    by_weight = target.masked_fill(where, 1)
    value, grad = value_and_grad(fused(name), spoilt, by_weight, token_weight=(~where).double())
    assert_near(value, plain[0], 1e-14)
    assert_near(grad, plain[1], 1e-14)


@every_loss
def test_appended_ignored_rows_leave_every_bit(name):
    logits, target = example(9, V, ignored=0.0)
    plain = value_and_grad(fused(name), logits, target)
    more = torch.cat([logits, logits]), torch.cat([target, torch.full_like(target, -100)])
    value, grad = value_and_grad(fused(name), *more)
    assert torch.equal(value, plain[0]) and torch.equal(grad[:9], plain[1])
    assert (grad[9:] == 0).all()


@every_loss
def test_ignore_index_may_be_a_class(name):
    logits, target = example(9, V, ignored=0.0)
    ignored = int(target[2])
    assert_matches_reference(name, logits, target, ignore_index=ignored)
    as_usual = fused(name)(logits, target.masked_fill(target == ignored, -100))
    assert torch.equal(fused(name)(logits, target, ignore_index=ignored), as_usual)


# ------------------------------------------------- 5. any upstream, stride, size and value

STRIDES = {
    "shifted sequence": lambda z: z[:, :-1],
    "leading rows": lambda z: z[1:],
    "other order": lambda z: z.transpose(0, 1),
    "every second column": lambda z: z[..., ::2],
    "a window of columns": lambda z: z[..., 3:-2],
    "columns far apart": lambda z: z.transpose(-1, -2).contiguous().transpose(-1, -2),
    "one row many times": lambda z: z[:, :1].expand(-1, 4, -1),
}


@every_loss
@pytest.mark.parametrize("stride", STRIDES)
def test_any_strides(name, stride):
    logits, _ = example(3, 5, 2 * V)
    view = STRIDES[stride]
    shape = view(logits).shape
    _, target = example(*shape, seed=3)
    assert_matches_reference(name, logits, target, source=view, transform=view)


@every_loss
def test_strided_and_contiguous_give_the_same_bits(name):
    logits, target = example(3, 5, V)
    spread = torch.stack([logits, logits], -1).flatten(-2)[..., ::2]
    assert not spread.is_contiguous()
    of_strided, of_plain = fused(name)(spread, target), fused(name)(logits, target)
    assert torch.equal(of_strided, of_plain)


@every_loss
def test_strided_targets_and_weights(name):
    logits, labels = example(3, 5, V)
    target = labels.T.contiguous().T
    token_weight = random_weights(5, 3).T
    weight = random_weights(2 * V)[::2]
    assert_matches_reference(name, logits, target, token_weight=token_weight, weight=weight)
    one = torch.tensor(2.0).expand(3, 5)
    assert_matches_reference(name, logits, target, token_weight=one)


@every_loss
def test_any_upstream_gradient(name):
    logits, target = example(3, 5, V)
    logits.requires_grad_()
    _, expected = value_and_grad(naive(name), logits, target, reduction="sum")
    expected = expected / upstream_like(naive(name)(logits, target))
    values = fused(name)(logits, target, reduction="none")
    (of_sum,) = torch.autograd.grad(values.sum(), logits, retain_graph=True)  # stride 0
    assert_near(of_sum, expected)
    (nothing,) = torch.autograd.grad((0 * values).sum(), logits, retain_graph=True)
    assert torch.equal(nothing, torch.zeros_like(logits))
    (scaled,) = torch.autograd.grad(-1e5 * values.mean(), logits, retain_graph=True)
    assert_near(scaled, expected * -1e5 / values.numel())
    (downstream,) = torch.autograd.grad(values.square().sum(), logits)
    naive_values = naive(name)(logits, target, reduction="none")
    (truth,) = torch.autograd.grad(naive_values.square().sum(), logits)
    assert_near(downstream, truth)


@every_loss
@pytest.mark.parametrize("shape", [(0, V), (1, V), (2, 0, V), (0, 3, V), (1, 1, V)], ids=str)
def test_no_token_and_one_token(name, shape):
    logits, target = example(*shape)
    for reduction in ("mean", "sum", "none"):
        assert_matches_reference(name, logits, target, reduction=reduction)


@every_loss
def test_one_class(name):
    # p is always 1: nothing to lose and nothing to learn
    logits, target = example(5, 1)
    assert (target == 0).any()
    value, grad = value_and_grad(fused(name), logits, target)
    assert_near(value, naive(name)(logits, target))
    assert grad.abs().max() < 1e-12
    if name != "self_adjusting_dice_loss":
        assert value.abs() < 1e-12


@every_loss
@pytest.mark.parametrize("where", ["columns", "scattered"])
def test_minus_infinity_changes_nothing(name, where):
    logits, target = example(9, V, classes=4)
    if where == "columns":
        gone = torch.tensor([c not in target for c in range(V)]).expand(9, V)
    else:
        gone = torch.rand(9, V, generator=torch.Generator().manual_seed(5)) < 0.5
        gone.scatter_(1, target.clamp(min=0)[:, None], False)
    logits = logits.masked_fill(gone, -torch.inf)
    for options in ({}, {"classes": "all"}) if name in SET_LOSSES else ({},):
        assert_matches_reference(name, logits, target, **options)
    _, grad = value_and_grad(fused(name), logits, target)
    assert (grad[gone] == 0).all()
    if where == "columns":
        keep = ~gone[0]
        renamed = torch.where(target == -100, -100, (keep.cumsum(0) - 1)[target.clamp(min=0)])
        value, narrow = value_and_grad(fused(name), logits[:, keep], renamed)
        assert_near(fused(name)(logits, target), value)
        assert_near(grad[:, keep], narrow)


def test_label_smoothing_ranges_over_the_finite_columns():
    logits, target = example(9, V, classes=4, ignored=0.0)
    logits[:, [c for c in range(V) if c not in target]] = -torch.inf
    assert_matches_reference("cross_entropy", logits, target, label_smoothing=0.3)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@pytest.mark.parametrize("poison", ["row", "one logit"])
def test_a_row_of_nan_poisons_its_own_token_only(name, poison):
    logits, target = example(9, V, ignored=0.0)
    clean, clean_grad = value_and_grad(fused(name), logits, target, reduction="none")
    spoilt = logits.clone()
    spoilt[4] = (
        torch.nan if poison == "row" else logits[4].index_fill(0, torch.tensor([7]), torch.nan)
    )
    value, grad = value_and_grad(fused(name), spoilt, target, reduction="none")
    others = torch.arange(9) != 4
    assert value[4].isnan()
    assert torch.equal(value[others], clean[others])
    assert torch.equal(grad[others], clean_grad[others])


@pytest.mark.parametrize("name", SET_LOSSES)
@pytest.mark.parametrize("options", [{}, {"classes": "all"}, {"per_sample": True}], ids=str)
def test_a_row_of_nan_makes_a_region_loss_nan(name, options):
    logits, target = example(3, 5, V, ignored=0.0)
    logits[1, 2] = torch.nan
    assert fused(name)(logits, target, **options).isnan()
    if options == {"per_sample": True}:
        each = fused(name)(logits, target, reduction="none", **options)
        assert each.isnan().tolist() == [False, True, False]


def test_a_row_of_nan_poisons_its_own_statistics_only():
    logits, target = example(9, V, ignored=0.0)
    clean = segloss.logit_statistics(logits, target, entropy=True)
    logits[4] = torch.nan
    spoilt = segloss.logit_statistics(logits, target, entropy=True)
    others = torch.arange(9) != 4
    for field in ("log_prob", "lse", "entropy"):
        assert getattr(spoilt, field)[4].isnan(), field
        assert torch.equal(getattr(spoilt, field)[others], getattr(clean, field)[others]), field


@every_loss
@pytest.mark.parametrize("wrong", [V, V + 5, -1, -101, 2**40])
def test_a_target_out_of_range_is_named_with_its_position(name, wrong):
    logits, target = example(7, V)
    target[3] = wrong
    with pytest.raises(ValueError, match=rf"target\[3\] is {wrong}\b.*{V}.*-100"):
        fused(name)(logits, target)
    with pytest.raises(ValueError, match=rf"target\[3\] is {wrong}\b"):
        module(name)(logits, target)


def test_a_target_out_of_range_in_a_batch_and_in_the_statistics():
    logits, target = example(2, 5, V)
    target[1, 2] = V
    with pytest.raises(ValueError, match=rf"target\[1, ?2\] is {V}\b"):
        segloss.cross_entropy(logits, target)
    with pytest.raises(ValueError, match=rf"target\[1, ?2\] is {V}\b"):
        segloss.logit_statistics(logits, target)
    with pytest.raises(ValueError, match=rf"target\[1, ?2\] is {V}\b"):
        combined()(logits, target)


# ------------------------------------------------------------------------ 6. determinism


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_inputs_same_bits(name, dtype, threads):
    logits, target = example(150, 3001, dtype=dtype, classes=30)
    first = value_and_grad(fused(name), logits, target)
    for _ in range(2):
        again = value_and_grad(fused(name), logits, target)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    truth = value_and_grad(naive(name), logits.double(), target)
    assert_near(first[0], truth[0], 1e-5)
    assert_near(first[1], truth[1], 1e-4 if dtype == torch.float32 else 3e-3)


# ---------------------------------------------------------------------------- 8. bad input

GOOD = example(7, V)
BAD_ARGUMENTS = {
    # what the message must name: the arguments
    "target: one token short": ("target", {"target": GOOD[1][:-1]}),
    "target: logits' shape": ("target", {"target": GOOD[1][:, None].expand(7, V)}),
    "target: probabilities": ("target", {"target": torch.rand(7, V)}),
    "target: float": ("target", {"target": GOOD[1].float()}),
    "target: bool": ("target", {"target": GOOD[1] > 0}),
    "target: list": ("target", {"target": GOOD[1].tolist()}),
    "target: elsewhere": ("target", {"target": GOOD[1].to("meta")}),
    "logits: integers": ("logits", {"logits": GOOD[0].long()}),
    "logits: complex": ("logits", {"logits": GOOD[0].to(torch.complex64)}),
    "logits: list": ("logits", {"logits": GOOD[0].tolist()}),
    "logits: scalar": ("logits", {"logits": torch.tensor(1.0), "target": torch.tensor(0)}),
    "logits: no class": ("logits", {"logits": torch.zeros(7, 0)}),
    "weight: too long": ("weight", {"weight": torch.ones(V + 1)}),
    "weight: matrix": ("weight", {"weight": torch.ones(1, V)}),
    "weight: list": ("weight", {"weight": [1.0] * V}),
    "weight: integers": ("weight", {"weight": torch.ones(V, dtype=torch.long)}),
    "weight: elsewhere": ("weight", {"weight": torch.ones(V, device="meta")}),
    "token_weight: too short": ("token_weight", {"token_weight": torch.ones(6)}),
    "token_weight: column": ("token_weight", {"token_weight": torch.ones(7, 1)}),
    "token_weight: list": ("token_weight", {"token_weight": [1.0] * 7}),
    "token_weight: elsewhere": ("token_weight", {"token_weight": torch.ones(7, device="meta")}),
    "sample_ids: too short": ("sample_ids", {"sample_ids": torch.arange(6)}),
    "sample_ids: float": ("sample_ids", {"sample_ids": torch.arange(7.0)}),
    "sample_ids: list": ("sample_ids", {"sample_ids": list(range(7))}),
    "sample_ids: elsewhere": ("sample_ids", {"sample_ids": torch.arange(7, device="meta")}),
    "reduction": ("reduction", {"reduction": "avg"}),
    "reduction: None": ("reduction", {"reduction": None}),
    "ignore_index: float": ("ignore_index", {"ignore_index": 0.5}),
    "ignore_index: None": ("ignore_index", {"ignore_index": None}),
    "normalizer: with sum": ("normalizer", {"normalizer": 4, "reduction": "sum"}),
    "normalizer: with none": ("normalizer", {"normalizer": 4, "reduction": "none"}),
    "normalizer: text": ("normalizer", {"normalizer": "many"}),
}


@every_loss
@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name, bad):
    argument, given = BAD_ARGUMENTS[bad]
    if argument == "sample_ids" and name in SET_LOSSES:
        given = given | {"per_sample": True}
    arguments = {"logits": GOOD[0], "target": GOOD[1]} | given
    if (name, bad) == ("cross_entropy", "target: probabilities"):
        # which it takes as PyTorch's does
        assert_near(
            fused(name)(**arguments), torch.nn.functional.cross_entropy(**renamed(arguments))
        )
        return
    with pytest.raises((ValueError, TypeError), match=rf"\b{argument}\b"):
        fused(name)(**arguments)


def renamed(arguments: dict) -> dict:
    return {"input": arguments["logits"], "target": arguments["target"].to(arguments["logits"])}


BAD_OPTIONS = [
    ("cross_entropy", "label_smoothing", 1.5),
    ("cross_entropy", "label_smoothing", -0.1),
    ("cross_entropy", "z_loss", "large"),
    ("focal_loss", "gamma", -1.0),
    ("generalized_cross_entropy", "q", -0.5),
    ("self_adjusting_dice_loss", "alpha", -0.5),
    ("focal_tversky_loss", "gamma", -1.0),
    ("lovasz_softmax", "tolerance", -1e-3),
    ("lovasz_softmax", "classes", "some"),
    *[(name, "smooth", -1.0) for name in SET_LOSSES if name != "lovasz_softmax"],
    *[(name, "classes", "some") for name in SET_LOSSES],
    *[(name, "average", "weighted") for name in ("dice_loss", "jaccard_loss", "tversky_loss")],
]


@pytest.mark.parametrize("name, option, wrong", BAD_OPTIONS)
def test_bad_options_are_named_with_what_came(name, option, wrong):
    logits, target = GOOD
    with pytest.raises((ValueError, TypeError), match=rf"\b{option}\b.*{re.escape(str(wrong))}"):
        fused(name)(logits, target, **{option: wrong})
    with pytest.raises((ValueError, TypeError), match=rf"\b{option}\b.*{re.escape(str(wrong))}"):
        module(name, **{option: wrong})(logits, target)


@every_loss
def test_a_misspelt_keyword_is_a_type_error(name):
    with pytest.raises(TypeError, match="reduce"):
        fused(name)(*GOOD, reduce="mean")
    with pytest.raises(TypeError, match="reduce"):
        module(name, reduce="mean")


@pytest.mark.parametrize("name", SET_LOSSES)
def test_per_sample_without_samples(name):
    with pytest.raises(ValueError, match="sample_ids"):
        fused(name)(*GOOD, per_sample=True)


@pytest.mark.parametrize(
    "argument, given",
    [
        ("softcap", {"softcap": 0.0}),
        ("softcap", {"softcap": -3.0}),
        ("scale", {"scale": "big"}),
        ("logits", {"logits": [1.0]}),
    ],
)
def test_bad_logit_sources_are_named(argument, given):
    with pytest.raises((ValueError, TypeError), match=rf"\b{argument}\b"):
        given = {"logits": GOOD[0]} | given
        segloss.cross_entropy(segloss.DenseLogits(given.pop("logits"), **given), GOOD[1])


# -------------------------------------------------------------------------- the statistics


@pytest.mark.parametrize("shape", [(9, V), (2, 5, V), (0, V), (2, 1, 3, V)], ids=str)
def test_statistics_equal_the_reference(shape):
    logits, target = example(*shape)
    ours = segloss.logit_statistics(logits, target, entropy=True, argmax=True)
    true = reference.logit_statistics(logits, target, entropy=True, argmax=True)
    for field in ("log_prob", "lse", "entropy"):
        assert_near(getattr(ours, field), getattr(true, field), what=field)
        assert (getattr(ours, field)[target == -100] == 0).all()
    assert torch.equal(ours.argmax, true.argmax) and torch.equal(ours.valid, true.valid)
    assert ours.argmax.dtype == torch.int64 and ours.valid.dtype == torch.bool


def test_statistics_not_asked_for_are_none():
    ours = segloss.logit_statistics(*GOOD)
    assert ours.entropy is None and ours.argmax is None
    assert ours.prob_sum is None and ours.classes is None
    assert_near(ours.log_prob, reference.logit_statistics(*GOOD).log_prob)


@pytest.mark.parametrize("classes", ["present", "all", torch.tensor([7, 2, 3])], ids=str)
def test_probability_sums(classes):
    logits, target = GOOD
    ours = segloss.logit_statistics(logits, target, classes=classes)
    every = reference.logit_statistics(logits, target, classes="all").prob_sum
    assert_near(ours.prob_sum, every[ours.classes])
    expected = {"present": target[target != -100].unique(), "all": torch.arange(V)}
    if isinstance(classes, str):
        assert torch.equal(ours.classes, expected[classes])
    else:
        assert torch.equal(ours.classes, classes)


@pytest.mark.parametrize("classes", [None, "present", "all"])
@pytest.mark.parametrize("source", ["plain", "softcap"])
def test_statistics_are_differentiable_together(classes, source):
    logits, target = example(2, 5, V)
    logits[..., 4] = -torch.inf
    target = target.masked_fill(target == 4, 5)

    def mixture(s):
        value = (s.log_prob * s.log_prob.detach().cos()).sum() + (s.lse**2).mean()
        value = value + (s.entropy * torch.arange(10.0).view(2, 5)).sum()
        if classes is None:
            return value
        return value + (s.prob_sum * s.prob_sum.detach().sin()).sum()

    cap = (lambda z: z) if source == "plain" else (lambda z: segloss.DenseLogits(z, softcap=2.0))
    naive_cap = (lambda z: z) if source == "plain" else (lambda z: reference.transform(z, 2.0))
    options = {"entropy": True, "classes": classes}
    ours = value_and_grad(
        lambda z, y: mixture(segloss.logit_statistics(cap(z), y, **options)), logits, target
    )
    true = value_and_grad(
        lambda z, y: mixture(reference.logit_statistics(naive_cap(z), y, **options)), logits, target
    )
    assert_near(ours[0], true[0])
    assert_near(ours[1], true[1])


def test_statistics_gradcheck():
    logits, target = example(2, 3, 5, classes=3)
    logits.requires_grad_()

    def outputs(z):
        s = segloss.logit_statistics(z, target, entropy=True, classes="present")
        return s.log_prob, s.lse, s.entropy, s.prob_sum

    assert torch.autograd.gradcheck(outputs, logits)


def test_own_loss_from_statistics_as_dpo_does():
    logits, target = example(4, 6, V)

    def preference(log_prob):
        per_sequence = log_prob.sum(-1)
        return -torch.nn.functional.logsigmoid(0.1 * (per_sequence[:2] - per_sequence[2:])).mean()

    ours = value_and_grad(
        lambda z, y: preference(segloss.logit_statistics(z, y).log_prob), logits, target
    )
    true = value_and_grad(
        lambda z, y: preference(reference.logit_statistics(z, y).log_prob), logits, target
    )
    assert_near(ours[0], true[0])
    assert_near(ours[1], true[1])


@every_loss
def test_return_statistics(name):
    logits, target = example(2, 5, V)
    weight = random_weights(2, 5)
    weight[0, 1] = 0
    logits.requires_grad_()
    loss, statistics = fused(name)(logits, target, token_weight=weight, return_statistics=True)
    assert torch.equal(loss, fused(name)(logits, target, token_weight=weight))
    assert loss.requires_grad
    _, true = naive(name)(logits, target, token_weight=weight, return_statistics=True)
    for field in ("log_prob", "lse", "entropy"):
        assert_near(getattr(statistics, field), getattr(true, field), what=field)
        assert not getattr(statistics, field).requires_grad
    assert torch.equal(statistics.argmax, true.argmax)
    assert torch.equal(statistics.valid, true.valid)
    (grad,) = torch.autograd.grad(loss, logits)
    (plain,) = torch.autograd.grad(fused(name)(logits, target, token_weight=weight), logits)
    assert_near(grad, plain, 1e-14)


@every_loss
def test_modules_keep_their_options_and_have_no_parameters(name):
    loss = module(name, reduction="sum", ignore_index=7)
    assert list(loss.parameters()) == []
    logits, target = example(7, V)
    target = target.masked_fill(target == -100, 7)
    assert_near(loss(logits, target), naive(name)(logits, target, reduction="sum", ignore_index=7))


def test_a_module_moves_its_class_weight():
    loss = segloss.CrossEntropyLoss(weight=torch.ones(V))
    assert loss.to(torch.float64).weight.dtype == torch.float64
