"""DTensors say by their placements how head, hidden states and logits are sharded."""

from __future__ import annotations

from collections import Counter

import pytest
import ranks
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from vocab_cases import D, V, losses

import segloss
from segloss.losses.crossing import crossings
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


def evaluated(loss, source, target, leaves) -> tuple:
    value = loss(source, target)
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
    return found


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
