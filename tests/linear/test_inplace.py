"""Logits in the memory of dweight: the same values and gradients."""

import pytest
import torch
import torch.nn.functional as F

import segloss
from segloss.head import fused, inplace, inputs

V = 101  # no multiple of a block's classes
# tokens, D: as many rows as fit, fewer, and more, which do not lie there
SIZES = [(37, 32), (30, 32), (45, 32)]
LOSSES = {
    "ce": segloss.CrossEntropyLoss(),
    "smoothed": segloss.CrossEntropyLoss(label_smoothing=0.1),  # whose dlogits are formed at once
    "weighted": segloss.CrossEntropyLoss(weight=torch.linspace(0.5, 2, V), z_loss=0.01),
    "sum": 0.5 * segloss.CrossEntropyLoss() + 0.5 * segloss.FocalLoss(gamma=1.0),
}
EXTRAS = [(), ("bias",), ("bias", "a", "b"), ("softcap",)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks of 16 rows, blocks of 40 classes, 6 rows read at a time."""
    monkeypatch.setattr(inputs, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(inputs, "CPU_CHUNK_ROWS", 16)
    monkeypatch.setattr(inplace, "WIDTH", 40)
    monkeypatch.setattr(inplace, "READ_BYTES", 6 * V * 8)


def problem(num_tokens, width, dtype, extras, ignored=True):
    draw = torch.Generator().manual_seed(num_tokens)
    shapes = {"hidden": (num_tokens, width), "weight": (V, width), "bias": (V,),
              "a": (3, width), "b": (V, 3)}  # fmt: skip
    tensors = {
        name: (torch.randn(shape, generator=draw, dtype=torch.float64) / shape[-1] ** 0.25)
        .to(dtype)
        .requires_grad_()
        for name, shape in shapes.items()
        if name in ("hidden", "weight", *extras)
    }
    target = torch.randint(V, (num_tokens,), generator=draw)
    if ignored:
        target[::7] = -100
    return tensors, target


def source(tensors, extras):
    lora = (tensors["a"], tensors["b"], 0.5) if "a" in extras else None
    softcap = 3.0 if "softcap" in extras else None
    weights = tensors["hidden"], tensors["weight"], tensors.get("bias")
    return segloss.LinearLogits(*weights, lora=lora, softcap=softcap)


def written_out(tensors, extras):
    z = tensors["hidden"] @ tensors["weight"].T
    if "bias" in extras:
        z = z + tensors["bias"]
    if "a" in extras:
        z = z + 0.5 * (tensors["hidden"] @ tensors["a"].T) @ tensors["b"].T
    return 3 * torch.tanh(z / 3) if "softcap" in extras else z


def gradients(value, tensors):
    return torch.autograd.grad(value, list(tensors.values()), retain_graph=True)


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_logits_written_out(monkeypatch, name, size, extras):
    found = []

    def spy(*arguments):
        found.append(inplace.fits_in_place(*arguments))
        return found[-1]

    monkeypatch.setattr(fused, "fits_in_place", spy)
    tensors, target = problem(*size, torch.float64, extras)
    value = LOSSES[name](source(tensors, extras), target)
    expected = LOSSES[name](written_out(tensors, extras), target)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    made, known = gradients(value, tensors), gradients(expected, tensors)
    torch.testing.assert_close(made, known, rtol=1e-10, atol=1e-10)
    again = gradients(2 * value, tensors)  # a second backward makes the gradients once more
    torch.testing.assert_close(again, tuple(2 * g for g in known), rtol=1e-10, atol=1e-10)
    kept = int((target != -100).sum())
    assert found == [kept <= 32] * 2


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loses_what_plain_pytorch_loses(dtype, size, ignored):
    tensors, target = problem(*size, dtype, ("bias",), ignored)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    known = gradients(F.cross_entropy(written_out(exact, ("bias",)), target), exact)
    plain = gradients(F.cross_entropy(written_out(tensors, ("bias",)).float(), target), tensors)
    made = gradients(LOSSES["ce"](source(tensors, ("bias",)), target), tensors)
    for name, own, theirs, true in zip(tensors, made, plain, known, strict=True):
        allowed = 2 * (theirs.double() - true).norm()
        assert (own.double() - true).norm() <= allowed, name


def test_only_where_dweight_has_the_dtype_of_the_logits():
    tensors, _ = problem(30, 32, torch.float16, ())
    given = source(tensors, ()).inputs()
    assert not inplace.fits_in_place(given, 30, trained=True)  # its gradient waits in float32
    tensors, _ = problem(30, 32, torch.float32, ())
    for options in ({"chunk_bytes": 2**20}, {"grad_filter": 0.5}):
        given = segloss.LinearLogits(**tensors, **options).inputs()
        assert not inplace.fits_in_place(given, 30, trained=True)
    given = segloss.LinearLogits(**tensors).inputs()
    assert not inplace.fits_in_place(given, 30, trained=False)
    assert inplace.fits_in_place(given, 30, trained=True)
    with torch.autocast("cpu", torch.bfloat16):
        given = segloss.LinearLogits(**tensors).inputs()
        assert not inplace.fits_in_place(given, 30, trained=True)
