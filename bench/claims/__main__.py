"""Measure what the papers behind this package claim, cell by cell; `report` writes the page.

    python -m bench.claims [--only KIND ...] [--minutes N]   run the cells that are missing
    python -m bench.claims --rerun CELL ...                  run stored cells again, and compare
    python -m bench.claims --quick                           every kind of cell, tiny, elsewhere
    python -m bench.claims report                            write bench/CLAIMS.md's results

The protocol is in bench/CLAIMS.md, the cells are in bench/results/claims. A run that is stopped
goes on with the first cell that is missing. Needs the wheels of `make demo`.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.claims import coba, gradex, irdro, losses, own, report, smollm2
from bench.claims.cells import Cell, Store, commit, execute, ordered, rerun

KINDS = {
    "losses": losses, "coba": coba, "gradex": gradex, "own": own, "irdro": irdro,
    "smollm2": smollm2,
}  # fmt: skip


def every(quick: bool = False) -> list[Cell]:
    """All cells, in the order of the protocol."""
    return ordered(cell for kind in KINDS.values() for cell in kind.cells(quick))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m bench.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    found.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    found.add_argument("--minutes", type=float, default=math.inf, help="start no cell after these")
    found.add_argument("--rerun", nargs="+", metavar="CELL", default=[])
    found.add_argument("--quick", action="store_true", help="tiny cells in a folder of their own")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    chosen = parser().parse_args(argv)
    if chosen.what == "report":
        report.write(Store(), every())
        return 0
    # the same numbers whatever the machine's cores
    torch.set_num_threads(1)
    if chosen.rerun:
        return repeated(chosen.rerun, Store())
    cells = [cell for cell in every(chosen.quick) if cell.kind in chosen.only]
    folder = Path(tempfile.mkdtemp(prefix="claims-")) if chosen.quick else None
    store = Store(folder) if folder else Store()
    for _ in execute(cells, store, chosen.minutes, say):
        pass
    if folder:
        say(f"the quick cells, which are no result, lie in {folder}")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def repeated(names: Sequence[str], store: Store) -> int:
    """0 if every cell gives the stored numbers again."""
    cells = {cell.name: cell for cell in every()}
    wrong = 0
    for name in names:
        if name not in cells or name not in store:
            what = "has no numbers yet" if name in cells else "is no cell"
            say(f"--rerun {name}: it {what}; it takes one of bench/results/claims")
            return 2
        lines = rerun(cells[name], store)
        by = store.whole(name)["machine"]["commit"]
        if lines and by != commit():
            say(f"{name} is of commit {by}, this is {commit()}: the last digits may differ")
        say(f"{name}: {'the same numbers' if not lines else f'{len(lines)} numbers differ'}")
        for line in lines[:10]:
            say(f"  {line}")
        wrong += bool(lines)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
