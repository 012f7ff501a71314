"""Which loop of a kernel is the one over full (unmasked) tiles.

How it is told from the others, in this order:

1. A *matrix loop* holds matrix instructions and no smaller loop that does. (Loops that wait on a
   barrier sit inside it, as loops of two instructions; they are left out of the counts.)
2. A loop over *masked* tiles compares integers and selects about once per score. A loop's FLOPs say
   how many scores that is: FLOPs / (4 * head_dim) for the block, of which a thread has its part.
   From 0.4 comparisons and 0.75 selects per score on, a loop is masked. (Some comparisons are
   shared by several scores, and some selects serve other ends: rounding to bf16 on AMD, wrapping
   the buffers of a pipeline.)
3. The FLOPs of what is left must be those of a whole number of tiles, 4 * rows * keys * head_dim
   each, or 2 * m * n * k of a product; else warps repeat one another's work or the parser is
   wrong, which is an error. No full loop at all is an error too. (Exempt is float32, which is
   made of several tf32 products.)

Several full loops (cache, chunk) are all returned; the table shows the worst of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from _sass_count import MATRIX, Counts, Shape, classify, count
from _sass_parse import Function, Instruction, Loop, ParseError

__all__ = ["TileLoop", "full_tile_loops", "tile_flops"]


@dataclass(frozen=True)
class TileLoop:
    """`tiles` per iteration; `counts` are those of one iteration with every branch taken; `warps`
    of a block run it."""

    loop: Loop
    counts: Counts
    tiles: int
    warps: int
    skipped: Counts
    """What a branch leaves out while the running maximum stands: see `_rescaling`."""


def tile_flops(tile: Mapping[str, int]) -> int:
    """FLOPs of one tile: attention's two products, or one of a linear layer."""
    if "keys" in tile:
        return 4 * tile["rows"] * tile["keys"] * tile["head_dim"]
    return 2 * tile["m"] * tile["n"] * tile["k"]


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
    """The loop's blocks without the loops in it that only wait for a barrier."""
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


def _tiles(name: str, counts: Counts, tile: Mapping[str, int], warps: int, element: int) -> int:
    """Tiles in an iteration, by FLOPs and, where the threads copy K and V, by bytes as well:
    warps that repeat one another's products would else look like more tiles."""
    flops, wanted = _flops(counts, warps), tile_flops(tile)
    tiles, rest = divmod(flops, wanted)
    if rest or not tiles:
        raise ParseError(
            f"{name}: a loop does {flops} matrix FLOP an iteration, which is no multiple of the "
            f"tile's {wanted}: warps repeat one another's work, or the tile is wrong"
        )
    copied = counts.async_bytes * warps
    if "keys" in tile and copied:
        fetched = copied / (tile["keys"] * tile["head_dim"] * 2 * element)
        if fetched != tiles:
            raise ParseError(
                f"{name}: a loop does the FLOPs of {tiles} tiles an iteration and copies the keys "
                f"of {fetched:g}: warps repeat one another's work, or the tile is wrong"
            )
    return tiles


def full_tile_loops(
    function: Function,
    tile: Mapping[str, int],
    *,
    warp: int,
    warps: int,
    shapes: Sequence[Shape] = (),
    element: int = 2,
) -> list[TileLoop]:
    """The loops over full tiles of a kernel whose blocks have `warps` warps. `element`: the bytes
    of a key's number.

    Raises:
        ParseError: no loop with matrix instructions, FLOPs that are no whole number of tiles, or
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
            scores = _flops(counts, warps) / (4 * tile["head_dim"]) / (warps * warp)
            if compares >= 0.4 * scores and selects >= 0.75 * scores:
                continue
        tiles = _tiles(function.name, counts, tile, warps, element) if element == 2 else 1
        skipped = count(function.instructions(_rescaling(function, blocks)), warp=warp)
        full.append(TileLoop(loop, counts, tiles, warps, skipped))
    if not seen:
        raise ParseError(f"{function.name}: no loop with matrix instructions")
    if not full:
        raise ParseError(f"{function.name}: every loop compares and selects once per score")
    return full
