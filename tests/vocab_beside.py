"""What is read beside a head that is cut by vocabulary: listed classes, teachers, probabilities.

T token ranks x P vocabulary ranks; N tokens, V classes, k listed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vocab_cases import (
    Case,
    Counts,
    Mesh,
    N,
    V,
    assert_parts,
    cases,
    leaves,
    own_part,
    problem,
    sliced,
    source_of,
    spans_of,
)

import segloss
from segloss import DistillationLoss, TopK
from segloss.losses.crossing import crossings
from segloss.sources import make_beside, own_probabilities
from segloss.sweep.batch import make_batch

K, D_TEACHER = 3, 5
CHOSEN = (
    *("plain", "small chunks", "token weights", "softcap, scale, bias", "frozen", "lora"),
    *("frozen, softcap, bias", "empty token rank", "padded", "empty shard", "empty shard, frozen"),
    *("uneven", "own order", "sequence parallel", "not compact", "kept logits", "ignore_index 3"),
)


class Unlikelihood(segloss.losses.TokenLoss):
    """`-log(1 - p)` of every listed class."""

    def formula(self, stats):
        miss = -torch.expm1(stats.column_log_prob).clamp(max=-1e-6)
        return torch.where(stats.columns >= 0, -torch.log(miss), 0).sum(-1)


@dataclass(frozen=True)
class Read:
    """A loss, and what its call is given beside the logits."""

    loss: Any  # of the options that all losses share
    columns: bool = False
    teacher: str = ""
    probabilities: str = ""
    top: str = ""


def weight_of_classes() -> Tensor:
    return (torch.arange(V) % 5 + 1).double() / 4


def ce(**options):
    return segloss.CrossEntropyLoss(**options)


def mixed(kind: str, temperature: float = 1.0, **share):
    """A sum of a divergence and others, as a function of the shared options."""
    others = {
        "ce": ce,
        "dice": segloss.DiceLoss,
        "lovasz": segloss.LovaszSoftmaxLoss,
        "columns": Unlikelihood,
    }

    def make(**options):
        total = 0.5 * DistillationLoss(kind, 0.3, temperature, **options)
        for name, factor in share.items():
            total = total + factor * others[name](**options)
        return total

    return make


def alone(kind: str, **own):
    return lambda **options: DistillationLoss(kind, **own, **options)


READS = {
    "columns": Read(lambda **o: 0.5 * ce(**o) + 0.1 * Unlikelihood(**o), columns=True),
    "columns, none": Read(lambda **o: Unlikelihood(reduction="none", **o), columns=True),
    "columns and sets": Read(
        lambda **o: ce(**o) + Unlikelihood(**o) + segloss.DiceLoss(**o)
        + segloss.LovaszSoftmaxLoss(**o), columns=True),
    "forward, logits": Read(mixed("forward", ce=0.5), teacher="dense"),
    "forward, head": Read(alone("forward"), teacher="linear"),
    "reverse, head": Read(mixed("reverse", 2.0, ce=0.5), teacher="linear"),
    "reverse, logits, none": Read(alone("reverse", reduction="none"), teacher="dense"),
    "jsd, logits": Read(mixed("jsd", 2.0, ce=0.5), teacher="dense"),
    "jsd, head, none": Read(alone("jsd", beta=0.3, reduction="none"), teacher="linear"),
    "two and sets": Read(
        lambda **o: mixed("jsd", 2.0, ce=0.2, dice=0.2, lovasz=0.1)(**o)
        + 0.3 * DistillationLoss("reverse", **o), teacher="linear"),
    "forward, whole logits": Read(alone("forward", temperature=2.0), teacher="whole dense"),
    "jsd, whole head": Read(mixed("jsd", dice=0.5), teacher="whole linear"),
    "reverse, wider head": Read(mixed("reverse", ce=0.5), teacher="wider linear"),
    "jsd, narrower logits": Read(mixed("jsd", ce=0.5), teacher="narrower dense"),
    "stored, renormalised": Read(mixed("forward", 2.0, ce=0.5), top="renormalise"),
    "stored, uniform": Read(mixed("forward", 2.0, ce=0.5), top="uniform"),
    "stored, uniform, reverse": Read(mixed("reverse", 2.0, dice=0.5), top="uniform"),
    "stored, uniform, jsd": Read(alone("jsd", reduction="none"), top="uniform"),
    "stored, ignored, and columns": Read(
        mixed("reverse", columns=0.1), top="ignore", columns=True),
    "probabilities": Read(
        lambda **o: ce(weight=weight_of_classes(), label_smoothing=0.1, **o),
        probabilities="whole"),
    "probabilities here, none": Read(
        lambda **o: ce(z_loss=0.01, reduction="none", **o), probabilities="here"),
    "probabilities and a teacher": Read(
        mixed("reverse", ce=0.5), probabilities="whole", teacher="dense"),
}  # fmt: skip


def chosen_cases(shape: tuple[int, int]) -> list[Case]:
    parts = shape[1]
    every = [c for c in cases(parts) if c.name in CHOSEN] + [
        Case("logits", trained=("logits",)),
        Case("logits, padded", trained=("logits",), rows={2: (20, 20), 4: (10,) * 4}[parts]),
        Case("logits, empty shard", trained=("logits",),
             rows={2: (V, 0), 4: (0, 12, 17, 0)}[parts], options={"softcap": 3.0, "scale": 0.7}),
    ]  # fmt: skip
    # which way a head is trained matters on one mesh, how tokens and classes lie on all
    apart = () if shape == (1, 2) else ("softcap", "kept", "not compact", "uneven", "ignore_index")
    return [c for c in every if not c.name.startswith(apart)] if apart else every


def pairs(shape: tuple[int, int]) -> list[tuple[Case, str]]:
    return [(case, name) for case in chosen_cases(shape) for name in READS
            if not (READS[name].probabilities and case.ignore_index >= 0)]  # fmt: skip


def everything(case: Case, token_ranks: int) -> dict[str, Tensor]:
    """Of all ranks."""
    x = problem(case, token_ranks)
    g = torch.Generator().manual_seed(11)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    x["logits"] = (x["hidden"] @ x["weight"].T).detach()
    x["teacher hidden"], x["teacher weight"] = normal(N, D_TEACHER), normal(V + 3, D_TEACHER)
    x["teacher bias"] = normal(V + 3)
    columns = torch.randint(-1, V, (N, K), generator=g)
    columns[:, 1] = columns[:, 0]
    columns[:, 2] = x["target"].clamp(min=0)
    x["columns"] = columns
    x["top log_prob"], x["top ids"] = normal(N, V).log_softmax(-1).topk(K + 2)
    x["top ids"][::3, K] = -1
    x["probabilities"] = torch.rand(N, V, generator=g, dtype=torch.float64).pow(3)
    x["probabilities"][:, ::4] = 0
    return x


def given(read: Read, x: dict[str, Tensor], tokens: slice, here=None, vocab=None) -> dict:
    """The call's arguments of some tokens; `here` cuts what belongs to the classes (dim 0)."""
    call: dict[str, Any] = {"target": x["target"][tokens]}
    if read.columns:
        call["columns"] = x["columns"][tokens]
    if read.top:
        call["teacher"] = TopK(x["top ids"][tokens], x["top log_prob"][tokens], read.top)
    if read.probabilities:
        call["target"] = x["probabilities"][tokens]
        if read.probabilities == "here" and here is not None:
            call["target"] = here(call["target"].T, False).T
    if read.teacher:
        *how, kind = read.teacher.split()
        size = {"wider": V + 3, "narrower": V - 2}.get(how[0] if how else "", V)
        hidden, weight = x["teacher hidden"][tokens], x["teacher weight"][:size]
        bias = x["teacher bias"][:size]
        alike = here is not None and not how
        if alike:
            weight, bias = here(weight, True), here(bias, True)
        options = {"softcap": 4.0, "vocab": vocab if alike else None}
        if kind == "dense":
            call["teacher"] = segloss.DenseLogits(hidden @ weight.T + bias, **options)
        else:
            # blocks of a few rows, beside logits that lie in memory
            options["chunk_bytes"] = 8 * V * 7
            call["teacher"] = segloss.LinearLogits(hidden, weight, bias, **options)
    return call


def student(x: dict[str, Tensor], case: Case, **more):
    if "logits" in case.trained:
        return segloss.DenseLogits(x["logits"], **case.options, **more)
    return source_of(x, case, **more)


def evaluated(loss, source, call: dict, x: dict, case: Case, counts=None) -> dict[str, Any]:
    call = dict(call)
    if "token_weight" in case.call:
        call["token_weight"] = x["token_weight"]
    call["sample_ids"] = x["sample_ids"]
    value, statistics = loss(source, call.pop("target"), return_statistics=True, **call)
    if counts is not None:
        counts.phase = "backward"
    upstream = torch.ones_like(value)
    if value.dim():
        start = int(x["first token"]) if "first token" in x else 0
        upstream = 0.5 + (start + torch.arange(value.numel())).to(value) % 7
    grads = torch.autograd.grad(value, [x[n] for n in case.trained], upstream.view_as(value))
    found = {"value": value.detach(), "log_prob": statistics.log_prob}
    if statistics.column_log_prob is not None:
        found["column_log_prob"] = statistics.column_log_prob
    return found | dict(zip(case.trained, grads, strict=True))


def one_process(case: Case, name: str, token_ranks: int) -> dict[str, Any]:
    x = everything(case, token_ranks)
    call = given(READS[name], x, slice(None))
    x = leaves(x, case)
    loss = READS[name].loss(ignore_index=case.ignore_index)
    return evaluated(loss, student(x, case), call, x, case)


def on_ranks(case: Case, name: str, mesh: Mesh, known: dict) -> dict[str, Any]:
    """What this rank finds, its collectives included."""
    whole, read = everything(case, mesh.shape[0]), READS[name]
    own, shard = own_part(case, mesh, whole)
    rows, spans = spans_of(case, mesh.shape[1])
    size, span, tokens = rows[mesh.p], spans[mesh.p], mesh.own_tokens()

    def here(x: Tensor, padded: bool) -> Tensor:
        return sliced(x, size if padded else span[1], span)

    own["logits"] = here(whole["logits"][tokens].T, True).T.clone()
    if case.name not in known:
        plain = {n: v for n, v in shard.items() if n != "sequence_dim"}
        known[case.name] = [segloss.VocabShard(mesh.vocab, V, **more) for more in (shard, plain)]
        for vocab in known[case.name]:
            vocab.sharding(size, own["weight"].device)
    vocab, of_teacher = known[case.name]
    call = given(read, whole, tokens, here, of_teacher)
    own = leaves(own, case)
    loss = read.loss(group=mesh.tokens, ignore_index=case.ignore_index)
    source = student(own, case, vocab=vocab)
    told = told_of(loss, source, call, own, case)
    with Counts(mesh) as counts:
        found = evaluated(loss, source, call, own, case, counts)
    if mesh.tokens is not None:
        for each in [n for n in case.trained if n not in ("hidden", "logits")]:
            found[each] = found[each].clone()
            dist.all_reduce(found[each], group=mesh.tokens)
    return found | {"calls": counts.calls, "bytes": counts.bytes, "told": told}


def told_of(loss, source, call: dict, x: dict, case: Case) -> list[tuple]:
    """What `explain` says; the statistics are two numbers of a row more."""
    call = dict(call)
    target = call.pop("target")
    probabilities = own_probabilities(target, source, crossing=False)
    if probabilities is not None:
        target = loss.stand_in(probabilities)
    beside = make_beside(source, probabilities=probabilities, **call, crossing=False)
    batch = make_batch(source, target, sample_ids=x["sample_ids"], beside=beside,
                       token_weight=x["token_weight"] if "token_weight" in case.call else None,
                       ignore_index=case.ignore_index)  # fmt: skip
    asked = replace(loss.request_for(beside), entropy=True, argmax=True)
    return [astuple(c) for c in crossings(loss, asked, source, batch)[0]]


def results(shape: tuple[int, int]) -> dict:
    mesh, known = Mesh(shape), {}
    return {(c.name, name): on_ranks(c, name, mesh, known) for c, name in pairs(shape)}


def assert_same(found: list[dict], case: Case, name: str, shape: tuple[int, int]) -> None:
    true = one_process(case, name, shape[0])
    per_row = [what for what in ("log_prob", "column_log_prob") if what in true]
    assert_parts(found, case, shape, true, per_row + ["value"] * (true["value"].dim() > 0))


def assert_collectives(found: list[dict], shape: tuple[int, int]) -> None:
    """The same on all peers, and those that `explain` tells."""
    for rank, own in enumerate(found):
        t, p = divmod(rank, shape[1])
        for ranks, peer in (("vocabulary", found[t * shape[1]]), ("tokens", found[p])):
            mine, its = (
                {k: n for k, n in r["calls"].items() if k[1] == ranks} for r in (own, peer)
            )
            assert mine == its
    told: Counter = Counter()
    size: Counter = Counter()
    for *key, count, sent in found[0]["told"]:
        told[tuple(key)] += count
        size[tuple(key)] += torch.nan if sent is None else sent
    assert told == found[0]["calls"]
    for key, sent in found[0]["bytes"].items():
        if key[1] == "vocabulary" and shape[0] == 1:  # else other ranks' tokens count too
            assert size[key] == sent, key
