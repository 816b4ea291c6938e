"""The study of the papers' claims: its store, its rule and its page, on made-up cells."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import segloss
from bench.claims import __main__ as command
from bench.claims import coba, findings, gradex, irdro, losses, model, own, report, tasks
from bench.claims.cells import Cell, Store, apart, execute, ordered, rerun
from bench.claims.pictures import draw
from bench.claims.verdicts import all_of, any_of, below, compared, same, verdict

ITEMS = 40


def stored(hits, nll, **more) -> dict:
    """A run as a cell keeps it, from (items,) hits and nll."""
    hits, nll = np.asarray(hits), np.asarray(nll, np.float16)
    return {
        "exact": float(hits.mean()), "mean_nll": float(nll.mean()), "ece": 0.1,
        "hit": model.packed(np.packbits(hits)), "nll": model.packed(nll), **more,
    }  # fmt: skip


def result(hits, nll, **more) -> dict:
    """A variant's cell from (seeds, items) hits and nll."""
    runs = [stored(h, n, **more) for h, n in zip(hits, nll, strict=True)]
    return {"rate": 0.01, "items": np.shape(hits)[1], "runs": runs}


# ---------------------------------------------------------------------------------------- store


def cell(name: str, value: float, wave: int = 1, calls: list | None = None) -> Cell:
    def run() -> dict:
        if calls is not None:
            calls.append(name)
        return {"score": value, "seconds": {"training": np.random.rand()}}

    return Cell(name, run, wave, 1.0)


def test_cells_run_in_the_protocols_order_and_once(tmp_path):
    store, calls = Store(tmp_path), []
    cells = ordered([cell("b/late", 1.0, 2, calls), cell("a/early", 2.0, 1, calls)])
    assert [c.name for c in execute(cells, store, 1.0, say=lambda text: None)] == [
        "a/early", "b/late",
    ]  # fmt: skip
    assert list(execute(cells, store, 1.0, say=lambda text: None)) == []
    assert calls == ["a/early", "b/late"]
    assert store["a/early"]["score"] == 2.0
    assert store.names() == ["a/early", "b/late"]
    whole = store.whole("b/late")
    assert whole["command"] == "python -m bench.claims --rerun b/late"
    words = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    # a tree without its history has none
    assert (head or "unknown").startswith(whole["machine"]["commit"].rstrip("+"))


def test_a_cell_that_was_killed_leaves_no_file(tmp_path):
    def killed() -> dict:
        raise KeyboardInterrupt

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        list(execute([Cell("a/b", killed, 1, 1.0)], store, 1.0, say=lambda text: None))
    assert store.names() == []


def test_no_cell_starts_after_the_minutes(tmp_path):
    said = []
    assert list(execute([cell("a/b", 1.0)], Store(tmp_path), -1.0, say=said.append)) == []
    assert said[-1] == "-1 minutes are over; 1 cells are missing"


def test_a_rerun_names_what_differs_and_no_clock(tmp_path):
    store = Store(tmp_path)
    store.write("a/b", cell("a/b", 1.0).run(), 3.0)
    assert rerun(cell("a/b", 1.0), store) == []
    assert rerun(cell("a/b", 1.5), store) == ["/score: stored 1.0, again 1.5"]
    (found,) = apart({"x": [1, {"y": 2}]}, {"x": [1, {"y": 3}]})
    assert found.split("/") == ["", "x", "1", "y: stored 2, again 3"]
    assert apart({"x": [1]}, {"x": [1, 2]}) == ["/x: stored [1], again [1, 2]"]
    assert apart(float("nan"), float("nan")) == []


def test_rerun_of_what_is_no_cell(capsys):
    assert command.main(["--rerun", "losses/addition/none"]) == 2
    assert "is no cell" in capsys.readouterr().err


def test_every_kind_has_quick_cells_and_names_are_distinct():
    for quick in (False, True):
        cells = command.every(quick)
        assert {c.kind for c in cells} == set(command.KINDS)
        assert len({c.name for c in cells}) == len(cells)


# ----------------------------------------------------------------------------------------- rule


def draws(gain: float, seed: int = 0, seeds: int = 10, items: int = 1000):
    """Scores (seeds, items) of two variants that differ by `gain`; seeds and items at random."""
    rng = np.random.default_rng(seed)
    item = rng.normal(0.6, 0.2, items)
    noise = lambda: rng.normal(0, 0.01, (seeds, 1)) + rng.normal(0, 0.1, (seeds, items))  # noqa: E731
    return item + noise(), item + gain + noise()


@pytest.mark.parametrize(
    ("gain", "outcome"), [(0.08, "better"), (-0.08, "worse"), (0.0, "no gain")]
)
def test_outcome_of_a_planted_difference(gain, outcome):
    first, second = draws(gain)
    assert compared(first, second, 0.02, 4).outcome == outcome
    assert compared(-first, -second, 0.02, 4, higher=False).outcome == outcome


def test_too_few_seeds_are_undecided():
    first, second = draws(0.01, seeds=2)
    assert compared(first, second, 0.02, 4).outcome == "undecided"


def test_equal_variants_are_rarely_found_better():
    found = [compared(*draws(0.0, seed, 5, 100), 0.02, 1).outcome for seed in range(400)]
    assert sum(o in ("better", "worse") for o in found) <= 0.07 * 400


def test_scores_of_whole_runs_have_students_interval():
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.6])
    gain = compared(np.zeros(5), values, 0.02, higher=False).gain
    half = 2.776445 * values.std(ddof=1) / 5**0.5  # t of 4 degrees of freedom
    assert (gain.low, gain.high) == pytest.approx((-0.32 - half, -0.32 + half), rel=1e-4)
    assert compared(np.zeros(5), np.zeros(5), 0.02).outcome == "no gain"


def test_the_seeds_that_both_have_are_compared():
    first, second = draws(0.08)
    gain = compared(first, second[:5], 0.02).gain
    assert gain.mean == pytest.approx((second[:5] - first[:5]).mean())


def test_a_claim_of_one_of_several_and_of_one_against_all():
    assert any_of(["worse", "better", "undecided"]) == "better"
    assert any_of(["worse", "undecided"]) == "undecided"
    assert any_of(["worse", "worse"]) == "worse"
    assert any_of(["worse", "no gain"]) == "no gain"
    assert any_of(["not run", "not run"]) == all_of(["not run"]) == "not run"
    assert any_of(["no gain", "not run"]) == "undecided"
    assert all_of(["better", "better"]) == "better"
    assert all_of(["better", "undecided"]) == "undecided"
    assert all_of(["better", "worse", "no gain"]) == "worse"
    assert all_of(["better", "no gain", "undecided"]) == "no gain"
    assert all_of(["better", "not run"]) == "undecided"


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["better", "better"], "holds"),
        (["better", "worse"], "holds under conditions"),
        (["better", "not run"], "holds under conditions"),
        (["worse", "no gain"], "does not hold"),
        (["worse", "undecided"], "undecided"),
        (["worse", "not run"], "undecided"),
        (["not run", "not run"], "not run"),
    ],
)
def test_verdicts(outcomes, expected):
    found, words = verdict(dict(zip("ab", outcomes, strict=True)))
    assert found == expected
    assert f"{outcomes[0]}: a" in words


def test_the_same_and_a_limit():
    first, second = draws(0.0)
    gain = compared(first, second, 0.02).gain
    assert same(gain, 0.05) == "better" and same(gain, 1e-6) == "undecided"
    assert same(compared(first, second + 1, 0.02).gain, 0.05) == "worse"
    assert below([0.005, 0.006, 0.005, 0.004, 0.005], 0.01)[0] == "better"
    assert below([0.05, 0.06, 0.05, 0.04, 0.05], 0.01)[0] == "worse"
    assert below([0.005, 0.02, 0.001, 0.03, 0.005], 0.01)[0] == "undecided"


# ---------------------------------------------------------------------------------------- tasks


def test_answers_of_the_generated_tasks():
    """Read from what the model reads and is to predict."""
    added = tasks.addition(50, "test", 3)
    numbers = added.ids[:, :3]
    value = lambda digits: sum(d * 10**i for i, d in enumerate(digits.unbind(1)))  # noqa: E731
    total = value(numbers // 10) + value(numbers % 10)
    assert torch.equal(value(added.target[:, 3:]), total)
    assert (added.target[:, :3] == model.IGNORE).all()
    assert torch.equal(added.ids[:, 4:], added.target[:, 3:-1])
    items = tasks.sorting(50, "test")
    assert torch.equal(items.target[:, 8:], items.ids[:, :8].sort(1).values)
    sent = tasks.copying(2000, "test")
    right = sent.ids[:, :12].view(-1, 3, 4) == sent.target[:, 12:, None].mT
    # a replaced symbol is by chance the same one in 16
    assert right.float().mean().item() == pytest.approx(1 - 0.35 * 15 / 16, abs=0.01)
    turned = tasks.reversing(50, "test")
    assert torch.equal(turned.target[:, 6:], turned.ids[:, :6].flip(1))


def test_seeds_train_on_other_items_and_are_tested_on_the_same():
    data = losses.parts("sorting", 10, 8, 20)
    assert torch.equal(data("test", 0).ids, data("test", 1).ids)
    assert not torch.equal(data("train", 0).ids, data("train", 1).ids)
    assert not torch.equal(data("validation", 0).ids, data("test", 0).ids)


def test_dirty_data():
    clean = tasks.addition(1000, "clean", irdro.DIGITS)
    for kind, share in (("clean", 0.0), ("wrong10", 0.1), ("wrong30", 0.3)):
        dirty = irdro.spoilt(clean, kind, irdro.wrong_sums, 0)
        changed = (dirty.target != clean.target).any(1).float().mean().item()
        assert changed == pytest.approx(share, abs=0.005)
        # what is read ahead of each digit is what was to be predicted
        start = irdro.DIGITS
        assert torch.equal(dirty.ids[:, start + 1 :], dirty.target[:, start:-1])
        assert torch.equal(dirty.ids[:, : start + 1], clean.ids[:, : start + 1])
    copies = irdro.spoilt(clean, "copies", irdro.wrong_sums, 0)
    distinct = torch.unique(copies.target, dim=0)
    assert len(distinct) < 0.75 * len(torch.unique(clean.target, dim=0))


def test_weights_of_a_batch_are_the_ones_it_names():
    torch.manual_seed(0)
    network = model.Transformer(101, 9, width=16)
    data = tasks.addition(6, "batch", 4)
    loss = irdro.weighted({"scheme": "irdro", "temperature": 0.5})(network, data)
    log_prob = network(data.ids).log_softmax(-1)
    valid = data.target != model.IGNORE
    picked = log_prob.gather(2, data.target.clamp(min=0)[..., None])[..., 0]
    each = -(picked * valid).sum(1) / valid.sum(1)
    torch.testing.assert_close(loss, (torch.softmax(each.detach() / 0.5, 0) * each).sum())


def test_balancers():
    losses_now = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert coba.balancer("equal", (1, 2, 3, 4)).loss(losses_now).item() == pytest.approx(2.5)
    assert coba.balancer("size", (1, 2, 3, 4)).loss(losses_now).item() == pytest.approx(3.0)
    learnt = coba.Uncertainty()
    learnt.loss(losses_now).backward()
    # exp(-s) loss + s falls with s where the loss is above 1
    assert learnt.log_variance.grad.tolist() == pytest.approx([0, -0.25, -0.5, -0.75])
    average = coba.DWA(span=2)
    for _ in range(2):
        average.loss(losses_now)
    average.loss(losses_now / torch.tensor([1.0, 1, 1, 4]))
    value = average.loss(losses_now / torch.tensor([1.0, 1, 1, 4]))
    weights = torch.softmax(torch.tensor([1.0, 1, 1, 0.25]) / 2, 0)
    assert value.item() == pytest.approx((weights @ torch.tensor([1.0, 2, 3, 1])).item())


def test_scores_are_kept_as_they_are():
    torch.manual_seed(0)
    network = model.Transformer(17, 16, width=16)
    data = tasks.sorting(30, "test")
    logits = network(data.ids)
    valid = data.target != model.IGNORE
    # half of the items have the answers that the model gives
    own_answers = logits[::2].argmax(-1).masked_fill(~valid[::2], model.IGNORE)
    data.target[::2] = own_answers
    found = model.scored(network, data, batch=7)
    right = ((logits.argmax(-1) == data.target) | ~valid).all(1)
    assert right.sum() == 15 and model.hits_of(found, 30).tolist() == right.tolist()
    nll = [segloss.cross_entropy(z, t).item() for z, t in zip(logits, data.target, strict=True)]
    assert model.nll_of(found) == pytest.approx(np.array(nll), rel=1e-3)
    assert found["mean_nll"] == pytest.approx(np.mean(nll), rel=1e-5)


def test_calibration_error():
    sure, right = np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, True, True, False])
    # 0.05 too unsure in one bin, 0.05 too sure in the other
    assert model.calibration(sure, right) == pytest.approx(0.05)


def test_the_rate_is_chosen_on_validation_data_and_a_nan_never():
    seen = []

    def run(rate: float, seed: int, part: str) -> dict:
        seen.append((rate, seed, part))
        return {"exact": {1.0: 0.2, 2.0: 0.5, 3.0: float("nan")}[rate], "mean_nll": 0.0}

    found = model.variant(run, (1.0, 2.0, 3.0), 2, model.exactness)
    assert found["rate"] == 2.0
    assert seen == [
        *((r, model.TUNING_SEED, "validation") for r in (1.0, 2.0, 3.0)),
        (2.0, 0, "test"), (2.0, 1, "test"),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------- page


@pytest.fixture
def pages(tmp_path):
    """The page and the docs with nothing between the marks."""
    page, docs = tmp_path / "CLAIMS.md", tmp_path / "losses.md"
    page.write_text(
        "# Title\n\n<!-- results: begin -->\nwritten before\n<!-- results: end -->" + PROTOCOL
    )
    docs.write_text("# Losses\n\n<!-- here: begin -->\n<!-- here: end -->\n\nmore\n")
    return page, docs


PROTOCOL = "\n\n## Protocol\n\nas committed\n"


@pytest.fixture
def made_up(tmp_path) -> Store:
    """Cells whose numbers say which outcome is right."""
    store, rng = Store(tmp_path / "cells"), np.random.default_rng(0)

    def scores(rate: float, seeds: int = 5):
        hits = rng.random((seeds, ITEMS)) < rate
        return hits, np.where(hits, 0.1, 1.0)

    sure = [np.ones((5, ITEMS), bool), np.full((5, ITEMS), 0.1)]
    for task in losses.TASKS:
        more = {"said": model.packed(np.arange(ITEMS, dtype=np.uint8) % 2)}
        true = {"true": model.packed(np.zeros(ITEMS, np.uint8))}
        store.write(f"losses/{task}/ce", result(*scores(0.3), **more) | true, 1.0)
        if task != "copying":
            store.write(f"losses/{task}/focal", result(*sure, **more) | true, 1.0)
    for weights in coba.WEIGHTS:
        spread = {"spread": 0.5 if weights == "coba" else 0.1, "curve": [[1.0] * 4, [0.5] * 4]}
        store.write(f"coba/plenty/{weights}", result(*scores(0.5), **spread), 1.0)
    seeds = []
    for _ in range(5):
        runs = {name: stored(*(x[0] for x in scores(0.5))) for name in findings.RIVALS}
        runs["chosen"] = stored(np.ones(ITEMS, bool), np.full(ITEMS, 0.01))
        true = rng.uniform(1, 2, 3)
        seeds.append(
            {
                "runs": runs, "random": [runs["all"]] * 3, "subsets": [["a"], ["b"], ["c"]],
                "estimated": (1.5 * true).tolist(), "not_relative": true.tolist(),
                "true": true.tolist(), "selection_subsets": 200,
                "seconds": {"all groups": 1.0, "gradients": 1.0, "selection": 0.0,
                            "retraining": 3.0},
            }
        )  # fmt: skip
    store.write("gradex/steps20", {"steps": 20, "items": ITEMS, "seeds": seeds}, 1.0)
    for name, rate in (("none", 0.9), ("irdro-0.5", 0.1), ("irdro-1", 0.1), ("irdro-2", 0.1)):
        store.write(f"irdro/fine-tuning/clean/{name}", result(*scores(rate)), 1.0)
    nll = rng.random((10, ITEMS))
    for name in own.VARIANTS:
        store.write(f"own/{name}", result(nll > 0.5, nll), 1.0)
    return store


def test_outcomes_of_made_up_cells(made_up):
    found = {claim.number: claim for claim in findings.claims(made_up)}
    assert found[1].conditions["addition"] == "better"
    assert found[1].conditions["copying"] == "not run"
    assert found[1].verdict[0] == "holds under conditions"
    assert found[2].conditions == {"plenty": "worse", "scarce": "not run"}
    assert found[2].verdict[0] == "undecided"
    assert found[4].conditions["20 steps"] == "worse"  # half as much again
    assert found[5].conditions["20 steps"] == "better"  # 2 s against 200
    assert found[6].conditions["20 steps"] == "better"
    assert found[7].conditions["fine-tuning clean"] == "worse"
    assert found[8].verdict == found[9].verdict == ("holds", "as claimed: text")


def test_the_page_says_what_was_found_and_what_was_not_run(made_up, pages, tmp_path):
    page, docs = pages
    cells = command.every()
    report.write(made_up, cells, page, docs)
    text = page.read_text()
    assert text.endswith(f"<!-- results: end -->{PROTOCOL}") and "written before" not in text
    assert "converge at a more even pace | 2410.06741 | **undecided** | worse: plenty;" in text
    assert f"{len(made_up.names())} of {len(cells)} cells have been run. **Not run:**" in text
    by = made_up.whole("own/bf16")["machine"]["commit"]
    assert f"- {len(made_up.names())} cells by commit `{by}` on " in text
    assert "| smollm2 | 4 | 120 | ce, focal, lovasz, 0.6*ce+0.4*lovasz |" in text
    assert "Of single comparisons: better: focal (addition), focal (sorting), focal (subj" in text
    row = next(line for line in text.splitlines() if line.startswith("| `focal` | +"))
    assert row.count("**better**") == 3 and row.count("not run") == 1
    assert "**worse**" in next(line for line in text.splitlines() if "| `irdro-1` |" in line)
    for kind in ("losses", "coba", "gradex", "irdro", "own"):
        assert f"plots/claims-{kind}.png" in text
        assert (tmp_path / "plots" / f"claims-{kind}.png").stat().st_size > 1000
    assert text.index("## Verdicts") < text.index(report.TITLES["losses"])
    once = page.read_text()
    report.write(made_up, cells, page, docs)
    assert page.read_text() == once


def test_names_of_what_was_not_run_are_grouped():
    names = ["irdro/a/x", "irdro/a/y", "irdro/b/x", "irdro/b/y", "irdro/c/x"]
    assert report.grouped(names) == "a, b: x, y; c: x"
    assert report.grouped(["smollm2/ce", "smollm2/focal"]) == "ce, focal"


def test_the_docs_say_what_came_out_for_each_loss(made_up, pages):
    _, docs = pages
    report.write(made_up, [], *pages)
    text = docs.read_text()
    assert text.startswith("# Losses") and text.endswith("<!-- here: end -->\n\nmore\n")
    row = next(line for line in text.splitlines() if line.startswith("| `focal` |"))
    assert row.startswith("| `focal` | better: addition +7")
    assert "not run: copying, smollm2 |" in row and row.endswith("| not run |")
    assert len([line for line in text.splitlines() if line.startswith("| `")]) == 11


def test_smollm2_s_table(made_up, tmp_path):
    """Each row less cross-entropy's: focal right on all items, cross-entropy on every other one."""
    for name, right, nll in (("ce", np.arange(ITEMS) % 2 == 0, 0.5), ("focal", True, 0.25)):
        hits, losses_ = np.full((3, ITEMS), right), np.full((3, ITEMS), nll)
        names = {"names": ["a", "b"], "true": ["a"] * ITEMS}
        runs = result(hits, losses_, said=model.packed(1 - hits[0].astype(np.uint8)))
        for run in runs["runs"]:
            run |= names
        made_up.write(f"smollm2/{name}", runs, 1.0)
    rows = report.smollm2_table(made_up).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[-4:]]
    assert cells[0][:4] == ["`ce`", "50.0", "66.7", "0.500"]
    assert cells[1][1].startswith("+50.0 (") and cells[1][1].endswith("**better**")
    assert cells[1][2].startswith("+33.3 (") and cells[1][3].startswith("-0.250 (")
    assert cells[2] == ["`lovasz`", *["not run"] * 4]
    drawn = draw(made_up, tmp_path / "plots")
    assert (tmp_path / drawn["smollm2"]).stat().st_size > 1000


def test_the_page_without_any_cell(pages, tmp_path):
    report.write(Store(tmp_path / "none"), command.every(), *pages)
    assert pages[0].read_text().count("**not run**") == 9


def test_a_page_without_marks_is_refused(pages, tmp_path):
    pages[0].write_text("# Title")
    with pytest.raises(SystemExit, match="results: begin"):
        report.write(Store(tmp_path), [], *pages)


def test_every_stored_cell_is_one_of_the_protocol():
    names = {cell.name for cell in command.every()}
    store = Store()
    assert set(store.names()) <= names
    for name in store.names():
        assert store.whole(name)["cell"] == name
        json.dumps(store[name])


def test_gradex_groups():
    size = gradex.Size(4)
    clean, noisy, other = (gradex.group(name, size, 0) for name in ("clean0", "noisy0", "other0"))
    assert clean.ids.shape == noisy.ids.shape == other.ids.shape == (25, 7)
    value = lambda digits: sum(d * 10**i for i, d in enumerate(digits.unbind(1)))  # noqa: E731
    total = lambda data: value(data.ids[:, :3] // 10) + value(data.ids[:, :3] % 10)  # noqa: E731
    assert torch.equal(value(clean.target[:, 3:]), total(clean))
    assert not torch.equal(value(noisy.target[:, 3:]), total(noisy))
    assert torch.equal(value(other.target[:, 3:].flip(1)), total(other))
    assert torch.equal(other.ids[:, 4:], other.target[:, 3:-1])
