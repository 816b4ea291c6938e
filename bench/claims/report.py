"""The results on `bench/CLAIMS.md`: verdicts, then a picture and a table for each kind of cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.claims import coba, gradex, irdro, losses, own, pictures, smollm2
from bench.claims.cells import Cell, Store, slug
from bench.claims.findings import (
    RIVALS,
    Claim,
    answers,
    choice_gain,
    choice_scores,
    claims,
    coba_gain,
    correlations,
    errors,
    gradex_cell,
    loss_cell,
    loss_gain,
    over,
    own_gain,
    own_outcome,
    scores,
    speeds,
    true_of,
    weighting_gain,
)
from bench.claims.verdicts import Compared, by_outcome
from bench.report.writing import markdown
from segloss.compare.paired import f1_parts

ROOT = Path(__file__).parents[2]
PAGE, DOCS = ROOT / "bench" / "CLAIMS.md", ROOT / "docs" / "losses.md"
RESULTS, HERE = "results", "here"  # marks
NOT_RUN = "not run"
TITLES = {
    "losses": "Losses (2409.13641)", "coba": "CoBa (2410.06741)", "gradex": "GradEx (2409.19458)",
    "irdro": "Sample weights (2402.14270)", "own": "This package's own", "smollm2": "SmolLM2-135M",
}  # fmt: skip


def write(store: Store, cells: Sequence[Cell], page: Path = PAGE, docs: Path = DOCS) -> None:
    """The results on the page, above the protocol, and the losses' column in the docs."""
    drawn = pictures.draw(store, page.parent / "plots")
    between(page, RESULTS, results(store, cells, drawn))
    between(docs, HERE, here(store))


def between(page: Path, mark: str, text: str) -> None:
    """Replaces what lies between a page's marks; the rest stays as it is."""
    begin, end = (f"<!-- {mark}: {place} -->" for place in ("begin", "end"))
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{page} has no lines {begin} and {end} to write between")
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}", encoding="utf-8")


def results(store: Store, cells: Sequence[Cell], drawn: dict[str, str]) -> str:
    parts = ["## Verdicts\n", verdicts(claims(store)), missing(store, cells), machines(store)]
    for kind, table in TABLES.items():
        parts.append(f"## {TITLES[kind]}\n")
        if kind in drawn:
            parts.append(f"![{TITLES[kind]}]({drawn[kind]})\n")
        parts.append(table(store))
    return "\n".join(parts)


# ------------------------------------------------------------------------------------- verdicts


def verdicts(found: Sequence[Claim]) -> str:
    rows = []
    for claim in found:
        verdict, words = claim.verdict
        single = by_outcome(claim.single, ("better", "worse"))
        words += f". Of single comparisons: {single}" if single else ""
        rows.append([f"{claim.number}. {claim.text}", claim.source, f"**{verdict}**", words])
    return markdown(["claim", "of", "verdict", "conditions"], rows)


def missing(store: Store, cells: Sequence[Cell]) -> str:
    """What has not been run, by kind and by name."""
    left = [cell for cell in cells if cell.name not in store]
    count = f"{len(cells) - len(left)} of {len(cells)} cells have been run."
    if not left:
        return f"{count}\n"
    rows = []
    for kind, number in Counter(cell.kind for cell in left).items():
        these = [cell for cell in left if cell.kind == kind]
        minutes = sum(cell.seconds for cell in these) / 60
        rows.append([kind, number, f"{minutes:.0f}", grouped([cell.name for cell in these])])
    table = markdown(["kind", "cells", "minutes of one core, expected", "which"], rows)
    return f"{count} **Not run:**\n\n{table}\n`python -m bench.claims` runs them.\n"


def grouped(names: Sequence[str]) -> str:
    """Names by what they begin with, and beginnings that lack the same by that."""
    leaves: dict[str, list[str]] = {}
    for name in names:
        head, _, leaf = name.rpartition("/")
        leaves.setdefault(head.partition("/")[2], []).append(leaf)
    heads: dict[str, list[str]] = {}
    for head, found in leaves.items():
        heads.setdefault(", ".join(found), []).append(head)
    parts = [f"{', '.join(h)}: {found}" if any(h) else found for found, h in heads.items()]
    return "; ".join(parts)


def machines(store: Store) -> str:
    """What the numbers were made with."""
    found: Counter[str] = Counter()
    spent = 0.0
    for name in store.names():
        whole = store.whole(name)
        spent += whole["cpu_seconds"]
        where = whole["machine"]
        processor = f"{where['processor']}, AVX-512: {where['AVX-512']}, torch {where['torch']}"
        found[f"{where['commit']}` on {processor}"] += 1
    lines = [f"- {count} cells by commit `{by}, one thread" for by, count in found.items()]
    lines.append("\nTo the last digit a rerun gives the same numbers with that commit alone.")
    return "\n".join([f"{spent / 60:.0f} minutes of one core in all.\n", *lines, ""])


# ---------------------------------------------------------------------------------------- tables


def shown(found: Compared | None, unit: float = 100, places: int = 1) -> str:
    """`+3.1 (+0.4 to +5.8) better`, positive where it is better."""
    if found is None:
        return NOT_RUN
    gain = found.gain
    mean, low, high = (f"{unit * v:+.{places}f}" for v in (gain.mean, gain.low, gain.high))
    word = {"better": " **better**", "worse": " **worse**"}.get(found.outcome, "")
    return f"{mean} ({low} to {high}){word}"


def visible(found: Compared | None, unit: float = 100, places: int = 1) -> str:
    return "-" if found is None else f"{unit * found.gain.detectable:.{places}f}"


def source(pattern: str) -> str:
    return f"Cells `{pattern}`; `python -m bench.claims --rerun {pattern}` runs one again.\n"


def loss_tables(store: Store) -> str:
    names = (*losses.CLAIMED, *(n for n in losses.LOSSES + losses.SUMS
                               if n != "ce" and n not in losses.CLAIMED))  # fmt: skip
    first = []
    names = [n for n in names if any(loss_cell(task, n) in store for task in losses.TASKS)]
    for loss in names:
        gains = [loss_gain(store, task, loss) for task in losses.TASKS]
        seen = " ".join(visible(gain) for gain in gains)
        first.append([f"`{slug(loss)}`", *map(shown, gains), seen])
    reference = ["`ce`: exact match, %"]
    for task in losses.TASKS:
        result = store.find(loss_cell(task, "ce"))
        reference.append(NOT_RUN if result is None else f"{100 * scores(result).hit.mean():.1f}")
    text = [
        "Exact match less that of cross-entropy, in points (above, its own, in %). The first four "
        "are those of claim 1, 10 seeds and 4 comparisons a task; the others explore, 5 seeds and "
        "18 comparisons. The last column: what difference could be seen on each task.\n",
        source("losses/TASK/LOSS"),
        markdown(["loss", *losses.TASKS, "visible"], [[*reference, ""], *first]),
        "Beside exact match: nll, in nats less cross-entropy's (negative is better), ECE in %, the "
        "learning rate chosen, and macro-F1 of the subjects in points less cross-entropy's. ECE "
        "has no interval: it is the mean over seeds.\n",
        markdown(
            ["loss", *(f"{t}: nll, ECE, rate" for t in losses.TASKS), "subjects: macro-F1"],
            [beside(store, loss) for loss in ("ce", *names)],
        ),
    ]
    return "\n".join(text)


def beside(store: Store, loss: str) -> list[str]:
    row = [f"`{slug(loss)}`"]
    for task in losses.TASKS:
        result = store.find(loss_cell(task, loss))
        if result is None:
            row.append(NOT_RUN)
            continue
        ece = f"{100 * over(result, 'ece').mean():.1f}"
        row.append(f"{nll_of(store, task, loss)}, {ece}, {result['rate']:g}")
    subjects = store.find(loss_cell("subjects", loss))
    if subjects is None:
        return [*row, NOT_RUN]
    if loss == "ce":
        return [*row, f"{100 * f1_parts(true_of(subjects), answers(subjects)).mean():.1f}"]
    return [*row, shown(loss_gain(store, "subjects", loss, "f1"))]


def nll_of(store: Store, task: str, loss: str) -> str:
    """In nats, less cross-entropy's."""
    gain = None if loss == "ce" else loss_gain(store, task, loss, "nll")
    if gain is None:
        return f"{scores(store[loss_cell(task, loss)]).nll.mean():.3f}"
    low, high = sorted((-gain.gain.low, -gain.gain.high))
    return f"{-gain.gain.mean:+.3f} ({low:+.3f} to {high:+.3f})"


def coba_table(store: Store) -> str:
    rows = []
    for mix in coba.MIXES:
        for name in coba.WEIGHTS:
            result = store.find(f"coba/{mix}/{name}")
            if result is None:
                rows.append([mix, name, *[NOT_RUN] * 7])
                continue
            found = scores(result)
            values = [f"{100 * found.hit.mean():.1f}", f"{found.nll.mean():.3f}"]
            values.append(f"{over(result, 'spread').mean():.3f}")
            gains = ["", "", ""]
            if name != "coba":
                gains = [
                    shown(coba_gain(store, mix, name, "hit")),
                    shown(coba_gain(store, mix, name, "nll"), 1, 3),
                    shown(coba_gain(store, mix, name, "spread"), 1, 3),
                ]
            rows.append([mix, name, *values, *gains, f"{result['rate']:g}"])
    header = ["data", "weights", "exact match, %", "nll", "spread", "CoBa's gain: points",
              "CoBa's gain: nll", "CoBa's gain: spread", "rate"]  # fmt: skip
    about = (
        "Mean over the four tasks' items. A gain is positive where CoBa is better: more exact "
        "matches, less nll, less spread; 5 seeds, 4 comparisons.\n"
    )
    return "\n".join([about, source("coba/DATA/WEIGHTS"), markdown(header, rows)])


def percent(values) -> str:
    return f"{100 * values.mean():.1f} ({100 * values.min():.1f} to {100 * values.max():.1f})"


def gradex_table(store: Store) -> str:
    rows = []
    for steps in gradex.LENGTHS:
        result = store.find(gradex_cell(steps))
        if result is None:
            rows.append([steps, *[NOT_RUN] * 9])
            continue
        nll = {name: choice_scores(result, name).nll.mean() for name in ("chosen", *RIVALS)}
        off = [errors(result, name) for name in ("estimated", "not_relative")]
        rows.append([
            steps, *(percent(e) for e in off),
            f"{correlations(result).mean():.2f}",
            f"{1 / speeds(result).mean():.2f}",
            " ".join(f"{nll[name]:.3f}" for name in nll),
            *(shown(choice_gain(store, steps, rival), 1, 3) for rival in RIVALS),
        ])  # fmt: skip
    header = ["steps", "error, % (lowest to highest seed)", "error with `relative=False`, %",
              "rank correlation", "x faster", "nll: chosen, all, random, similar",
              "gain over all", "over random", "over similar"]  # fmt: skip
    about = (
        "The error is the mean over 12 subsets of abs(estimate - retrained) / retrained. x faster: "
        "the time of retraining on as many subsets as the choice looked at, over that of training "
        "on all groups, gradients and the choice. Gains in nats of the sums to test, positive "
        "where the chosen subset is better; 5 seeds, 3 comparisons.\n"
    )
    return "\n".join([about, source("gradex/stepsSTEPS"), markdown(header, rows)])


def weighting_table(store: Store) -> str:
    rows = []
    for setting in irdro.SETTINGS:
        text = setting == "text"
        none = [store.find(f"irdro/{setting}/{kind}/none") for kind in irdro.DATA]
        values = [
            NOT_RUN if result is None
            else f"{scores(result).nll.mean():.3f}" if text
            else f"{100 * scores(result).hit.mean():.1f}"
            for result in none
        ]  # fmt: skip
        rows.append([setting, f"`none`: {'nll' if text else 'exact match, %'}", *values])
        unit, places = (1, 3) if text else (100, 1)
        for name in irdro.VARIANTS:
            gains = [weighting_gain(store, setting, kind, name) for kind in irdro.DATA]
            if name != "none" and any(gains):
                rows.append([setting, f"`{name}`", *(shown(g, unit, places) for g in gains)])
    about = (
        "What weights gain over none, positive where they are better: fine-tuning in points of "
        "exact match, text in nats of nll. `irdro` is claim 7's, 10 seeds and 3 comparisons; the "
        "others explore, 5 seeds and 12 comparisons.\n"
    )
    header = ["setting", "weights", *irdro.DATA]
    return "\n".join([about, source("irdro/SETTING/DATA/WEIGHTS"), markdown(header, rows)])


def own_table(store: Store) -> str:
    rows = []
    for name in own.VARIANTS:
        result = store.find(f"own/{name}")
        if result is None:
            rows.append([f"`{name}`", *[NOT_RUN] * 4])
            continue
        found = own_gain(store, name)
        nll = f"{scores(result).nll.mean():.4f}"
        if name == "float32":
            rows.append([f"`{name}`", nll, "", "", f"{result['rate']:g}"])
        else:
            words = {"better": "the same", "worse": "not the same"}
            said = own_outcome(store, name)
            rows.append([f"`{name}`", nll, shown(found, 1, 4).replace("**", ""),
                         words.get(said, said), f"{result['rate']:g}"])  # fmt: skip
    about = "A gain is positive where the variant's nll is lower; 10 seeds, 2 comparisons.\n"
    header = ["variant", "nll", "gain over float32, nats", "within 0.02 nats", "rate"]
    return "\n".join([about, source("own/VARIANT"), markdown(header, rows)])


def smollm2_table(store: Store) -> str:
    if not any(loss_cell("smollm2", loss) in store for loss in smollm2.LOSSES):
        return "Not run.\n"
    rows = []
    for loss in smollm2.LOSSES:
        result = store.find(loss_cell("smollm2", loss))
        if result is None:
            rows.append([f"`{slug(loss)}`", *[NOT_RUN] * 4])
            continue
        found = scores(result)
        f1 = f1_parts(true_of(result), answers(result)).mean()
        cells = [f"{100 * found.hit.mean():.1f}", f"{100 * f1:.1f}"]
        if loss != "ce":
            cells = [shown(loss_gain(store, "smollm2", loss, score)) for score in ("hit", "f1")]
        nll, rate = nll_of(store, "smollm2", loss), f"{result['rate']:g}"
        rows.append([f"`{slug(loss)}`", *cells, nll, rate])
    about = (
        "Fine-tuned on the demo's exam questions. The first row has cross-entropy's scores, the "
        "others theirs less these (of nll, negative is better). 3 seeds, 3 comparisons; in bf16 "
        "(autocast); these cells do not hold what ECE needs.\n"
    )
    header = ["loss", "exact match, %", "macro-F1, %", "nll", "rate"]
    return "\n".join([about, source("smollm2/LOSS"), markdown(header, rows)])


def here(store: Store) -> str:
    """What came out for every loss, for the docs."""

    def words(loss: str) -> str:
        tasks = [*losses.TASKS, *(["smollm2"] if loss in smollm2.LOSSES else [])]
        gains = {task: loss_gain(store, task, loss) for task in tasks}
        if not any(gains.values()):
            return NOT_RUN
        found: dict[str, list[str]] = {"better": [], "worse": [], "no difference": [], NOT_RUN: []}
        for task, gain in gains.items():
            outcome = NOT_RUN if gain is None else gain.outcome
            points = "" if gain is None else f" {100 * gain.gain.mean:+.1f}"
            key = outcome if outcome in found else "no difference"
            found[key].append(task + (points if outcome != NOT_RUN else ""))
        return "; ".join(f"{key}: {', '.join(names)}" for key, names in found.items() if names)

    rows = [[f"`{n}`", words(n), words(f"0.5*ce+0.5*{n}")] for n in losses.LOSSES if n != "ce"]
    return markdown(["loss", "here, alone", "here, `0.5*ce+0.5*loss`"], rows)


TABLES: dict[str, Callable[[Store], str]] = {
    "losses": loss_tables, "coba": coba_table, "gradex": gradex_table, "irdro": weighting_table,
    "own": own_table, "smollm2": smollm2_table,
}  # fmt: skip
