"""What a compiled kernel may cost: the thresholds that `make kernels` and the tests hold it to."""

# bytes of stack per thread on NVIDIA, registers on AMD; in every kernel, dtype and target
SPILLS = 0

# By launch (`bench/launches.py`), per bf16 logit on sm_90: bytes moved, and instructions of the
# loop over whole tiles. The cross-entropy's forward pass is the former, its backward the latter.
# For scale: Liger's cross-entropy takes 9.3 and 14.8 instructions; memory is the limit up to about
# 15 and 30 on an H100.
SM_90_BF16 = {
    "row_stats": {"bytes": 2.0, "instructions": 8.5},
    "logit_grad": {"bytes": 4.0, "instructions": 8.0},
    # per logit of the student: the teacher's is read beside it
    "divergence-forward": {"bytes": 4.0, "instructions": 22.0},
    "divergence_grad-forward": {"bytes": 6.0, "instructions": 13.5},
}

# Fused cross-entropy over the three bare matrix products, on a GPU (`make gpu`). Passes of 6 bytes
# a logit cannot take less than 1 + (FLOP/s / bytes/s) / D of them: by hidden size, so much over it.
GPU_OVER_PRODUCTS = 1.1
GPU_OVER_FLOOR = 1.04
