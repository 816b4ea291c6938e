"""Checks the layers that `pyproject.toml` names: imports run downwards only, and in no circle.

    python tests/layers.py      # or: make lint

Import-linter follows neither links nor folders without `__init__.py`, so it looks at a copy in
which `segloss/kernels` is a folder of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def check(root: Path) -> subprocess.CompletedProcess:
    """Import-linter's verdict on the checkout at `root`."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        ignored = shutil.ignore_patterns("__pycache__")
        for package in ("segloss", "bench"):
            shutil.copytree(root / package, copy / package, ignore=ignored)  # links are followed
        (copy / "segloss" / "kernels" / "__init__.py").touch()
        shutil.copy(root / "pyproject.toml", copy)
        return subprocess.run(
            [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )


if __name__ == "__main__":
    verdict = check(ROOT)
    print(verdict.stdout, verdict.stderr, sep="")
    sys.exit(verdict.returncode)
