"""The measurements measure what they say, at sizes that cost nothing, and the report says what was
not measured and what was wrong."""

from __future__ import annotations

import argparse
import importlib
import json
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


# ----------------------------------------------------------------------------------- measurements


def test_saturated_input_is_saturated(bench):
    inputs = bench("inputs")
    for logits, target in (
        inputs.zipf("saturated", 100, 3000),
        linear_logits(*inputs.zipf_head("saturated", 100, 256, 3000)),
    ):
        p = segloss.logit_statistics(logits, target).log_prob.exp()
        assert 30 <= (p == 1).sum() <= 32  # beside 30 % by design, the strongest of the others


def test_flat_input_is_flat(bench):
    logits, target = bench("inputs").zipf("flat", 50, 1000)
    p = segloss.logit_statistics(logits, target).log_prob.exp()
    assert p.max() < 2 / 1000


def linear_logits(hidden, weight, target):
    return hidden @ weight.T, target


def test_loops_are_lovasz(bench):
    peers = bench("peers")
    logits, target = bench("inputs").zipf("zipf", 30, 200)
    for loop in (peers.berman_loop, peers.gathered_loop):
        logits.grad = None
        logits.requires_grad_()
        (grad,) = torch.autograd.grad(loop(logits, target), logits)
        (expected,) = torch.autograd.grad(reference.lovasz_softmax(logits, target), logits)
        torch.testing.assert_close(grad, expected)


def test_core_measures_every_implementation(bench, report, monkeypatch):
    core = bench("core")
    monkeypatch.delitem(core.IMPLEMENTATIONS, core.COMPILED)  # seconds of a compiler
    core.measure("zipf", torch.bfloat16, (40, 300), report)
    assert not report.wrong
    (section,) = report.sections
    assert set(section.seconds) == {*core.IMPLEMENTATIONS, core.PASS}
    lines = [line for line in core.LIMITS if core.COMPILED not in line]
    assert len(section.lines) == len(lines)


def test_core_takes_directions_and_ignored_tokens_apart(bench, report):
    core = bench("core")
    core.directions((40, 300), report)
    core.ignored((40, 300), report)
    directions, ignored = report.sections
    assert len(directions.seconds) == len(core.APART) * len(core.DIRECTIONS)
    assert set(ignored.seconds) == set(ignored.errors) and len(ignored.seconds) == 9


def test_head_measures_every_implementation(bench, report):
    head, peers = bench("head"), bench("peers")
    tensors = bench("inputs").head_of("zipf", 150, 16, 300)
    others = {peers.EAGER: peers.eager}
    head.time_shape("zipf", tensors, report, others, {"QuACK": peers.NEEDS_GPU}, [peers.EAGER])
    assert not report.wrong
    (section,) = report.sections
    frozen = head.FROZEN.format
    assert {head.T3, head.MASKED, peers.EAGER, frozen(head.DICE), frozen(peers.EAGER)} <= set(
        section.seconds
    )
    assert section.missing == {"QuACK": "needs a GPU"}
    assert peers.EAGER not in section.bounds and section.bounds[frozen(head.CE)][0] == head.T2


def test_a_wrong_peer_is_shown_and_not_timed(bench, report):
    head = bench("head")
    tensors = bench("inputs").head_of("zipf", 20, 16, 300)

    def wrong(hidden, weight, target):
        return 1.1 * bench("peers").eager(hidden, weight, target)

    head.time_shape("zipf", tensors, report, {"wrong": wrong})
    (section,) = report.sections
    assert "relative error" in section.wrong["wrong"]
    assert "wrong" not in section.seconds
    assert report.finish() == 0  # it is a finding about the peer


def test_a_wrong_result_of_ours_fails_the_run(bench, report, monkeypatch):
    core = bench("core")
    name = core.CE
    _, truth = core.IMPLEMENTATIONS[name]
    wrong = {name: (lambda z, y: 1.1 * truth(z, y), truth)}
    monkeypatch.setattr(core, "IMPLEMENTATIONS", wrong)
    core.measure("zipf", torch.float32, (20, 300), report)
    (section,) = report.sections
    assert name not in section.seconds and report.finish() == 1
    assert {line.verdict for line in section.lines} == {"not measured"}


def test_what_is_too_slow_is_named_and_left_out(bench, report, monkeypatch):
    head = bench("head")
    monkeypatch.setattr(bench("common"), "MOST_SECONDS", -1.0)
    head.time_shape("zipf", bench("inputs").head_of("zipf", 20, 16, 300), report, {})
    (section,) = report.sections
    assert set(section.seconds) == {head.T3, head.T2, head.PASS}
    assert section.missing[head.CE].startswith("not run, predicted")
    assert {line.verdict for line in section.lines} == {"not measured"}


def test_segmentation_names_what_is_wrong_and_what_is_missing(bench, report, monkeypatch):
    segmentation, peers = bench("segmentation"), bench("peers")
    ours, truth = segloss.DiceLoss(), reference.dice_loss
    rivals = {
        name: peers.Rival(make, ours, truth)
        for name, make in {
            "right": lambda: lambda z, y: truth(z, y),
            "other formula": lambda: lambda z, y: truth(z, y, smooth=1.0),
            "absent": lambda: importlib.import_module("no_such_library"),
        }.items()
    }
    monkeypatch.setattr(peers, "LOGITS", rivals)
    segmentation.measure((30, 100), *peers.logits(), report)
    (section,) = report.sections
    assert set(section.seconds) == {"DiceLoss()", "right"}
    assert "relative error" in section.wrong["other formula"]
    assert section.missing["absent"].startswith("ModuleNotFoundError")


def test_plain_dropping_drops_nothing_below_nothing(bench, monkeypatch):
    head = bench("head")
    monkeypatch.setattr(head, "GRAD_FILTER", 0.0)
    hidden, weight, target = bench("inputs").zipf_head("zipf", 300, 8, 50)
    exact = bench("common").value_and_grads(
        lambda h, w: torch.nn.functional.cross_entropy(h @ w.T, target), hidden, weight
    )
    for grad, expected in zip(head.plain_dropping(hidden, weight, target), exact[1:], strict=True):
        torch.testing.assert_close(grad, expected)


def test_candidates_are_counted_where_they_are_made(bench, monkeypatch):
    module = bench("candidates")
    counter = module.Counter(module.dense.candidates)
    monkeypatch.setattr(module.dense, "candidates", counter)
    logits, target = bench("inputs").zipf("zipf", 40, 100)
    target[:5] = -100
    module.LOSS(logits, target)
    p, y = logits[5:].softmax(-1), target[5:]
    expected = 0
    for c in y.unique():
        least = 1 - p[y == c, c].max()
        expected += int((p[y != c, c] > least).sum())
    assert counter.calls == [(35, y.unique().numel(), expected)]


# ------------------------------------------------------------------------------- fits, predictions


def test_fit_of_a_line(bench):
    x = [256, 512, 1024, 2048]
    fit = bench("growth").linear_fit(x, [0.5 + 0.01 * n for n in x])
    assert fit.start == pytest.approx(0.5) and fit.slope == pytest.approx(0.01)
    assert fit.residual < 1e-9
    bent = bench("growth").linear_fit(x, [1e-6 * n**2 for n in x])
    assert bent.exponent == pytest.approx(2) and bent.residual > 0.2


def test_prediction_goes_through_the_last_two_sizes(bench):
    predicted = bench("growth").predicted
    assert predicted([], 100) == 0
    assert predicted([(10, 2.0)], 40) == 8
    assert predicted([(10, 2.0), (20, 3.0)], 40) == 5
    assert predicted([(10, 2.0), (20, 1.0)], 40) == 1  # noise; it does not get faster


def test_a_cell_predicted_too_large_is_not_run(bench, report, monkeypatch):
    growth = bench("growth")
    small = growth.Axis("N", "hidden states", (8, 16, 32), 100, growth.hidden_cell)
    monkeypatch.setattr(growth, "predicted", lambda points, size: 99.0 if points else 0.0)
    growth.grow(small, report)
    (section,) = report.sections
    assert {name.rpartition(" ")[2] for name in section.seconds} == {"8"}
    assert section.missing["CE, N 16"].startswith("not run, predicted 198 s and ")
    assert section.missing["CE, N 32"].endswith("above 60 s")
    assert section.data["fits"] == {}


def test_short_cells_get_more_rounds(bench):
    rounds = bench("growth").rounds_of
    assert [rounds(seconds, 2) for seconds in (10.0, 0.6, 0.2, 0.001)] == [2, 2, 5, 8]
    assert rounds(0.001, 9) == 9


def test_relative_error_of_all_of_a_tensor(bench):
    """Also of what lies beyond the piece that is looked at at a time; not of something else."""
    relative_error, wrong = bench("common").relative_error, bench("common").Wrong
    truth = torch.ones(2**18 + 4, 2, dtype=torch.float64)
    actual = truth.float()
    assert relative_error(actual, truth) == 0.0
    actual[-1] = 3.0
    assert relative_error(actual, truth) == pytest.approx((8 / truth.numel()) ** 0.5)
    actual[7] = torch.nan
    assert not relative_error(actual, truth) < torch.inf
    with pytest.raises(wrong, match="shape"):
        relative_error(truth.T, truth)


def test_both_limits_of_a_cell(bench):
    too_large = bench("common").too_large
    assert too_large(59, 15e9) == ""
    assert too_large(61, 1e9) == "predicted 61 s and 1 GB: above 60 s"
    assert too_large(1, 17e9) == "predicted 1 s and 17 GB: above 16 GB"


# ----------------------------------------------------------------------------------------- report


@pytest.fixture
def measured(bench, report):
    """Files of a run: a table with a wrong and a missing peer, one of growth, one of memory."""
    common = bench("common")
    report.add(
        common.Section(
            "zipf, bfloat16, N 8, D 2, V 9",
            "head",
            {"CE": [2.0, 2.0, 4.0], "fast": [1.0, 1.0, 1.0], "slow": [5.0], "t3": [1.0]},
            errors={"CE": "1e-3"},
            lines=[
                common.Line("CE / fast", 2.0, 1.1),
                common.Line("Dice / CE", 1.5, 1.7),
                common.Line("focal / CE", None, 1.05, note="focal was not timed"),
            ],
            wrong={"broken": "relative error 1"},
            missing={"QuACK": "needs a GPU"},
            rivals={"CE": ["broken", "fast", "slow", "QuACK"]},
            bounds={"CE": ["t3"]},
        )
    )
    cells = [(n, 0.1 * n, 0.11 * n, 0.12 * n) for n in (4, 8)]
    fit = {"start": 0.0, "slope": 0.11, "residual": 0.03, "exponent": 0.97}
    report.add(
        common.Section(
            "growth with N, logits",
            "growth",
            {},
            missing={"CE, N 16": "not run, predicted 99 s and 1 GB: above 60 s"},
            data={"axis": "N", "level": "logits", "points": {"CE": cells}, "fits": {"CE": fit}},
        )
    )
    lines = [common.Line("eager", 100.0, None), common.Line("DiceLoss", 5.0, 10.0, " MiB")]
    report.add(common.Section("memory, N 8", "memory", {}, lines=lines))
    return report.options.output


def test_results_say_what_was_wrong_missed_and_not_measured(bench, measured, tmp_path):
    output = tmp_path / "RESULTS.md"
    bench("report").main([measured, "--output", str(output)])
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in output.read_text().splitlines()
        if line.startswith("|")
    ]
    # beside the fastest that is right, not the wrong one and not the one without a time
    assert ["Losses on hidden states", "CE", "fast", "2", "loses 1", "2"] in rows
    assert ["broken", "WRONG", "", "", "relative error 1", ""] in rows
    assert ["QuACK", "not measured", "", "", "needs a GPU", ""] in rows
    verdicts = {row[1]: row[5] for row in rows if len(row) == 7 and row[0].startswith("zipf")}
    assert verdicts == {"CE / fast": "MISS", "Dice / CE": "pass", "focal / CE": "not measured"}
    text = output.read_text()
    assert "Targets: 2 passed, 1 missed, 1 not measured" in text
    assert "Not run: CE, N 16: not run, predicted 99 s" in text
    assert "ours takes 5.0% of eager's 100 MiB" in text
    assert "Growth with N, logits: largest distance from a straight line" in text
    assert "CE 3% (N^0.97)" in text
    # whole topics without a file
    assert "Not measured: `python -m bench.segmentation` measures it." in text
    assert "Not measured: `make gpu` measures it." in text
    for name in ("ratios", "head", "growth", "memory"):
        assert f"plots/{name}.png" in text
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 1000


def test_estimates_stand_beside_what_came_out(bench, monkeypatch, tmp_path):
    from segloss.selection import Comparison

    gradex, output = bench("gradex"), tmp_path / "RESULTS.md"
    found = Comparison([("noisy0",), ("clean0", "clean1")], [0.75, 0.5], [0.875, 0.25])
    seconds = {"meta-training": 6.0, "gradients": 2.0, "estimates": 0.5, "retraining": 8.5}
    monkeypatch.setattr(gradex, "run", lambda toy: gradex.Result(found, seconds, {"base": 2.0}, 9))
    assert gradex.main(["--output", str(tmp_path / "gradex.json")]) == 0
    bench("report").main([str(tmp_path / "gradex.json"), "--output", str(output)])
    text = output.read_text()
    best, worst = (text.index(row) for row in (
        "| 0.5000 | 0.2500 | clean0 clean1 |", "| 0.7500 | 0.8750 | noisy0 |"
    ))  # fmt: skip
    assert best < worst and "plots/gradex.png" in text
    # 0.25 s against 4.25 s, and 8 s once
    assert "| an estimate / a retraining | 0.0588 |" in text
    assert "| subsets from which it pays | 2 |" in text


def test_machine_stands_beside_the_figures(bench, measured, tmp_path):
    output = tmp_path / "RESULTS.md"
    bench("report").main([measured, "--output", str(output)])
    machine = json.loads(Path(measured).read_text())["machine"]
    sections = output.read_text().split("## Losses on hidden states")[1]
    for name in ("processor", "AMX", "AVX-512", "torch", "date"):
        assert machine[name] in sections.split("|")[0]


def test_tables_of_other_files_are_shown(bench, measured, tmp_path):
    other = tmp_path / "kernels.json"
    table = {"title": "sm_90", "header": ["kernel", "spills"], "rows": [["row_stats", "0"]]}
    other.write_text(json.dumps({"kind": "kernels", "machine": {}, "tables": [table]}))
    output = tmp_path / "RESULTS.md"
    bench("report").main([measured, str(other), "--output", str(output)])
    assert "| row_stats | 0 |" in output.read_text()
    assert "`make kernels` measures it" not in output.read_text()


def test_a_file_that_is_none_of_ours_is_refused(bench, tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(SystemExit, match="not a file of ours"):
        bench("report").read([str(path)])
    with pytest.raises(SystemExit, match="cannot be read"):
        bench("report").read([str(tmp_path / "missing.json")])


def test_files_are_also_pytest_benchmarks(measured):
    content = json.loads(Path(measured).read_text())
    found = {b["name"]: b["stats"] for b in content["benchmarks"]}
    assert found["CE"]["median"] == 2.0 and found["CE"]["rounds"] == 3
    assert {"machine_info", "commit_info", "datetime", "version"} <= set(content)


def test_ratio_of_what_ran_once(bench):
    line = bench("common").ratio_line("a / b", {"a": [1.0, 2.0, 3.0], "b": [4.0]}, "a", "b", 1.0)
    assert (line.low, line.value, line.high) == (0.375, 0.5, 0.625)
