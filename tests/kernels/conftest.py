"""Every test in this folder runs Triton's interpreter, with an eye on the memory it touches."""

import warnings

import numpy as np
import pytest
from kernel_helpers import Memory, watch

from segloss.kernels.common import interpreting

if not interpreting():
    raise pytest.UsageError(
        "tests/kernels needs TRITON_INTERPRET=1 in the environment (make test-kernels); the other "
        "tests need it unset (make test-package)"
    )


@pytest.fixture(autouse=True)
def quiet_arithmetic():
    """NumPy warns of what floating point does silently on a GPU: inf - inf, exp2 of too much."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def memory(monkeypatch) -> Memory:
    """A launch that touches anything but its own tensors fails."""
    memory = Memory()
    watch(memory, monkeypatch)
    return memory
