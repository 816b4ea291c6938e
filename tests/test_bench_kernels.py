"""The counts of `make kernels` are right: loops, occupancy, estimates, and what a table says."""

from __future__ import annotations

import json

import pytest

from bench import kernels
from bench.compiled import AMD, NVIDIA, _loops
from bench.hardware import GPUS
from bench.limits import SM_90_BF16

SASS = """
.L_x_0:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64+0x10] ;
.L_x_1:
        /*0020*/                   MUFU.EX2 R4, R4 ;
        /*0030*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/               @P0 BRA `(.L_x_2) ;
        /*0060*/                   LDG.E R4, desc[UR4][R2.64] ;
.L_x_3:
        /*0070*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0080*/               @P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4) ;
"""
ASSEMBLY = """
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\t.loc\t1 127 9
\tglobal_load_dwordx4 v[8:11], v6, s[20:21]
\tbuffer_load_ushort v5, v6, s[20:23], 0 offen
\tv_exp_f32_e32 v5, v5
\tglobal_store_short v6, v5, s[2:3]
\ts_cbranch_scc0 .LBB0_1
\ts_endpgm
"""


def test_loops_are_read_off_both_vendors_code():
    """Forward jumps, the padding at the end and what lies outside are no loops."""
    first, second = _loops(SASS.splitlines(), NVIDIA)
    assert (first.instructions, first.special, first.bytes_read, first.bytes_written) == (
        3,
        1,
        0,
        8,
    )
    assert (second.instructions, second.bytes_read) == (2, 8)
    (loop,) = _loops(ASSEMBLY.splitlines(), AMD)
    assert (loop.instructions, loop.special, loop.bytes_read, loop.bytes_written) == (5, 1, 18, 2)


# of NVIDIA's occupancy calculator: registers, shared memory, warps of a block -> share of 64 warps
OCCUPANCY = [
    ((32, 0, 8), 1.0),
    ((40, 0, 8), 0.75),
    ((255, 0, 8), 0.125),
    ((32, 100 << 10, 8), 0.25),
]


@pytest.mark.parametrize("block, expected", OCCUPANCY)
def test_occupancy(block, expected):
    assert GPUS["sm_90"].occupancy(*block, warp_size=32) == expected


def test_an_estimate_is_the_largest_of_its_bounds():
    gpu = GPUS["sm_90"]
    assert gpu.estimate(2, 8, 1) == (2 / gpu.bandwidth, "memory")
    assert gpu.estimate(2, 100, 1)[1] == "issue"
    assert gpu.estimate(2, 8, 8)[1] == "special functions"


def row(launch="row_stats", **values):
    """A row of ours as `compile_ours` makes it, within every limit unless told otherwise."""
    return {
        "whose": "segloss", "launch": launch, "kernel": f"{launch}_kernel", "target": "sm_90",
        "dtype": "bfloat16", "columns": kernels.ALIGNED, "transform": {}, "constants": {},
        "registers": 32, "shared_memory": 0, "spills": 0, "warps": 8, "special": 1.0,
        "loops": [{"instructions_per_element": 8.0}], "instructions": 8.0,
    } | values  # fmt: skip


TRAFFIC = {
    launch: {f"{launch}_kernel": {"read": limits["bytes"], "written": 0.0}}
    for launch, limits in SM_90_BF16.items()
}
FAULTS = {
    "none": ({}, {}, 0),
    "instructions": ({"instructions": 8.6}, {}, 1),
    "spill": ({"spills": 8}, {}, 1),
    "bytes": ({}, {"read": 4.0, "written": 0.0}, 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_misses_nothing(fault, tmp_path, monkeypatch, capsys):
    values, moved, status = FAULTS[fault]
    rows = [row(**values), *(row(launch) for launch in SM_90_BF16 if launch != "row_stats")]
    peer = {"whose": "CCE", "launch": "CCE forward", "target": "sm_90", "dtype": "bfloat16"}
    rows.append(peer | {"error": "ImportError: No module named 'cut_cross_entropy'"})
    traffic = json.loads(json.dumps(TRAFFIC))
    traffic["row_stats"]["row_stats_kernel"] |= moved
    monkeypatch.setattr(kernels, "collect", lambda workers: (rows, traffic))
    output = tmp_path / "kernels.json"
    assert kernels.main(["--output", str(output)]) == status
    content = json.loads(output.read_text())
    assert [line["verdict"] for line in content["lines"]].count("MISS") == status
    assert content["kind"] == "kernels" and content["machine"]["date"]
    text = output.with_suffix(".md").read_text()
    assert "Estimates, not measurements" in text and "No module named" in text
    assert text in capsys.readouterr().out


def test_a_limit_that_cannot_be_judged_is_no_pass():
    with pytest.raises(RuntimeError, match=f"1 of {1 + 2 * len(SM_90_BF16)} limits"):
        kernels.gate([row("other")])
