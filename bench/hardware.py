"""GPUs by compilation target: what a roofline estimate and the occupancy of a kernel need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peak figures of the vendor's data sheets; multiprocessor is short for AMD's compute unit."""

    name: str
    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes/s
    lanes: int  # instructions of one thread that a multiprocessor issues per cycle
    special: int  # of them exponentials and the like
    warps: int  # that a multiprocessor holds
    blocks: int
    shared_memory: int  # bytes
    shared_per_block: int  # bytes a block takes beside its own
    registers: int  # of 4 bytes
    register_step: int  # a warp's registers come in multiples of this

    def occupancy(self, registers: int, shared_memory: int, warps: int, warp_size: int) -> float:
        """Share of the warps that a multiprocessor could hold, of blocks of `warps` warps."""
        step = self.register_step
        per_warp = -(-registers * warp_size // step) * step
        by_registers = self.registers // max(1, per_warp) // warps
        by_memory = self.shared_memory // max(1, shared_memory + self.shared_per_block)
        blocks = min(self.blocks, self.warps // warps, by_registers, by_memory)
        return blocks * warps / self.warps

    def estimate(self, bytes_: float, instructions: float, special: float) -> tuple[float, str]:
        """Seconds per logit at best, and what bounds them: everything overlaps, nothing waits."""
        per_second = self.multiprocessors * self.clock
        bounds = {
            "memory": bytes_ / self.bandwidth,
            "issue": instructions / (self.lanes * per_second),
            "special functions": special / (self.special * per_second),
        }
        bound = max(bounds, key=bounds.__getitem__)
        return bounds[bound], bound


KIB = 1024
GPUS = {
    "sm_80": Gpu("A100 SXM", 108, 1.41e9, 2.04e12, 128, 16, 64, 32, 164 * KIB, KIB, 65536, 256),
    "sm_90": Gpu("H100 SXM", 132, 1.98e9, 3.35e12, 128, 16, 64, 32, 228 * KIB, KIB, 65536, 256),
    "sm_100": Gpu("B200", 148, 1.965e9, 8.0e12, 128, 16, 64, 32, 228 * KIB, KIB, 65536, 256),
    # four units of 16 lanes; 512 registers for each of 64 lanes in each of them
    "gfx942": Gpu("MI300X", 304, 2.1e9, 5.3e12, 64, 16, 32, 32, 64 * KIB, 0, 4 * 512 * 64, 512),
}  # fmt: skip
