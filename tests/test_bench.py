"""The measurements measure what they say, at sizes that cost nothing."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest
import torch

import segloss
from segloss import reference

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of `bench/`, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture
def report(bench, tmp_path):
    options = argparse.Namespace(quick=True, rounds=1, output=str(tmp_path / "results.json"))
    return bench("common").Report("test", options)


def test_saturated_input_is_saturated(bench):
    inputs = bench("inputs")
    for logits, target in (
        inputs.zipf("saturated", 100, 3000),
        linear_logits(*inputs.zipf_head("saturated", 100, 256, 3000)),
    ):
        p = segloss.logit_statistics(logits, target).log_prob.exp()
        assert 30 <= (p == 1).sum() <= 32  # beside 30 % by design, the strongest of the others


def linear_logits(hidden, weight, target):
    return hidden @ weight.T, target


def test_loops_are_lovasz(bench):
    core = bench("core")
    logits, target = bench("inputs").zipf("zipf", 30, 200)
    for loop in (core.berman_loop, core.gathered_loop):
        logits.grad = None
        logits.requires_grad_()
        (grad,) = torch.autograd.grad(loop(logits, target), logits)
        (expected,) = torch.autograd.grad(reference.lovasz_softmax(logits, target), logits)
        torch.testing.assert_close(grad, expected)


def test_core_measures_every_implementation(bench, report):
    core = bench("core")
    core.measure("zipf", torch.bfloat16, (40, 300), report)
    assert not report.wrong
    (section,) = report.sections
    assert set(section["seconds"]) == set(core.IMPLEMENTATIONS)
    assert len(section["lines"]) == len(core.LIMITS)


def test_head_measures_every_implementation(bench, report):
    head = bench("head")
    tensors = head.head_of("zipf", 150, 16, 300)
    others = {head.EAGER: head.eager}
    head.time_shape("zipf", tensors, report, others)
    assert not report.wrong
    (section,) = report.sections
    assert {head.T3, head.MASKED, head.EAGER, head.FROZEN.format(head.DICE)} <= set(
        section["seconds"]
    )


def test_a_wrong_result_is_reported_and_not_timed(bench, report):
    head = bench("head")
    tensors = head.head_of("zipf", 20, 16, 300)

    def wrong(hidden, weight, target, share):
        return 1.1 * head.eager(hidden, weight, target)

    head.time_shape("zipf", tensors, report, {"wrong": wrong})
    assert len(report.wrong) == 1 and report.finish() == 1
    assert "wrong" not in report.sections[0]["seconds"]


def test_what_is_too_slow_is_named_and_left_out(bench, report, monkeypatch, capsys):
    head = bench("head")
    monkeypatch.setattr(head, "SLOW_SECONDS", -1.0)
    head.time_shape("zipf", head.head_of("zipf", 20, 16, 300), report, {})
    assert set(report.sections[0]["seconds"]) == {head.T3, head.T2}
    assert "CE left out: 0 s for 20 rows alone" in capsys.readouterr().out


def test_plain_dropping_drops_nothing_below_nothing(bench, monkeypatch):
    head = bench("head")
    monkeypatch.setattr(head, "GRAD_FILTER", 0.0)
    hidden, weight, target = bench("inputs").zipf_head("zipf", 300, 8, 50)
    exact = bench("common").value_and_grads(
        lambda h, w: torch.nn.functional.cross_entropy(h @ w.T, target), hidden, weight
    )
    for grad, expected in zip(head.plain_dropping(hidden, weight, target), exact[1:], strict=True):
        torch.testing.assert_close(grad, expected)
