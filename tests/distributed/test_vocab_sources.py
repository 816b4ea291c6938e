"""Slices of logits and of a head: statistics, precision, memory, options, refusals. Four ranks."""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
import vocab_cases
from helpers import TOLERANCE, relative_error
from linear_memory import resident
from torch.distributed.device_mesh import init_device_mesh
from vocab_cases import D, N, V, losses

import segloss
from segloss.sharding import columns_of

PARTS = 4
MIB = 2**20
CASE = vocab_cases.Case("statistics")
CUTS = {"even": None, "padded": (10, 10, 10, 10), "empty shards": (0, 12, 17, 0)}
CLASSES = {"none": None, "present": "present", "all": "all", "ids": [28, 3, 9, 10]}
NAMES = ("ce, all options", "focal, none", "dice, all", "lovasz, per sample", "all kinds")


def logits_of(x: dict) -> torch.Tensor:
    """With rows that have no finite logit on some ranks, and on all but one."""
    logits = (x["hidden"] @ x["weight"].T).detach()
    logits[x["target"] >= 16, :16] = -torch.inf
    logits[x["target"] == V - 1, : V - 1] = -torch.inf
    return logits


def statistics(source, target, leaves, classes) -> dict:
    """Every statistic, and the gradient of a sum of all that are real numbers."""
    ids = torch.tensor(classes) if isinstance(classes, list) else classes
    found = segloss.logit_statistics(source, target, entropy=True, argmax=True, classes=ids)
    row = torch.arange(target.numel()).double()
    total = (found.log_prob * row + found.lse * (row % 3) - found.entropy * (row % 5)).sum()
    if classes is not None:
        total = total + (found.prob_sum * (1 + found.classes % 4)).sum()
    grads = torch.autograd.grad(total, leaves)
    names = ("log_prob", "lse", "entropy", "argmax", "valid", "prob_sum", "classes")
    values = {n: getattr(found, n) for n in names if getattr(found, n) is not None}
    return {n: v.detach() for n, v in values.items()} | {"grads": list(grads)}


def cut(x: torch.Tensor, rows, rank: int, dim: int = 0) -> torch.Tensor:
    case = vocab_cases.Case("", rows=rows)
    sizes, spans = vocab_cases.spans_of(case, PARTS)
    turned = vocab_cases.sliced(x.movedim(dim, 0), sizes[rank], spans[rank])
    return turned.movedim(0, dim).clone()


def of_statistics(rank: int) -> dict:
    found, x = {}, vocab_cases.problem(CASE, 1)
    for where, rows in CUTS.items():
        vocab = segloss.VocabShard(dist.group.WORLD, V)
        for name, classes in CLASSES.items():
            hidden = x["hidden"].clone().requires_grad_()
            weight = cut(x["weight"], rows, rank).requires_grad_()
            source = segloss.LinearLogits(hidden, weight, vocab=vocab)
            key = ("linear", where, name)
            found[key] = statistics(source, x["target"], [hidden, weight], classes)
            logits = cut(logits_of(x), rows, rank, 1).requires_grad_()
            source = segloss.DenseLogits(logits, vocab=vocab)
            found["dense", where, name] = statistics(source, x["target"], [logits], classes)
        for name in NAMES:
            logits = cut(logits_of(x), rows, rank, 1).requires_grad_()
            source = segloss.DenseLogits(logits, softcap=3.0, scale=0.7, vocab=vocab)
            value = losses()[name](source, x["target"], sample_ids=x["sample_ids"])
            (grad,) = torch.autograd.grad(value.sum(), logits)
            found["loss", where, name] = {"value": value.detach(), "grad": grad}
    return found


def of_no_gradient(rank: int, mesh) -> dict:
    """Statistics alone: the rows' exchange and nothing else crosses."""
    x, found = vocab_cases.problem(CASE, 1), {}
    vocab = segloss.VocabShard(dist.group.WORLD, V)
    source = segloss.LinearLogits(x["hidden"], cut(x["weight"], None, rank), vocab=vocab)
    vocab.sharding(source.weight.shape[0], torch.device("cpu"))
    for name in ("ce", "all kinds"):
        with torch.no_grad(), vocab_cases.Counts(mesh) as counts:
            found[name] = losses()[name](source, x["target"]), counts.calls
    return found


# ------------------------------------------------------------------------- precision and memory


def confident(seed: int = 0) -> tuple:
    """float32 rows whose nll is 1e-8 to 1e-4: their targets lead by 12 to 20."""
    g = torch.Generator().manual_seed(seed)
    n, v, d = 128, 512, 64
    weight = torch.nn.functional.normalize(torch.randn(v, d, generator=g), dim=-1)
    target = torch.randint(v, (n,), generator=g)
    lead = 15 + 11 * torch.rand(n, 1, generator=g)
    return lead * weight[target], weight, target


def of_precision(rank: int, groups: dict[int, object]) -> dict:
    found = {}
    hidden, weight, target = confident()
    for parts, group in groups.items():
        vocab = segloss.VocabShard(group, weight.shape[0])
        own = weight.chunk(parts)[rank % parts]
        source = segloss.LinearLogits(hidden, own, vocab=vocab)
        found["nll", parts] = segloss.cross_entropy(source, target, reduction="none")
        states = (0.25 * hidden).bfloat16().requires_grad_()
        source = segloss.LinearLogits(states, own.bfloat16(), vocab=vocab)
        for name in ("ce", "dice"):
            source_loss = losses_of_precision()[name](source, target)
            (found[name, parts],) = torch.autograd.grad(source_loss, states)
    return found


def losses_of_precision() -> dict:
    return {"ce": segloss.CrossEntropyLoss(), "dice": segloss.DiceLoss()}


MEMORY = {
    "cross-entropy": (segloss.CrossEntropyLoss(), True),
    "dice": (segloss.DiceLoss(), True),
    "lovasz, frozen": (segloss.LovaszSoftmaxLoss(), False),
    "focal, none": (segloss.FocalLoss(reduction="none"), True),
}
TOKENS, CLASSES_OF_HEAD, WIDTH = 1024, 32768, 16


def of_memory(rank: int, groups: dict[int, object]) -> dict:
    """Bytes by which resident memory rises above inputs and gradients."""
    found = {}
    for name, (loss, trained) in MEMORY.items():
        for parts, group in ({1: None} | groups).items():
            dist.barrier()
            if parts > 1 or rank == 0:
                found[name, parts] = rise(loss, trained, parts, group)
    return found


def rise(loss, trained: bool, parts: int, group) -> int:
    g = torch.Generator().manual_seed(0)
    classes = CLASSES_OF_HEAD // parts
    hidden = torch.randn(TOKENS, WIDTH, generator=g).bfloat16().requires_grad_()
    weight = torch.randn(classes, WIDTH, generator=g).bfloat16().requires_grad_(trained)
    target = torch.randint(64, (TOKENS,), generator=g)
    vocab = None if group is None else segloss.VocabShard(group, CLASSES_OF_HEAD)

    def step(n: int, v: int, vocab):
        source = segloss.LinearLogits(hidden[:n], weight[:v], chunk_bytes=1 << 30, vocab=vocab)
        loss(source, target[:n]).sum().backward()

    small = None if group is None else segloss.VocabShard(group, 64 * parts)
    step(64, 64, small)  # what a first call sets up
    hidden.grad = weight.grad = None
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    step(TOKENS, classes, vocab)
    grads = [t.grad.nbytes for t in (hidden, weight) if t.grad is not None]
    return resident("VmHWM") - before - sum(grads)


# ------------------------------------------------------------------------- options and refusals


def of_filter(rank: int) -> dict:
    """A filter that merges columns: its share is of all ranks' columns."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(512, 16, generator=g, dtype=torch.float64)
    hidden = torch.randn(300, 16, generator=g, dtype=torch.float64)
    target = torch.randint(8, (300,), generator=g)
    vocab = segloss.VocabShard(dist.group.WORLD, 512)
    found = {}
    for name in ("ce", "dice"):
        for limit in (0.0, 1e-2):
            states = hidden.clone().requires_grad_()
            own = weight.chunk(PARTS)[rank].clone().requires_grad_()
            source = segloss.LinearLogits(states, own, vocab=vocab, grad_filter=limit)
            losses_of_precision()[name](source, target).backward()
            found[name, limit] = (states.grad, own.grad, source.report.get("dropped_mass"))
    return found


def said(function) -> str:
    """The error, by its type and text."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def of_refusals(rank: int) -> dict[str, str]:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tp, world = mesh["tp"], dist.group.WORLD
    x = vocab_cases.problem(CASE, 1)
    hidden, weight, target = x["hidden"], x["weight"], x["target"]

    def local(tensor, on=tp, *placements):
        return DTensor.from_local(tensor, on, placements or [Replicate()], run_check=False)

    head = local(weight, tp, Shard(0))
    whole = local(hidden)
    linear, dense, shard = segloss.LinearLogits, segloss.DenseLogits, segloss.VocabShard
    ce, distill = segloss.CrossEntropyLoss(), segloss.DistillationLoss()
    two = local(hidden, mesh, Shard(0), Replicate())
    head_of_two = local(weight, mesh, Replicate(), Shard(0))
    tokens = linear(two, head_of_two)
    whole_b = x["lora_b"].repeat(2, 1)
    lies = [3, 4, 4, 4]
    return {
        "plain hidden": said(lambda: linear(hidden, head)),
        "plain weight": said(lambda: linear(whole, weight)),
        "weight Shard(1)": said(lambda: linear(whole, local(weight, tp, Shard(1)))),
        "weight Partial": said(lambda: linear(whole, local(weight, tp, Partial()))),
        "hidden Shard(-1)": said(lambda: linear(local(hidden, tp, Shard(1)), head)),
        "hidden Partial": said(lambda: linear(local(hidden, tp, Partial()), head)),
        "other mesh": said(lambda: linear(local(hidden, mesh["dp"], Shard(0)), head)),
        "plain bias": said(lambda: linear(whole, head, x["bias"])),
        "bias Replicate": said(lambda: linear(whole, head, local(x["bias"].repeat(2)))),
        "B Replicate": said(
            lambda: linear(whole, head, lora=(local(x["lora_a"]), local(whole_b), 1.0))
        ),
        "logits Partial": said(lambda: dense(local(hidden, tp, Partial()))),
        "vocab beside DTensors": said(lambda: linear(whole, head, vocab=shard(world, V))),
        "vocab is a group": said(lambda: linear(hidden, weight, vocab=world)),
        "sequence_dim of logits": said(
            lambda: dense(hidden, vocab=shard(world, V, sequence_dim=0))
        ),
        "sequence_dim of D": said(
            lambda: linear(hidden, weight, vocab=shard(world, V, sequence_dim=1))
        ),
        "no group": said(lambda: shard(None, V)),
        "first alone": said(lambda: shard(world, V, first=0)),
        "2-D mesh as a group": said(lambda: shard(mesh, V)),
        "DTensor target": said(lambda: ce(linear(hidden, weight), local(target))),
        "class weight": said(lambda: segloss.CrossEntropyLoss(weight=local(x["bias"]))),
        "another group": said(lambda: segloss.CrossEntropyLoss(group=world)(tokens, target)),
        "teacher of a whole student": said(
            lambda: distill(hidden @ weight.T, target, teacher=linear(whole, head))
        ),
        "teacher's tokens": said(
            lambda: distill(hidden @ weight.T, target[:8].repeat(6), teacher=tokens)
        ),
        "teacher's shards": said(
            lambda: distill(
                linear(hidden, cut(weight, None, rank), vocab=shard(world, V)), target,
                teacher=linear(hidden, cut(weight, CUTS["empty shards"], rank),
                               vocab=shard(world, V)))
        ),
        "teacher's group": said(
            lambda: distill(linear(hidden, cut(weight, None, rank), vocab=shard(world, V)), target,
                            teacher=linear(whole, head))
        ),
        "teacher's classes": said(
            lambda: distill(linear(whole, head), target, teacher=torch.zeros(N, 900))
        ),
        "half a target": said(
            lambda: ce(linear(whole, head), torch.ones(N, V - 2, dtype=torch.float64))
        ),
        "rows": said(lambda: tokens.rows(torch.arange(2))),
        "ZeRO-3": said(lambda: linear(hidden, placeholder())),
        # the ranks disagree, and all of them say so
        "cut short": said(lambda: ce(linear(hidden, weight[:7], vocab=shard(world, V)), target)),
        "gap": said(
            lambda: ce(
                linear(hidden, weight[:8], vocab=shard(world, V, first=8 * rank, width=lies[rank])),
                target,
            )
        ),
        "another V": said(
            lambda: ce(linear(hidden, weight[:8], vocab=shard(world, V + rank)), target)
        ),
        "target": said(
            lambda: ce(linear(hidden, weight[:8], vocab=shard(world, V)), target.fill_(V))
        ),
    }  # fmt: skip


def placeholder() -> torch.Tensor:
    empty = torch.empty(0)
    empty.ds_shape = (V, D)
    return empty


def of_a_rank_that_raises(rank: int) -> str:
    """The last rank has a wrong target among its tokens; the others' collective ends in time."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    x = vocab_cases.problem(CASE, 1)
    each = N // PARTS
    tokens = slice(rank * each, (rank + 1) * each)
    target = x["target"][tokens].clone()
    if rank == PARTS - 1:
        target[0] = V
    source = segloss.LinearLogits(x["hidden"][tokens], x["weight"])
    return said(lambda: segloss.DiceLoss(group=group)(source, target))


def of_compiled(rank: int) -> tuple:
    """A sharded head is called outside the graph."""
    x = vocab_cases.problem(CASE, 1)
    vocab = segloss.VocabShard(dist.group.WORLD, V)
    own = cut(x["weight"], None, rank).requires_grad_()
    loss = losses()["all kinds"]

    def call(hidden):
        return loss(segloss.LinearLogits(hidden, own, vocab=vocab), x["target"])

    value = torch.compile(call, backend="eager")(x["hidden"])
    return value.detach(), torch.autograd.grad(value, own)[0]


def results(rank, group):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[rank // 2], 4: group}
    mesh = vocab_cases.Mesh((1, PARTS))
    mesh.vocab = group
    by_mesh = init_device_mesh("cpu", (PARTS,))
    x = vocab_cases.problem(CASE, 1)
    own = slice(rank * N // PARTS, (rank + 1) * N // PARTS)
    with_mesh = losses(by_mesh)["dice"](
        segloss.LinearLogits(x["hidden"][own], x["weight"]), x["target"][own]
    )
    return {
        "statistics": of_statistics(rank),
        "no gradient": of_no_gradient(rank, mesh),
        "precision": of_precision(rank, groups),
        "memory": of_memory(rank, groups),
        "filter": of_filter(rank),
        "mesh": with_mesh,
        "compiled": of_compiled(rank),
        "refusals": of_refusals(rank),
        "raises": of_a_rank_that_raises(rank),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # every tensor of its own pages, so that a freed one is no longer resident
        patch.setitem(os.environ, "MALLOC_MMAP_THRESHOLD_", "65536")
        return ranks.spawn(results, tmp_path_factory.mktemp("sources"), PARTS)


def near(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", CUTS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", ["linear", "dense"])
def test_statistics(found, kind, where, name):
    x, rows = vocab_cases.problem(CASE, 1), CUTS[where]
    if kind == "dense":
        leaves = [logits_of(x).requires_grad_()]
        source = segloss.DenseLogits(*leaves)
    else:
        leaves = [x["hidden"].requires_grad_(), x["weight"].requires_grad_()]
        source = segloss.LinearLogits(*leaves)
    true = statistics(source, x["target"], leaves, CLASSES[name])
    for rank, own in enumerate(r["statistics"][kind, where, name] for r in found):
        for what, value in true.items():
            if what != "grads":
                near(own[what], value)
                assert torch.equal(own[what], found[0]["statistics"][kind, where, name][what])
        *hidden, sliced = own["grads"]
        near(hidden, true["grads"][:-1])
        grad = true["grads"][-1]
        padding = cut(torch.zeros_like(grad), rows, rank, int(kind == "dense")) == 7
        expected = cut(grad, rows, rank, int(kind == "dense"))
        near(sliced, expected.masked_fill(padding, 0))


@pytest.mark.parametrize("where", CUTS)
@pytest.mark.parametrize("name", NAMES)
def test_losses_of_sliced_logits(found, where, name):
    x, rows = vocab_cases.problem(CASE, 1), CUTS[where]
    logits = logits_of(x).requires_grad_()
    source = segloss.DenseLogits(logits, softcap=3.0, scale=0.7)
    value = losses()[name](source, x["target"], sample_ids=x["sample_ids"])
    (grad,) = torch.autograd.grad(value.sum(), logits)
    for rank, own in enumerate(r["statistics"]["loss", where, name] for r in found):
        near(own["value"], value.detach())
        padding = cut(torch.zeros_like(grad), rows, rank, 1) == 7
        near(own["grad"], cut(grad, rows, rank, 1).masked_fill(padding, 0))


@pytest.mark.parametrize("name", ["ce", "all kinds"])
def test_without_a_gradient_only_forward_crosses(found, name):
    x = vocab_cases.problem(CASE, 1)
    source = segloss.LinearLogits(x["hidden"], x["weight"])
    for value, calls in (rank["no gradient"][name] for rank in found):
        near(value, losses()[name](source, x["target"]))
        there = {("forward", "vocabulary", "all-gather"): 1}
        if name == "all kinds":
            there["forward", "vocabulary", "all-reduce"] = 3
        assert calls == there


@pytest.mark.parametrize("parts", [2, 4])
def test_confident_rows_keep_their_digits(found, parts):
    hidden, weight, target = confident()
    logits = hidden.double() @ weight.double().T
    true = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    chosen = (true > 1e-8) & (true <= 1e-4)
    assert chosen.sum() > 60
    whole = segloss.cross_entropy(segloss.LinearLogits(hidden, weight), target, reduction="none")
    true, whole = true[chosen], whole[chosen].double()
    for rank in found:
        ours = rank["precision"]["nll", parts][chosen].double()
        assert ((ours - true) / true).norm() <= 2 * ((whole - true) / true).norm()


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", ["ce", "dice"])
def test_half_precision_parts_of_dhidden_add_up(found, parts, name):
    hidden, weight, target = confident()
    loss = losses_of_precision()[name]
    grads = {}
    for dtype in (torch.float64, torch.bfloat16):
        states = (0.25 * hidden).bfloat16().to(dtype).requires_grad_()
        logits = torch.nn.functional.linear(states, weight.bfloat16().to(dtype))
        (grads[dtype],) = torch.autograd.grad(loss(logits, target), states)
    true = grads[torch.float64]
    allowed = 2 * relative_error(grads[torch.bfloat16], true) + TOLERANCE[torch.bfloat16]
    for rank in found:
        assert relative_error(rank["precision"][name, parts], true) <= allowed


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_divided_by_the_ranks(found, name, parts):
    whole = found[0]["memory"][name, 1]
    assert whole > 60 * MIB  # the logits of a chunk, in bfloat16
    for rank in found:
        # and vectors of N and of N D numbers, and what the products of the CPU library set aside
        own = rank["memory"][name, parts]
        assert own <= whole / parts + 4 * MIB, f"{own / MIB:.1f} of {whole / MIB:.1f} MiB"


@pytest.mark.parametrize("name", ["ce", "dice"])
def test_a_filter_merges_the_small_columns_of_each_slice(found, name):
    shares = [rank["filter"][name, 1e-2][2] for rank in found]
    assert len(set(shares)) == 1 and 1e-3 < shares[0] < 0.9
    exact, filtered = ([r["filter"][name, limit] for r in found] for limit in (0.0, 1e-2))
    # another approximation than unsharded: each slice's small columns are one term
    for own in filtered:
        assert 1e-6 < relative_error(own[0], exact[0][0]) < 0.1
    heads = (torch.cat([own[1] for own in every]) for every in (filtered, exact))
    assert 1e-6 < relative_error(*heads) < 0.1


def test_a_mesh_is_taken_as_a_group(found):
    x = vocab_cases.problem(CASE, 1)
    value = segloss.DiceLoss()(segloss.LinearLogits(x["hidden"], x["weight"]), x["target"])
    for rank in found:
        near(rank["mesh"], value)


def test_under_compile(found):
    x = vocab_cases.problem(CASE, 1)
    weight = x["weight"].requires_grad_()
    value = losses()["all kinds"](segloss.LinearLogits(x["hidden"], weight), x["target"])
    (grad,) = torch.autograd.grad(value, weight)
    for rank, own in enumerate(r["compiled"] for r in found):
        near(own[0], value.detach())
        near(own[1], cut(grad, None, rank))


REFUSED = {
    "plain hidden": (
        "TypeError: hidden is a plain tensor beside a DTensor weight",
        "DTensor.from_local(hidden, mesh, [Replicate()])",
        "head_loss(model, loss, target, ...)",
    ),
    "plain weight": ("TypeError: weight is a plain tensor beside a DTensor hidden", "head_loss"),
    "weight Shard(1)": ("TypeError: weight has the placements", "Shard(0)"),
    "weight Partial": ("TypeError: weight has the placements", "weight.redistribute"),
    "hidden Shard(-1)": ("TypeError: hidden has the placements", "Replicate()"),
    "hidden Partial": ("TypeError: hidden has the placements", "hidden.redistribute"),
    "other mesh": ("TypeError: hidden is on", "one mesh"),
    "plain bias": ("TypeError: bias is a plain tensor beside a DTensor hidden",),
    "bias Replicate": ("TypeError: bias has the placements", "Shard"),
    "B Replicate": ("TypeError: lora's B has the placements", "Shard"),
    "logits Partial": ("TypeError: logits has the placements", "Shard(1)"),
    "vocab beside DTensors": ("TypeError: vocab goes with plain tensors", "leave vocab out"),
    "vocab is a group": ("TypeError: vocab is", "segloss.VocabShard"),
    "sequence_dim of logits": ("ValueError: vocab has sequence_dim=0",),
    "sequence_dim of D": ("ValueError: vocab's sequence_dim is 1",),
    "no group": ("TypeError: group is None",),
    "first alone": ("ValueError: first is 0 and width None",),
    "2-D mesh as a group": ("ValueError: group is a DeviceMesh of 2 dimensions", 'mesh["dp"]'),
    "DTensor target": ("TypeError: target is a DTensor", "target.to_local()"),
    "class weight": ("TypeError: weight is a DTensor", "weight.full_tensor()"),
    "another group": ("ValueError: group has the ranks [0, 1, 2, 3]", "leave group out"),
    "teacher of a whole student": (
        "TypeError: teacher's classes are sharded over ranks, and the student's are not so",
        "all classes on every rank",
    ),
    "teacher's tokens": (
        "TypeError: teacher's tokens are sharded over other ranks than the student's",
        "placements of the student's tokens",
    ),
    "teacher's shards": ("TypeError: teacher's classes are sharded", "the student's shards"),
    "teacher's group": ("TypeError: teacher's classes are sharded", "the student's shards"),
    "teacher's classes": ("ValueError: teacher has 900 classes, the student 58",),
    "half a target": ("TypeError: target is a torch.float64 tensor", "class indices"),
    "rows": ("TypeError: logits of single rows",),
    "ZeRO-3": ("TypeError: weight is an empty ZeRO-3 placeholder", "head_loss("),
    "cut short": ("ValueError: the vocabulary's ranks have [7, 7, 7, 7] columns", "29"),
    "gap": ("ValueError: the vocabulary's ranks have the columns", "leave a gap at 3"),
    "another V": ("ValueError: num_classes is [29, 30, 31, 32]",),
    "target": ("ValueError: target[0] is 29, but logits have 29 classes",),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_way_out(found, name):
    kind, *parts = REFUSED[name]
    for rank in found:  # all of them, so that none waits for another
        message = rank["refusals"][name]
        assert message.startswith(kind) and all(part in message for part in parts), message


def test_columns_that_overlap():
    with pytest.raises(ValueError, match="overlap at 3"):
        columns_of([[4, 7, 0, 4], [4, 7, 3, 4]])
    with pytest.raises(ValueError, match="some do not"):
        columns_of([[4, 7, 0, 4], [4, 7, -1, -1]])
    with pytest.raises(ValueError, match="slices of"):
        columns_of([[4, 7, 0, 4], [2, 7, 4, 3]])
    assert columns_of([[4, 7, 3, 4], [3, 7, 0, 3]]) == [(3, 4), (0, 3)]


def test_a_rank_that_raises_leaves_no_other_waiting(found):
    *others, last = (rank["raises"] for rank in found)
    assert last.startswith("ValueError: target[0] is 29")
    assert all(other.startswith("RuntimeError") for other in others), others
