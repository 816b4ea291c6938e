"""`bench/RESULTS.md` and its plots, from JSON files: `python -m bench.report FILE ...`.

Nothing is measured here. What no file holds is named as not measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.report.drawing import draw
from bench.report.reading import read
from bench.report.writing import results

__all__ = ["main", "read"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON files of measurements")
    parser.add_argument("--output", default="bench/RESULTS.md", help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    tables, others = read(chosen.files)
    output = Path(chosen.output)
    plots = draw(tables, output.parent / "plots")
    output.write_text(results(tables, others, plots))
    print(f"{output}, and {len(plots)} plots in {output.parent / 'plots'}")
    return 0
