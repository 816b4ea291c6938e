"""Products of dlogits, and where their sums over chunks of rows lie.

R rows, C classes, D hidden size.
"""

import pytest
import torch
from helpers import relative_error
from linear_helpers import problem, source, value_and_grads

import segloss
from segloss.kernels.products import CONTRACT_COLUMNS, GradBlock, contract_rows

BF16, FP32 = torch.bfloat16, torch.float32
# with and without a second block of columns
COLUMNS = (300, 2 * CONTRACT_COLUMNS + 77)
# dtype of dlogits, of what is added, of the sum
SUMS = [
    (BF16, BF16, BF16), (BF16, BF16, FP32), (BF16, FP32, FP32), (BF16, FP32, BF16),
    (torch.float16, FP32, FP32), (FP32, FP32, FP32), (torch.float64,) * 3,
]  # fmt: skip
ROUNDING = {BF16: 2.0**-8, torch.float16: 2.0**-11, FP32: 2.0**-21, torch.float64: 1e-14}


def factors(columns, dtype):
    draw = torch.Generator().manual_seed(columns)
    return [torch.randn(64, n, generator=draw).to(dtype) for n in (columns, 24)]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtypes", SUMS, ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_a_product_is_added_to_a_sum_in_any_memory(dtypes, columns):
    dlogits, hidden = factors(columns, dtypes[0])
    plus = torch.randn(columns, 24).to(dtypes[1])
    truth = 0.5 * (dlogits.double().T @ hidden.double()) + plus.double()
    places = [torch.full((columns, 24), torch.nan, dtype=dtypes[2])]
    if dtypes[1] == dtypes[2]:
        places.append(plus)  # last: it is spent
    for out in places:
        done = contract_rows(dlogits, hidden, 0.5, plus, out)
        assert done.data_ptr() == out.data_ptr() and done.dtype == dtypes[2]
        # the product and the sum are each rounded once
        assert relative_error(done, truth) <= ROUNDING[dtypes[0]]


@pytest.mark.parametrize("columns", COLUMNS)
def test_a_factored_block_is_added_like_a_plain_one(columns):
    values, hidden = factors(columns, BF16)
    row_scale, target_grad = torch.rand(64, 1), torch.randn(64)
    target = torch.arange(64) % 7
    values[torch.arange(64), target] = 0
    dlogits = values.double() * row_scale.double()
    dlogits[torch.arange(64), target] = target_grad.double()
    plus = torch.randn(columns, 24)
    truth = dlogits.T @ hidden.double() + plus.double()
    block = GradBlock(values, row_scale, target, target_grad)
    assert relative_error(block.contract(hidden, 1.0, plus, plus), truth) <= 2.0**-8


@pytest.mark.parametrize("weight_dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
def test_dweight_of_any_number_of_chunks(chunks, weight_dtype):
    # float32 masters under autocast, or a bfloat16 head
    n, v = 160, 1100
    tensors, target = problem(n, v=v, d=16, dtype=weight_dtype, names=("hidden", "weight"))
    rows = -(-int((target >= 0).sum()) // chunks)

    def run(tensors, **of_source):
        with torch.autocast("cpu", BF16, enabled=weight_dtype == FP32 and bool(of_source)):
            return value_and_grads(
                segloss.cross_entropy, lambda t: source(t, **of_source),
                tensors, target, ("hidden", "weight"),
            )  # fmt: skip

    value, grads = run(tensors, chunk_bytes=rows * v * 2)
    true_value, true = run({name: t.double() for name, t in tensors.items()})
    assert relative_error(value, true_value) <= 2.0**-8
    assert grads["weight"].dtype == weight_dtype
    # bfloat16 logits and a bfloat16 product per chunk, whatever the number of chunks
    assert relative_error(grads["weight"], true["weight"]) <= 2 * 2.0**-8
