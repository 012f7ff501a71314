"""From counts to cycles: how long each unit of an SM is busy with one tile, and what follows.

Every unit is given the cycles it needs if nothing ever waits. Two shares of the matrix units'
peak follow:

    no overlap        matrix / (matrix + issue + MUFU): the softmax of a tile and its products
                      take turns, as they do in one block of a plain kernel
    perfect overlap   matrix / max(matrix, issue, MUFU, memory): only the busiest unit counts

Latency, bank conflicts, memory beyond the SM, clocks and power are not in it. It ranks loops of
one architecture; it does not predict a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from _gpu_limits import LIMITS, Limits
from _sass_compile import Compiled, Kernel
from _sass_count import ALU, FMA, MUFU, SHUFFLE, Counts, tensor_core_shapes
from _sass_loops import TileLoop, full_tile_loops

__all__ = ["Cycles", "Report", "ctas_per_sm", "cycles", "kv_bytes_per_row", "report"]


@dataclass(frozen=True)
class Cycles:
    """Of one SM for one tile of one block."""

    matrix: float
    issue: float
    mufu: float
    memory: float

    @property
    def bound(self) -> str:
        """The unit that a perfect overlap would wait for."""
        every = {"matrix": self.matrix, "issue": self.issue, "mufu": self.mufu, "memory": self.memory}
        return max(every, key=lambda unit: every[unit])

    def share(self, flops: float, peak: float) -> float:
        """Of the peak, if matrix work overlaps with nothing."""
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


def kv_bytes_per_row(tile: Mapping[str, int], element: int = 2) -> float | None:
    """Bytes of K and V that a block fetches per key and row of output (one query head of one
    token). A tile's rows share what it fetches, whichever heads they are of."""
    if "keys" not in tile:
        return None
    return 2 * tile["head_dim"] * element / tile["rows"]


@dataclass(frozen=True)
class Report:
    """One line of the table. The cycles and counts are those of the worst full loop; None where
    the kernel has no product."""

    kernel: Kernel
    arch: str
    compiled: Compiled
    ctas: int
    limited_by: str
    loop: TileLoop | None
    loops: int
    time: Cycles | None
    flops: int
    share: float | None
    overlapped: float | None
    instructions_per_mflop: float | None


def report(kernel: Kernel, arch: str, compiled: Compiled) -> Report:
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
    if not compiled.dots:
        return Report(
            kernel, arch, compiled, ctas, limited_by, None, 0, None, 0, None, None, None
        )  # fmt: skip
    shapes = tensor_core_shapes(compiled.ptx) if compiled.ptx else []
    loops = full_tile_loops(
        compiled.function, kernel.tile, warp=limits.warp, warps=compiled.warps, shapes=shapes
    )
    lines = []
    for loop in loops:
        per_warp = sum(loop.counts.matrix_flops.values()) * loop.warps
        flops = (per_warp + sum(loop.counts.cta_matrix_flops.values())) // loop.tiles
        time = cycles(loop.counts, limits, warps=loop.warps, tiles=loop.tiles)
        other = loop.counts.other_instructions * loop.warps / loop.tiles
        lines.append((time.share(flops, limits.peak), loop, time, flops, other / flops * 1e6))
    share, loop, time, flops, per_mflop = min(lines, key=lambda line: line[0])
    return Report(
        kernel, arch, compiled, ctas, limited_by, loop, len(loops), time, flops, share,
        time.share_overlapped(flops, limits.peak), max(line[4] for line in lines),
    )  # fmt: skip
