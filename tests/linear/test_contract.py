"""What the fused head promises beside its values: gradients twice, nothing written, odd inputs."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LOSSES, assert_near, fused, module, random_weights, upstream_like
from linear_helpers import (
    CASE_MODES,
    CASES,
    EVERYTHING,
    MODES,
    SOME_CASE_MODES,
    TOKEN_CASES,
    TOKENS,
    Allocations,
    D,
    V,
    assert_equal_to_truth,
    assert_same_bits,
    both,
    problem,
    source,
    stored,
    value_and_grads,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import segloss

with_backward = pytest.mark.parametrize(
    "name, mode", [case for case in CASE_MODES if case[1] != "no grad"]
)
some_modes = pytest.mark.parametrize("name, mode", SOME_CASE_MODES)
each_case = pytest.mark.parametrize("name", CASES)
each_kind = pytest.mark.parametrize("mode", ["fused", "frozen", "recompute, some kept"])


def leaves_of(tensors, trainable=EVERYTHING):
    return {n: t.detach().clone().requires_grad_(n in trainable) for n, t in tensors.items()}


def options_of(name, mode):
    trainable, source_options, options = MODES[mode]
    return trainable, source_options, {} if name == "0.6 ce + 0.4 lovasz" else options


# ------------------------------------------------------------------------------------ backward


@with_backward
def test_a_second_backward_gives_the_same_bits(name, mode):
    trainable, source_options, options = options_of(name, mode)
    tensors, target = problem(*TOKENS)
    leaves = leaves_of(tensors, trainable)
    loss = CASES[name][0](source(leaves, **source_options), target, **options)
    inputs = [leaves[n] for n in trainable]
    upstream = upstream_like(loss)

    def backward(upstream):
        return torch.autograd.grad(loss, inputs, upstream, retain_graph=True)

    first = backward(upstream)
    kept = [grad.clone() for grad in first]
    for again in (first, backward(upstream)):
        assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
    for grad, tripled in zip(kept, backward(3 * upstream), strict=True):
        assert_near(tripled, 3 * grad, 1e-13)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@each_kind
@each_case
def test_an_upstream_gradient_of_one_and_of_anything(name, mode):
    trainable, source_options, options = options_of(name, mode)
    tensors, target = problem(*TOKENS)
    for factor in (1.0, 0.0, -1e5, 1e-20):
        assert_equal_to_truth(
            *both(
                name, tensors, target, trainable, source_options,
                upstream=lambda value, f=factor: torch.full_like(value, f), **options,
            ),
            what=f"upstream {factor}",
        )  # fmt: skip


@pytest.mark.parametrize("trainable", [EVERYTHING, ("hidden",)], ids=len)
@each_case
def test_the_loss_in_a_larger_graph(name, trainable):
    # the upstream gradient depends on the loss's own value, and hidden is no leaf
    tensors, target = problem(*TOKENS)

    def graph(loss, logits_of):
        def value(t, y):
            grown = t | {"hidden": torch.tanh(t["hidden"]) * 2}
            return loss(logits_of(grown), y).square() + grown["hidden"].mean()

        return value

    ours, truth = CASES[name]
    assert_equal_to_truth(
        value_and_grads(graph(ours, source), dict, tensors, target, trainable),
        value_and_grads(graph(truth, stored), dict, tensors, target, trainable),
    )


@each_case
def test_two_losses_of_one_source(name):
    tensors, target = problem(*TOKENS)

    def two(loss):
        return lambda z, y: loss(z, y) + 3 * loss(z, y.masked_fill(y == y[0, 0], -100))

    ours, truth = CASES[name]
    assert_equal_to_truth(
        value_and_grads(two(ours), source, tensors, target),
        value_and_grads(two(truth), stored, tensors, target),
    )


@some_modes
def test_double_backward_says_no(name, mode):
    trainable, source_options, options = options_of(name, mode)
    tensors, target = problem(*TOKENS)
    leaves = leaves_of(tensors, trainable)
    loss = CASES[name][0](source(leaves, **source_options), target, **options).sum()
    grads = torch.autograd.grad(loss, [leaves[n] for n in trainable], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (loss + sum(grad.square().sum() for grad in grads)).backward()


@each_case
def test_without_grad_there_is_no_graph(name):
    tensors, target = problem(*TOKENS)
    leaves = leaves_of(tensors)
    with torch.no_grad():
        quiet = CASES[name][0](source(leaves), target)
    plain = CASES[name][0](source(tensors), target)
    assert not quiet.requires_grad and not plain.requires_grad
    assert torch.equal(quiet, plain)
    assert_near(quiet, CASES[name][0](source(leaves), target).detach(), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@some_modes
def test_the_callers_tensors_are_never_written(name, mode, dtype):
    trainable, source_options, options = options_of(name, mode)
    tensors, target = problem(*TOKENS, dtype=dtype)
    leaves = leaves_of(tensors, trainable)
    given = leaves | {
        "target": target,
        "token_weight": random_weights(*TOKENS).float(),
        "class weight": random_weights(V).float(),
    }
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    loss = CASES[name][0](
        source(leaves, **source_options),
        target,
        token_weight=given["token_weight"],
        weight=given["class weight"],
        **options,
    )
    upstream = torch.full_like(loss, 2.5)
    for _ in range(2):
        torch.autograd.grad(loss, [leaves[n] for n in trainable], upstream, retain_graph=True)
    assert (upstream == 2.5).all()
    for key, value in before.items():
        assert torch.equal(given[key].detach(), value), key


@with_backward
def test_only_what_is_trainable_gets_a_gradient(name, mode):
    trainable, source_options, options = options_of(name, mode)
    tensors, target = problem(*TOKENS)
    leaves = leaves_of(tensors, trainable)
    CASES[name][0](source(leaves, **source_options), target, **options).sum().backward()
    for tensor_name, leaf in leaves.items():
        assert (leaf.grad is not None) == (tensor_name in trainable), tensor_name
        if leaf.grad is not None:
            assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype


# --------------------------------------------------------------------- products and allocations

N_LARGE, V_LARGE, D_LARGE = 256, 1024, 8
# name, trainable, the source's options, the loss's options, products of the whole head
PRODUCTS = [
    ("cross_entropy", ("hidden", "weight"), {}, {}, 3),
    ("token sum", ("hidden", "weight"), {}, {}, 3),
    ("cross_entropy", ("weight",), {}, {}, 2),
    ("cross_entropy", ("hidden",), {}, {}, 2),
    ("cross_entropy", ("hidden",), {}, {"reduction": "none"}, 2),
    ("dice_loss", ("hidden",), {}, {}, 2),
    ("lovasz_softmax", ("hidden",), {}, {}, 2),
    ("cross_entropy", ("hidden", "weight"), {}, {"reduction": "none"}, 3.875),
    ("dice_loss", ("hidden", "weight"), {}, {}, 3.875),
    ("0.6 ce + 0.4 lovasz", ("hidden", "weight"), {}, {}, 3.875),
    ("cross_entropy", ("hidden", "weight"), {"memory_budget": 0}, {"reduction": "none"}, 4),
    ("dice_loss", ("hidden", "weight"), {"memory_budget": 0}, {}, 4),
    ("dice_loss", ("hidden", "weight"), {"memory_budget": N_LARGE * V_LARGE * 2}, {}, 3.5),
    ("dice_loss", ("hidden", "weight"), {"memory_budget": N_LARGE * V_LARGE * 4}, {}, 3),
    ("dice_loss", (), {}, {}, 1),
    ("cross_entropy", (), {}, {}, 1),
]


@pytest.mark.parametrize("name, trainable, of_source, options, products", PRODUCTS, ids=str)
def test_matrix_products_and_allocations(name, trainable, of_source, options, products):
    tensors, target = problem(
        N_LARGE, v=V_LARGE, d=D_LARGE, dtype=torch.float32, names=("hidden", "weight"), ignored=0.0
    )
    all_logits = N_LARGE * V_LARGE * 4
    leaves = leaves_of(tensors, trainable)
    logits = source(leaves, chunk_bytes=all_logits // 8, **of_source)
    with FlopCounterMode(display=False) as count, Allocations() as made:
        loss = CASES[name][0](logits, target, **options)
        if trainable:
            loss.sum().backward()
    # set losses multiply the columns of the present classes again: 6 of 1024
    one = 2 * N_LARGE * V_LARGE * D_LARGE
    assert products <= count.get_total_flops() / one <= products * 1.03
    kept = of_source.get("memory_budget", 0)
    # the kept logits are one piece: nothing else is larger than a chunk
    assert made.largest() <= max(all_logits // 8, kept or 0, V_LARGE * D_LARGE * 4)
    if trainable == ("hidden",):
        assert (V_LARGE, D_LARGE) not in [shape for shape, _ in made.seen]
    if name in LOSSES:
        assert f"{products:.3g} x 2NDV" in logits.explain(module(name, **options), target)


def test_ignored_rows_are_left_out_of_the_products():
    tensors, target = problem(
        N_LARGE, v=V_LARGE, d=D_LARGE, dtype=torch.float32, names=("hidden", "weight"), ignored=0.0
    )
    target[torch.arange(N_LARGE) % 8 != 0] = -100
    leaves = leaves_of(tensors)
    for name, products in [("cross_entropy", 3), ("dice_loss", 3)]:  # of one chunk
        one = 2 * N_LARGE * V_LARGE * D_LARGE
        for compact, share in [(True, 1 / 8), (False, 1.0)]:
            with FlopCounterMode(display=False) as count:
                CASES[name][0](source(leaves, compact=compact), target).backward()
            assert products * share <= count.get_total_flops() / one <= products * share * 1.03


MODE_LINES = [
    (segloss.CrossEntropyLoss(), ("hidden", "weight"), {}, "fused", 3),
    (segloss.CrossEntropyLoss(), ("hidden",), {}, "fused", 2),
    (segloss.FocalLoss(reduction="none"), ("hidden",), {}, "frozen", 2),
    (segloss.FocalLoss(reduction="none"), ("hidden", "weight"), {}, "recompute", 3.75),
    (segloss.FocalLoss(reduction="none"), ("hidden", "weight"), {"memory_budget": 0}, "rec", 4),
    (segloss.LovaszSoftmaxLoss(), ("hidden",), {}, "frozen", 2),
    (segloss.LovaszSoftmaxLoss(), ("hidden", "weight"), {}, "recompute", 3.75),
    (segloss.DiceLoss(), (), {}, "no gradient", 1),
    (segloss.DiceLoss(classes="all"), ("hidden", "weight"), {}, "recompute", 5),
    (segloss.DiceLoss(classes="all"), ("hidden",), {}, "recompute", 5),
    (segloss.CrossEntropyLoss() + segloss.FocalLoss(), ("hidden", "weight"), {}, "fused", 3),
    (segloss.CrossEntropyLoss() + segloss.DiceLoss(), ("hidden",), {}, "frozen", 2),
]


@pytest.mark.parametrize("loss, trainable, of_source, mode, products", MODE_LINES, ids=str)
def test_explain_says_mode_chunks_and_products(loss, trainable, of_source, mode, products):
    tensors, target = problem(40, names=("hidden", "weight"), ignored=0.0)
    target[::2] = -100
    leaves = leaves_of(tensors, trainable)
    plan = source(leaves, chunk_bytes=V * 8 * 6, **of_source).explain(loss, target)
    lines = {line.split()[0]: line for line in plan.splitlines()}
    assert "20 of 40" in lines["tokens"]
    assert mode in lines["mode"]
    assert f"{products} x 2NDV" in lines["products"]
    assert f"{products * 2 * 20 * D * V:.3g} FLOP" in lines["products"]
    assert "4 of 5 rows" in lines["chunks"]


# ------------------------------------------------------------------------ embeddings, autocast


@each_case
def test_tied_embeddings(name):
    tensors, target = problem(*TOKENS, names=("weight",))
    ids = torch.randint(V, TOKENS, generator=torch.Generator().manual_seed(3))

    def hidden(t):
        return {"hidden": torch.tanh(F.embedding(ids, t["weight"])), "weight": t["weight"]}

    ours, truth = CASES[name]
    assert_equal_to_truth(
        value_and_grads(ours, lambda t: source(hidden(t), chunk_bytes=300), tensors, target),
        value_and_grads(truth, lambda t: stored(hidden(t)), tensors, target),
    )


@pytest.mark.parametrize("trainable", [EVERYTHING, ("hidden",)], ids=len)
@each_case
def test_autocast(name, trainable):
    # outside, the head is float32; inside, F.linear multiplies in bfloat16, and so do we
    ours, truth = CASES[name]

    def linear(t):
        adapter = F.linear(F.linear(t["hidden"], t["a"]), t["b"]) * 0.75
        return (F.linear(t["hidden"], t["weight"], t["bias"]) + adapter).float()

    def under_autocast(loss):
        def run(z, y):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss(z(), y)

        return run

    def runs(seed):
        tensors, target = problem(*TOKENS, dtype=torch.float32, seed=seed)
        doubles = {n: t.double() for n, t in tensors.items()}
        for loss, logits, leaves in (
            (under_autocast(ours), lambda t: lambda: source(t), tensors),
            (under_autocast(truth), lambda t: lambda: linear(t), tensors),
            (truth, stored, doubles),
        ):
            value, grads = value_and_grads(loss, logits, leaves, target, trainable)
            yield {"value": value} | grads

    # an adapter's gradient is eight numbers: one draw's error says little of the next one's
    drawn = [list(runs(seed)) for seed in range(4)]
    assert all(x.dtype == torch.float32 for mine, _, _ in drawn for x in mine.values())
    for n in drawn[0][0]:
        mine, eager, exact = (torch.stack([d[i][n].double() for d in drawn]) for i in range(3))
        scale = 0.1 * max(torch.stack([d[2][m] for d in drawn]).norm() for m in trainable)
        error, eager_error = (mine - exact).norm(), (eager - exact).norm()
        assert error <= 2 * eager_error + 2e-3 * max(exact.norm(), scale), n


def test_autocast_multiplies_in_its_own_dtype():
    tensors, target = problem(*TOKENS, dtype=torch.float32, names=("hidden", "weight"))
    leaves = leaves_of(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = segloss.cross_entropy(source(leaves), target)
    halves = {n: t.bfloat16() for n, t in tensors.items()}
    assert_near(inside.detach(), segloss.cross_entropy(source(halves), target), 1e-6)
    assert not torch.allclose(inside, segloss.cross_entropy(source(tensors), target), rtol=1e-4)
    inside.backward()  # outside the block, as PyTorch recommends
    assert leaves["weight"].grad.dtype == leaves["hidden"].grad.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        outside = segloss.cross_entropy(source(tensors), target)
    assert torch.equal(outside, segloss.cross_entropy(source(tensors), target))


def test_autocast_takes_a_mix_of_dtypes_and_leaves_float64_alone():
    tensors, target = problem(*TOKENS, dtype=torch.float32, names=("hidden", "weight"))
    mixed = leaves_of({"hidden": tensors["hidden"].bfloat16(), "weight": tensors["weight"]})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = segloss.cross_entropy(source(mixed), target)
        double, _ = both("cross_entropy", *problem(*TOKENS))
    loss.backward()
    assert mixed["hidden"].grad.dtype == torch.bfloat16
    assert mixed["weight"].grad.dtype == torch.float32
    assert_near(double[0], both("cross_entropy", *problem(*TOKENS))[1][0])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("trainable", [EVERYTHING, ("hidden",)], ids=len)
@each_case
def test_activation_checkpointing(name, trainable, use_reentrant):
    tensors, target = problem(*TOKENS)
    ours, truth = CASES[name]

    def checkpointed(leaves, target):
        def run(hidden, *rest):
            hidden = torch.tanh(hidden)
            return ours(source({"hidden": hidden, **dict(zip(EVERYTHING[1:], rest, strict=True))}),
                        target)  # fmt: skip

        return checkpoint(run, *leaves.values(), use_reentrant=use_reentrant)

    def plain(leaves, target):
        return truth(stored(leaves | {"hidden": torch.tanh(leaves["hidden"])}), target)

    def backward(loss):
        # the reentrant kind works with backward() alone
        leaves = leaves_of(tensors, trainable)
        value = loss(leaves, target)
        value.backward(upstream_like(value))
        return value.detach(), {n: leaves[n].grad for n in trainable}

    assert_equal_to_truth(backward(checkpointed), backward(plain))


# ------------------------------------------------------------------------------- odd batches


@pytest.mark.parametrize(
    "how, compact",
    [
        ("ignored", True),
        ("ignored", False),
        ("weight 0", True),
        ("no rows", True),
        ("no time", True),
        ("no time", False),
    ],
)
@some_modes
def test_no_valid_token_gives_zero_and_zero_gradients(name, mode, how, compact):
    trainable, source_options, options = options_of(name, mode)
    shape = {"no rows": (0,), "no time": (2, 0)}.get(how, TOKENS)
    tensors, target = problem(*shape)
    options = dict(options)
    if how == "ignored":
        target = torch.full_like(target, -100)
    if how == "weight 0":
        options["token_weight"] = torch.zeros(target.shape)
    source_options = source_options | {"compact": compact}
    value, grads = value_and_grads(
        CASES[name][0], lambda t: source(t, **source_options), tensors, target, trainable, **options
    )
    assert value.shape == CASES[name][1](stored(tensors), target, **options).shape
    assert (value == 0).all()
    for tensor_name in trainable:
        assert torch.equal(grads[tensor_name], torch.zeros_like(tensors[tensor_name]))


@each_kind
@each_case
def test_one_token(name, mode):
    trainable, source_options, options = options_of(name, mode)
    for shape in [(1,), (1, 1)]:
        tensors, target = problem(*shape)
        assert_equal_to_truth(*both(name, tensors, target, trainable, source_options, **options))


@each_kind
@each_case
def test_one_class(name, mode):
    # p is always 1: nothing to lose and nothing to learn
    trainable, source_options, options = options_of(name, mode)
    tensors, target = problem(5, v=1, ignored=0.0)
    value, grads = value_and_grads(
        CASES[name][0], lambda t: source(t, **source_options), tensors, target, trainable, **options
    )
    assert_near(value, CASES[name][1](stored(tensors), target, **options))
    assert all(grad.abs().max() < 1e-12 for grad in grads.values())


@pytest.mark.parametrize("mode", ["recompute", "frozen", "no grad", "recompute, some kept"])
@pytest.mark.parametrize("name", TOKEN_CASES)
def test_a_row_of_nan_poisons_its_own_token_only(name, mode):
    trainable, source_options, _ = MODES[mode]
    tensors, target = problem(9, ignored=0.0)

    def run(tensors):
        value, grads = value_and_grads(
            CASES[name][0], lambda t: source(t, **source_options), tensors, target, trainable,
            reduction="none",
        )  # fmt: skip
        return value, grads.get("hidden")

    clean, clean_grad = run(tensors)
    tensors["hidden"][4, 1] = torch.nan
    value, grad = run(tensors)
    others = torch.arange(9) != 4
    assert value.isnan().tolist() == (~others).tolist()
    assert_near(value[others], clean[others], 1e-14)
    if grad is not None:
        assert grad[4].isnan().all()
        assert_near(grad[others], clean_grad[others], 1e-14)


@pytest.mark.parametrize("trainable", [EVERYTHING, ("hidden",), ()], ids=len)
@each_case
def test_a_row_of_nan_makes_the_mean_nan(name, trainable):
    tensors, target = problem(9, ignored=0.0)
    tensors["hidden"][4, 1] = torch.nan
    leaves = leaves_of(tensors, trainable)
    assert CASES[name][0](source(leaves, chunk_bytes=200), target).isnan()


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
@some_modes
def test_an_ignored_row_may_hold_anything(name, mode, spoilt, compact):
    trainable, source_options, options = options_of(name, mode)
    tensors, target = problem(*TOKENS)
    gone = target == -100
    assert gone.any()
    plain = both(name, tensors, target, trainable, source_options, **options)[1]
    tensors["hidden"][gone] = spoilt
    ours = value_and_grads(
        CASES[name][0], lambda t: source(t, **source_options, compact=compact),
        tensors, target, trainable, **options,
    )  # fmt: skip
    assert_equal_to_truth(ours, plain)
    if "hidden" in ours[1]:
        assert (ours[1]["hidden"][gone] == 0).all()


@each_case
def test_a_row_of_weight_0_may_hold_anything(name):
    tensors, target = problem(*TOKENS)
    gone = target == -100
    plain = both(name, tensors, target)[1]
    tensors["hidden"][gone] = torch.nan
    for compact in (True, False):
        ours = value_and_grads(
            CASES[name][0], lambda t, c=compact: source(t, compact=c), tensors,
            target.masked_fill(gone, 1), token_weight=(~gone).double(),
        )  # fmt: skip
        assert_equal_to_truth(ours, plain)


@pytest.mark.parametrize("transform", [{}, {"softcap": 3.0, "scale": 1.5}], ids=str)
@some_modes
def test_padding_the_vocabulary_changes_nothing(name, mode, transform):
    # as padded checkpoints do it: rows of anything, taken out by a bias of -inf
    trainable, source_options, options = options_of(name, mode)
    tensors, target = problem(*TOKENS)
    source_options = source_options | transform
    plain = value_and_grads(
        CASES[name][0], lambda t: source(t, **source_options), tensors, target, trainable, **options
    )
    wide = tensors | {
        "weight": F.pad(tensors["weight"], (0, 0, 0, 5), value=0.5),
        "b": F.pad(tensors["b"], (0, 0, 0, 5), value=-2.0),
        "bias": F.pad(tensors["bias"], (0, 5), value=-torch.inf),
    }
    value, grads = value_and_grads(
        CASES[name][0], lambda t: source(t, **source_options), wide, target, trainable, **options
    )
    for tensor_name in ("weight", "b", "bias"):
        if tensor_name in grads:
            assert (grads[tensor_name][V:] == 0).all()
            grads[tensor_name] = grads[tensor_name][:V]
    assert_equal_to_truth((value, grads), plain, 1e-12)


@pytest.mark.parametrize("options", [{"classes": "all"}, {"classes": "all", "per_sample": True}])
@pytest.mark.parametrize(
    "name", [n for n in CASES if n not in (*TOKEN_CASES, "0.6 ce + 0.4 lovasz")]
)
def test_padding_the_vocabulary_changes_no_mean_over_all_classes(name, options):
    tensors, target = problem(*TOKENS)
    tensors["bias"][7:9] = -torch.inf
    target = target.masked_fill((target == 7) | (target == 8), 1)
    for trainable in (EVERYTHING, ("hidden",)):
        ours, truth = both(name, tensors, target, trainable, {"chunk_bytes": 200}, **options)
        assert_equal_to_truth(ours, truth)


def test_label_smoothing_ranges_over_the_finite_columns():
    tensors, target = problem(9, classes=4)
    absent = torch.tensor([c not in target for c in range(V)])
    tensors["bias"][absent] = -torch.inf
    for trainable in (EVERYTHING, ("hidden",)):
        assert_equal_to_truth(
            *both("cross_entropy", tensors, target, trainable, label_smoothing=0.3)
        )


@each_case
def test_appended_ignored_rows_leave_every_bit(name):
    tensors, target = problem(9, ignored=0.0)
    arguments = CASES[name][0], source
    plain = value_and_grads(*arguments, tensors, target)
    longer = tensors | {"hidden": torch.cat([tensors["hidden"], tensors["hidden"] + 1])}
    value, grads = value_and_grads(*arguments, longer, F.pad(target, (0, 9), value=-100))
    assert (grads["hidden"][9:] == 0).all()
    grads["hidden"] = grads["hidden"][:9]
    assert_same_bits((value, grads), plain)


@each_case
def test_int32_targets_are_the_same(name):
    tensors, target = problem(*TOKENS)
    assert_same_bits(
        value_and_grads(CASES[name][0], source, tensors, target),
        value_and_grads(CASES[name][0], source, tensors, target.int()),
    )


@each_case
def test_a_target_out_of_range_is_named_with_its_position(name):
    tensors, target = problem(2, 5)
    target[1, 2] = V
    with pytest.raises(ValueError, match=rf"target\[1, ?2\] is {V}\b.*{V} classes.*-100"):
        CASES[name][0](source(tensors), target)


def test_dense_and_linear_are_the_same_loss():
    # one more truth: our own dense path, which the other tests hold to the reference
    tensors, target = problem(40, v=507)
    for name in [n for n in CASES if hasattr(segloss, n)]:
        ours = value_and_grads(fused(name), source, tensors, target)
        dense = value_and_grads(fused(name), stored, tensors, target)
        assert_equal_to_truth(ours, dense, 1e-12, name)


def test_saturated_tokens():
    # p rounds to 1 in float64 above a margin of 36.7
    tensors, target = problem(6, ignored=0.0)
    for lift in (20.0, 40.0, 800.0, -40.0, -800.0):

        def certain(t, lift=lift):
            bump = torch.zeros(V, 1).double().index_fill_(0, target[:1], lift)
            return t | {
                "hidden": torch.cat([t["hidden"], torch.ones(6, 1).double()], -1),
                "weight": torch.cat([t["weight"], bump], -1),
                "a": F.pad(t["a"], (0, 1)),
            }

        for name, (ours, truth) in CASES.items():
            for trainable in (EVERYTHING, ("hidden",)):
                arguments = tensors, target, trainable
                value, grads = value_and_grads(ours, lambda t: source(certain(t)), *arguments)
                true = value_and_grads(truth, lambda t: stored(certain(t)), *arguments)
                assert (value - true[0]).abs() <= 1e-6 * true[0].abs() + 1e-12, (name, lift)
                for n, grad in grads.items():
                    allowed = 1e-6 * true[1][n].norm() + 1e-12
                    assert (grad - true[1][n]).norm() <= allowed, (name, lift, n)


def test_the_reference_is_what_the_docstring_says():
    tensors, _ = problem(*TOKENS)
    weight = tensors["weight"] + 0.75 * tensors["b"] @ tensors["a"]
    plain = 3 * torch.tanh(0.5 * F.linear(tensors["hidden"], weight, tensors["bias"]) / 3)
    assert_near(stored(tensors, softcap=3.0, scale=0.5), plain, 1e-13)
