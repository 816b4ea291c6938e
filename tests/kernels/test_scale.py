"""Gradients times the last factor: multiplied in float32, rounded once, left alone by 1."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import assert_close, on

from segloss.kernels.scale import scaled

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# of the values, of the result
DTYPES = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (FP64, FP64), (FP32, BF16), (FP32, FP16)]
backends = pytest.mark.parametrize("backend", ["triton", "torch"])


def numbers(n, dtype):
    return torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)


@backends
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x)[6:] for x in d))
@pytest.mark.parametrize("n", [0, 1, 8192 + 3])  # none, one, one block and a ragged one
def test_values_times_a_number(n, dtypes, backend):
    values, factor = (
        numbers(n, dtypes[0]),
        torch.tensor(1 / 3, dtype=FP64).to(FP64 if dtypes[0] == FP64 else FP32),
    )
    wide = FP64 if dtypes[0] == FP64 else FP32
    truth = (values.to(wide) * factor).to(dtypes[1])
    out = torch.full((n,), torch.nan, dtype=dtypes[1])
    done = on(backend, scaled, values, factor, out)
    assert done is out
    assert_close(out, truth)  # the interpreter cuts bfloat16 off
    if dtypes[0] == dtypes[1]:
        assert on(backend, scaled, values, factor, values) is values
        assert_close(values, truth)


@backends
def test_a_cast_alone(backend):
    values = numbers(100, FP32)
    out = torch.full((100,), torch.nan, dtype=BF16)
    assert_close(on(backend, scaled, values, torch.ones(()), out), values.to(BF16))


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_nothing_is_touched_where_the_factor_is_1(dtype, memory):
    values = numbers(100, dtype)
    memory.forbid(values)
    scaled(values, torch.ones(()), values)
    assert memory.launches == 1
