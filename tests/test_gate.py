"""`make test` fails when a test is skipped: a package that is missing must not pass the gate."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIPS = {
    "module": 'import pytest\npytest.importorskip("absent")\n',
    "test": 'import pytest\ndef test_it():\n    pytest.importorskip("absent")\n',
}


@pytest.mark.parametrize("setting", ["1", ""])
def test_a_skip_is_a_failure_where_all_is_installed(setting, tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_passes.py").write_text("def test_it():\n    pass\n")
    for name, text in SKIPS.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"SEGLOSS_NO_SKIPS": setting},
        capture_output=True,
        text=True,
    )
    assert done.returncode == bool(setting), done.stdout
    for name in SKIPS:
        said = f"skipped, but must run: test_{name}.py" in done.stdout
        assert said == bool(setting), done.stdout


def test_make_sets_it():
    command = ["make", "--dry-run", "--old-file=.venv/.ready", "test"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in printed.splitlines() if "pytest" in line]
    assert len(lines) == 2 and all(line.startswith("SEGLOSS_NO_SKIPS=1 ") for line in lines)
