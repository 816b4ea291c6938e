"""Distillation on logits and from a head: against the float64 reference, whatever the teacher."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_near,
    example,
    random_weights,
    relative_error,
    upstream_like,
)
from torch import Tensor

import segloss
from segloss import DenseLogits, DistillationLoss, LinearLogits, TopK, reference

KINDS = ("forward", "reverse", "jsd")
every_kind = pytest.mark.parametrize("kind", KINDS)
# (student's classes, teacher's): the same, padding on either side
WIDTHS = [(37, 37), (37, 40), (40, 37)]
D, D_TEACHER = 6, 5


def teacher_logits(*shape: int, seed: int = 5, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def grads(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves, upstream_like(value)))


def assert_distils(logits: Tensor, target: Tensor, teacher, truth=None, **options) -> None:
    """Value and gradient of the loss on `logits` equal the reference's, with `truth` for it."""
    call = {n: options.pop(n) for n in ("token_weight", "normalizer") if n in options}
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = DistillationLoss(**options)(ours, target, teacher=teacher, **call)
    truth = teacher if truth is None else truth
    true = reference.distillation_loss(theirs, target, teacher=truth, **options, **call)
    assert_near(value.detach(), true.detach())
    (grad,), (true_grad,) = grads(value, [ours]), grads(true, [theirs])
    assert_near(grad, true_grad)


# ---------------------------------------------------------------------------------- on logits


@pytest.mark.parametrize("v, v_teacher", WIDTHS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_kind
def test_equals_the_reference(kind, reduction, v, v_teacher):
    logits, target = example(3, 11, v)
    target = target.clamp(max=36)
    assert_distils(
        logits, target, teacher_logits(3, 11, v_teacher), divergence=kind, reduction=reduction
    )


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2.0},
        {"temperature": 0.5, "temperature_squared": True},
        {"beta": 0.1},
        {"weight": torch.linspace(0.5, 2, 37, dtype=torch.float64)},
        {"normalizer": 100.0},
        {"token_weight": random_weights(3, 11) - 0.125},
        {"ignore_index": 3},
    ],
    ids=lambda options: next(iter(options)),
)
@every_kind
def test_every_option(kind, options):
    logits, target = example(3, 11, 37)
    if "ignore_index" in options:
        target = torch.where(target == -100, 3, target)
    assert_distils(logits, target, teacher_logits(3, 11, 37), divergence=kind, **options)


@pytest.mark.parametrize("beta, kind", [(0, "forward"), (1, "reverse")])
def test_the_ends_of_beta_are_the_divergences_themselves(beta, kind):
    logits, target = example(7, 37)
    teacher = teacher_logits(7, 37)
    end = DistillationLoss("jsd", beta=beta)(logits, target, teacher=teacher)
    assert torch.equal(end, DistillationLoss(kind)(logits, target, teacher=teacher))
    assert_distils(logits, target, teacher, divergence="jsd", beta=beta)


@every_kind
def test_each_source_has_its_own_transform(kind):
    logits, target = example(7, 37)
    teacher = teacher_logits(7, 37)
    student = DenseLogits(logits.clone().requires_grad_(), softcap=5.0, scale=0.8)
    value = DistillationLoss(kind, temperature=2)(
        student, target, teacher=DenseLogits(teacher, softcap=3.0)
    )
    leaf = logits.clone().requires_grad_()
    true = reference.distillation_loss(
        reference.transform(leaf, 5.0, 0.8),
        target,
        teacher=reference.transform(teacher, 3.0),
        divergence=kind,
        temperature=2,
    )
    assert_near(value.detach(), true.detach())
    assert_near(grads(value, [student.logits])[0], grads(true, [leaf])[0])


@every_kind
def test_columns_of_minus_infinity(kind):
    """In both; in the teacher alone, but of reverse KL, which is infinite then."""
    logits, target = example(7, 37)
    teacher = teacher_logits(7, 37)
    target = torch.where(target == 5, 6, target)
    for matrix in (logits, teacher):
        matrix[:, 5] = -torch.inf
    assert_distils(logits, target, teacher, divergence=kind)
    teacher[:, 9] = -torch.inf
    if kind == "reverse":
        assert DistillationLoss(kind)(logits, target, teacher=teacher).isinf()
    else:
        assert_distils(logits, target, teacher, divergence=kind)
    logits[:, 12] = -torch.inf
    target = torch.where(target == 12, 6, target)
    if kind == "forward":
        assert DistillationLoss(kind)(logits, target, teacher=teacher).isinf()
    if kind == "jsd":
        assert_distils(logits, target, teacher, divergence=kind)


@every_kind
def test_probabilities_that_round_to_0_and_1(kind):
    logits, target = example(7, 37)
    teacher = teacher_logits(7, 37)
    logits[:4] *= 400
    teacher[2:6] *= 400
    assert_distils(logits, target, teacher, divergence=kind)
    # 32-bit numbers lose p at 1e-45 where 64 bits do not: the value stays finite and near
    options = {"divergence": kind, "reduction": "none"}
    value = DistillationLoss(**options)(logits.float(), target, teacher=teacher.float())
    true = reference.distillation_loss(logits, target, teacher=teacher, **options)
    assert relative_error(value, true) < 1e-5


def test_a_one_hot_teacher_is_cross_entropy():
    """To the bit: the teacher's sums are exact, and the student's are taken in the same order."""
    logits, target = example(33, 507, dtype=torch.float32)
    teacher = torch.full_like(logits, -torch.inf)
    teacher.scatter_(1, target.clamp(min=0)[:, None], 0.0)
    results = []
    for loss, call in (
        (DistillationLoss(reduction="none"), {"teacher": teacher}),
        (segloss.CrossEntropyLoss(reduction="none"), {}),
    ):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, target, **call)
        results.append((value.detach(), *grads(value, [leaf])))
    assert torch.equal(results[0][0], results[1][0])
    assert relative_error(results[0][1], results[1][1]) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_kind
def test_every_dtype(kind, dtype):
    """At most twice the error of plain PyTorch in the same dtype, and a rounding."""
    allowance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-3)
    logits, target = example(33, 507, dtype=dtype)
    teacher = teacher_logits(33, 507, dtype=dtype)

    def run(function, logits, teacher, **options):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, target, teacher=teacher, **options)
        return value.detach(), grads(value, [leaf])[0]

    ours = run(segloss.distillation_loss, logits, teacher, divergence=kind)
    plain = run(reference.distillation_loss, logits, teacher, divergence=kind)
    truth = run(reference.distillation_loss, logits.double(), teacher.double(), divergence=kind)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours[1].dtype == dtype
    for a, b, true in zip(ours, plain, truth, strict=True):
        assert relative_error(a, true) <= 2 * relative_error(b, true) + allowance


@pytest.mark.parametrize("head", [False, True], ids=["logits", "head"])
@every_kind
def test_float32_sums_with_cross_entropy(kind, head):
    """Cross-entropy's part has an arithmetic of its own in float32, on a CPU."""
    logits, target = example(3, 11, 300)
    weight = torch.randn(300, 11, generator=torch.Generator().manual_seed(2)) / 4
    leaves = [logits.float()]
    if head:
        leaves = [torch.randn(3, 11, 11, generator=torch.Generator().manual_seed(1)), weight]
    ours = [leaf.requires_grad_() for leaf in leaves]
    theirs = [leaf.detach().double().requires_grad_() for leaf in leaves]
    teacher = teacher_logits(3, 11, 300)
    criterion = 0.3 * segloss.CrossEntropyLoss() + 0.7 * DistillationLoss(kind)
    source = LinearLogits(*ours) if head else ours[0]
    value = criterion(source, target, teacher=teacher.float())
    z = theirs[0] @ theirs[1].T if head else theirs[0]
    true = 0.3 * reference.cross_entropy(z, target)
    true = true + 0.7 * reference.distillation_loss(z, target, teacher=teacher, divergence=kind)
    assert_near(value.detach().double(), true.detach(), 1e-6)
    for grad, true_grad in zip(grads(value, ours), grads(true, theirs), strict=True):
        assert relative_error(grad.double(), true_grad) < 1e-5


@pytest.mark.parametrize("scale", [10, 40, 200])
@every_kind
def test_float32_logits_of_any_size(kind, scale):
    """Probabilities down to the least that float32 has, whose mixture is 0."""
    logits = scale * teacher_logits(64, 300, seed=1)
    teacher = scale * teacher_logits(64, 300, seed=2)
    target = torch.zeros(64, dtype=torch.int64)
    ours, theirs = logits.float().requires_grad_(), logits.float().double().requires_grad_()
    value = DistillationLoss(kind)(ours, target, teacher=teacher.float())
    true = reference.distillation_loss(
        theirs, target, teacher=teacher.float().double(), divergence=kind
    )
    assert_near(value.detach().double(), true.detach(), 1e-6)
    (grad,), (true_grad,) = grads(value, [ours]), grads(true, [theirs])
    # where each has all of its probability at another class the gradient is a difference of numbers
    # near 1 / 64
    assert (grad - true_grad).norm() < 5e-5 * true_grad.norm() + 1e-7


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@every_kind
def test_gradcheck(kind, temperature):
    logits, target = example(2, 3, 7)
    teacher = teacher_logits(2, 3, 9)
    loss = DistillationLoss(kind, 0.3, temperature, reduction="none")
    torch.autograd.gradcheck(
        lambda z: loss(z, target, teacher=teacher), logits.clone().requires_grad_()
    )


def test_the_teacher_gets_no_gradient_and_is_not_written():
    logits, target = example(7, 37)
    teacher = teacher_logits(7, 37).requires_grad_()
    before = teacher.detach().clone(), logits.clone()
    value = DistillationLoss()(logits.requires_grad_(), target, teacher=teacher)
    value.backward()
    assert teacher.grad is None and logits.grad is not None
    assert torch.equal(teacher, before[0]) and torch.equal(logits, before[1])


def test_strided_teachers_are_read_where_they_lie():
    logits, target = example(3, 11, 37)
    longer = teacher_logits(3, 12, 40)
    for teacher in (
        longer[:, :-1],
        longer[:, 1:, :37],
        longer.transpose(0, 1)[:11].transpose(0, 1),
    ):
        assert_distils(logits, target, teacher)
        assert_distils(logits[:, :7], target[:, :7], teacher[:, :7], divergence="jsd")


def test_without_a_valid_token_the_value_is_0():
    logits, target = example(7, 37)
    nothing = torch.full_like(target, -100)
    leaf = logits.clone().requires_grad_()
    for kind in KINDS:
        value = DistillationLoss(kind)(leaf, nothing, teacher=torch.full_like(logits, torch.nan))
        assert value == 0 and (grads(value, [leaf])[0] == 0).all()
    value = DistillationLoss()(leaf[:0], target[:0], teacher=logits[:0])
    assert value == 0 and (grads(value, [leaf])[0] == 0).all()


def test_ignored_rows_of_either_are_not_read():
    logits, target = example(9, 37)
    teacher = teacher_logits(9, 37)
    expected = DistillationLoss()(logits, target, teacher=teacher)
    logits[target == -100] = torch.nan
    teacher[target == -100] = torch.inf
    assert torch.equal(DistillationLoss()(logits, target, teacher=teacher), expected)


# -------------------------------------------------------------------------------- from a head


def heads(v: int, v_teacher: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(v)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    target = torch.randint(min(v, v_teacher), (3, 11), generator=generator)
    target[torch.rand(3, 11, generator=generator) < 0.3] = -100
    student = draw(3, 11, D), draw(v, D), draw(v)
    return student, (draw(3, 11, D_TEACHER), draw(v_teacher, D_TEACHER)), target


MIXED = (
    lambda kind, **options: DistillationLoss(kind, 0.3, 2.0, **options),
    lambda kind, **options: (
        0.5 * segloss.CrossEntropyLoss(label_smoothing=0.1, **options)
        + 0.5 * DistillationLoss(kind, 0.3, 2.0, **options)
    ),
)


@pytest.mark.parametrize("trained", ["all", "hidden", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("made", MIXED, ids=["alone", "with cross-entropy"])
@every_kind
def test_every_cost_mode(kind, made, reduction, trained):
    """Fused, frozen and recomputed; one chunk and many; a teacher of either source."""
    (hidden, weight, bias), (h_teacher, w_teacher), target = heads(37, 40)
    names = {"all": (0, 1, 2), "hidden": (0,), "weight": (1,)}[trained]

    def leaves():
        return [t.clone().requires_grad_(i in names) for i, t in enumerate((hidden, weight, bias))]

    loss = made(kind, reduction=reduction)
    full_teacher = reference.linear_logits(h_teacher, w_teacher, softcap=4.0)
    own = leaves()
    logits = reference.linear_logits(*own, softcap=6.0, scale=0.9)
    options = {"divergence": kind, "beta": 0.3, "temperature": 2.0, "reduction": reduction}
    true = reference.distillation_loss(logits, target, teacher=full_teacher, **options)
    if made is MIXED[1]:
        smooth = {"label_smoothing": 0.1, "reduction": reduction}
        true = 0.5 * true + 0.5 * reference.cross_entropy(logits, target, **smooth)
    true_grads = grads(true, [own[i] for i in names])
    teachers = (
        full_teacher,
        LinearLogits(h_teacher, w_teacher, softcap=4.0, chunk_bytes=7 * 40 * 8),
    )
    for teacher in teachers:
        for chunk in ({}, {"chunk_bytes": 7 * 37 * 8}, {"compact": False, "chunk_bytes": 3000}):
            ours = leaves()
            source = LinearLogits(*ours, softcap=6.0, scale=0.9, **chunk)
            value = loss(source, target, teacher=teacher)
            assert_near(value.detach(), true.detach())
            for a, b in zip(grads(value, [ours[i] for i in names]), true_grads, strict=True):
                assert_near(a, b)


@pytest.mark.parametrize("scale", [1, 40, 200])
@pytest.mark.parametrize("absent", ["nowhere", "both", "one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_kind
def test_a_head_of_any_size_with_absent_columns(kind, dtype, absent, scale):
    """The gradient is formed with the value, and again where a logarithm in it is infinite."""
    v, v_teacher = 61, 61
    hidden = (scale * teacher_logits(33, v, seed=1)).to(dtype)
    teacher = (scale * teacher_logits(33, v_teacher, seed=2)).to(dtype)
    bias = torch.zeros(v, dtype=dtype)
    target = torch.arange(33) % 4
    target[::5] = -100
    if absent != "nowhere":
        bias[7] = teacher[:, 7] = -torch.inf
    if absent == "one":  # where the divergence is finite
        (bias if kind == "reverse" else teacher.T)[9] = -torch.inf
    ours, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    student = LinearLogits(ours, torch.eye(v, dtype=dtype).requires_grad_(), bias)
    value, stats = DistillationLoss(kind)(student, target, teacher=teacher, return_statistics=True)
    plain = DistillationLoss(kind)(student, target, teacher=teacher)
    logits = theirs + bias.double()
    true = reference.distillation_loss(logits, target, teacher=teacher.double(), divergence=kind)
    within = 1e-10 if dtype == torch.float64 else 1e-5
    assert_near(value.detach().double(), true.detach(), within)
    assert_near(plain.detach().double(), true.detach(), within)
    log_prob = logits.detach().log_softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    assert_near(stats.log_prob.double(), torch.where(target < 0, 0, log_prob), within)
    (true_grad,) = grads(true, [theirs])
    for own in (value, plain):
        (grad,) = grads(own, [ours])
        assert (grad - true_grad).norm() < 5 * within * true_grad.norm() + 0.01 * within


def test_a_formula_that_reads_more_than_its_loss_says():
    class Both(DistillationLoss):
        def formula(self, stats):
            return super().formula(stats) - 0.5 * stats.log_prob

    (hidden, weight, bias), (h_teacher, w_teacher), target = heads(37, 37)
    teacher = LinearLogits(h_teacher, w_teacher)
    ours, theirs = ([t.clone().requires_grad_() for t in (hidden, weight, bias)] for _ in "ab")
    chunk = {"chunk_bytes": 7 * 37 * 8}
    value = Both()(LinearLogits(*ours, **chunk), target, teacher=teacher)
    logits = reference.linear_logits(*theirs)
    true = reference.distillation_loss(
        logits, target, teacher=reference.linear_logits(h_teacher, w_teacher)
    ) + 0.5 * F.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert_near(value.detach(), true.detach())
    for grad, true_grad in zip(grads(value, ours), grads(true, theirs), strict=True):
        assert_near(grad, true_grad)


@every_kind
def test_a_tensor_of_logits_against_a_head(kind):
    """The teacher's logits are made a chunk at a time, in forward and again in backward."""
    _, (h_teacher, w_teacher), target = heads(37, 40)
    logits, _ = example(3, 11, 37)
    teacher = LinearLogits(h_teacher, w_teacher, chunk_bytes=4 * 40 * 8)
    assert_distils(logits, target, teacher, h_teacher @ w_teacher.T, divergence=kind)
    wider = torch.cat([logits, logits], 1)[:, 3:14]  # no stride leads from sample to sample
    assert_distils(wider, target, teacher, h_teacher @ w_teacher.T, divergence=kind)


def test_a_second_backward_gives_the_same():
    (hidden, weight, _), (h_teacher, w_teacher), target = heads(37, 40)
    for reduction in ("mean", "none"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        teacher = LinearLogits(h_teacher, w_teacher)
        value = DistillationLoss(reduction=reduction)(
            LinearLogits(*leaves), target, teacher=teacher
        )
        first = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
        second = torch.autograd.grad(value.sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bfloat16_heads_and_autocast():
    (hidden, weight, _), (h_teacher, w_teacher), target = heads(37, 37, torch.float32)
    exact = reference.distillation_loss(
        (hidden @ weight.T).double(), target, teacher=(h_teacher @ w_teacher.T).double()
    )
    half = [t.bfloat16() for t in (hidden, weight, h_teacher, w_teacher)]
    loss = DistillationLoss()
    value = loss(LinearLogits(*half[:2]), target, teacher=LinearLogits(*half[2:]))
    assert value.dtype == torch.float32 and relative_error(value, exact) < 3e-2
    leaf = hidden.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(LinearLogits(leaf, weight), target, teacher=LinearLogits(h_teacher, w_teacher))
    value.backward()
    assert relative_error(value.detach(), exact) < 3e-2 and leaf.grad.dtype == torch.float32


# ------------------------------------------------------------------------------- stored teachers


def stored(rest: str, k: int = 6) -> tuple[TopK, Tensor, Tensor]:
    """A stored teacher over 37 classes, some of its places empty, with logits and target."""
    logits, target = example(3, 11, 37)
    log_prob, ids = teacher_logits(3, 11, 37).log_softmax(-1).topk(k)
    ids = ids.masked_fill(torch.arange(k) >= 4 + torch.arange(11)[:, None] % 3, -1)
    return TopK(ids, log_prob, rest), logits, target


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rest", ["renormalise", "uniform", "ignore"])
@every_kind
def test_stored_teachers(kind, rest, temperature):
    teacher, logits, target = stored(rest)
    options = {"divergence": kind, "beta": 0.3, "temperature": temperature}
    if rest == "renormalise" and kind == "reverse":
        with pytest.raises(ValueError, match="reverse KL is infinite"):
            DistillationLoss(**options)(logits, target, teacher=teacher)
    elif rest == "ignore" and temperature != 1:
        with pytest.raises(ValueError, match="rest='ignore' takes 1"):
            DistillationLoss(**options)(logits, target, teacher=teacher)
    else:
        for reduction in ("mean", "none"):
            assert_distils(logits, target, teacher, reduction=reduction, **options)


def test_a_part_of_a_sum_refuses_its_teacher():
    """As it does alone."""
    logits, target = torch.randn(4, 9), torch.arange(4)
    log_prob, ids = torch.randn(4, 9).log_softmax(-1).topk(3)
    for kind, temperature, rest, message in (
        ("reverse", 1, "renormalise", "reverse KL is infinite"),
        ("forward", 2, "ignore", "rest='ignore' takes 1"),
    ):
        loss = segloss.CrossEntropyLoss() + segloss.DistillationLoss(kind, temperature=temperature)
        with pytest.raises(ValueError, match=message):
            loss(logits, target, teacher=segloss.TopK(ids, log_prob, rest=rest))


@pytest.mark.parametrize("rest", ["renormalise", "uniform"])
def test_all_classes_stored_is_the_teacher_itself(rest):
    logits, target = example(7, 37)
    teacher = teacher_logits(7, 37)
    log_prob, ids = teacher.log_softmax(-1).topk(37)
    for kind in ("forward", "jsd"):
        loss = DistillationLoss(kind, temperature=2)
        given = loss(logits, target, teacher=TopK(ids, log_prob, rest))
        assert_near(given, loss(logits, target, teacher=teacher), 1e-12)


@pytest.mark.parametrize("kind, rest", [("forward", "renormalise"), ("jsd", "uniform")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_stored_teachers_of_a_head(kind, rest, reduction):
    teacher, _, _ = stored(rest)
    (hidden, weight, _), _, target = heads(37, 37)
    for frozen in (False, True):
        results = []
        for source in (
            lambda h, w: LinearLogits(h, w, chunk_bytes=7 * 37 * 8),
            lambda h, w: h @ w.T,
        ):
            leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
            loss = segloss.CrossEntropyLoss(reduction=reduction)
            loss = 0.3 * loss + DistillationLoss(kind, temperature=2, reduction=reduction)
            value = loss(source(*leaves), target, teacher=teacher)
            found = grads(value, leaves[: 2 - frozen])
            results.append([value.detach(), *found])
        for a, b in zip(*results, strict=True):
            assert_near(a, b)


# -------------------------------------------------------------------------- sums, calls, errors


def test_a_sum_is_one_sweep_of_its_parts():
    logits, target = example(3, 11, 37)
    teacher = teacher_logits(3, 11, 37)
    parts = [
        (0.5, segloss.CrossEntropyLoss(), {}),
        (0.5, DistillationLoss(temperature=2), {"teacher": teacher}),
        (0.25, DistillationLoss("reverse"), {"teacher": teacher}),
        (0.1, segloss.DiceLoss(), {}),
        (0.1, segloss.LovaszSoftmaxLoss(), {}),
    ]
    apart, together = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = sum(c * loss(apart, target, **call) for c, loss, call in parts)
    loss = sum(c * loss for c, loss, _ in parts)
    value, statistics = loss(together, target, teacher=teacher, return_statistics=True)
    assert_near(value.detach(), expected.detach(), 1e-12)
    assert_near(grads(value, [together])[0], grads(expected, [apart])[0], 1e-12)
    truth = reference.logit_statistics(logits, target, entropy=True, argmax=True)
    assert_near(statistics.entropy, truth.entropy)
    assert torch.equal(statistics.argmax, truth.argmax)


def test_four_batches_are_one():
    logits, target = example(8, 37)
    teacher = teacher_logits(8, 37)
    whole = DistillationLoss()(logits, target, teacher=teacher)
    count = int((target != -100).sum())
    parts = [
        DistillationLoss()(logits[i], target[i], teacher=teacher[i], normalizer=count)
        for i in (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8))
    ]
    assert_near(sum(parts), whole, 1e-12)


def test_functions_and_expressions():
    (hidden, weight, bias), (h_teacher, w_teacher), target = heads(37, 37)
    teacher = LinearLogits(h_teacher, w_teacher)
    value = segloss.linear_distillation_loss(
        hidden, weight, target, linear_bias=bias, teacher=teacher, divergence="jsd"
    )
    logits = reference.linear_logits(hidden, weight, bias)
    assert_near(value, segloss.distillation_loss(logits, target, teacher=teacher, divergence="jsd"))
    loss = segloss.parse_loss("0.5*ce + 0.5*distill(temperature=2, divergence='reverse')")
    expected = 0.5 * segloss.CrossEntropyLoss() + 0.5 * DistillationLoss("reverse", temperature=2)
    assert torch.equal(
        loss(logits, target, teacher=teacher), expected(logits, target, teacher=teacher)
    )


def test_probability_targets_go_with_a_teacher():
    logits, _ = example(7, 37, ignored=0)
    y, teacher = teacher_logits(7, 37, seed=9).softmax(-1), teacher_logits(7, 37)
    value = (segloss.CrossEntropyLoss() + DistillationLoss())(logits, y, teacher=teacher)
    log_p = logits.log_softmax(-1)
    expected = F.cross_entropy(logits, y)
    expected = expected + F.kl_div(
        log_p, teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert_near(value, expected)


LOGITS, TARGET = example(7, 37)
RIGHT = teacher_logits(7, 37)
TOP = {"ids": torch.zeros(7, 2, dtype=torch.int64), "log_prob": torch.zeros(7, 2)}


@pytest.mark.parametrize(
    "teacher, error, says",
    [
        (None, TypeError, r"teacher is missing: call DistillationLoss as loss\(logits, target, te"),
        ("gpt", TypeError, "teacher is 'gpt'; it takes logits"),
        (RIGHT[:3], ValueError, r"teacher has leading shape \(3,\); it takes the logits', \(7,\)"),
        (torch.zeros(7, 900), ValueError, "teacher has 900 classes, the student 37: more than pad"),
        (RIGHT.long(), TypeError, "it takes float64, float32, bfloat16 or float16"),
        (TopK(TOP["ids"] + 40, TOP["log_prob"]), ValueError, "teacher's ids has ids from 40 to 40"),
        (TopK(TOP["ids"][:2], TOP["log_prob"][:2]), ValueError, r"leading shape \(2,\)"),
    ],
)
def test_wrong_teachers(teacher, error, says):
    with pytest.raises(error, match=says):
        DistillationLoss()(LOGITS, TARGET, teacher=teacher)


@pytest.mark.parametrize(
    "changed, error, says",
    [
        (
            {"rest": "drop"},
            ValueError,
            "rest is 'drop'; it takes 'renormalise' or 'uniform' or 'ig",
        ),
        ({"ids": torch.zeros(7, 2)}, TypeError, "ids is a torch.float32 tensor"),
        ({"log_prob": torch.zeros(7, 3)}, ValueError, r"log_prob \(7, 3\); both take \(..., k\)"),
        ({"log_prob": [0.0]}, TypeError, "log_prob is a list"),
    ],
)
def test_wrong_stored_teachers(changed, error, says):
    with pytest.raises(error, match=says):
        TopK(**TOP | changed)


@pytest.mark.parametrize(
    "options, error, says",
    [
        (
            {"divergence": "kl"},
            ValueError,
            "divergence is 'kl'; it takes 'forward' or 'reverse' or",
        ),
        ({"beta": 1.5}, ValueError, "beta is 1.5; it takes a number from 0 to 1"),
        ({"temperature": 0}, ValueError, "temperature is 0; it takes a number above 0"),
        ({"temperature": "2"}, TypeError, "temperature is '2'; it takes a number"),
    ],
)
def test_wrong_options(options, error, says):
    with pytest.raises(error, match=says):
        DistillationLoss(**options)


def test_other_losses_say_where_a_teacher_and_probabilities_go():
    with pytest.raises(TypeError, match="FocalLoss reads no teacher; it goes to DistillationLoss"):
        segloss.FocalLoss()(LOGITS, TARGET, teacher=RIGHT)
    with pytest.raises(TypeError, match=r"probabilities \(..., V\) go to CrossEntropyLoss"):
        segloss.FocalLoss()(LOGITS, RIGHT.softmax(-1))
    with pytest.raises(ValueError, match="ignore_index is 0, and target holds probabilities"):
        segloss.CrossEntropyLoss(ignore_index=0)(LOGITS, RIGHT.softmax(-1))


def test_hinton_keeps_the_gradient_s_size():
    """What `temperature_squared` is for: the gradient has a limit instead of falling as 1 / T^2."""
    logits, target = example(7, 37)
    teacher = teacher_logits(7, 37)

    def size(temperature, squared):
        leaf = logits.clone().requires_grad_()
        loss = DistillationLoss(temperature=temperature, temperature_squared=squared)
        return grads(loss(leaf, target, teacher=teacher), [leaf])[0].norm().item()

    assert math.isclose(size(50, True), size(100, True), rel_tol=0.1)
    assert math.isclose(size(50, False), 4 * size(100, False), rel_tol=0.1)
