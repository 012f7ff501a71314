"""Which loop of a kernel is the one over full (unmasked) tiles.

How it is told from the others, in this order:

1. A *matrix loop* holds matrix instructions and no smaller loop that does. (Loops that wait on a
   barrier sit inside it, as loops of two instructions; they are left out of the counts.)
2. Its FLOPs are those of a whole number of tiles: 4 * rows * keys * head_dim per tile of
   attention, 2 * m * n * k of a product. Anything else is an error, since then either the
   parser or the tile is wrong.
3. A loop over *masked* tiles compares and selects once per score: each thread holds
   rows * keys / threads of them. Loops with fewer than half as many integer comparisons or
   selects beyond the leanest loop are full. The leanest must itself have fewer compares than
   half its scores, or there is no full loop, which is an error.

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
    masks: int
    instructions: list[Instruction]
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


def _tiles(
    name: str, counts: Counts, tile: Mapping[str, int], wanted: int, warps: int, element: int
) -> int:
    """Tiles in an iteration, by FLOPs and, where the threads copy K and V, by bytes as well:
    warps that repeat one another's products would else look like more tiles."""
    flops = sum(counts.matrix_flops.values()) * warps + sum(counts.cta_matrix_flops.values())
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
    passes: int = 1,
    element: int = 2,
) -> list[TileLoop]:
    """The loops over full tiles of a kernel whose blocks have `warps` warps. `passes` is how many
    products of the matrix unit make one (3 of tf32 for one of float32), `element` the bytes of
    a key's number.

    Raises:
        ParseError: no loop with matrix instructions, FLOPs that are no whole number of tiles, or
            nothing but masked loops.
    """
    every = function.loops()
    found = []
    for loop in _matrix_loops(function):
        blocks = _body(function, loop, every)
        instructions = function.instructions(blocks)
        counts = count(instructions, warp=warp, shapes=_shapes_in(function, blocks, shapes))
        selects, compares = _mask_work(instructions)
        skipped = count(function.instructions(_rescaling(function, blocks)), warp=warp)
        found.append((loop, counts, selects, compares, instructions, skipped))
    if not found:
        raise ParseError(f"{function.name}: no loop with matrix instructions")

    wanted = tile_flops(tile) * passes
    threads = warps * warp
    result = []
    for loop, counts, selects, compares, instructions, skipped in found:
        tiles = _tiles(function.name, counts, tile, wanted, warps, element)
        scores = tiles * tile["rows"] * tile["keys"] / threads if "keys" in tile else 0
        body = TileLoop(loop, counts, tiles, warps, selects + compares, instructions, skipped)
        result.append((body, scores, compares))
    if "keys" not in tile:
        return [entry[0] for entry in result]
    leanest = min(entry[0].masks / entry[0].tiles for entry in result)
    full = [
        entry
        for entry in result
        if entry[0].masks / entry[0].tiles <= leanest + 0.5 * entry[1] / entry[0].tiles
        and entry[2] < 0.5 * entry[1]
    ]
    if not full:
        raise ParseError(f"{function.name}: every loop compares and selects once per score")
    return [entry[0] for entry in full]
