"""The static analysis of GPU code: parser, counts, loops, model and bars. It needs no GPU."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.codegen.compile import read_resources
from benchmarks.codegen.count import (
    Counts,
    Shape,
    classify,
    count,
    matrix_flops,
    tensor_core_shapes,
)
from benchmarks.codegen.limits import LIMITS, TARGETS
from benchmarks.codegen.loops import TileLoop, full_tile_loops, program_rows, tile_flops
from benchmarks.codegen.model import Measured, ctas_per_sm, cycles, kv_bytes_per_output
from benchmarks.codegen.parse import Instruction, ParseError, read_amdgcn, read_sass
from benchmarks.codegen.table import memory_share, save_json, table, violations

KEYS = [
    "kernel",
    "config",
    "target",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "ctas_per_sm",
    "mma_flops",
    "mma_cycles",
    "issue_cycles",
    "mufu_cycles",
    "bound",
    "share_of_peak",
    "baseline",
]


def sass(*lines: str) -> str:
    """nvdisasm's form of instructions and labels (which end in a colon)."""
    text = [line if line.endswith(":") else f"        /*0010*/   {line} ;" for line in lines]
    return "\n".join(["\t.text.k:", *text])


# two loops over 64 x 32 scores for 4 warps of 16 rows, head_dim 16: 2 + 4 and 2 + 4 HMMA of 4096
# FLOP would be 64 * 32 * 16 * 4 / 4 / 4096 = 8
QK_AND_PV = ["HMMA.16816.F32.BF16 R4, R8, R12, RZ"] * 8
TILE = {"rows": 64, "keys": 32, "head_dim": 16}
FULL = [".L_x_1:", "@!PT LDS RZ, [RZ]", *QK_AND_PV, *["MUFU.EX2 R1, R1"] * 16, "BAR.SYNC 0x0"]
MASKED = [".L_x_3:", *QK_AND_PV, *["ISETP.GE.AND P0, PT, R1, R2, PT", "FSEL R1, R1, R2, P0"] * 16]
KERNEL = sass(
    "MOV R1, R2",
    *FULL,
    "@P1 BRA `(.L_x_1)",
    *MASKED,
    "@!P2 BRA `(.L_x_3)",
    "EXIT",
    ".L_x_9:",
    "BRA `(.L_x_9)",
)


def test_loops_are_found_and_the_unmasked_one_is_chosen() -> None:
    function = read_sass(KERNEL)
    assert [function.blocks[loop.header].labels for loop in function.loops()] == [
        [".L_x_1"],
        [".L_x_3"],
    ]
    # .L_x_9, which nvdisasm prints after the last instruction, is never reached
    (loop,) = full_tile_loops(function, TILE, warp=32, warps=4)
    assert function.blocks[loop.loop.header].labels == [".L_x_1"]
    assert loop.tiles == 1
    assert loop.counts.classes["mufu"] == 16
    assert loop.counts.classes["barrier"] == 1
    assert loop.counts.matrix == Counter(HMMA=8)


def test_a_loop_in_a_loop_is_the_one_that_counts_and_waiting_is_left_out() -> None:
    function = read_sass(
        sass(
            ".L_out:",
            "MOV R1, R2",
            ".L_in:",
            *QK_AND_PV,
            "@P3 BRA `(.L_wait)",
            ".L_ready:",
            "@P1 BRA `(.L_in)",
            "BRA.U UP0, `(.L_out)",
            "EXIT",
            ".L_wait:",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR4], R0",
            "@P3 BRA `(.L_wait)",
            "BRA `(.L_ready)",
        )
    )
    (loop,) = full_tile_loops(function, TILE, warp=32, warps=4)
    assert function.blocks[loop.loop.header].labels == [".L_in"]
    assert loop.counts.classes["barrier"] == 0
    # the branches in, out and back from the wait
    assert loop.counts.classes["control"] == 3


def test_a_backward_tile_has_three_or_four_products() -> None:
    assert tile_flops({**TILE, "products": 3}) == 6 * 64 * 32 * 16
    keys = {"rows": 32, "keys": 32, "head_dim": 16, "products": 4}
    assert tile_flops(keys) == tile_flops(TILE)
    assert program_rows({**keys, "keys": 128}) == 128  # keys are the products' rows
    assert program_rows({**TILE, "products": 3}) == 64
    (loop,) = full_tile_loops(read_sass(KERNEL), keys, warp=32, warps=4)
    assert loop.useful_flops == tile_flops(keys)
    # 4-byte copies of the LSE are not keys
    text = sass(".L_a:", "LDGSTS.E [R1], [R2.64]", *QK_AND_PV, "@P0 BRA `(.L_a)", "EXIT")
    (loop,) = full_tile_loops(read_sass(text), keys, warp=32, warps=4)
    assert (loop.tiles, loop.repeated) == (1, 1.0)


@pytest.mark.parametrize(
    ("text", "tile", "message"),
    [
        (sass("MOV R1, R2", "EXIT"), TILE, "no loop with matrix instructions"),
        (
            sass(".L_a:", "FFMA R1, R2, R3, R4", "@P0 BRA `(.L_a)", "EXIT"),
            TILE,
            "no loop with matrix",
        ),
        (sass(*MASKED, "@P0 BRA `(.L_x_3)", "EXIT"), TILE, "every loop compares and selects"),
        (KERNEL, {**TILE, "keys": 64}, "32768 matrix FLOP|131072"),
    ],
)
def test_what_cannot_be_read_is_an_error(text: str, tile: dict[str, int], message: str) -> None:
    with pytest.raises(ParseError, match=message):
        full_tile_loops(read_sass(text), tile, warp=32, warps=4)


def test_other_text_is_an_error() -> None:
    with pytest.raises(ParseError, match="no instruction"):
        read_sass("hello")
    with pytest.raises(ParseError, match="no instruction"):
        read_amdgcn("hello")
    with pytest.raises(ParseError, match="nowhere"):
        read_sass(sass("BRA `(.L_gone)"))
    with pytest.raises(ParseError, match="REG"):
        read_resources("nothing")


def test_products_that_warps_repeat_are_not_useful() -> None:
    copies = ["LDGSTS.E.BYPASS.128 [R1], [R2.64]"]  # 512 bytes a warp, 2048 a block: one tile
    text = sass(".L_a:", *copies, *QK_AND_PV * 2, "@P0 BRA `(.L_a)", "EXIT")
    (loop,) = full_tile_loops(read_sass(text), TILE, warp=32, warps=4)
    assert (loop.tiles, loop.repeated) == (1, 2.0)
    (loop,) = full_tile_loops(read_sass(text.replace("LDGSTS", "LDG")), TILE, warp=32, warps=4)
    assert (loop.tiles, loop.repeated) == (2, 1.0)


def test_products_with_padding_may_be_left_out() -> None:
    padded = {**TILE, "head_dim": 32}

    def loops(products: int) -> list[TileLoop]:
        text = sass(".L_a:", *QK_AND_PV[:1] * products, "@P0 BRA `(.L_a)", "EXIT")
        return full_tile_loops(read_sass(text), padded, warp=32, warps=4, head_dim=16)

    for products in (8, 12, 16):
        (loop,) = loops(products)
        assert (loop.tiles, loop.repeated) == (1, 1.0)
        assert loop.useful_flops == products * 4096 * 4
    with pytest.raises(ParseError, match=f"{7 * 4096 * 4} matrix FLOP.*{8 * 4096 * 4}"):
        loops(7)


@pytest.mark.parametrize(
    ("opcode", "kind", "flops"),
    [
        ("HMMA.16816.F32.BF16", "HMMA", 4096),
        ("HMMA.1688.F32.TF32", "HMMA.TF32", 2048),
        ("HGMMA.64x128x16.F32.BF16", "HGMMA", 2 * 64 * 128 * 16 // 4),
        ("HGMMA.64x64x8.F32.TF32", "HGMMA.TF32", 2 * 64 * 64 * 8 // 4),
        ("v_mfma_f32_32x32x8_bf16", "MFMA", 16384),
        ("v_mfma_f32_16x16x16_f16", "MFMA", 8192),
        ("v_mfma_f32_32x32x2_f32", "MFMA.F32", 4096),
    ],
)
def test_flops_of_a_matrix_instruction(opcode: str, kind: str, flops: int) -> None:
    assert matrix_flops(Instruction(opcode)) == (kind, flops)


def test_an_unknown_matrix_instruction_is_an_error() -> None:
    with pytest.raises(ParseError, match="HMMA"):
        matrix_flops(Instruction("HMMA.999.F32"))
    with pytest.raises(ParseError, match="more UTC"):
        count([Instruction("UTCHMMA")], warp=32)


def test_the_shape_of_tcgen05_is_read_from_its_descriptor() -> None:
    mma = "@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r9 + 0 ], %rd1, %rd2, %r7, %p2;"
    assert tensor_core_shapes(f"mov.b32 \t%r7, 136381584;\n{mma}") == [Shape(128, 128, 16, 2)]
    with pytest.raises(ParseError, match="not known"):
        tensor_core_shapes(mma)


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("FFMA", "fma"),
        ("IMAD.X", "fma"),
        ("FMNMX", "alu"),
        ("F2FP.BF16.F32.PACK_AB", "alu"),
        ("MUFU.EX2", "mufu"),
        ("LDGSTS.E.BYPASS.128", "async load"),
        ("UTMALDG.4D", "bulk load"),
        ("LDG.E", "plain load"),
        ("LDL.LU", "local"),
        ("STL.64", "local"),
        ("UIADD3", "uniform"),
        ("LDSM.16.M88.4", "shared"),
        ("BAR.SYNC", "barrier"),
        ("v_exp_f32_e32", "mufu"),
        ("v_pk_mul_f32", "fma"),
        ("v_max3_f32", "alu"),
        ("ds_read_b128", "shared"),
        ("s_barrier", "barrier"),
        ("global_load_dwordx4", "plain load"),
        ("s_add_i32", "uniform"),
        ("scratch_load_dword", "local"),
        ("NEWTHING.X", "unclassified"),
    ],
)
def test_classes(opcode: str, name: str) -> None:
    assert classify(Instruction(opcode)) == name


def test_bytes_in_shared_memory() -> None:
    both = Instruction("HGMMA.64x64x16.F32.BF16", "R88, gdesc[UR28], R88")
    one = Instruction("HGMMA.64x128x16.F32.BF16", "R24, R120, gdesc[UR24].tnspB, R24")
    assert count([both], warp=32).shared_bytes == (64 + 64) * 16 * 2 // 4
    assert count([one], warp=32).shared_bytes == 128 * 16 * 2 // 4
    assert count([Instruction("LDSM.16.M88.4")], warp=32).shared_bytes == 512
    assert count([Instruction("ds_read_b128")], warp=64).shared_bytes == 1024
    assert count([Instruction("LDGSTS.E.BYPASS.128")], warp=32).async_bytes == 512


def test_cycles_of_a_tile_by_hand() -> None:
    counts = Counts(
        classes=Counter(matrix=16, mufu=66, fma=200, alu=100, shuffle=8),
        matrix_flops=Counter(HGMMA=16 * 2 * 64 * 128 * 16 // 4),
        shared_bytes=1280,
    )
    time = cycles(counts, LIMITS["cuda:90"], warps=8)
    assert time.matrix == 8 * 16 * 65536 / 4096 == 2048
    assert time.mufu == 66 * 32 * 8 / 16
    # 374 instructions of 8 warps on 4 schedulers; the integer unit has 100 at half the rate
    assert time.issue == 374 * 8 / 4
    assert time.memory == 8 * 1280 / 128
    flops = 8 * 16 * 65536
    assert time.share(flops, 4096) == pytest.approx(2048 / (2048 + 748 + 1056))
    assert time.share_overlapped(flops, 4096) == 1.0
    assert time.bound == "matrix"
    # twice the tiles in an iteration: half the cycles each
    assert cycles(counts, LIMITS["cuda:90"], warps=8, tiles=2).mufu == time.mufu / 2
    # half the FMA units: now they are the limit
    assert (
        cycles(
            counts,
            LIMITS["cuda:80"].__class__(**{**LIMITS["cuda:90"].__dict__, "fma": 32}),
            warps=8,
        ).issue
        == 200 * 32 * 8 / 32
    )


def test_a_branch_around_the_rescaling_is_seen() -> None:
    text = sass(
        ".L_a:",
        *QK_AND_PV,
        "@!P4 BRA `(.L_kept)",
        *["FMUL R1, R1, R2"] * 32,
        ".L_kept:",
        "MUFU.EX2 R1, R1",
        "@P0 BRA `(.L_a)",
        "EXIT",
    )
    (loop,) = full_tile_loops(read_sass(text), TILE, warp=32, warps=4)
    assert loop.counts.classes["fma"] == 32
    assert loop.counts.without(loop.skipped).classes["fma"] == 0
    # always executed: no branch around it
    (loop,) = full_tile_loops(
        read_sass(text.replace("@!P4 BRA `(.L_kept)", "MOV R1, R2")), TILE, warp=32, warps=4
    )
    assert not loop.skipped.classes


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "expected"),
    [
        ("cuda:80", 4, 128, 0, (4, "registers")),
        ("cuda:80", 4, 255, 80 * 1024, (2, "shared")),
        ("cuda:90", 8, 204, 164864, (1, "shared")),
        ("cuda:80", 8, 32, 0, (8, "warps")),
        ("hip:gfx942", 4, 256, 0, (2, "registers")),
        ("hip:gfx942", 4, 64, 65536, (1, "shared")),
    ],
)
def test_resident_blocks(
    arch: str, warps: int, registers: int, shared: int, expected: tuple[int, str]
) -> None:
    got = ctas_per_sm(LIMITS[arch], warps=warps, registers=registers, shared_bytes=shared)
    assert got == expected


def test_keys_and_values_fetched() -> None:
    packed, single = kv_bytes_per_output(1, 28, 4, 128, 512)
    assert single == 7 * packed
    packed, single = kv_bytes_per_output(1620, 28, 4, 128, 512)
    assert 1.0 < single / packed < 1.05


def a_row(**changes: object) -> Measured:
    row = Measured(
        "prefill",
        "c",
        "sm_90",
        200,
        0,
        1000,
        1,
        2**22,
        1024.0,
        900.0,
        544.0,
        "matrix",
        0.5,
        1.0,
        share_rescaling=0.5,
        instructions_per_mflop=500.0,
        matrix={"HGMMA": 16},
        dots=2,
        tile={"rows": 128, "keys": 64, "head_dim": 128},
        dtype="bf16",
        tiles_per_iteration=1,
        baseline_share=0.5,
        baseline_instructions_per_mflop=500.0,
    )
    return replace(row, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"matrix": {"HMMA": 16}}, "HMMA instead of HGMMA"),
        ({"matrix": {}}, "no matrix instruction"),
        ({"baseline": 0.99, "share_of_peak": 0.495}, "49.5% of peak, the plain kernel 50.0%"),
        ({"instructions_per_mflop": 501.0}, "501 instructions per MFLOP"),
        ({"repeated": 1.5}, "warps repeat products"),
        ({"error": "no loop"}, "no loop"),
    ],
)
def test_every_bar_can_fail(changes: dict[str, object], message: str) -> None:
    assert violations([a_row()]) == ([], [])
    faults, goals = violations([a_row(**changes)])
    (found,) = faults + goals
    assert message in found
    assert bool(goals) == any(text in message for text in ("peak", "MFLOP", "repeat"))


def test_a_decode_tile_is_compared_unless_it_waits_for_memory() -> None:
    """64 rows do 64 FLOPs for a byte of K and V, and an A100 can do 153: 42 % of its peak."""
    tile = {"rows": 64, "keys": 128, "head_dim": 128}
    changes = {"kernel": "decode", "target": "sm_80", "matrix": {"HMMA": 16}, "tile": tile}
    row = a_row(**changes, mma_flops=4 * 64 * 128 * 128, instructions_per_mflop=755.0)
    assert memory_share(row) == pytest.approx(64 / 153, rel=0.01)
    assert violations([row]) == ([], [])
    for other in (
        replace(row, kernel="prefill"),  # other tiles have the same keys
        replace(row, share_of_peak=0.41),
        replace(row, tile={**tile, "rows": 128}, mma_flops=2 * (row.mma_flops or 0)),
    ):
        ((goal,),) = violations([other])[1:]
        assert "755 instructions per MFLOP" in goal


def test_file_and_table(tmp_path: Path) -> None:
    rows = [a_row(), replace(a_row(), dots=0, mma_flops=None, share_of_peak=None, matrix={})]
    save_json(tmp_path / "s.json", rows)
    saved = json.loads((tmp_path / "s.json").read_text())
    assert [list(entry)[: len(KEYS)] for entry in saved] == [KEYS, KEYS]
    assert saved[0]["share_of_peak"] == 0.5
    assert saved[1]["mma_flops"] is None
    assert "50.0%" in table(rows)


AMD = """
k:
\ts_mov_b32 s0, 0
.LBB0_1:                                ; %loop
.Ltmp0:
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\tv_exp_f32_e32 v1, v1
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
.Lfunc_end0:
\tv_exp_f32_e32 v1, v1
"""


def test_amd_text() -> None:
    function = read_amdgcn(AMD)
    (loop,) = function.loops()
    assert [i.opcode for i in function.instructions(loop.blocks)] == [
        "v_mfma_f32_32x32x8_bf16",
        "v_exp_f32_e32",
        "s_cbranch_scc1",
    ]
    assert len(function.instructions()) == 5


def test_every_target_has_limits() -> None:
    assert TARGETS == ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
    for limits in LIMITS.values():
        assert limits.peak("bf16") == limits.peak("fp16") > limits.peak("fp32")
