"""Turns counts into cycles: how long each unit of an SM is busy with one tile.

Every unit gets the cycles that it needs if nothing ever waits. Two shares of the matrix units' peak
follow:

    no overlap        matrix / (matrix + issue + MUFU): the softmax of a tile and its products
                      take turns, as they do in one block of a plain kernel
    perfect overlap   matrix / max(matrix, issue, MUFU, memory): only the busiest unit counts

The model ignores latency, bank conflicts, memory outside the SM, clocks and power. It ranks loops
of one architecture; it does not predict a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from benchmarks.codegen.compile import Compiled
from benchmarks.codegen.count import ALU, FMA, MUFU, SHUFFLE, Counts, tensor_core_shapes
from benchmarks.codegen.limits import LIMITS, Limits
from benchmarks.codegen.loops import TileLoop, full_tile_loops

if TYPE_CHECKING:
    from vxl_kernels._triton.catalog import Compilation

__all__ = ["Cycles", "Measured", "ctas_per_sm", "cycles", "kv_bytes_per_output", "measure"]


@dataclass(frozen=True)
class Cycles:
    """Cycles of one SM for one tile of one block."""

    matrix: float
    issue: float
    mufu: float
    memory: float

    @property
    def bound(self) -> str:
        """The busiest unit, which limits a perfect overlap."""
        every = {
            "matrix": self.matrix,
            "issue": self.issue,
            "mufu": self.mufu,
            "memory": self.memory,
        }
        return max(every, key=lambda unit: every[unit])

    def share(self, flops: float, peak: float) -> float:
        """Share of the peak if matrix work overlaps with nothing."""
        return flops / peak / (self.matrix + self.issue + self.mufu)

    def share_overlapped(self, flops: float, peak: float) -> float:
        return flops / peak / max(self.matrix, self.issue, self.mufu, self.memory)


def cycles(counts: Counts, limits: Limits, *, warps: int, tiles: int = 1) -> Cycles:
    """`counts` of one iteration over `tiles` tiles, run by each of `warps` warps.

    Issue is the busiest of: the schedulers' slots, the FMA units, the integer units, each with
    everything but matrix instructions and MUFU results in it."""
    warp = limits.warp
    flops = {kind: n * warps for kind, n in counts.matrix_flops.items()}
    for kind, n in counts.cta_matrix_flops.items():
        flops[kind] = flops.get(kind, 0) + n
    matrix = sum(n / limits.matrix_flops[kind] for kind, n in flops.items())
    lanes = warp * warps
    if limits.name.startswith("gfx"):
        # scalar, memory and vector instructions of different waves issue side by side
        issued = max(
            counts.scalar_math,
            counts.other_instructions - counts.scalar_math - counts.classes[MUFU],
        )
    else:
        issued = counts.other_instructions
    issue = lanes * max(
        issued / limits.slots,
        (counts.classes[FMA] + counts.double) / limits.fma,
        counts.classes[ALU] / limits.alu,
        counts.classes[SHUFFLE] / limits.shuffle,
    )
    mufu = lanes * counts.classes[MUFU] / limits.mufu
    shared = (counts.shared_bytes * warps + counts.cta_shared_bytes) / limits.shared_bytes
    if counts.tensor_memory_bytes:
        shared += counts.tensor_memory_bytes * warps / limits.tensor_memory_bytes
    return Cycles(matrix / tiles, issue / tiles, mufu / tiles, shared / tiles)


def ctas_per_sm(
    limits: Limits, *, warps: int, registers: int, shared_bytes: int, tensor_memory_columns: int = 0
) -> tuple[int, str]:
    """Blocks resident on an SM, and what limits them."""
    fit = {
        "warps": limits.warps // warps,
        "threads": limits.threads // (warps * limits.warp),
        "blocks": limits.ctas,
        "shared": limits.shared_total // max(1, shared_bytes + limits.shared_reserved),
    }
    granule = limits.register_granule
    if limits.name.startswith("gfx"):
        per_wave = -(-max(1, registers) // granule) * granule
        fit["registers"] = min(8, limits.registers // per_wave) * 4 // warps
    else:
        # a warp's registers come in units of 8 a thread, from one sub-core's quarter
        per_warp = -(-max(1, registers) * limits.warp // granule) * granule
        fit["registers"] = limits.registers // 4 // per_warp * 4 // warps
    if tensor_memory_columns:
        fit["tensor memory"] = limits.tensor_memory_columns // tensor_memory_columns
    least = min(fit, key=lambda key: fit[key])
    return fit[least], least


def kv_bytes_per_output(
    rows: int, heads: int, kv_heads: int, tile_rows: int, bytes_per_key: int
) -> tuple[float, float]:
    """Bytes of K and V fetched per key and output row (one query head of one token): `(heads of a
    KV head packed into the tile, one head a tile)`, from the number of blocks a launch has."""
    group = heads // kv_heads
    packed = -(-rows * group // tile_rows) * kv_heads
    single = -(-rows // tile_rows) * heads
    return packed * bytes_per_key / (rows * heads), single * bytes_per_key / (rows * heads)


@dataclass(frozen=True)
class Measured:
    """One kernel in one configuration, measured: a line of the table, plain data only.

    Cycles, counts and FLOPs are those of one tile of the worst full loop, for a whole block;
    None where the kernel has no product. `share_of_peak` is the share without overlap of a
    tile in which the running maximum does not change. `share_rescaling` is that of a tile in which
    every branch is taken. They differ only if the kernel branches around the rescaling of its
    accumulator.
    """

    kernel: str
    config: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    ctas_per_sm: int
    mma_flops: int | None = None
    mma_cycles: float | None = None
    issue_cycles: float | None = None
    mufu_cycles: float | None = None
    bound: str | None = None
    share_of_peak: float | None = None
    baseline: float | None = None
    # -- beyond what the file format asks for --
    baseline_config: str = ""
    baseline_share: float | None = None
    baseline_instructions_per_mflop: float | None = None
    share_rescaling: float | None = None
    share_overlapped: float | None = None
    memory_cycles: float | None = None
    instructions_per_mflop: float | None = None
    counts: dict[str, int] = field(default_factory=dict)
    matrix: dict[str, int] = field(default_factory=dict)
    repeated: float | None = None
    full_loops: int = 0
    tiles_per_iteration: int = 0
    ctas_limited_by: str = ""
    tile: dict[str, int] = field(default_factory=dict)
    head_dim: int = 0
    dtype: str = ""
    dots: int = 0
    compile_seconds: float = 0.0
    error: str = ""


def measure(kernel: Compilation, arch: str, compiled: Compiled) -> Measured:
    """Measures one compiled kernel.

    Raises:
        ParseError: a kernel with products whose loop is not found or does other FLOPs than its
            tile has.
    """
    limits = LIMITS[arch]
    ctas, limited_by = ctas_per_sm(
        limits,
        warps=compiled.warps,
        registers=compiled.registers,
        shared_bytes=compiled.shared_bytes,
        tensor_memory_columns=compiled.tensor_memory_columns,
    )
    row = Measured(
        kernel=kernel.kernel,
        config=kernel.config,
        target=limits.name,
        registers=compiled.registers,
        spill_bytes=compiled.spill_bytes,
        shared_bytes=compiled.shared_bytes,
        ctas_per_sm=ctas,
        ctas_limited_by=limited_by,
        tile=dict(kernel.tile),
        head_dim=kernel.head_dim,
        dtype=kernel.dtype,
        dots=compiled.dots,
        compile_seconds=compiled.seconds,
    )
    if not compiled.dots:
        return row
    shapes = tensor_core_shapes(compiled.ptx) if compiled.ptx else []
    loops = full_tile_loops(
        compiled.function,
        kernel.tile,
        warp=limits.warp,
        warps=compiled.warps,
        shapes=shapes,
        element=4 if kernel.dtype == "fp32" else 2,
        head_dim=kernel.head_dim,
    )
    rows = [_measure_loop(row, loop, limits) for loop in loops]
    worst = min(rows, key=lambda r: r.share_of_peak or 0.0)
    return replace(
        worst,
        full_loops=len(loops),
        instructions_per_mflop=max(r.instructions_per_mflop or 0.0 for r in rows),
    )


def _measure_loop(row: Measured, loop: TileLoop, limits: Limits) -> Measured:
    flops = loop.useful_flops // loop.tiles
    peak = limits.peak(row.dtype)
    steady = loop.counts.without(loop.skipped)
    time = cycles(steady, limits, warps=loop.warps, tiles=loop.tiles)
    every = cycles(loop.counts, limits, warps=loop.warps, tiles=loop.tiles)
    other = steady.other_instructions * loop.warps / loop.tiles
    return replace(
        row,
        mma_flops=flops,
        mma_cycles=time.matrix,
        issue_cycles=time.issue,
        mufu_cycles=time.mufu,
        memory_cycles=time.memory,
        bound=time.bound,
        share_of_peak=time.share(flops, peak),
        share_rescaling=every.share(flops, peak),
        share_overlapped=time.share_overlapped(flops, peak),
        instructions_per_mflop=other / flops * 1e6,
        counts=dict(steady.classes),
        matrix=dict(loop.counts.matrix),
        tiles_per_iteration=loop.tiles,
        repeated=loop.repeated,
    )
