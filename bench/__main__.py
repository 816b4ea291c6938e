"""`python -m bench [--quick]`: every measurement of this machine, then tables and plots.

Each part is a process of its own: what one of them does to memory does not reach the next, and one
that fails leaves the others' results.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from bench import report

PARTS = ("core", "segmentation", "head", "growth", "candidates")
RECORDED = Path("bench/results")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    when = time.strftime("%Y%m%d-%H%M%S")
    parser.add_argument(
        "--output", default=f"runs/bench-{when}", metavar="FOLDER", help="default: %(default)s"
    )
    chosen = parser.parse_args()
    folder, codes = Path(chosen.output), {}
    start = time.monotonic()
    for part in chosen.parts:
        command = [sys.executable, "-m", f"bench.{part}", "--output", str(folder / f"{part}.json")]
        codes[part] = subprocess.run(command + ["--quick"] * chosen.quick).returncode
        minutes = (time.monotonic() - start) / 60
        print(f"\n{part} ended with {codes[part]} after {minutes:.1f} minutes\n", flush=True)
    written = sorted(map(str, folder.glob("*.json")))
    # of other machines or other days; they say so themselves
    measured = {Path(path).name for path in written}
    recorded = [str(p) for p in sorted(RECORDED.glob("*.json")) if p.name not in measured]
    if written:
        report.main([*written, *recorded, "--output", str(folder / "RESULTS.md")])
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main())
