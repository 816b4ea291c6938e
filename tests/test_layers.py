"""The order of the layers holds, and its check sees what breaks it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from layers import ROOT, check
from stubs import STUB, stub

from segloss import functional


def test_imports_run_downwards():
    verdict = check(ROOT)
    assert verdict.returncode == 0, verdict.stdout + verdict.stderr


@pytest.mark.parametrize(
    ("place", "line", "found"),
    [
        ("segloss/sweep/classes.py", "from segloss.losses.base import Loss",
         "segloss.sweep is not allowed to import segloss.losses"),
        ("kernels/common.py", "from segloss.checks import describe",
         "segloss.kernels is not allowed to import segloss.checks"),
        ("segloss/head/rows.py", "import segloss.head.sweep", "No cycles are allowed in"),
        ("segloss/losses/token.py", "import bench.common", "not allowed to import bench"),
        ("segloss/strays.py", "", "segloss.strays"),
    ],
    ids=["upwards", "from the kernels", "a circle", "of the bench", "a file in no layer"],
)  # fmt: skip
def test_what_breaks_the_order_is_found(place, line, found, tmp_path):
    for package in ("segloss", "bench", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / place
    text = path.read_text() if path.exists() else ""
    path.write_text(f"{text}\n{line}\n")
    verdict = check(tmp_path)
    assert verdict.returncode != 0
    assert found in " ".join(verdict.stdout.split())


def test_stub_of_the_functions_is_the_one_they_give():
    assert STUB.read_text() == stub(), "run `make stubs`"


def test_type_checkers_and_editors_know_every_function(tmp_path):
    """By mypy, on a user's file: each function and its keywords, and what is wrong."""
    lines = ["import segloss", "import torch", "x = torch.ones(2, 3)", "y = torch.ones(2).long()"]
    for name in functional.__all__:
        given = "x, x, y" if name.startswith("linear_") else "x, y"
        lines.append(f"segloss.{name}({given}, token_weight=None, reduction='sum')")
    lines += ["segloss.FocalLoss(gamma=1.5)", "segloss.cross_entropy(x, y, gama=1)"]
    path = tmp_path / "user.py"
    path.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--no-implicit-reexport", path],
        cwd=Path(ROOT),
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stdout.splitlines() if "error" in line and "user.py" in line]
    assert len(errors) == 1 and 'Unexpected keyword argument "gama"' in errors[0], done.stdout
