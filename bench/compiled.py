"""Compile Triton kernels for GPUs that are not there, and read what the machine code costs."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class AbsentDevice:
    """Triton's driver of a GPU that is not there: it names a target and runs nothing."""

    name: str

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> None:
        return None


@contextmanager
def compiling_for(target: str) -> Iterator[dict[JITFunction, list[CompiledKernel]]]:
    """Inside, a kernel launch on CPU tensors compiles what it would run on `target`, no more.

    Yields what on leaving holds the compiled kernels by function, in the order of the launches.
    Nothing is written to the launch's outputs.
    """
    compiled: dict[JITFunction, list[CompiledKernel]] = {}
    run, parse, one_at_a_time = JITFunction.run, JITFunction.parse, Lock()
    driver, device = triton.runtime.driver, AbsentDevice(target)

    def compile_only(kernel, *args, grid, warmup, **options):
        version = run(kernel, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(kernel, []).append(version)

    def parse_alone(function):
        with one_at_a_time:  # CPython 3.11 fails when two threads build a syntax tree
            return parse(function)

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        # what users of a GPU get by default today; Triton 3.10 changes its default
        patch.dict(os.environ, TRITON_DEFAULT_FP_FUSION="1"),
        # Triton 3.4 has no private name for it
        patch.object(driver, "_active" if hasattr(driver, "_active") else "active", device),
        patch.object(JITFunction, "run", compile_only),
        patch.object(JITFunction, "parse", parse_alone),
        # which Triton 3.4 has not: it compiles one kernel after the other
        getattr(triton, "AsyncCompileMode", nullcontext)(pool),
    ):
        yield compiled
    for versions in compiled.values():
        versions[:] = [v if isinstance(v, CompiledKernel) else v.kernel for v in versions]


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of the hardware."""

    registers: int  # per thread
    shared_memory: int  # bytes per block
    spills: int  # NVIDIA: bytes of stack per thread; AMD: registers spilled

    @classmethod
    def of(cls, kernel: CompiledKernel) -> Resources:
        assembly = kernel.asm.get("amdgcn")
        if assembly is None:
            usage = _cubin_tool("cuobjdump", "-res-usage", kernel=kernel)
            spills = _field(usage, r"STACK:(\d+)") + _field(usage, r"LOCAL:(\d+)")
            registers = _field(usage, r"REG:(\d+)")
        else:
            spills = _field(assembly, r"\.vgpr_spill_count:\s*(\d+)")
            spills += _field(assembly, r"\.sgpr_spill_count:\s*(\d+)")
            registers = _field(assembly, r"\.vgpr_count:\s*(\d+)")
        return cls(registers, kernel.metadata.shared, spills)


def _field(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in:\n{text[-2000:]}"
    return int(found.group(1))


def _cubin_tool(tool: str, *options: str, kernel: CompiledKernel) -> str:
    """What one of the tools in Triton's wheel prints about a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [getattr(triton.knobs.nvidia, tool).path, *options, cubin.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ------------------------------------------------------------------------------------- loops


@dataclass(frozen=True)
class Loop:
    """An innermost loop of a kernel's machine code: what one thread does in one pass."""

    instructions: int
    special: int  # of them exponentials, reciprocals and the like, which have a slower unit
    bytes_read: int  # from global memory
    bytes_written: int


def loops(kernel: CompiledKernel) -> list[Loop]:
    assembly = kernel.asm.get("amdgcn")
    if assembly is None:
        return _loops(_cubin_tool("nvdisasm", "-c", kernel=kernel).splitlines(), NVIDIA)
    return _loops(assembly.splitlines(), AMD)


@dataclass(frozen=True)
class Syntax:
    """How to read one vendor's assembly."""

    label: str
    instruction: str
    jump: str  # group 1 the label
    special: str
    read: str
    write: str
    widths: dict[str, int]  # bytes by part of the mnemonic; 4 without any


NVIDIA = Syntax(
    label=r"\s*(\.L_x_\d+):",
    instruction=r"\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?(.*?)\s*;",
    jump=r"BRA.*`\((\.L_x_\d+)\)",
    special=r"MUFU",
    read=r"LDG",
    write=r"STG",
    widths={"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16},
)
AMD = Syntax(
    label=r"(\.LBB\d+_\d+):",
    instruction=r"\t([a-z]\w+(?:\s.*)?)$",
    jump=r"s_c?branch\w*\s+(\.LBB\d+_\d+)",
    special=r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    read=r"(global|buffer|flat)_load",
    write=r"(global|buffer|flat)_store",
    widths={"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2}
    | {"dwordx2": 8, "dwordx3": 12, "dwordx4": 16},
)


def _loops(lines: list[str], syntax: Syntax) -> list[Loop]:
    code, first_of, spans = [], {}, []
    for line in lines:
        if label := re.match(syntax.label, line):
            first_of[label.group(1)] = len(code)
        elif instruction := re.match(syntax.instruction, line):
            code.append(instruction.group(1))
            jump = re.match(syntax.jump, code[-1])
            if jump and jump.group(1) in first_of:  # backwards
                spans.append((first_of[jump.group(1)], len(code)))
    # a jump to itself pads the end of the code
    spans = [(first, last) for first, last in spans if last - first > 1]
    innermost = [
        (first, last)
        for first, last in spans
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
    ]
    return [_loop(code[a:b], syntax) for a, b in innermost]


def _loop(code: list[str], syntax: Syntax) -> Loop:
    def bytes_of(operation: str) -> int:
        names = [re.split(r"[._]", op.split()[0]) for op in code if re.match(operation, op)]
        widths = syntax.widths
        return sum(next((widths[part] for part in name if part in widths), 4) for name in names)

    return Loop(
        len(code),
        sum(re.match(syntax.special, op) is not None for op in code),
        bytes_of(syntax.read),
        bytes_of(syntax.write),
    )


def main_loop(kernel: CompiledKernel) -> Loop | None:
    """The loop over the logits, None if there is none.

    Of a kernel with one for whole tiles and one for the rest of a row, the former: it does as much
    in fewer instructions, and is where time goes.
    """
    reading = [loop for loop in loops(kernel) if loop.bytes_read]
    most = max((loop.bytes_read for loop in reading), default=0)
    longest = [loop for loop in reading if loop.bytes_read == most]
    return min(longest, key=lambda loop: loop.instructions, default=None)


def options(kernel: CompiledKernel) -> dict:
    """The dtype of the logits and the constants that a kernel was compiled with."""
    signature = kernel.src.signature
    names = list(signature)
    constants = kernel.src.constants.items()  # those in tuples have longer places
    constants = {names[place[0]]: value for place, value in constants if len(place) == 1}
    logits = signature["rows"].logits if "rows" in signature else signature.get("logits", "")
    return {"logits": logits} | constants


def threads(kernel: CompiledKernel) -> int:
    return kernel.metadata.num_warps * kernel.metadata.target.warp_size
