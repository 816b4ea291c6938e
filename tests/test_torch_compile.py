"""Calls inside `torch.compile(fullgraph=True)`: the eager values and gradients, bit for bit."""

import pytest
import torch
from own_losses import MarginLoss

import segloss

V, D = 11, 8
TARGET = torch.tensor([[-100, 3, 3, 0, 10, 7], [1, 3, 5, 5, 2, 9]])
WEIGHT = torch.linspace(0.5, 1.5, V)

LOSSES = {
    "cross_entropy": segloss.CrossEntropyLoss(label_smoothing=0.1, weight=WEIGHT),
    "focal": segloss.FocalLoss(gamma=1.5),
    "dice": segloss.DiceLoss(weight=WEIGHT),
    "generalized_dice": segloss.GeneralizedDiceLoss(per_sample=True),
    "lovasz": segloss.LovaszSoftmaxLoss(classes="all"),
    "sum": 0.6 * segloss.CrossEntropyLoss(weight=WEIGHT) + 0.4 * segloss.LovaszSoftmaxLoss(),
    "per_token": segloss.FocalLoss(reduction="none"),
}


def value_and_grads(function, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    loss = value[0] if isinstance(value, tuple) else value
    upstream = torch.linspace(1.0, 2.0, loss.numel()).view(loss.shape)
    return value, torch.autograd.grad(loss, leaves, upstream)


def assert_same_compiled(function, *tensors):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    value, grads = value_and_grads(function, *tensors)
    compiled_value, compiled_grads = value_and_grads(compiled, *tensors)
    torch.testing.assert_close(compiled_value, value, rtol=0, atol=0)
    torch.testing.assert_close(compiled_grads, grads, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_logits(name):
    loss = LOSSES[name]
    assert_same_compiled(lambda z: loss(2 * z, TARGET), torch.randn(2, 6, V))


@pytest.mark.parametrize("name", LOSSES)
def test_fused_head(name):
    loss = LOSSES[name]

    def function(hidden, weight, bias, a, b):
        source = segloss.LinearLogits(hidden, weight, bias, softcap=5.0, lora=(a, b, 0.5))
        return loss(source, TARGET)

    shapes = [(2, 6, D), (V, D), (V,), (2, D), (V, 2)]
    assert_same_compiled(function, *(torch.randn(shape) for shape in shapes))


def test_functions_and_keywords():
    weights = torch.rand(2, 6)

    def function(hidden, weight):
        return segloss.linear_poly_loss(
            hidden, weight, TARGET, epsilon=2.0, token_weight=weights, normalizer=7.0
        )

    assert_same_compiled(function, torch.randn(2, 6, D), torch.randn(V, D))
    assert_same_compiled(
        lambda z: segloss.dice_loss(segloss.DenseLogits(z, softcap=3.0), TARGET, per_sample=True),
        torch.randn(2, 6, V),
    )


def test_statistics():
    loss = segloss.CrossEntropyLoss()

    def function(hidden, weight):
        value, statistics = loss(
            segloss.LinearLogits(hidden, weight), TARGET, return_statistics=True
        )
        return value, statistics.entropy, statistics.argmax, statistics.valid

    assert_same_compiled(function, torch.randn(2, 6, D), torch.randn(V, D))


ASKED = {
    "a tensor": ("jsd", "none", lambda z, h, w: z),
    "another cap": ("reverse", "mean", lambda z, h, w: segloss.DenseLogits(z, softcap=3.0)),
    "a head": ("forward", "mean", lambda z, h, w: segloss.LinearLogits(h, w, softcap=4.0)),
    "stored": ("forward", "mean", lambda z, h, w: stored(z, "renormalise")),
    "stored, written out": ("jsd", "none", lambda z, h, w: stored(z, "uniform")),
}


def stored(logits, rest):
    log_prob, ids = logits.log_softmax(-1).topk(4)
    return segloss.TopK(ids, log_prob, rest)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", ASKED)
def test_teachers(name, head):
    kind, reduction, make = ASKED[name]
    loss = 0.5 * segloss.DistillationLoss(kind, temperature=2, reduction=reduction)
    loss = loss + 0.5 * segloss.CrossEntropyLoss(reduction=reduction)
    parts = torch.randn(2, 6, V), torch.randn(2, 6, D), torch.randn(V, D)

    def function(hidden, weight):
        logits = segloss.LinearLogits(hidden, weight) if head else hidden @ weight.T
        return loss(logits, TARGET, teacher=make(*parts))

    assert_same_compiled(function, torch.randn(2, 6, D), torch.randn(V, D))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_listed_classes(reduction):
    loss = segloss.CrossEntropyLoss(reduction=reduction)
    loss = loss + MarginLoss(reduction=reduction)
    columns = torch.randint(-1, V, (2, 6, 3))

    def function(hidden, weight):
        source = segloss.LinearLogits(hidden, weight)
        value, stats = loss(source, TARGET, columns=columns, return_statistics=True)
        return value, stats.column_log_prob, stats.argmax

    assert_same_compiled(function, torch.randn(2, 6, D), torch.randn(V, D))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_probabilities(reduction):
    y = torch.randn(2, 6, V).softmax(-1)
    loss = segloss.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1)

    def function(hidden, weight):
        source = segloss.LinearLogits(hidden, weight)
        value, stats = loss(source, y, return_statistics=True)
        return value, stats.lse, stats.valid

    assert_same_compiled(function, torch.randn(2, 6, D), torch.randn(V, D))


def test_a_wrong_teacher_under_compile():
    torch._dynamo.reset()
    loss = segloss.DistillationLoss()
    compiled = torch.compile(lambda z: loss(z, TARGET, teacher="gpt"), backend="aot_eager")
    with pytest.raises(Exception, match="teacher is 'gpt'; it takes logits"):
        compiled(torch.randn(2, 6, V))


def test_without_gradient():
    logits = torch.randn(2, 6, V)
    loss = LOSSES["sum"]
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: loss(z, TARGET), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(logits), loss(logits, TARGET))


def test_two_losses_of_one_kind_do_not_meet():
    logits = torch.randn(2, 6, V)
    losses = [segloss.FocalLoss(gamma) for gamma in (1.0, 3.0)]
    functions = [torch.compile(loss, fullgraph=True, backend="aot_eager") for loss in losses]
    torch._dynamo.reset()
    for function, gamma in zip(functions, (1.0, 3.0), strict=True):
        expected = segloss.focal_loss(logits, TARGET, gamma=gamma)
        assert function(logits, TARGET).item() == expected.item()


def test_operators_pass_opcheck():
    from segloss.losses.compiled import remember

    key = remember(
        segloss.FocalLoss().description, "DenseLogits", (("scale", 1.0),),
        ("target", "source.logits"), None, True, (False, True), "mean",
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.segloss.loss.default,
        ([TARGET, torch.randn(2, 6, V, requires_grad=True)], key),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("dtype, upstream", [(torch.bfloat16, 1 / 3), (torch.float16, 65536.0)])
def test_the_upstream_factor_is_not_rounded(dtype, upstream):
    """bf16(1 / 3) is 0.2 % off, fp16(65536) infinite; float16 gradients before it are mostly 0."""
    loss = segloss.CrossEntropyLoss()
    n, v = 1024, 61
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, D), (v, D))
    hidden, weight = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    target = torch.randint(v, (n,), generator=generator)

    def run(h, w):
        return loss(segloss.LinearLogits(h, w), target)

    def grads(function, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*leaves) * upstream, leaves)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    truth = grads(run, hidden.double(), weight.double())
    for ours, exact in zip(grads(compiled, hidden, weight), truth, strict=True):
        factor = (ours.double() * exact).sum() / exact.square().sum()
        assert factor == pytest.approx(1, abs=8e-4)
        assert (ours.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("compact, name", [(False, "ce"), (True, "ce"), (False, "dice")])
def test_cuda_graphs_leave_out_what_waits(compact, name):
    loss = {"ce": segloss.CrossEntropyLoss(), "dice": segloss.DiceLoss()}[name]
    used = []

    def backend(graph, inputs):
        used.extend(n.target for n in graph.graph.nodes if "segloss" in str(n.target))
        return graph

    def run(h, w):
        return loss(segloss.LinearLogits(h, w, compact=compact), torch.arange(4))

    torch._dynamo.reset()
    torch.compile(run, fullgraph=True, backend=backend)(torch.randn(4, D), torch.randn(V, D))
    (op,) = used
    op = getattr(op, "_opoverload", op)
    waits = compact or name == "dice"
    assert (torch.Tag.cudagraph_unsafe in op.tags) == waits
