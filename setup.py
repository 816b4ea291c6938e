"""What pyproject.toml cannot say: no wheel, sdist or editable install without the kernels."""

from pathlib import Path

from setuptools import setup

if not Path(__file__).with_name("segloss").joinpath("kernels", "common.py").is_file():
    raise SystemExit(
        "segloss/kernels is not the folder kernels/ but what is left of a symbolic link to it, as "
        "unpacking a zip in Python or git on Windows leaves it; put a copy of kernels/ in its place"
    )

setup()
