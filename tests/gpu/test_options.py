"""Every option of the losses, the weighting and the projection on a real GPU: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import (
    CASE_MODES,
    HALF,
    MODES,
    OPTIONS,
    SET_OPTIONS,
    TOKENS,
    TRANSFORM,
    V,
    as_good_as_plain,
    call_options,
    compare,
    compare_on_logits,
    run,
)
from helpers import fused, module, naive, relative_error
from linear_helpers import CASES, problem, stored

import segloss
from segloss.kernels import projection

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name, mode", CASE_MODES)
def test_every_loss_and_way_of_computing(name, mode):
    """Bias, LoRA, soft-cap, frozen and compact heads among them."""
    trainable, source_options, options = MODES[mode]
    tensors, target = problem(*TOKENS, v=V, d=8)
    how = {"source_options": source_options, "transform": TRANSFORM, **options}
    compare(name, *CASES[name], tensors, target, trainable, gpu=CUDA, **how)


@pytest.mark.parametrize("name, option", OPTIONS)
def test_every_option(name, option):
    """On hidden states and on logits: `classes="all"` and `per_sample` among them."""
    options = (call_options() | SET_OPTIONS)[option]
    tensors, target = problem(*TOKENS, v=V, d=8, names=("hidden", "weight"), dtype=HALF)
    compare(name, fused(name), naive(name), tensors, target, gpu=CUDA, **options)
    logits = stored(tensors)
    compare_on_logits(name, fused(name), naive(name), logits, target, gpu=CUDA, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_autocast(name, dtype):
    """float32 tensors, products in half precision, as good as autocast's own products."""
    tensors, target = problem(*TOKENS, v=V, d=8, names=("hidden", "weight"), dtype=torch.float32)
    ours, truth = CASES[name]

    def automatic(loss):
        def inside(logits, target, **options):
            with torch.autocast("cuda", dtype):
                return loss(logits() if callable(logits) else logits, target, **options)

        return inside

    exact = {key: x.double() for key, x in tensors.items()}
    names = ("hidden", "weight")
    true = run(truth, stored, exact, target, names)
    there = {key: x.to(CUDA) for key, x in tensors.items()}
    plain = run(automatic(truth), lambda t: lambda: stored(t), there, target, names, CUDA)

    def source(t):
        return lambda: segloss.LinearLogits(t["hidden"], t["weight"])

    mine = run(automatic(ours), source, there, target, names, CUDA)
    plain = [x.cpu() for x in plain]
    as_good_as_plain(mine, plain, true, dtype, name)


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
@pytest.mark.parametrize("name", ["cross_entropy", "dice_loss"])
def test_a_compiled_step(name):
    tensors, target = problem(*TOKENS, v=V, d=8, names=("hidden", "weight"), dtype=HALF)
    made = module(name)

    def loss(hidden, weight, target):
        return made(segloss.LinearLogits(hidden, weight), target)

    there = [x.to(CUDA) for x in tensors.values()]
    target = target.to(CUDA)
    compiled = torch.compile(loss, fullgraph=True)
    found = []
    for call in (loss, compiled):
        leaves = [x.detach().requires_grad_() for x in there]
        value = call(*leaves, target)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for eager, graph in zip(*found, strict=True):
        assert relative_error(graph, eager) <= 1e-3


def on_the_cpu(monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setenv("SEGLOSS_BACKEND", "torch")
        return function()


def test_coba(monkeypatch):
    def weights(device):
        coba = segloss.CoBa(num_tasks=3, warmup=2, history=5)
        generator = torch.Generator().manual_seed(1)
        for i in range(9):
            losses = torch.rand(3, generator=generator, dtype=torch.float64) + 2 - 0.1 * i
            coba.update(losses.to(device))
        return coba.weights().cpu()

    truth = on_the_cpu(monkeypatch, lambda: weights("cpu"))
    assert relative_error(weights(CUDA), truth) < 1e-12


@pytest.mark.parametrize("scheme", ["irdro", "linupper", "quadratic", "extremes", "rank"])
def test_sample_weights(scheme, monkeypatch):
    losses = torch.rand(37, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    truth = on_the_cpu(monkeypatch, lambda: segloss.SampleWeighting(scheme)(losses))
    there = segloss.SampleWeighting(scheme)(losses.to(CUDA))
    assert relative_error(there.cpu(), truth) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_the_projection_has_the_same_bits(dtype, monkeypatch):
    x = torch.randn(3, 20000, generator=torch.Generator().manual_seed(0)).to(dtype)
    w = x[0, :300].double()
    truth = on_the_cpu(monkeypatch, lambda: projection.project(x, 300))
    back = on_the_cpu(monkeypatch, lambda: projection.back_project(w, 9000))
    assert torch.equal(projection.project(x.to(CUDA), 300).cpu(), truth)
    assert torch.equal(projection.back_project(w.to(CUDA), 9000).cpu(), back)


@pytest.mark.parametrize("name", CASES)
def test_every_device(name):
    """The current one is the first."""
    tensors, target = problem(*TOKENS, v=V, d=8, names=("hidden", "weight"))
    for index in range(torch.cuda.device_count()):
        compare(name, *CASES[name], tensors, target, gpu=torch.device("cuda", index))
