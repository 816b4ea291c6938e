"""`head_loss` where an engine cuts the head by classes: transformers' and torch's tensor
parallelism, alone, with sequence parallel and with FSDP2, on four processes."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

pytest.importorskip("transformers")
import engine_cases
from engine_cases import LR, STEPS, V, assert_same, gradients, loss_of
from exact_llama import all_exact, exact
from ranks import spawn

import segloss
from segloss import reference

RANKS, HEADS = 4, 4


@dataclass(frozen=True)
class Case(engine_cases.Case):
    """A Llama whose heads four ranks can share."""

    def make(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "pad_token_id": 0}
        sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24}
        config = LlamaConfig(num_hidden_layers=1, **sizes, **heads)
        model = exact(LlamaForCausalLM(config).to(self.dtype).train())
        with torch.no_grad():
            model.lm_head.weight.mul_(20)
        return model


CASES = [Case("trainable", loss) for loss in ("ce", "dice", "lovasz", "sum")]
CASES.append(Case("trainable", "sum", True))


def loaded(case: Case, **sizes):
    """The model as transformers distributes it."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder(),
        dtype=case.dtype,
        distributed_config=DistributedConfig(**sizes),
    )
    return model.train()


def folder() -> Path:
    return Path(tempfile.gettempdir()) / f"segloss-heads-{os.getppid()}"


def by_torch(case: Case, mesh, sequence: bool, **of_head):
    """The model by `parallelize_module`."""
    model = case.make()
    everywhere = Shard(1) if sequence else Replicate()
    colwise = ColwiseParallel(input_layouts=everywhere)
    rowwise = RowwiseParallel(output_layouts=everywhere, use_local_output=not sequence)
    for layer in model.model.layers:
        plan = {f"self_attn.{n}_proj": colwise for n in "qkv"} | {"self_attn.o_proj": rowwise}
        plan |= {"mlp.gate_proj": colwise, "mlp.up_proj": colwise, "mlp.down_proj": rowwise}
        if sequence:
            norm = SequenceParallel(use_local_output=False)
            plan |= {"input_layernorm": norm, "post_attention_layernorm": norm}
        parallelize_module(layer, mesh, plan)
    of_head = {"output_layouts": Replicate()} | of_head
    plan = {"lm_head": ColwiseParallel(input_layouts=everywhere, **of_head)}
    if sequence:
        plan |= {
            "model.embed_tokens": RowwiseParallel(
                input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
            ),
            "model.norm": SequenceParallel(use_local_output=False),
        }
    parallelize_module(model, mesh, plan)
    return model


class Engine:
    """A model on the ranks; `dp`: the mesh of the ranks that have other rows, None for none."""

    def __init__(self, make, dp=None, averages=False):
        self.make, self.dp, self.averages = make, dp, averages

    def add_up(self, model) -> None:
        """Data parallelism by hand, where the engine does none."""
        if self.dp is None or self.averages:
            return
        for parameter in model.parameters():
            grad = parameter.grad
            local = grad.to_local() if hasattr(grad, "to_local") else grad
            dist.all_reduce(local, group=self.dp.get_group())


def engines(mesh) -> dict[str, Engine]:
    dp, tp = mesh["dp"], mesh["tp"]

    def on_top(case):
        model = by_torch(case, tp, sequence=True)
        for layer in model.model.layers:
            fully_shard(layer, mesh=dp)
        return fully_shard(model, mesh=dp)

    return {
        "transformers tp_size=4": Engine(lambda case: loaded(case, tp_size=4)),
        "transformers fsdp_size=2, tp_size=2": Engine(
            lambda case: loaded(case, fsdp_size=2, tp_size=2), dp, averages=True
        ),
        "torch": Engine(lambda case: by_torch(case, tp, False), dp),
        "torch, logits are a DTensor": Engine(
            lambda case: by_torch(
                case, tp, False, output_layouts=Shard(-1), use_local_output=False
            ),
            dp,
        ),
        "torch, sequence parallel": Engine(lambda case: by_torch(case, tp, True), dp),
        "torch, sequence parallel, FSDP2": Engine(on_top, dp, averages=True),
    }


NAMES = list(engines({"dp": None, "tp": None}))


def train(case: Case, engine: Engine) -> list:
    """As `Case.truth`: (loss, gradients as the optimizer holds them) of each step."""
    from segloss.integrations.transformers import head_loss

    model = engine.make(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, foreach=False)
    group = None if engine.dp is None else engine.dp.get_group()
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    criterion, steps = loss_of(case.loss, group), []
    for step in range(STEPS):
        ids, target = case.data(step, rank, ranks)
        loss, outputs = head_loss(model, criterion, target, input_ids=ids)
        assert outputs.logits.shape == (len(ids), 1, V) and outputs.loss is loss
        optimizer.zero_grad()
        (loss * ranks if engine.averages else loss).backward()
        engine.add_up(model)
        steps.append((loss.item(), {n: g.clone() for n, g in gradients(model).items()}))
        optimizer.step()
    return steps


class Elder(Case):
    """Another model of the same size."""

    def make(self):
        model = super().make().eval()
        draw = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter += 0.2 * noise.to(parameter.dtype)
        return model.requires_grad_(False)


TAUGHT = {"torch": False, "torch, sequence parallel": True}


def distilling(group=None):
    options = {"temperature": 2, "group": group}
    loss = 0.5 * segloss.CrossEntropyLoss(group=group)
    loss = loss + 0.5 * segloss.DistillationLoss("jsd", **options)
    return loss + 0.2 * segloss.DistillationLoss("reverse", group=group)


def taught(name: str, mesh) -> tuple:
    """(loss, gradients) of a step with a teacher whose head is cut as the student's is."""
    from segloss.integrations.transformers import head_loss

    engine = engines(mesh)[name]
    student, teacher = engine.make(CASES[0]), by_torch(ELDER, mesh["tp"], TAUGHT[name])
    group = engine.dp.get_group()
    ids, target = CASES[0].data(0, dist.get_rank(group), dist.get_world_size(group))
    loss, _ = head_loss(student, distilling(group), target, teacher=teacher, input_ids=ids)
    loss.backward()
    engine.add_up(student)
    return loss.item(), {n: g.clone() for n, g in gradients(student).items()}


ELDER = Elder("trainable", "ce")


def refused(mesh) -> dict[str, str]:
    from segloss.integrations.transformers import head_loss

    case = CASES[0]
    ids, target = case.data(0)

    def said(model) -> str:
        try:
            head_loss(model, loss_of("ce"), target, input_ids=ids)
        except TypeError as error:
            return str(error)
        return "nothing"

    def apart():
        model = by_torch(case, mesh["tp"], False)
        fully_shard(model.lm_head, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])

    return {
        "slices of logits": said(by_torch(case, mesh["tp"], False, output_layouts=Shard(-1))),
        "a group of its own": said(apart()),
    }


def saved(rank: int) -> None:
    """The model's files, which every rank loads its part of."""
    all_exact()
    warnings.simplefilter("ignore")
    if rank == 0:
        CASES[0].make().save_pretrained(folder())
    dist.barrier()


def removed(rank: int) -> None:
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder())


def ranks_results(rank, group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    saved(rank)
    found = {"refused": refused(mesh)}
    for name, engine in engines(mesh).items():
        for case in CASES:
            found[name, str(case)] = train(case, engine)
    for name in TAUGHT:
        found["taught", name] = taught(name, mesh)
    removed(rank)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return spawn(ranks_results, tmp_path_factory.mktemp("engines"), RANKS)


def two_results(rank, group):
    saved(rank)
    engine = Engine(lambda case: loaded(case, tp_size=2))
    found = {str(case): train(case, engine) for case in CASES}
    removed(rank)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return spawn(two_results, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transformers_tp_size_2(two, case):
    for rank in two:
        assert_same(rank[str(case)], case)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_one_process(found, name, case):
    for rank in found:
        assert_same(rank[name, str(case)], case)


@pytest.mark.parametrize("name", TAUGHT)
def test_a_teacher_cut_alike(found, name):
    all_exact()
    student, teacher = CASES[0].make(), ELDER.make()
    ids, target = CASES[0].data(0)
    logits, others = student(input_ids=ids).logits, teacher(input_ids=ids).logits
    options = {"divergence": "jsd", "temperature": 2, "teacher": others}
    loss = 0.5 * reference.cross_entropy(logits, target)
    loss = loss + 0.5 * reference.distillation_loss(logits, target, **options)
    options = {"divergence": "reverse", "teacher": others}
    loss = loss + 0.2 * reference.distillation_loss(logits, target, **options)
    loss.backward()
    true = gradients(student)
    for value, grads in (rank["taught", name] for rank in found):
        assert value == pytest.approx(loss.item(), rel=1e-9)
        for parameter, grad in true.items():
            torch.testing.assert_close(grads[parameter], grad, rtol=1e-7, atol=1e-11)


REFUSED = {
    "slices of logits": "output_layouts=Replicate()",
    "a group of its own": "call fully_shard on the model alone",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(found, name):
    for rank in found:
        assert REFUSED[name] in rank["refused"][name]
