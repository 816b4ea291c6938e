"""A head cut by vocabulary and tokens cut by anything, and the same in one process.

T token ranks x P vocabulary ranks; N tokens, V classes, D hidden size, B samples.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import segloss
from segloss.losses.crossing import crossings
from segloss.sweep.batch import make_batch

# V: 29 is prime, so that no number of ranks divides it; N: over 2 x 2 ranks and 4 in sequence
N, V, D, SAMPLE = 24, 29, 6, 4


@dataclass(frozen=True)
class Case:
    """How the head is cut, and with which options of `LinearLogits` and of the call."""

    name: str
    rows: tuple[int, ...] | None = None  # of each rank's slice; by default as DTensor cuts
    spans: tuple[tuple[int, int], ...] | None = None  # (first, width), where given to VocabShard
    options: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)  # "token_weight": True is random weights
    trained: tuple[str, ...] = ("hidden", "weight")
    sequence: bool = False
    empty: bool = False  # the last token rank has no valid token
    ignore_index: int = -100
    losses: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return self.name


def cases(parts: int) -> list[Case]:
    padded = -(-V // parts) + 2 if parts == 2 else 10  # 4 x 10: the last rank has padding alone
    slices = {2: (V, 0), 4: (0, 12, 17, 0)}[parts]
    uneven = {2: (4, V - 4), 4: (1, 20, 3, 5)}[parts]
    spans = {2: ((20, 9), (0, 20)), 4: ((20, 9), (8, 12), (3, 5), (0, 3))}[parts]
    few = ("ce", "focal, none", "dice, all", "lovasz", "all kinds")
    return [
        Case("plain"),
        Case("small chunks", options={"chunk_bytes": 8 * V * 5}),
        Case("token weights", call={"token_weight": True}, options={"memory_budget": 900}),
        Case("normalizer", call={"normalizer": 31.0}, losses=("ce", "dice", "lovasz, per sample")),
        Case(
            "softcap, scale, bias",
            options={"softcap": 3.0, "scale": 0.7},
            trained=("hidden", "weight", "bias"),
        ),
        Case("frozen", trained=("hidden",)),
        Case(
            "frozen, softcap, bias",
            options={"softcap": 3.0, "bias": True},
            trained=("hidden",),
            losses=few,
        ),
        Case("lora", trained=("hidden", "lora_a", "lora_b")),
        Case("lora trained alone", trained=("lora_a", "lora_b"), losses=few),
        Case("head trained alone", trained=("weight",), losses=few),
        Case("empty token rank", empty=True),
        Case("padded", rows=(padded,) * parts),
        Case("empty shard", rows=slices),
        Case("empty shard, frozen", rows=slices, trained=("hidden",), losses=few),
        Case("uneven", rows=uneven, losses=few),
        Case("own order", spans=spans, losses=few),
        Case("sequence parallel", sequence=True),
        Case("not compact", options={"compact": False}),
        Case("kept logits", options={"memory_budget": 1 << 20}, losses=few),
        # so low a limit merges no column, so that the result is exact
        Case("grad_filter", options={"grad_filter": 1e-300}, losses=few),
        # a class whose number within its shard is the ignored one must not be ignored, nor -1
        Case("ignore_index 3", ignore_index=3, losses=few),
        Case("ignore_index -1", ignore_index=-1, losses=few),
    ]


def losses(group=None, ignore_index: int = -100) -> dict[str, segloss.losses.Loss]:
    weight = (torch.arange(V) % 5 + 1).double() / 4
    every = {"group": group, "ignore_index": ignore_index}
    ce, focal = segloss.CrossEntropyLoss, segloss.FocalLoss
    dice, lovasz = segloss.DiceLoss, segloss.LovaszSoftmaxLoss
    return {
        "ce": ce(**every),
        "ce, all options": ce(weight=weight, label_smoothing=0.1, z_loss=0.01, **every),
        "ce + focal, sum": 0.5 * ce(reduction="sum", **every)
        + 0.5 * focal(reduction="sum", **every),
        "focal, none": focal(reduction="none", **every),
        "ce, none": ce(weight=weight, label_smoothing=0.1, reduction="none", **every),
        "dice": dice(**every),
        "dice, all": dice(classes="all", weight=weight, **every),
        "dice, per sample": dice(per_sample=True, **every),
        "dice, micro": dice(average="micro", **every),
        "focal tversky": segloss.FocalTverskyLoss(**every),
        "gdice": segloss.GeneralizedDiceLoss(**every),
        "lovasz": lovasz(**every),
        "lovasz, per sample": lovasz(per_sample=True, **every),
        "lovasz, all": lovasz(classes="all", **every),
        "all kinds": 0.4 * ce(label_smoothing=0.05, **every)
        + 0.2 * focal(**every)
        + 0.2 * dice(**every)
        + 0.2 * lovasz(**every),
    }


def chosen(case: Case) -> list[str]:
    names = case.losses or tuple(losses())
    return [n for n in names if "normalizer" not in case.call or "sum" not in n]


def problem(case: Case, token_ranks: int, dtype=torch.float64) -> dict[str, Tensor]:
    """Everything of all ranks. Targets are few classes, over the whole vocabulary; no ties."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    weight = normal(V, D)
    some = torch.tensor([0, 2, 3, 5, 9, 13, 14, 18, 19, 22, 26, V - 1])
    target = some[torch.randint(len(some), (N,), generator=g)]
    hidden = 0.7 * normal(N, D) + 0.15 * weight[target]
    sure = torch.arange(N) % 4 == 2
    hidden[sure] = 0.1 * hidden[sure] + 1.5 * weight[target[sure]]
    hidden[2] = 4.0 * weight[target[2]]
    target[::5] = case.ignore_index
    if case.empty:
        target[N - N // token_ranks :] = case.ignore_index
    token_weight = torch.rand(N, generator=g, dtype=torch.float64) + 0.5
    token_weight[1] = 0
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "bias": normal(V).to(dtype),
        "lora_a": normal(2, D).to(dtype),
        "lora_b": normal(V, 2).to(dtype),
        "target": target,
        "token_weight": token_weight,
        "sample_ids": torch.arange(N) // SAMPLE,
    }


def source_of(tensors: dict[str, Tensor], case: Case, **more) -> segloss.LinearLogits:
    options = {k: v for k, v in case.options.items() if k != "bias"} | more
    lora = None
    if "lora_a" in case.trained:
        lora = (tensors["lora_a"], tensors["lora_b"], 0.5)
    bias = tensors["bias"] if "bias" in case.trained or "bias" in case.options else None
    return segloss.LinearLogits(tensors["hidden"], tensors["weight"], bias, lora=lora, **options)


def call_of(case: Case, tensors: dict[str, Tensor]) -> dict[str, Any]:
    call = {k: v for k, v in case.call.items() if k != "token_weight"}
    call["sample_ids"] = tensors["sample_ids"]
    if "token_weight" in case.call:
        call["token_weight"] = tensors["token_weight"]
    return call


def value_and_grads(loss, source, tensors, case: Case, counts=None) -> dict[str, Any]:
    """The value, detached statistics and gradients of a call."""
    value, statistics = loss(
        source, tensors["target"], return_statistics=True, **call_of(case, tensors)
    )
    if counts is not None:
        counts.phase = "backward"
    upstream = torch.ones_like(value)
    if value.dim():
        start = int(tensors["first token"]) if "first token" in tensors else 0
        upstream = 0.5 + (start + torch.arange(value.numel())).to(value) % 7
    wanted = [tensors[name] for name in case.trained]
    grads = torch.autograd.grad(value, wanted, upstream.view_as(value))
    found = {"value": value.detach(), "lse": statistics.lse, "argmax": statistics.argmax}
    found |= {"log_prob": statistics.log_prob, "entropy": statistics.entropy}
    return found | dict(zip(case.trained, grads, strict=True))


def leaves(tensors: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    return tensors | {n: tensors[n].clone().requires_grad_() for n in case.trained}


def one_process(case: Case, name: str, token_ranks: int) -> dict[str, Any]:
    tensors = leaves(problem(case, token_ranks), case)
    loss = losses(ignore_index=case.ignore_index)[name]
    return value_and_grads(loss, source_of(tensors, case), tensors, case)


# ----------------------------------------------------------------------------- on the ranks


@dataclass
class Mesh:
    """T x P ranks, the vocabulary's ranks side by side."""

    shape: tuple[int, int]
    tokens: Any = None
    vocab: Any = None

    def __post_init__(self):
        rows, parts = self.shape
        for p in range(parts):
            group = dist.new_group([t * parts + p for t in range(rows)])
            if p == self.p and rows > 1:
                self.tokens = group
        for t in range(rows):
            group = dist.new_group([t * parts + p for p in range(parts)])
            if t == self.t:
                self.vocab = group

    @property
    def t(self) -> int:
        return dist.get_rank() // self.shape[1]

    @property
    def p(self) -> int:
        return dist.get_rank() % self.shape[1]

    def own_tokens(self) -> slice:
        each = N // self.shape[0]
        return slice(self.t * each, (self.t + 1) * each)


class Counts:
    """Collectives by (phase, group, kind), and their bytes."""

    NAMES = (
        *("all_reduce", "all_gather", "all_gather_single", "reduce_scatter_single"),
        *("all_gather_into_tensor", "reduce_scatter_tensor"),  # before torch 2.13
    )

    def __init__(self, mesh: Mesh):
        self.mesh, self.phase = mesh, "forward"
        self.calls: Counter = Counter()
        self.bytes: Counter = Counter()

    def __enter__(self) -> Counts:
        self.real = {name: getattr(dist, name) for name in self.NAMES if hasattr(dist, name)}
        for name in self.real:
            setattr(dist, name, self.counted(name))
        return self

    def __exit__(self, *exception) -> None:
        for name, real in self.real.items():
            setattr(dist, name, real)

    def counted(self, name: str):
        def call(*arguments, **options):
            group = options.get("group")
            where = "vocabulary" if group is self.mesh.vocab else "tokens"
            assert group in (self.mesh.vocab, self.mesh.tokens) and group is not None
            sent = arguments[0] if name == "all_reduce" else arguments[1]
            kind = "reduce-scatter" if name.startswith("reduce") else name[:10].replace("_", "-")
            key = (self.phase, where, kind)
            self.calls[key] += 1
            self.bytes[key] += sent.numel() * sent.element_size()
            return self.real[name](*arguments, **options)

        return call


def spans_of(case: Case, parts: int) -> tuple[list[int], list[tuple[int, int]]]:
    """(rows of each slice, (first, width) of each)."""
    if case.spans:
        return [width + 1 for _, width in case.spans], list(case.spans)
    rows = list(case.rows or [min(-(-V // parts), V - p * -(-V // parts)) for p in range(parts)])
    starts = [min(V, sum(rows[:p])) for p in range(parts)]
    return rows, [(s, min(n, V - s)) for s, n in zip(starts, rows, strict=True)]


def sliced(x: Tensor, rows: int, span: tuple[int, int], fill: float = 7.0) -> Tensor:
    """A rank's slice of a head's tensor (V, ...), padded with what must not be read."""
    first, width = span
    return torch.cat([x[first : first + width], x.new_full((rows - width, *x.shape[1:]), fill)])


def own_part(case: Case, mesh: Mesh, whole: dict[str, Tensor]) -> tuple[dict, dict]:
    """(this rank's tensors, options of the source)."""
    parts = mesh.shape[1]
    rows, spans = spans_of(case, parts)
    tokens = mesh.own_tokens()
    own = {n: whole[n][tokens] for n in ("hidden", "target", "token_weight", "sample_ids")}
    for name in ("weight", "bias", "lora_b"):
        own[name] = sliced(whole[name], rows[mesh.p], spans[mesh.p])
    own["lora_a"], own["first token"] = whole["lora_a"], torch.tensor(tokens.start)
    if case.sequence:
        own["hidden"] = own["hidden"].chunk(parts)[mesh.p]
    shard = {"sequence_dim": 0 if case.sequence else None}
    if case.spans:
        shard |= dict(zip(("first", "width"), spans[mesh.p], strict=True))
    return own, shard


def on_ranks(case: Case, name: str, mesh: Mesh, vocab: dict) -> dict[str, Any]:
    """What this rank finds, its collectives included."""
    own, shard = own_part(case, mesh, problem(case, mesh.shape[0]))
    if case.name not in vocab:
        vocab[case.name] = segloss.VocabShard(mesh.vocab, V, **shard)
        vocab[case.name].sharding(own["weight"].shape[0], own["weight"].device)
    own = leaves(own, case)
    loss = losses(mesh.tokens, case.ignore_index)[name]
    source = source_of(own, case, vocab=vocab[case.name])
    batch = make_batch(source, own["target"], sample_ids=own["sample_ids"],
                       token_weight=call_of(case, own).get("token_weight"),
                       ignore_index=case.ignore_index)  # fmt: skip
    # what `explain` says; the statistics are two numbers of a row more
    asked = replace(loss.request(), entropy=True, argmax=True)
    told, _ = crossings(loss, asked, source, batch)
    with Counts(mesh) as counts:
        found = value_and_grads(loss, source, own, case, counts)
    if mesh.tokens is not None:  # what data parallelism adds up
        for each in [n for n in case.trained if n != "hidden"]:
            found[each] = found[each].clone()
            dist.all_reduce(found[each], group=mesh.tokens)
    return found | {
        "calls": counts.calls,
        "bytes": counts.bytes,
        "told": [astuple(c) for c in told],
    }


def results(shape: tuple[int, int]) -> dict:
    mesh, vocab = Mesh(shape), {}
    return {
        (case.name, name): on_ranks(case, name, mesh, vocab)
        for case in cases(shape[1])
        for name in chosen(case)
    }


# ----------------------------------------------------------------------------- comparison


def assert_same(found: list[dict], case: Case, name: str, shape: tuple[int, int]) -> None:
    true = one_process(case, name, shape[0])
    per_row = ["lse", "log_prob", "entropy", "argmax"]
    assert_parts(found, case, shape, true, per_row + ["value"] * ("none" in name))


def assert_parts(
    found: list[dict], case: Case, shape: tuple[int, int], true: dict, per_row: list[str]
) -> None:
    """Every rank has the value of one process, its tokens of what is `per_row` and its part of the
    gradients, to 1e-12; the same bits on all ranks of the vocabulary."""
    rows, parts = shape
    slices, spans = spans_of(case, parts)
    each = N // rows
    for rank, own in enumerate(found):
        t, p = divmod(rank, parts)
        tokens = slice(t * each, (t + 1) * each)
        expected = {"value": true["value"]} | {what: true[what][tokens] for what in per_row}
        for what in expected:
            assert torch.equal(own[what], found[t * parts][what]), f"rank {rank} {what}"
        for trained in case.trained:
            grad = true[trained]
            if trained == "hidden":
                grad = grad[tokens]
                grad = grad.chunk(parts)[p] if case.sequence else grad
            elif trained == "logits":
                grad = sliced(grad[tokens].T, slices[p], spans[p], 0).T
            elif trained != "lora_a":
                grad = sliced(grad, slices[p], spans[p], 0)
            expected[trained] = grad
        for what, value in expected.items():
            assert own[what].shape == value.shape, f"rank {rank} {what}"
            if value.numel():
                error = (own[what] - value).abs().max() / value.abs().max().clamp(min=1)
                assert error <= 1e-12, f"rank {rank} {what} differs by {error:.3g}"


# sharding.md: collectives of (phase, ranks), whatever the data; hidden is trained, one chunk
TABLE = {
    "ce": {
        ("forward", "vocabulary", "all-gather"): 1,
        ("backward", "vocabulary", "all-reduce"): 1,  # hidden
        ("forward", "tokens", "all-reduce"): 2,
    },
    "dice": {
        ("forward", "vocabulary", "all-gather"): 1,
        ("forward", "vocabulary", "all-reduce"): 1,
        ("backward", "vocabulary", "all-reduce"): 2,
        ("forward", "tokens", "all-reduce"): 4,  # the union is one
    },
    "lovasz": {
        ("forward", "vocabulary", "all-gather"): 1,
        ("forward", "vocabulary", "all-reduce"): 2,
        ("backward", "vocabulary", "all-reduce"): 3,
        ("forward", "tokens", "all-reduce"): 2,
        ("forward", "tokens", "all-gather"): 3,
    },
}
TABLE["focal, none"] = {k: n for k, n in TABLE["ce"].items() if k[1] == "vocabulary"}
TABLE["dice, micro"] = TABLE["gdice"] = TABLE["focal tversky"] = TABLE["dice"]


def assert_as_table(found: list[dict], case: Case, name: str, shape: tuple[int, int]) -> None:
    """The collectives are the same on all peers, those of the table, and those of `explain`."""
    parts = shape[1]
    for rank, own in enumerate(found):
        t, p = divmod(rank, parts)
        for ranks, peer in (("vocabulary", found[t * parts]), ("tokens", found[p])):
            mine, its = (
                {k: n for k, n in r["calls"].items() if k[1] == ranks} for r in (own, peer)
            )
            assert mine == its
    told: Counter = Counter()
    size: Counter = Counter()
    for *key, count, sent in found[0]["told"]:
        told[tuple(key)] += count
        size[tuple(key)] += torch.nan if sent is None else sent
    if "normalizer" not in case.call:  # which `explain` is not given
        assert told == found[0]["calls"]
    for key, sent in found[0]["bytes"].items():
        if key[1] == "vocabulary" and shape[0] == 1:  # else other ranks' tokens count too
            assert size[key] == sent, key
    if name in TABLE and case.name in ("plain", "token weights", "empty token rank"):
        there = {k: n for k, n in TABLE[name].items() if k[1] == "vocabulary" or shape[0] > 1}
        assert found[0]["calls"] == there
