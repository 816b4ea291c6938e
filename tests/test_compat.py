"""`make compat`: what is declared is what is tried, and the table says what came of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import compat
import pytest

ROOT = Path(__file__).resolve().parents[1]
DECLARED = re.findall(
    r'"(torch|triton|transformers|trl|axolotl)>=([\d.]+)',
    (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
)
TITLES = {"torch": "PyTorch", "triton": "Triton", "trl": "TRL", "axolotl": "Axolotl"}


@pytest.mark.parametrize("name, least", DECLARED)
def test_the_declared_and_the_newest_release_are_tried_and_said(name, least):
    asked = [row.asked for row in compat.ROWS]
    assert f"{name}=={least}.0" in asked and name in asked
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert list(compat.table_of(text)) == asked
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"{TITLES.get(name, name)} {least}" in readme


def test_a_table_keeps_the_rows_that_were_not_run():
    empty = f"above\n{compat.BEGIN}\n{compat.END}\nbelow\n"
    first = ("torch", "torch 9.0", "losses", "2 passed", "2026-01-01")
    one = compat.with_table(empty, {"torch": first})
    assert one.startswith("above\n") and one.endswith("\nbelow\n")
    assert compat.table_of(one)["torch"] == ("`torch`", *first[1:])
    assert compat.table_of(one)["trl"] == ("`trl`", "-", "-", "not run", "-")
    second = ("trl", "trl 1 | 2", "-", "not run: no network", "2026-01-02")
    two = compat.table_of(compat.with_table(one, {"trl": second}))
    assert two["torch"] == ("`torch`", *first[1:]) and two["trl"][1] == "trl 1 / 2"
    with pytest.raises(SystemExit, match="has no <!-- compat: begin -->"):
        compat.with_table("no markers", {})


def test_what_came_of_the_tests_is_counted(tmp_path, monkeypatch):
    """Those of the kernels run interpreted, all others do not."""
    code = """
import os, pytest
def test_interpreted(): assert os.environ.get("TRITON_INTERPRET") == "1"
def test_not_interpreted(): assert "TRITON_INTERPRET" not in os.environ
def test_skipped(): pytest.skip("why")
"""
    files = [str(tmp_path / name) for name in ("test_kernels.py", "test_others.py")]
    for file in files:
        Path(file).write_text(code)
    monkeypatch.setattr(compat, "KERNELS", (files[0],))
    python = Path(sys.executable)
    assert compat.test(python, files[:1]) == "1 passed, 1 failed, 1 skipped (test_not_interpreted)"
    assert compat.test(python, files[1:]) == "1 passed, 1 failed, 1 skipped (test_interpreted)"
    assert compat.test(python, files).startswith("2 passed, 2 failed, 2 skipped (")


def test_a_release_that_cannot_be_installed_is_named(monkeypatch):
    monkeypatch.setattr(compat, "install", lambda row, folder: compat.run(
        sys.executable, "-c", "import sys; sys.exit('ERROR: no such release')"
    ))  # fmt: skip
    cells = compat.try_row(compat.ROWS[0])
    assert cells[:4] == ("torch==2.8.0", "-", cells[2], "not run: ERROR: no such release")
