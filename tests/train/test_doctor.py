"""`segloss doctor` says what it runs on, and notices a loss that is wrong."""

import torch

import segloss
from segloss import doctor


def test_report(command):
    code, out, _ = command("doctor")
    assert code == 0 and "all checks passed" in out
    for word in ("python", "torch", "triton", "segloss", "numpy", "device", "backend", "threads"):
        assert any(line.startswith(word + " ") for line in out.splitlines())
    assert any(line.split() == ["segloss", segloss.__version__] for line in out.splitlines())
    for family in ("cross-entropy", "focal", "Dice", "Lovász-Softmax", "0.6 * CE + 0.4 * Lovász"):
        assert any(line.startswith(family) and line.endswith("ok") for line in out.splitlines())


def test_wrong_value_wrong_gradient_and_failure(command, monkeypatch):
    ce = segloss.CrossEntropyLoss()

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.01 * grad

    def broken(logits, target):
        raise RuntimeError("no kernel image")

    naive = doctor.reference.cross_entropy
    families = {
        "value": (lambda logits, target: 1.01 * ce(logits, target), naive),
        "gradient": (lambda logits, target: WrongGradient.apply(ce(logits, target)), naive),
        "nan": (lambda logits, target: torch.nan * ce(logits, target), naive),
        "failure": (broken, naive),
        "right": (ce, naive),
    }
    monkeypatch.setattr(doctor, "FAMILIES", families)
    code, out, _ = command("doctor")
    lines = {line.split()[0]: line for line in out.splitlines()[-7:] if line}
    assert code == 1
    assert "FAILED: value differs from the reference by 1.0e-02" in lines["value"]
    assert "FAILED: gradient differs from the reference by 1.0e-02" in lines["gradient"]
    assert "FAILED: value differs from the reference by nan" in lines["nan"]
    assert "FAILED: RuntimeError: no kernel image" in lines["failure"]
    assert lines["right"].endswith("ok")
    assert "4 of 5 checks failed" in out


def test_a_backend_that_cannot_be(monkeypatch):
    monkeypatch.setenv("SEGLOSS_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        assert doctor.environment()["backend"].startswith("none: SEGLOSS_BACKEND=triton, but")
