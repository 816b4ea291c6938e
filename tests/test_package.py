"""What an installed segloss is: where it is found, what it imports, what importing it does.

Each check of an import runs in a process of its own, from a folder of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import segloss

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, cwd: Path = ROOT, path: tuple[Path, ...] = ()) -> str:
    """Standard output of a Python process that runs `code` with `path` on its module path."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light_and_only_defines():
    assert not python("""
import os, random, sys, threading
import numpy, torch
from torch.utils._python_dispatch import TorchDispatchMode

class NoTensors(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} runs at import")

def settings():
    return (
        dict(os.environ), list(sys.path), torch.get_default_dtype(), torch.get_num_threads(),
        torch.is_grad_enabled(), threading.active_count(), random.getstate(),
        str(numpy.random.get_state()), torch.get_rng_state().tolist(),
    )

before = settings()
with NoTensors():
    import segloss
assert settings() == before
assert not torch.cuda.is_initialized()
heavy = {"transformers", "matplotlib", "accelerate", "gguf", "safetensors", "torch._dynamo"}
heavy &= set(sys.modules)
assert not heavy, heavy
""")


def test_works_where_triton_is_missing():
    assert not python("""
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ImportError(f"no module named {name!r}")

sys.meta_path.insert(0, NoTriton())
import torch, segloss
logits = torch.randn(5, 7, requires_grad=True)
target = torch.tensor([0, 3, -100, 6, 3])
loss = segloss.cross_entropy(logits, target)
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))
(segloss.lovasz_softmax(logits, target) + loss).backward()
assert logits.grad.isfinite().all()
assert "triton" not in sys.modules
""")


def test_kernels_are_the_folder_of_the_repository(tmp_path):
    code = """
import segloss.kernels.row_stats as module
print(module.__file__)
"""
    for cwd in (ROOT, tmp_path):
        assert Path(python(code, cwd)).resolve() == (ROOT / "kernels" / "row_stats.py")


OTHER_KERNELS = """
from unittest.mock import MagicMock

OTHER = True

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
"""


@pytest.fixture(scope="module")
def other_kernels(tmp_path_factory) -> Path:
    """A folder with a stand-in for Hugging Face's `kernels`, of a version transformers imports."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION as version

    site = tmp_path_factory.mktemp("site")
    package, metadata = site / "kernels", site / f"kernels-{version}.dist-info"
    for folder in (package, metadata):
        folder.mkdir()
    (package / "__init__.py").write_text(OTHER_KERNELS)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    )
    return site


@pytest.mark.parametrize("order", ["segloss, transformers", "transformers, segloss"])
@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_lives_beside_another_package_named_kernels(place, order, other_kernels, tmp_path):
    """`python -c` in the repository's root finds the folder `kernels/` before any other."""
    code = f"""
import warnings
warnings.simplefilter("default")  # transformers itself warns
import {order}
import kernels, segloss.kernels.row_stats
from transformers import LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available
assert is_kernels_available() and kernels.OTHER
"""
    assert not python(code, ROOT if place == "root" else tmp_path, (other_kernels,))


BUILD = "from setuptools import build_meta as b; print(b.build_{}({!r}))"


def copy_of_sources(folder: Path) -> Path:
    """What is built from, since a build leaves its folders in the source tree."""
    folder.mkdir()
    for name in ("segloss", "kernels"):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_wheel_and_sdist_hold_the_kernels(tmp_path):
    source = copy_of_sources(tmp_path / "source")
    wheel, sdist = (
        tmp_path / python(BUILD.format(kind, str(tmp_path)), source).splitlines()[-1]
        for kind in ("wheel", "sdist")
    )
    # the name that is free on PyPI, and the version of the one place that says it
    assert wheel.name.startswith(f"segloss_torch-{segloss.__version__}-")
    expected = {f"segloss/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    expected |= {"segloss/__init__.py", "segloss/py.typed"}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    assert expected <= in_wheel
    assert {name.partition("/")[0] for name in in_wheel if ".dist-info/" not in name} == {"segloss"}
    with tarfile.open(sdist) as archive:
        in_sdist = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert expected | {"pyproject.toml", "setup.py", "LICENSE"} <= set(in_sdist)
    # files, not a link to a folder that the archive does not hold
    assert all(in_sdist[name].isfile() for name in expected)


@pytest.mark.parametrize("left", ["a text file", "nothing"])
def test_a_tree_that_lost_its_link_is_not_built(left, tmp_path):
    """Python's zipfile and git on Windows leave a file with the link's text; others leave nothing.

    The way out that the error names works.
    """
    source = copy_of_sources(tmp_path / "source")
    (source / "segloss/kernels").unlink()
    if left == "a text file":
        (source / "segloss/kernels").write_text("../kernels")
    for kind in ("wheel", "sdist", "editable"):
        code = BUILD.format(kind, str(tmp_path))
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=source, capture_output=True, text=True
        )
        assert done.returncode == 1
        [said] = done.stderr.splitlines()  # one sentence, no traceback
        assert said.endswith("; put a copy of kernels/ in its place")
    assert not list(tmp_path.glob("*.whl")) + list(tmp_path.glob("*.tar.gz"))

    (source / "segloss/kernels").unlink(missing_ok=True)
    shutil.copytree(source / "kernels", source / "segloss/kernels")
    name = python(BUILD.format("wheel", str(tmp_path)), source).splitlines()[-1]
    in_wheel = zipfile.ZipFile(tmp_path / name).namelist()
    assert "segloss/kernels/common.py" in in_wheel and "kernels/common.py" not in in_wheel
