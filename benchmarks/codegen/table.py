"""The table of `machine_code.py`, its file and its bars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.codegen.limits import LIMITS
from benchmarks.codegen.loops import program_rows
from benchmarks.codegen.model import Measured, kv_bytes_per_output
from benchmarks.common.report import _number, plain_table
from vxl_kernels.files import atomic_write

__all__ = [
    "EXPECTED",
    "compile_times",
    "kv_table",
    "memory_share",
    "save_json",
    "table",
    "violations",
]

# the matrix instruction that an architecture is bought for
EXPECTED = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}
# wgmma and tcgen05 take 64 or more rows; kernels of fewer wait for memory, not for products
_ROWS_OF_A_MATRIX_UNIT = 64
_COMPARED = ("sm_80", "sm_90")

_HEADER = (
    "kernel",
    "config",
    "regs",
    "spill",
    "shared",
    "CTAs",
    "matrix",
    "kFLOP",
    "MUFU",
    "math",
    "bulk",
    "async",
    "plain",
    "bar",
    "instr/MFLOP",
    "matrix cyc",
    "issue",
    "MUFU cyc",
    "memory",
    "bound",
    "share",
    "overlap",
    "baseline",
)


def _cells(r: Measured) -> list[str]:
    counts = r.counts
    tiles = max(1, r.tiles_per_iteration)

    def each(*names: str) -> str:
        return _number(sum(counts.get(n, 0) for n in names) / tiles, ".0f") if counts else "-"

    matrix = " + ".join(f"{n // tiles} {kind}" for kind, n in r.matrix.items()) or "-"
    return [
        r.kernel,
        r.config,
        str(r.registers),
        str(r.spill_bytes),
        str(r.shared_bytes),
        f"{r.ctas_per_sm} {r.ctas_limited_by}",
        matrix,
        "-" if r.mma_flops is None else f"{r.mma_flops / 1e3:.0f}",
        each("mufu"),
        each("fma", "alu"),
        each("bulk load"),
        each("async load"),
        each("plain load"),
        each("barrier"),
        _number(r.instructions_per_mflop, ".0f"),
        _number(r.mma_cycles, ".0f"),
        _number(r.issue_cycles, ".0f"),
        _number(r.mufu_cycles, ".0f"),
        _number(r.memory_cycles, ".0f"),
        r.bound or "-",
        _percent(r.share_of_peak, r.share_rescaling),
        _percent(r.share_overlapped),
        "-" if r.baseline is None else f"{r.baseline:.3f}x",
    ]


def _percent(value: float | None, worst: float | None = None) -> str:
    if value is None:
        return "-"
    text = f"{100 * value:.1f}%"
    return text if worst is None or worst == value else f"{text} ({100 * worst:.1f}%)"


def table(rows: Sequence[Measured]) -> str:
    lines = [_cells(r) for r in rows if not r.error]
    return plain_table(_HEADER, lines, left=(0, 1, 5, 6, 19))


LEGEND = """\
All numbers are of one block (CTA), counts per warp, of one tile of the worst loop over full tiles.
matrix: matrix instructions and the kFLOP they do. math: arithmetic other than MUFU. bulk, async,
plain: loads by TMA, cp.async, into registers. instr/MFLOP: instructions that are not matrix ones,
of all warps, per matrix MFLOP. Cycles: how long an SM is busy with the tile (limits.py).
share: of the matrix units' peak if nothing overlaps, matrix / (matrix + issue + MUFU); in brackets
a tile in which the accumulator is rescaled, where a branch avoids that. overlap: if everything did.
baseline: share over that of the plain kernel's best configuration for this architecture."""

RELATION = """\
How the share relates to time: the plain kernel's (Triton's tutorial) was measured by others at 60 %
of peak on A100 and 40-48 % on H100. The model knows no latency, no clock under load and no tiles at
the causal edge, and lets only one block's work take turns; so read it as a ranking of loops on one
architecture, not as a time."""


def kv_table(heads: int, kv_heads: int, head_dim: int, tile_rows: int, element: int = 2) -> str:
    """K and V fetched by launches of different lengths, packed and one head a tile."""
    header = ("query rows", "packed, bytes", "per head, bytes", "ratio")
    lines = []
    for rows in (1, tile_rows * kv_heads // heads, 64, 128, 1620):
        packed, single = kv_bytes_per_output(
            rows, heads, kv_heads, tile_rows, 2 * head_dim * element
        )
        lines.append([str(rows), f"{packed:.1f}", f"{single:.1f}", f"{single / packed:.2f}x"])
    return plain_table(header, lines, left=())


def compile_times(rows: Sequence[Measured]) -> dict[str, float]:
    """Seconds of processor time per target, without the baseline."""
    seconds: dict[str, float] = {}
    for r in rows:
        if r.kernel != "plain_flash":
            seconds[r.target] = seconds.get(r.target, 0.0) + r.compile_seconds
    return seconds


def save_json(path: Path, rows: Sequence[Measured]) -> None:
    """One object a line of the table; cycles per tile of a block, shares as parts of 1."""
    atomic_write(path, json.dumps([asdict(r) for r in rows], indent=1) + "\n", durable=False)


def memory_share(r: Measured) -> float | None:
    """Share of the matrix units' peak at which a decode tile's keys come from the GPU's memory;
    None for other kernels, whose tiles share them in the L2 cache."""
    if not r.kernel.startswith("decode") or not r.mma_flops or r.share_of_peak is None:
        return None
    (limits,) = (x for x in LIMITS.values() if x.name == r.target)
    fetched = 2 * r.tile["keys"] * r.tile["head_dim"] * (4 if r.dtype == "fp32" else 2)
    return r.mma_flops / fetched * limits.memory_bytes / limits.peak(r.dtype)


def _compared(r: Measured) -> bool:
    """Whether a line is attention of full tiles that waits for the SM and not for memory. It is
    compared with the plain kernel."""
    forward = "keys" in r.tile and "products" not in r.tile
    if not forward or r.tile["rows"] < _ROWS_OF_A_MATRIX_UNIT or r.dtype == "fp32":
        return False
    by_memory = memory_share(r)
    return by_memory is None or (r.share_of_peak or 0.0) < by_memory


# Bytes a thread that Triton 3.6 spills and newer ones do not, by target, kernel and configuration.
_OF_TRITON_3_6 = {
    "sm_80 prefill bf16 d128 BM128 BN128 w8 s2 pages pages_in_block": 8,
    "sm_80 prefill fp32 d128 BM32 BN32 w4 s1 pages block_in_page": 16,
}


def _allowed_spills(name: str) -> int:
    from triton import __version__

    return _OF_TRITON_3_6.get(name, 0) if __version__.startswith("3.6.") else 0


def violations(rows: Sequence[Measured]) -> tuple[list[str], list[str]]:
    """Faults (unreadable or spilled code, the wrong instruction) and goals that are not reached
    (no repeated work, the plain kernel's share and instructions), in words. The plain kernel is
    held to nothing."""
    found: list[str] = []
    goals: list[str] = []
    for r in rows:
        if r.kernel == "plain_flash":
            continue
        name = f"{r.target} {r.kernel} {r.config}"
        if r.error:
            found.append(f"{name}: {r.error}")
            continue
        if r.spill_bytes > _allowed_spills(name):
            found.append(f"{name}: spills {r.spill_bytes} bytes a thread")
        if not r.dots:
            continue
        wide_enough = program_rows(r.tile) >= _ROWS_OF_A_MATRIX_UNIT
        kinds = {kind.split(".")[0] for kind in r.matrix}
        if wide_enough and kinds != {EXPECTED[r.target]}:
            found.append(
                f"{name}: products use {', '.join(sorted(kinds)) or 'no matrix instruction'} "
                f"instead of {EXPECTED[r.target]}"
            )
        if wide_enough and (r.repeated or 1.0) > 1.0:
            goals.append(f"{name}: warps repeat products, {r.repeated:.2f} times the tile's FLOPs")
        if r.baseline is None or not _compared(r):
            continue
        if r.target in _COMPARED and r.baseline < 1.0:
            goals.append(
                f"{name}: {_percent(r.share_of_peak)} of peak, the plain kernel "
                f"{_percent(r.baseline_share)} ({r.baseline_config})"
            )
        ours, theirs = r.instructions_per_mflop, r.baseline_instructions_per_mflop
        if ours is not None and theirs is not None and ours > theirs:
            goals.append(
                f"{name}: {ours:.0f} instructions per MFLOP, the plain kernel {theirs:.0f}"
            )
    return found, goals
