"""Parts of `bench.gpu` that crash, hang and fail, each after a measurement that has to survive."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from bench.gpu_parts import Bench


def run(name: str, output: str, tiny: bool, seconds: float) -> None:
    bench = Bench(name, Path(output), tiny, time.monotonic() + seconds)
    bench.record("before", ms=1.0)
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hang":
        time.sleep(600)
    if name == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    bench.record("after", ms=2.0)
