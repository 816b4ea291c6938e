"""DTensors say by their placements how head, hidden states and logits are sharded."""

from __future__ import annotations

from collections import Counter

import pytest
import ranks
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from vocab_beside import Unlikelihood
from vocab_cases import D, V, losses

import segloss
from segloss.losses.crossing import crossings
from segloss.sources import make_beside, own_probabilities
from segloss.sweep.batch import make_batch

B, T = 4, 8
R, S0, S1 = Replicate(), Shard(0), Shard(1)
# name: (mesh dimensions, placements of hidden, of weight)
HEADS = {
    "tp": (("tp",), (R,), (S0,)),
    "tp, sequence parallel": (("tp",), (S1,), (S0,)),
    "dp x tp": (("dp", "tp"), (S0, R), (R, S0)),
    "dp x tp, sequence parallel": (("dp", "tp"), (S0, S1), (R, S0)),
    "tokens of one dimension": (("dp", "tp"), (S0, S0), (R, S0)),
    "tokens alone": (("dp",), (S0,), (R,)),
    "cp x tp": (("dp", "tp"), (S1, R), (R, S0)),
    "nothing": (("tp",), (R,), (R,)),
}
LOGITS = {
    "tp": (("tp",), (Shard(-1),)),
    "dp x tp": (("dp", "tp"), (S0, Shard(2))),
    "tokens alone": (("dp",), (S1,)),
}
OPTIONS = {
    "plain": (),
    "bias": ("bias",),
    "frozen": ("frozen",),
    "lora": ("frozen", "lora"),
    "target is a DTensor": ("target",),
}
PAIRS = [
    (where, title)
    for where in HEADS
    for title in OPTIONS
    if title == "plain" or where in ("dp x tp", "tp, sequence parallel")
]
NAMES = ("ce", "focal, none", "dice, all", "all kinds")
every_head = pytest.mark.parametrize(
    "name, where, title", [(name, *pair) for name in NAMES for pair in PAIRS]
)


def problem() -> dict:
    g = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    weight = normal(V, D)
    target = torch.randint(V, (B, T), generator=g)
    hidden = 0.6 * normal(B, T, D) + 0.3 * weight[target]
    logits = normal(B, T, V).scatter_add(2, target[..., None], 2 + normal(B, T, 1))
    target[:, ::3] = -100
    target[3] = -100  # the last ranks have no valid token where the batch is cut
    return {
        **{"hidden": hidden, "weight": weight, "bias": normal(V), "logits": logits},
        **{"lora_a": normal(2, D), "lora_b": normal(V, 2), "target": target},
    }


def wanted(options: tuple) -> list[str]:
    names = ["hidden"]
    if "frozen" not in options:
        names.append("weight")
    return (
        names + [n for n in ("bias",) if n in options] + ["lora_a", "lora_b"] * ("lora" in options)
    )


def head(x: dict, options: tuple) -> segloss.LinearLogits:
    lora = (x["lora_a"], x["lora_b"], 0.5) if "lora" in options else None
    bias = x["bias"] if "bias" in options else None
    return segloss.LinearLogits(x["hidden"], x["weight"], bias, lora=lora)


def evaluated(loss, source, target, leaves, **call) -> tuple:
    value = loss(source, target, **call)
    weights = torch.ones_like(value) if value.dim() == 0 else upstream(value)
    return value.detach(), torch.autograd.grad(value, leaves, weights)


def upstream(value):
    """The same of every token and on every rank, whichever tokens are there."""
    return torch.full_like(value, 0.75)


def told_of(loss, source, target) -> dict[str, int]:
    """Collectives by kind, as `explain` has them."""
    batch = make_batch(source, target)
    told: Counter = Counter()
    for crossing in crossings(loss, loss.request(), source, batch)[0]:
        told[crossing.kind] += crossing.count
    return dict(told)


# of c10d, which segloss calls, and of the functional collectives that DTensor calls
KINDS = {
    **{"allreduce_": "all-reduce", "all_reduce": "all-reduce"},
    **{"_allgather_base_": "all-gather", "all_gather_into_tensor": "all-gather"},
    "reduce_scatter_tensor": "reduce-scatter",
}


def placed(x: torch.Tensor, mesh, placements) -> DTensor:
    return distribute_tensor(x.clone(), mesh, placements).requires_grad_(x.is_floating_point())


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def read_beside(x: dict, teacher, columns, y) -> dict[str, tuple]:
    """{what is read: (loss, target, what else the call is given)}"""
    distill, ce = segloss.DistillationLoss, segloss.CrossEntropyLoss
    soft = 0.5 * ce(label_smoothing=0.1) + 0.5 * distill("jsd", temperature=2)
    return {
        "teacher": (soft, x["target"], {"teacher": teacher}),
        "teacher, none": (distill("reverse", reduction="none"), x["target"], {"teacher": teacher}),
        "columns": (ce() + 0.1 * Unlikelihood(), x["target"], {"columns": columns}),
        "probabilities": (ce(z_loss=0.01), y, {}),
        "all": (
            soft + 0.1 * Unlikelihood() + 0.2 * distill(),
            x["target"],
            {"teacher": teacher, "columns": columns},
        ),
    }


READ = ("teacher", "teacher, none", "columns", "probabilities", "all")


def beside_problem() -> dict:
    x, g = problem(), torch.Generator().manual_seed(6)
    x["columns"] = torch.randint(-1, V, (B, T, 3), generator=g)
    x["y"] = torch.rand(B, T, V, generator=g, dtype=torch.float64).pow(3)
    x["teacher weight"] = torch.randn(V, D, generator=g, dtype=torch.float64)
    return x


def of_beside(mesh) -> dict:
    """Students of hidden states and of logits; every tensor beside them by its placements."""
    found = {}
    for where, (dims, of_hidden, of_weight) in HEADS.items():
        on = mesh[dims]
        tokens = [p if d == "dp" else R for d, p in zip(dims, of_hidden, strict=True)]
        of_logits = [Shard(2) if w == S0 else t for w, t in zip(of_weight, tokens, strict=True)]
        # hidden states that no rank shares out can go with a head that no rank does
        of_teachers = [of_weight] + [(R,) * len(dims)] * (where in ("tp", "dp x tp"))
        for of_teacher in of_teachers:
            x = beside_problem()
            for name, p in (("hidden", of_hidden), ("weight", of_weight), ("target", tokens)):
                x[name] = placed(x[name], on, p)
            weight = placed(x["teacher weight"], on, of_teacher)
            teacher = segloss.LinearLogits(x["hidden"], weight)
            columns, y = placed(x["columns"], on, tokens), placed(x["y"], on, of_logits)
            places = placed(torch.arange(B * T).view(B, T), on, tokens).to_local()
            for name, (loss, target, call) in read_beside(x, teacher, columns, y).items():
                source, leaves = head(x, ()), [x["hidden"], x["weight"]]
                told = told_beside(loss, source, target, call)
                with CommDebugMode() as comm:
                    value, grads = evaluated(loss, source, target, leaves, **call)
                found[where, name, "hidden" if of_teacher is of_weight else "whole"] = {
                    "value": value,
                    "grads": [whole(g) for g in grads],
                    "tokens": places,
                    "told": told,
                    "comm": {str(k): n for k, n in comm.get_comm_counts().items()},
                }
            z = placed(beside_problem()["logits"], on, of_logits)
            teacher = placed(teacher_logits(beside_problem()), on, of_logits)
            for name, (loss, target, call) in read_beside(x, teacher, columns, y).items():
                value, grads = evaluated(loss, z, target, [z], **call)
                found[where, name, "logits"] = {
                    "value": value,
                    "grads": [whole(g) for g in grads],
                    "tokens": places,
                }
    return found


def teacher_logits(x: dict) -> torch.Tensor:
    return x["hidden"].detach() @ x["teacher weight"].T


def told_beside(loss, source, target, call) -> dict[str, int]:
    probabilities = own_probabilities(target, source, crossing=False)
    if probabilities is not None:
        target = loss.stand_in(probabilities)
    beside = make_beside(source, probabilities=probabilities, **call, crossing=False)
    batch = make_batch(source, target, beside=beside)
    told: Counter = Counter()
    for crossing in crossings(loss, loss.request_for(beside), source, batch)[0]:
        told[crossing.kind] += crossing.count
    return dict(told)


def results(rank, group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found = {}
    for name in NAMES:
        for where, (dims, of_hidden, of_weight) in HEADS.items():
            on = mesh[dims]
            for title, options in OPTIONS.items():
                if (where, title) not in PAIRS:
                    continue
                x = problem()
                spread = dict.fromkeys(("weight", "bias", "lora_b"), of_weight)
                spread |= {"hidden": of_hidden, "lora_a": (R,) * len(dims)}
                x |= {n: placed(x[n], on, p) for n, p in spread.items()}
                for other in spread.keys() - set(wanted(options)):
                    x[other].requires_grad_(False)
                tokens = [p if d == "dp" else R for d, p in zip(dims, of_hidden, strict=True)]
                target = placed(x["target"], on, tokens)
                target = target if "target" in options else target.to_local()
                told = told_of(losses()[name], head(x, options), target)
                with CommDebugMode() as comm:
                    value, grads = evaluated(
                        losses()[name], head(x, options), target, [x[n] for n in wanted(options)]
                    )
                found[name, where, title] = {
                    "value": value,
                    "grads": [whole(g) for g in grads],
                    "placements": all(
                        g.placements == x[n].placements
                        for n, g in zip(wanted(options), grads, strict=True)
                    ),
                    "comm": {str(k): n for k, n in comm.get_comm_counts().items()},
                    "told": told,
                    "tokens": whole(placed(torch.arange(B * T).view(B, T), on, tokens).to_local()),
                }
        for where, (dims, placements) in LOGITS.items():
            x = problem()
            on = mesh[dims]
            tokens = [p if d == "dp" else R for d, p in zip(dims, placements, strict=True)]
            logits = placed(x["logits"], on, placements)
            target = placed(x["target"], on, tokens).to_local()
            value, (grad,) = evaluated(losses()[name], logits, target, [logits])
            found[name, where, "logits"] = {"value": value, "grads": [whole(grad)]}
            tokens = placed(torch.arange(B * T).view(B, T), on, tokens).to_local()
            found[name, where, "logits"]["tokens"] = tokens
    return found | of_beside(mesh)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.spawn(results, tmp_path_factory.mktemp("dtensor"), 4)


def true_of(name: str, options: tuple | None) -> tuple:
    x = problem()
    names = ["logits"] if options is None else wanted(options)
    x |= {n: x[n].requires_grad_() for n in names}
    source = x["logits"] if options is None else head(x, options)
    return evaluated(losses()[name], source, x["target"], [x[n] for n in names])


def assert_equal_to_one_process(found, key, true) -> None:
    value, grads = true
    for own in (rank[key] for rank in found):
        expected = value if value.dim() == 0 else value.view(-1)[own["tokens"]]
        torch.testing.assert_close(own["value"], expected, rtol=1e-12, atol=1e-12)
        for grad, true_grad in zip(own["grads"], grads, strict=True):
            torch.testing.assert_close(grad, true_grad, rtol=1e-12, atol=1e-12)
        assert own.get("placements", True), "a gradient lies otherwise than its tensor"


@every_head
def test_a_head_by_placements(found, name, where, title):
    assert_equal_to_one_process(found, (name, where, title), true_of(name, OPTIONS[title]))


@every_head
def test_no_collective_beyond_the_table(found, name, where, title):
    key = (name, where, title)
    for own in (rank[key] for rank in found):
        counted: Counter = Counter()
        for call, count in own["comm"].items():
            counted[KINDS[call.rpartition(".")[2]]] += count
        assert dict(counted) == own["told"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", LOGITS)
def test_logits_by_placements(found, name, where):
    assert_equal_to_one_process(found, (name, where, "logits"), true_of(name, None))


@pytest.mark.parametrize("kind", ["hidden", "logits"])
@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("where", HEADS)
def test_what_is_read_beside_them(found, where, name, kind):
    x = beside_problem()
    names = ["hidden", "weight"] if kind == "hidden" else ["logits"]
    teacher = teacher_logits(x)
    x |= {n: x[n].requires_grad_() for n in names}
    source = head(x, ()) if kind == "hidden" else x["logits"]
    loss, target, call = read_beside(x, teacher, x["columns"], x["y"])[name]
    true = evaluated(loss, source, target, [x[n] for n in names], **call)
    assert_equal_to_one_process(found, (where, name, kind), true)
    if (where, name, "whole") in found[0] and kind == "hidden":
        assert_equal_to_one_process(found, (where, name, "whole"), true)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("where", HEADS)
def test_no_collective_beyond_those_told_beside_them(found, where, name):
    for own in (rank[where, name, "hidden"] for rank in found):
        counted: Counter = Counter()
        for call, count in own["comm"].items():
            counted[KINDS[call.rpartition(".")[2]]] += count
        assert dict(counted) == own["told"]
