"""`make compat`: does the oldest release that is declared work, and the newest there is?

    python tests/compat.py                          # every row of the table
    python tests/compat.py torch==2.8.0 trl         # these; a bare name is the newest release

Each row is a venv with its releases, and what pip finds they need, before all that the environment
this runs in (`.venv`) has; in it run the tests that concern them. The table between the markers in
CONTRIBUTING.md is written after every row and keeps those that were not run.

Nothing here needs a GPU: pip's wheels of torch for one import and run on a CPU, at 8 GB of disk
until the row is done.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- compat: begin -->", "<!-- compat: end -->"
HEADER = ("asked for", "tried with", "tests", "result", "date")

CORE = (
    "tests/losses",
    "tests/linear/test_values.py",
    "tests/linear/test_precision.py",
    "tests/weighting",
    "tests/test_contract.py",
    "tests/test_torch_compile.py",
)
KERNELS = ("tests/kernels",)  # interpreted, hence in a process of their own
TRANSFORMERS = tuple(
    f"tests/integrations/test_{part}.py"
    for part in ("head", "transformers", "trainer", "labels", "fuse")
)
TRL = ("tests/integrations/test_trl.py",)
PREFERENCES = ("tests/integrations/test_preferences.py",)  # they ask for TRL 1.16
AXOLOTL = ("tests/integrations/test_axolotl.py",)
TORCHAO = ("tests/integrations/test_torchao.py",)
BITSANDBYTES = ("tests/integrations/test_bitsandbytes.py",)


@dataclass(frozen=True)
class Row:
    asked: str  # a requirement; a bare name is the newest release
    tests: tuple[str, ...]
    beside: tuple[str, ...] = ()  # what pip may have to change as well
    deps: bool = True  # False where the metadata pin what the tests do not need

    @property
    def name(self) -> str:
        return self.asked.partition("=")[0]


# what takes part in transformers' choice of releases
HUB = ("accelerate", "datasets", "peft")
ROWS = (
    # the first with torch.mm(out_dtype=)
    Row("torch==2.8.0", CORE),
    Row("torch", CORE),
    # what torch 2.8 comes with; its interpreter, which users do not run, fails with a later NumPy
    Row("triton==3.4.0", KERNELS, ("numpy<2.4",)),
    Row("triton", KERNELS),
    Row("transformers==4.57.0", TRANSFORMERS, HUB),
    Row("transformers==5.5.0", TRANSFORMERS, HUB),
    Row("transformers==5.17.0", TRANSFORMERS, HUB),
    Row("transformers==5.24.0", TRANSFORMERS, HUB),  # what `segloss train` asks for
    Row("transformers", TRANSFORMERS, HUB),
    Row("trl==1.10.0", TRL),
    Row("trl==1.15.0", TRL),  # the first with adapters on the head, and `dft`
    Row("trl==1.16.0", (*TRL, *PREFERENCES)),  # what `segloss train` asks for
    Row("trl", (*TRL, *PREFERENCES)),
    Row("axolotl==0.18.0", AXOLOTL, deps=False),
    Row("axolotl", AXOLOTL, deps=False),
    Row("torchao", TORCHAO, deps=False),
    Row("bitsandbytes", BITSANDBYTES, deps=False),
)


# ------------------------------------------------------------------------------------- one row


def install(row: Row, folder: Path) -> Path:
    """The Python of a venv with the row's releases before those of this environment."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = folder / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    Path(purelib, "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    newest = ["--upgrade"] if row.asked == row.name else []
    options = [*newest, *([] if row.deps else ["--no-deps"])]
    run(python, "-m", "pip", "install", "--quiet", *options, row.asked, *row.beside)
    return python


def run(*command: object) -> str:
    """Standard output; a failure says why in its last line."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError((lines or done.stderr.splitlines() or ["no reason given"])[0])
    return done.stdout.strip()


def versions(python: Path, names: Sequence[str]) -> str:
    code = "import sys; from importlib.metadata import version as v; "
    code += "print(', '.join(f'{name} {v(name)}' for name in sys.argv[1:]))"
    return run(python, "-c", code, *dict.fromkeys(names))


def test(python: Path, tests: Sequence[str]) -> str:
    """What came of the tests, in a few words."""
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for process in (KERNELS, tuple(path for path in tests if path not in KERNELS)):
        if set(process) & set(tests):
            for name, outcome in pytest(python, process):
                outcomes[outcome].append(name)
    counts = [f"{len(names)} {outcome}" for outcome, names in outcomes.items() if names]
    failed = outcomes["failed"]
    which = f" ({', '.join(failed[:3])}{' ...' if len(failed) > 3 else ''})" if failed else ""
    return (", ".join(counts) or "no test was found") + which


def pytest(python: Path, tests: Sequence[str]) -> list[tuple[str, str]]:
    """(name, outcome) of every test, of those in `KERNELS` interpreted."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    if tests == KERNELS:
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        # other releases warn of other things: not what is asked here
        options = ["-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
        options += ["-m", "not gpu and not deepspeed and not models"]  # those of `quantised` too
        command = [str(python), "-m", "pytest", *options, f"--junitxml={file}", *tests]
        subprocess.run(command, cwd=ROOT, env=environment)
        cases = ET.parse(file).iter("testcase")
        return [(case.get("name", "?"), outcome(case)) for case in cases]


def outcome(case: ET.Element) -> str:
    tags = {child.tag for child in case}
    if tags & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in tags else "passed"


def try_row(row: Row) -> tuple[str, ...]:
    """The row's cells."""
    folder = Path(tempfile.mkdtemp(prefix="compat-"))
    shown, result = "-", "-"
    try:
        python = install(row, folder)
        shown = versions(python, [row.name, "torch", "triton"])
        result = test(python, row.tests)
    except (RuntimeError, OSError, ET.ParseError) as error:
        result = f"not run: {error}"
    finally:
        shutil.rmtree(folder)
    where = ", ".join(Path(path).stem.removeprefix("test_") for path in row.tests)
    return row.asked, shown, where, result, time.strftime("%Y-%m-%d")


# ----------------------------------------------------------------------------------- the table


def table_of(text: str) -> dict[str, tuple[str, ...]]:
    """The rows between the markers, by what they asked for."""
    lines = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    return {row[0].strip("`"): row for row in cells}


def with_table(text: str, found: dict[str, tuple[str, ...]]) -> str:
    """The text with a row for each of `ROWS`: found now, kept, or not run."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{TABLE.name} has no {BEGIN} and {END}; the table goes between them")
    known = table_of(text) | found
    missing = ("-", "-", "not run", "-")
    rows = [known.get(row.asked, (row.asked, *missing)) for row in ROWS]
    lines = [HEADER, ("---",) * len(HEADER), *((f"`{r[0].strip('`')}`", *r[1:]) for r in rows)]
    table = "\n".join("| " + " | ".join(c.replace("|", "/") for c in line) + " |" for line in lines)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/compat.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    asked = [row.asked for row in ROWS]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(asked)}")
    chosen = parser.parse_args(arguments).rows or asked
    if unknown := [name for name in chosen if name not in asked]:
        parser.error(f"no row {unknown[0]}; there are {', '.join(asked)}")
    found: dict[str, tuple[str, ...]] = {}
    for row in ROWS:
        if row.asked in chosen:
            print(f"== {row.asked}", flush=True)
            found[row.asked] = try_row(row)
            TABLE.write_text(with_table(TABLE.read_text(), found))
    for cells in found.values():
        print(" | ".join(cells))
    return any("failed" in cells[3] or "not run" in cells[3] for cells in found.values())


if __name__ == "__main__":
    sys.exit(main())
