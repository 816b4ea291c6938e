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

# On a simulated GPU (`bench/simulated.py`), on hidden states with `compact=False`, forward and
# backward. Launches, torch's operations and our kernels alike: of one more chunk, of all else.
LAUNCHES_PER_CHUNK = {"cross_entropy": 34, "focal_loss": 54, "dice_loss": 22, "lovasz_softmax": 20}
LAUNCHES_ELSE = {"cross_entropy": 40, "focal_loss": 40, "dice_loss": 150, "lovasz_softmax": 220}
# Times that the host waits, whatever the number of chunks; one more with `compact=True`.
WAITS = {"cross_entropy": 0, "focal_loss": 0, "dice_loss": 3, "lovasz_softmax": 7}
# Bytes a logit that passes over them may move, all kernels together, and bytes of other passes over
# all numbers of the gradients: one chunk, cross-entropy, bfloat16.
LOGIT_PASSES = 6.0
# what `explain` says of the peak, from the allocator's
EXPLAINED = 0.05
