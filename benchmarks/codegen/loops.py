"""Finds the loop of a kernel over full (unmasked) tiles, by these rules in this order:

1. A *matrix loop* holds matrix instructions and no smaller loop that does. (Loops that wait on a
   barrier sit inside it, as loops of two instructions; they are left out of the counts.)
2. A loop over *masked* tiles compares integers and selects about once per score. A loop's FLOPs say
   how many scores that is: FLOPs / (4 * head_dim) for the block, of which a thread has its part.
   From 0.15 comparisons and 0.75 selects per score on, a loop is masked. (A comparison of a key's
   number counts for all rows of a thread, and some selects have other purposes: rounding to bf16 on
   AMD, wrapping the buffers of a pipeline.) A kernel of fewer than 64 rows waits for memory. Its
   masked loops are taken too, unless they do less than a tile.
3. The remaining loops must do at least the FLOPs of a tile, 4 * rows * keys * head_dim, or
   2 * m * n * k of a product. Fewer is an error, and so is a missing full loop. Extra FLOPs are
   work that warps repeat. They count as time, not as useful work. (float32 takes several tf32
   products for one, with selects of its own. There all loops are taken, and all FLOPs count as
   useful.) A tile of head_dim 80 is padded to 128. A compiler that sees the zeros may leave out
   products with them, as AMD's does in some loops. There the FLOPs of 80 are enough.

All full loops (cache, chunk) are returned; the table shows the worst one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.codegen.count import MATRIX, Counts, Shape, classify, count
from benchmarks.codegen.parse import Function, Instruction, Loop, ParseError

__all__ = ["TileLoop", "full_tile_loops", "program_rows", "tile_flops"]


@dataclass(frozen=True)
class TileLoop:
    """`tiles` per iteration; `counts` are those of one iteration with every branch taken; `warps`
    of a block run it."""

    loop: Loop
    counts: Counts
    tiles: int
    warps: int
    skipped: Counts
    """What a branch leaves out while the running maximum does not change: see `_rescaling`."""
    useful_flops: int
    """Those of the tiles, per iteration, as far as they are done."""
    repeated: float
    """Matrix FLOPs done over useful ones: above 1 where warps repeat one another's products."""


def tile_flops(tile: Mapping[str, int]) -> int:
    """FLOPs of one tile: attention's products (two, or as many as the tile says: a backward pass
    has three for dQ, four for dK and dV), or one of a linear layer."""
    if "keys" in tile:
        return _flops_per_score(tile) * tile["rows"] * tile["keys"]
    return 2 * tile["m"] * tile["n"] * tile["k"]


def program_rows(tile: Mapping[str, int]) -> int:
    """The rows that a program keeps and that the matrix instructions have: query rows, or keys
    where dK and dV are summed (four products)."""
    return tile["keys"] if tile.get("products") == 4 else tile.get("rows", tile.get("m", 128))


def _flops_per_score(tile: Mapping[str, int]) -> int:
    return 2 * tile.get("products", 2) * tile["head_dim"]


def _mask_work(instructions: Sequence[Instruction]) -> tuple[int, int]:
    """`(selects, integer comparisons)`."""
    selects = compares = 0
    for i in instructions:
        if i.opcode in ("FSEL", "SEL") or i.opcode.startswith("v_cndmask"):
            selects += 1
        elif i.base == "ISETP" or i.opcode.startswith(("v_cmp", "v_cmpx")):
            integer = i.base == "ISETP" or i.opcode.split("_")[3][:1] in ("i", "u")
            compares += integer
    return selects, compares


def _matrix_loops(function: Function) -> list[Loop]:
    def has_matrix(loop: Loop) -> bool:
        return any(classify(i) == MATRIX for i in function.instructions(loop.blocks))

    loops = function.loops()
    candidates = [loop for loop in loops if has_matrix(loop)]
    return [a for a in candidates if not any(b.inside(a) for b in candidates)]


def _body(function: Function, loop: Loop, loops: Sequence[Loop]) -> list[int]:
    """The blocks of a loop, without inner loops that only wait for a barrier."""
    spins = [
        other
        for other in loops
        if other.inside(loop)
        and any(i.base in ("SYNCS", "NANOSLEEP") for i in function.instructions(other.blocks))
    ]
    waiting = frozenset().union(*(s.blocks for s in spins)) if spins else frozenset()
    return sorted(loop.blocks - waiting)


def _rescaling(function: Function, blocks: Sequence[int]) -> list[int]:
    """The blocks that a warp jumps over unless the accumulator has to be rescaled: an `if` with
    no `else` whose body is 16 or more multiplications and next to nothing else."""
    found = []
    for b in blocks:
        block = function.blocks[b]
        multiplies = sum(i.base in ("FMUL", "FMUL2") for i in block.instructions)
        before = [p for p in blocks if b in function.blocks[p].successors]
        if (
            multiplies >= 16
            and multiplies >= 0.9 * len(block.instructions)
            and len(before) == len(block.successors) == 1
            and block.successors[0] in function.blocks[before[0]].successors
        ):
            found.append(b)
    return found


def _shapes_in(function: Function, blocks: Sequence[int], shapes: Sequence[Shape]) -> list[Shape]:
    """The tcgen05 shapes of these blocks: the text of PTX and of SASS has the same order."""
    total = [
        (b, i)
        for b, block in enumerate(function.blocks)
        for i in block.instructions
        if i.base.startswith("UTC") and classify(i) == MATRIX
    ]
    if len(total) != len(shapes):
        raise ParseError(
            f"{len(total)} UTC*MMA instructions in the SASS, {len(shapes)} tcgen05.mma in the PTX"
        )
    chosen = set(blocks)
    return [shape for (b, _), shape in zip(total, shapes, strict=True) if b in chosen]


def _flops(counts: Counts, warps: int) -> int:
    return sum(counts.matrix_flops.values()) * warps + sum(counts.cta_matrix_flops.values())


def _tiles(
    name: str, counts: Counts, tile: Mapping[str, int], warps: int, head_dim: int | None
) -> int:
    """Tiles in an iteration: by the bytes of K and V where the threads copy them themselves, else
    by FLOPs. More FLOPs than the tiles have means that warps repeat one another's products."""
    flops, wanted = _flops(counts, warps), tile_flops(tile)
    least = tile_flops({**tile, "head_dim": head_dim}) if head_dim else wanted
    if flops < least:
        raise ParseError(
            f"{name}: a loop does {flops} matrix FLOP an iteration, a tile has {least}: the tile "
            "is not the kernel's, or its products are spread over several loops"
        )
    if "keys" in tile and counts.async_bytes:
        walked = tile["rows"] if tile.get("products") == 4 else tile["keys"]
        fetched = counts.async_bytes * warps / (4 * walked * tile["head_dim"])
        if "products" in tile:  # LSE and delta of the rows, 4 bytes each, come on top or alone
            return int(fetched) or max(flops // wanted, 1)
        if fetched != int(fetched) or not fetched:
            raise ParseError(f"{name}: a loop copies the keys of {fetched:g} tiles an iteration")
        return int(fetched)
    return max(flops // wanted, 1)


def full_tile_loops(
    function: Function,
    tile: Mapping[str, int],
    *,
    warp: int,
    warps: int,
    shapes: Sequence[Shape] = (),
    element: int = 2,
    head_dim: int | None = None,
) -> list[TileLoop]:
    """The loops over full tiles of a kernel whose blocks have `warps` warps. `element`: the bytes
    of a key's number. `head_dim`: without the padding to the tile's; None if there is none.

    Raises:
        ParseError: no loop with matrix instructions, FLOPs that are not a whole number of tiles, or
            nothing but masked loops.
    """
    every = function.loops()
    full = []
    seen = 0
    for loop in _matrix_loops(function):
        seen += 1
        blocks = _body(function, loop, every)
        instructions = function.instructions(blocks)
        counts = count(instructions, warp=warp, shapes=_shapes_in(function, blocks, shapes))
        selects, compares = _mask_work(instructions)
        if "keys" in tile:
            scores = _flops(counts, warps) / _flops_per_score(tile) / (warps * warp)
            masked = compares >= 0.15 * scores and selects >= 0.75 * scores
            smaller = _flops(counts, warps) < tile_flops(tile)
            if masked and element == 2 and ("products" in tile or tile["rows"] >= 64 or smaller):
                continue
        tiles = _tiles(function.name, counts, tile, warps, head_dim) if element == 2 else 1
        skipped = count(function.instructions(_rescaling(function, blocks)), warp=warp)
        flops = _flops(counts, warps)
        useful = min(flops, tile_flops(tile) * tiles) if element == 2 else flops
        full.append(TileLoop(loop, counts, tiles, warps, skipped, useful, flops / useful))
    if not seen:
        raise ParseError(f"{function.name}: no loop with matrix instructions")
    if not full:
        raise ParseError(f"{function.name}: every loop compares and selects once per score")
    return full
