"""Every loss in every way of computing it: value and gradients against plain PyTorch in float64."""

import pytest
import torch
from helpers import LOSSES, SET_LOSSES, TOKEN_LOSSES, assert_near, fused, random_weights
from linear_helpers import (
    CASE_MODES,
    CASES,
    EVERYTHING,
    LOGIT_BYTES,
    LORA_SCALE,
    MODES,
    SET_CASES,
    SOME_CASE_MODES,
    SOME_MODES,
    TOKEN_CASES,
    TOKENS,
    D,
    V,
    assert_equal_to_truth,
    assert_same_bits,
    both,
    problem,
    source,
    token_options,
    value_and_grads,
)

import segloss
from segloss import reference

every_mode = pytest.mark.parametrize("name, mode", CASE_MODES)
some_modes = pytest.mark.parametrize("name, mode", SOME_CASE_MODES)


@every_mode
def test_every_loss_in_every_mode(name, mode):
    trainable, source_options, options = MODES[mode]
    tensors, target = problem(*TOKENS)
    assert_equal_to_truth(
        *both(name, tensors, target, trainable, source_options, **options), what=f"{name} {mode}"
    )


@pytest.mark.parametrize("which", token_options(*TOKENS))
@some_modes
def test_every_option(name, mode, which):
    trainable, source_options, of_mode = MODES[mode]
    options = of_mode | token_options(*TOKENS)[which]
    if "normalizer" in options:
        options.pop("reduction", None)
    tensors, target = problem(*TOKENS)
    if "ignore_index" in options:
        target = target.masked_fill(target == -100, options["ignore_index"])
    assert_equal_to_truth(*both(name, tensors, target, trainable, source_options, **options))


OWN_OPTIONS = [
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("cross_entropy", {"label_smoothing": 1.0, "weight": random_weights(V)}),
    ("cross_entropy", {"z_loss": 0.01}),
    ("cross_entropy", {"label_smoothing": 0.2, "z_loss": 0.1, "weight": random_weights(V)}),
    ("focal_loss", {"gamma": 0.0}),
    ("focal_loss", {"gamma": 0.5}),
    ("poly_loss", {"epsilon": -0.5}),
    ("generalized_cross_entropy", {"q": 0.1}),
    ("self_adjusting_dice_loss", {"alpha": 1.0, "gamma": 0.2}),
    ("self_adjusting_dice_loss", {"alpha": 0.5, "detach": True}),
    *[(name, {"classes": "all"}) for name in SET_LOSSES],
    *[(name, {"classes": "all", "per_sample": True}) for name in SET_LOSSES],
    *[(name, {"per_sample": True}) for name in SET_LOSSES],
    *[(name, {"per_sample": True, "weight": random_weights(V)}) for name in SET_LOSSES],
    *[(name, {"per_sample": True, "sample_ids": torch.arange(15).view(3, 5) % 4})
      for name in SET_LOSSES],
    *[(name, {"average": "micro"}) for name in SET_LOSSES
      if name not in ("generalized_dice_loss", "lovasz_softmax")],
    ("tversky_loss", {"alpha": 0.6, "beta": 0.1, "smooth": 1.0}),
    ("focal_tversky_loss", {"gamma": 2.0}),
    ("lovasz_softmax", {"weight": random_weights(V), "token_weight": random_weights(3, 5)}),
]  # fmt: skip


@pytest.mark.parametrize("mode", SOME_MODES)
@pytest.mark.parametrize("name, options", OWN_OPTIONS, ids=str)
def test_every_option_of_a_loss(name, options, mode):
    trainable, source_options, of_mode = MODES[mode]
    tensors, target = problem(*TOKENS)
    assert_equal_to_truth(
        *both(name, tensors, target, trainable, source_options, **of_mode, **options)
    )


@pytest.mark.parametrize(
    "transform",
    [{"softcap": 2.0}, {"scale": 0.3}, {"softcap": 3.0, "scale": 1.7}],
    ids=str,
)
@some_modes
def test_softcap_and_scale(name, mode, transform):
    trainable, source_options, options = MODES[mode]
    tensors, target = problem(*TOKENS)
    assert_equal_to_truth(
        *both(name, tensors, target, trainable, source_options, transform, **options)
    )


@pytest.mark.parametrize("transform", [{}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("mode", ["fused", "frozen", "recompute", "recompute, some kept"])
def test_smoothing_and_z_loss_of_a_transformed_head(mode, transform):
    trainable, source_options, options = MODES[mode]
    options = options | {"label_smoothing": 0.3, "z_loss": 0.1, "weight": random_weights(V)}
    tensors, target = problem(*TOKENS)
    tensors["bias"][4] = -torch.inf
    target = target.masked_fill(target == 4, 5)
    ours, truth = both(
        "cross_entropy", tensors, target, trainable, source_options, transform, **options
    )
    assert_equal_to_truth(ours, truth)


@pytest.mark.parametrize(
    "names", [("hidden", "weight"), EVERYTHING[:3], ("hidden", "weight", "a", "b")]
)
@pytest.mark.parametrize("name", CASES)
def test_with_and_without_bias_and_adapter(name, names):
    tensors, target = problem(*TOKENS, names=names)
    for trainable in (names, ("hidden",)):
        assert_equal_to_truth(*both(name, tensors, target, trainable))


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 1, 3), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_leading_dimensions(name, shape):
    tensors, target = problem(*shape)
    for trainable in (EVERYTHING, ("hidden",)):
        ours, truth = both(name, tensors, target, trainable, {"chunk_bytes": 200})
        assert_equal_to_truth(ours, truth)
        assert ours[1]["hidden"].shape == (*shape, D)
    if name in TOKEN_CASES:
        ours, truth = both(name, tensors, target, reduction="none")
        assert_equal_to_truth(ours, truth)
        assert ours[0].shape == shape


STRIDES = {
    "shifted sequence": lambda t: t | {"hidden": t["hidden"][:, :-1]},
    "other order": lambda t: t | {"hidden": t["hidden"].transpose(0, 1)},
    "one row many times": lambda t: t | {"hidden": t["hidden"][:, :1].expand(-1, 4, -1)},
    "transposed weight": lambda t: t | {"weight": t["weight"].T.contiguous().T},
    "every second class": lambda t: (
        t | {"weight": t["weight"][::2], "bias": t["bias"][::2], "b": t["b"][::2]}
    ),
    "every second feature": lambda t: t | {n: t[n][..., ::2] for n in ("hidden", "weight", "a")},
}


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("name", CASES)
def test_any_strides(name, stride):
    tensors, _ = problem(*TOKENS)
    view = STRIDES[stride]
    seen = view(tensors)
    _, target = problem(*seen["hidden"].shape[:-1], v=seen["weight"].shape[0])
    ours, truth = CASES[name]
    for trainable in (EVERYTHING, ("hidden",)):
        arguments = tensors, target, trainable
        assert_equal_to_truth(
            value_and_grads(ours, lambda t: source(view(t), chunk_bytes=300), *arguments),
            value_and_grads(truth, lambda t: reference_logits(view(t)), *arguments),
        )


def reference_logits(t):
    lora = (t["a"], t["b"], LORA_SCALE)
    return reference.linear_logits(t["hidden"], t["weight"], t["bias"], lora=lora)


# -------------------------------------------------------------- the ways agree with each other


@pytest.mark.parametrize("name", CASES)
def test_modes_agree(name):
    tensors, target = problem(*TOKENS)
    loss = CASES[name][0]

    def hidden_grad(trainable, reduce=lambda value: value, options=None, **of_source):
        value, grads = value_and_grads(
            lambda z, y: reduce(loss(z, y, **(options or {}))),
            lambda t: source(t, **of_source),
            tensors, target, trainable,
        )  # fmt: skip
        return value, grads["hidden"]

    whole = hidden_grad(EVERYTHING)
    others = [hidden_grad(("hidden",)), hidden_grad(EVERYTHING, memory_budget=LOGIT_BYTES)]
    if name in TOKEN_CASES:
        count = (target != -100).sum()
        mean = {"reduce": lambda v: v.sum() / count, "options": {"reduction": "none"}}
        others += [hidden_grad(EVERYTHING, **mean), hidden_grad(("hidden",), **mean)]
    with torch.no_grad():
        assert_near(loss(source(tensors), target), whole[0], 1e-12)
    for value, grad in others:
        assert_near(value, whole[0], 1e-12)
        assert_near(grad, whole[1], 1e-12)


ROW = 507 * 8  # bytes of its float64 logits; 507 is no multiple of a block of classes
# chunks of one row, of a few with some kept, all but one row, far more than there are
PLANS = [(1, 0), (5 * ROW, 12 * ROW), (32 * ROW, 0), (1 << 40, 0)]


@pytest.mark.parametrize("trainable", [EVERYTHING, ("hidden",)], ids=len)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_chunk_plan_changes_rounding_only(name, options, trainable):
    if name == "0.6 ce + 0.4 lovasz":
        options = {"normalizer": 20.0} if options else {}
    tensors, target = problem(44, v=507)
    assert (target != -100).sum() == 33

    def planned(chunk_bytes=None, budget=0):
        return value_and_grads(
            CASES[name][0],
            lambda t: source(t, chunk_bytes=chunk_bytes, memory_budget=budget),
            tensors, target, trainable, **options,
        )  # fmt: skip

    default = planned()
    for plan in PLANS:
        assert_equal_to_truth(planned(*plan), default, 1e-12, f"chunk_bytes, budget = {plan}")


@pytest.mark.parametrize("name", CASES)
def test_a_short_last_chunk_is_not_kept_after_one_left_out(name):
    # 26 rows in chunks of 5, 5, 5, 5, 5, 1: what is kept stands for the first rows
    tensors, target = problem(26, ignored=0.0)
    row = V * 8
    of_source = {"chunk_bytes": 5 * row, "memory_budget": 12 * row}
    assert_equal_to_truth(*both(name, tensors, target, EVERYTHING, of_source))
    if name in TOKEN_CASES:
        ours, truth = both(name, tensors, target, EVERYTHING, of_source, reduction="none")
        assert_equal_to_truth(ours, truth)


@pytest.mark.parametrize("name", CASES)
def test_same_inputs_same_bits(name):
    tensors, target = problem(40, v=507, dtype=torch.float32)
    for trainable, options in [
        (EVERYTHING, {}),
        (EVERYTHING, {"normalizer": 7.0}),
        (("hidden",), {}),
    ]:
        first, second = (
            value_and_grads(
                CASES[name][0], lambda t: source(t, chunk_bytes=9000), tensors, target, trainable,
                **options,
            )
            for _ in range(2)
        )  # fmt: skip
        assert_same_bits(first, second)


@pytest.mark.parametrize("compact", [True, False])
@some_modes
def test_compact_or_not(name, mode, compact):
    trainable, source_options, options = MODES[mode]
    tensors, target = problem(*TOKENS, ignored=0.6)
    source_options = source_options | {"compact": compact}
    weight = random_weights(*TOKENS)
    weight[1, 1:3] = 0
    assert_equal_to_truth(
        *both(name, tensors, target, trainable, source_options, token_weight=weight, **options)
    )


# ----------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_equals_the_merged_weight(name):
    tensors, target = problem(*TOKENS)
    loss = CASES[name][0]

    def merged(t):
        weight = t["weight"] + LORA_SCALE * t["b"] @ t["a"]
        return segloss.LinearLogits(t["hidden"], weight, t["bias"])

    for trainable in (EVERYTHING, ("hidden", "a", "b"), ("a", "b"), ("hidden",)):
        assert_equal_to_truth(
            value_and_grads(loss, source, tensors, target, trainable),
            value_and_grads(loss, merged, tensors, target, trainable),
        )


@pytest.mark.parametrize("name", ["cross_entropy", "lovasz_softmax"])
def test_a_new_adapter_changes_nothing_and_learns(name):
    # as peft starts one: B = 0, so that only B has a gradient
    tensors, target = problem(*TOKENS)
    tensors["b"].zero_()
    ours, truth = both(name, tensors, target)
    assert_equal_to_truth(ours, truth)
    assert (ours[1]["a"] == 0).all() and ours[1]["b"].norm() > 0
    plain = fused(name)(source({n: tensors[n] for n in ("hidden", "weight", "bias")}), target)
    assert_near(ours[0], plain)


# -------------------------------------------------------------------------------- the functions


@pytest.mark.parametrize("name", LOSSES)
def test_the_linear_function_is_the_loss_of_linear_logits(name):
    tensors, target = problem(*TOKENS)
    linear = getattr(segloss, f"linear_{name}")
    of_source = {"softcap": 3.0, "scale": 0.5, "chunk_bytes": 300, "memory_budget": 500}
    of_loss = {
        "weight": random_weights(V),
        "reduction": "sum",
        "token_weight": random_weights(*TOKENS),
        "ignore_index": -100,
    }

    def called(t, y):
        lora = (t["a"], t["b"], LORA_SCALE)
        head = t["hidden"], t["weight"], y
        return linear(*head, linear_bias=t["bias"], lora=lora, **of_source, **of_loss)

    assert_same_bits(
        value_and_grads(called, lambda t: t, tensors, target),
        value_and_grads(fused(name), lambda t: source(t, **of_source), tensors, target, **of_loss),
    )


# ---------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("mode", ["fused", "frozen", "recompute", "no grad"])
@pytest.mark.parametrize("name", CASES)
def test_return_statistics(name, mode):
    trainable, source_options, options = MODES[mode]
    if name not in TOKEN_CASES:
        options = {}
    tensors, target = problem(*TOKENS)
    weight = random_weights(*TOKENS)
    weight[0, 1] = 0
    options = options | {"token_weight": weight}
    found = {}

    def loss(z, y, **options):
        value, found["ours"] = CASES[name][0](z, y, return_statistics=True, **options)
        return value

    arguments = tensors, target, trainable
    with_them = value_and_grads(loss, lambda t: source(t, **source_options), *arguments, **options)
    assert_equal_to_truth(with_them, both(name, *arguments, **options)[1])
    seen = target.masked_fill(weight == 0, -100)
    true = reference.logit_statistics(reference_logits(tensors), seen, entropy=True, argmax=True)
    for field in ("log_prob", "lse", "entropy"):
        ours = getattr(found["ours"], field)
        assert ours.shape == target.shape and not ours.requires_grad
        assert_near(ours, getattr(true, field), what=field)
        assert (ours[seen == -100] == 0).all()
    assert torch.equal(found["ours"].argmax, true.argmax)
    assert torch.equal(found["ours"].valid, true.valid)


@pytest.mark.parametrize("classes", [None, "present", "all", torch.tensor([7, 2, 3])], ids=str)
@pytest.mark.parametrize("trainable", [EVERYTHING, ("hidden",)], ids=len)
@pytest.mark.parametrize("transform", [{}, {"softcap": 2.0}], ids=str)
def test_statistics_are_differentiable_together(classes, trainable, transform):
    tensors, target = problem(2, 5)
    tensors["bias"][4] = -torch.inf
    target = target.masked_fill(target == 4, 5)

    def mixture(module):
        def loss(z, y):
            s = module.logit_statistics(z, y, entropy=True, classes=classes)
            value = (s.log_prob * s.log_prob.detach().cos()).sum() + (s.lse**2).mean()
            value = value + (s.entropy * torch.arange(10.0).view(2, 5)).sum()
            if classes is None:
                return value
            return value + (s.prob_sum * s.prob_sum.detach().sin()).sum()

        return loss

    for options in ({"chunk_bytes": 200}, {"memory_budget": 400, "chunk_bytes": 200}, {}):
        assert_equal_to_truth(
            value_and_grads(
                mixture(segloss), lambda t, o=options: source(t, **o, **transform),
                tensors, target, trainable,
            ),
            value_and_grads(
                lambda z, y: mixture(reference)(reference.transform(z, **transform), y),
                reference_logits, tensors, target, trainable,
            ),
        )  # fmt: skip


# ----------------------------------------------------------------------------------- gradcheck

GRADCHECK_MODES = {
    "fused": ({}, EVERYTHING, {}),
    "recompute": ({"chunk_bytes": 32, "memory_budget": 64}, EVERYTHING, {"reduction": "none"}),
    "frozen": ({"chunk_bytes": 64}, ("hidden",), {"reduction": "none"}),
}


@pytest.mark.parametrize("mode", GRADCHECK_MODES)
@pytest.mark.parametrize("name", [name for name in CASES if name != "dft_loss"])
def test_gradcheck(name, mode):
    # DFT's gradient is by definition not that of its value
    of_source, trainable, options = GRADCHECK_MODES[mode]
    if name == "0.6 ce + 0.4 lovasz":
        options = {}
    tensors, target = problem(1, 3, v=4, d=2, classes=3)
    names = list(tensors)

    def loss(*leaves):
        logits = source(dict(zip(names, leaves, strict=True)), softcap=4.0, **of_source)
        return CASES[name][0](logits, target, token_weight=random_weights(1, 3), **options)

    leaves = [t.requires_grad_(n in trainable) for n, t in tensors.items()]
    assert torch.autograd.gradcheck(loss, leaves, check_undefined_grad=False)


@pytest.mark.parametrize("mode", ["fused", "frozen", "recompute"])
def test_dft_gradient_is_that_of_cross_entropy_weighted_by_p(mode):
    trainable, source_options, options = MODES[mode]
    tensors, target = problem(*TOKENS)
    p = (
        segloss.logit_statistics(source(tensors), target)
        .log_prob.exp()
        .masked_fill(target == -100, 0)
    )
    options = {"reduction": "sum"} | options
    of_source = lambda t: source(t, **source_options)  # noqa: E731
    arguments = of_source, tensors, target, trainable
    assert_equal_to_truth(
        value_and_grads(segloss.dft_loss, *arguments, **options),
        value_and_grads(segloss.cross_entropy, *arguments, token_weight=p, **options),
    )


def test_every_loss_is_here():
    assert {*TOKEN_CASES, *SET_CASES} == {*CASES}
    assert {*TOKEN_LOSSES, *SET_LOSSES} == {*LOSSES} and len(LOSSES) == 12
    for name in LOSSES:
        assert callable(getattr(segloss, f"linear_{name}"))
