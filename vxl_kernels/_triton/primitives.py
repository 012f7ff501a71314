"""What the kernels share: rows and positions, pages, the softmax step.

Names: `offs_` index vectors, `_ptrs` pointer tiles, UPPER CASE compile-time constants. Lengths
are never constants. `layout.py` describes rows and positions; this is its twin on the device,
as `csrc/include/vxl/params.h` is for the CPU kernels. `layout=None` is one chunk of plain rows:
a ratio that no position reaches and no VSTs.
"""

import triton
import triton.language as tl

__all__ = [
    "MAX_STRIDE",
    "advance",
    "assume_stride",
    "cached_entries",
    "key_ptrs",
    "load_block",
    "load_rows",
    "locate",
    "narrow",
    "new_offset",
    "opaque_zero",
    "paged_offset",
    "query_row",
    "score_block",
    "visible_new",
]


# -- rows and positions ----------------------------------------------------------------------


@triton.jit
def chunk_row(is_vst, index, chunk, window, ratio, chunks, SPLIT: tl.constexpr):
    """Row that holds raw token (or VST) `index` of `chunk`. In split order it grows with
    `index` by one; interleaved, a VST stands behind each `ratio` raw tokens."""
    vsts = window // ratio
    if SPLIT:
        return tl.where(is_vst, chunks * window + chunk * vsts, chunk * window) + index
    else:
        place = tl.where(is_vst, index * (ratio + 1) + ratio, index + index // ratio)
        return chunk * (window + vsts) + place


@triton.jit
def query_row(position, chunk, window, ratio, chunks, SPLIT: tl.constexpr):
    """Row that holds the token at `position` of `chunk`."""
    before = position // (ratio + 1)  # VSTs in front of the position
    is_vst = position % (ratio + 1) == ratio
    index = tl.where(is_vst, before, position - before)
    return chunk_row(is_vst, index, chunk, window, ratio, chunks, SPLIT)


@triton.jit
def visible_new(position, ratio):
    """How many raw tokens and how many VSTs of its chunk the row at `position` sees, itself
    included. A bound for each: so both are runs of keys from 0 on, in either storage order."""
    vst = (position + 1) // (ratio + 1)
    return position + 1 - vst, vst


# -- memory ------------------------------------------------------------------------------------

# Elements from a key to the next, at most; the launcher copies or goes the 64-bit way beyond. A
# block of 128 keys is then within 2 GiB.
MAX_STRIDE = tl.constexpr(2**20)


@triton.jit
def assume_stride(stride):
    """Tells the compiler what the launcher has seen to. AMD's then loads a block from a scalar
    address and 32-bit offsets instead of a 64-bit address for each thread."""
    tl.assume(stride >= 0)
    tl.assume(stride <= MAX_STRIDE)


@triton.jit
def cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages):
    """Length of a sequence's cache, held inside its table."""
    return tl.minimum(tl.maximum(tl.load(cache_seqlens_ptr + i_batch), 0), max_pages * page_size)


@triton.jit
def page_of(table_ptr, entry, max_pages):
    """Page at an entry of a sequence's table, int64. Entries behind the table's end are taken
    for its last: whoever looks ahead stays inside."""
    return tl.load(table_ptr + tl.minimum(entry, max_pages - 1).to(tl.uint32)).to(tl.int64)


@triton.jit
def locate(
    table_ptr, start, offs_n, page_size, max_pages, BY: tl.constexpr, PAGE_MODE: tl.constexpr
):
    """Where the cache entries `start + offs_n` lie: (entry in the table, slot in the page, page,
    the block's spread: entries of the table behind its first [N], and in all).

    PAGE_MODE tells how blocks of N = BY keys, which start at multiples of N, meet pages:
    "block_in_page"   page_size is a multiple of N, or there is one page: one page a block, so these
                      are scalars, of `start`. (With a single page, `advance` past its end returns
                      garbage that no caller reads.)
    "pages_in_block"  page_size divides N: a key's slot and its place after the block's first entry
                      in the table are the same in every block, and that entry is a scalar.
    "gather"          neither. Blocks may start anywhere, and the spread is of no use.
    """
    if PAGE_MODE == "pages_in_block":
        entry = start // page_size
        behind = offs_n // page_size
        slot = offs_n - behind * page_size
        page = page_of(table_ptr, entry + behind, max_pages).to(tl.int32)
        # Divided here: no compiler takes a division out of a loop that may not run at all.
        return entry, slot, page, behind, BY // page_size
    else:
        index = start if PAGE_MODE == "block_in_page" else start + offs_n
        entry = index // page_size
        page = page_of(table_ptr, entry, max_pages)
        return entry, index - entry * page_size, page, 0, 0


@triton.jit
def advance(table_ptr, place, page_size, max_pages, BY: tl.constexpr, PAGE_MODE: tl.constexpr):
    """`locate` for the block BY entries further on, from that of this block. With "pages_in_block",
    a block that is not wholly inside the table is replaced by the last one that is."""
    entry, slot, page, behind, spread = place
    if PAGE_MODE == "pages_in_block":
        entry = tl.minimum(entry + spread, max_pages - spread)
        page = tl.load(table_ptr + (entry + behind))
    else:
        slot += BY
        if PAGE_MODE == "block_in_page":
            stays = (slot - page_size) >> 31  # all ones within the page, else 0
            entry += 1 + stays
            slot &= stays
        else:
            pages = slot // page_size
            entry += pages
            slot -= pages * page_size
        page = page_of(table_ptr, entry, max_pages)
    return entry, slot, page, behind, spread


@triton.jit
def paged_offset(place, offs_n, page_stride, slot_stride, PAGE_MODE: tl.constexpr):
    """From the cache's start to each key of a block, in elements, for `key_ptrs`: (what the
    block's keys have in common, 64 bits; what is left for each [N])."""
    _, slot, page, _, _ = place
    if PAGE_MODE == "gather":
        return 0, page * page_stride + slot.to(tl.int64) * slot_stride
    else:  # the launcher has seen that 32 bits reach every eighth element
        eighths = page.to(tl.int32) * (page_stride // 8).to(tl.int32) + slot * (slot_stride // 8)
        if PAGE_MODE == "block_in_page":
            return eighths.to(tl.uint32).to(tl.int64) * 8, offs_n * slot_stride
        else:
            return 0, eighths.to(tl.int64) * 8


@triton.jit
def new_offset(row, offs_n, row_stride):
    """As `paged_offset`: from the call's first row to the rows `row + offs_n` of own keys."""
    return row.to(tl.int64) * row_stride, offs_n * row_stride


@triton.jit
def key_ptrs(ptr, offset, offs_d):
    """Pointers to a block of keys [N, D]. One address and a tile of 32-bit offsets from it, added
    last: a tile of 64-bit sums takes four instructions more for each load, and the registers."""
    base, each = offset
    if each.dtype == tl.int32:
        return ptr + base + (each[:, None] + offs_d)
    else:
        return (ptr + base + offs_d) + each[:, None]


@triton.jit
def load_rows(ptrs, offs_row, rows, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr):
    """A tile [R, D] of which rows at or behind `rows` and dimensions behind HEAD_DIM are 0."""
    BLOCK_D: tl.constexpr = ptrs.shape[1]
    in_dims = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    if MASK_ROWS:
        in_rows = offs_row[:, None] < rows
        if HEAD_DIM != BLOCK_D:
            return tl.load(ptrs, mask=in_rows & in_dims, other=0.0)
        return tl.load(ptrs, mask=in_rows, other=0.0)
    if HEAD_DIM != BLOCK_D:
        return tl.load(ptrs, mask=in_dims, other=0.0)
    return tl.load(ptrs)


@triton.jit
def load_block(desc, at_batch, i_head, at_row, ptrs, HEAD_DIM: tl.constexpr, TMA: tl.constexpr):
    """A full block of keys [N, D]: by TMA from a tensor (batch or page, head, row,
    head_dim), or by the threads from pointers."""
    if TMA:
        BLOCK_N: tl.constexpr = ptrs.shape[0]
        BLOCK_D: tl.constexpr = ptrs.shape[1]
        return desc.load([at_batch.to(tl.int32), i_head, at_row, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        return load_rows(ptrs, 0, 0, HEAD_DIM, False)


# -- registers -----------------------------------------------------------------------------------


@triton.jit
def opaque_zero(WHICH: tl.constexpr = 0):
    """0, though no compiler can tell: grids have one program along their third axis.

    Added to an index, it makes the compiler compute what follows from the index again instead of
    keeping the value from before a loop, which would take registers all through the loop or be
    spilled. Zeros of one WHICH (0, 1 or 2) are one value to the compiler, others are not.
    """
    if WHICH == 0:
        return tl.program_id(2)
    elif WHICH == 1:
        return 2 * tl.program_id(2)
    else:
        return tl.num_programs(2) - 1


# -- arithmetic by hand where the compiler's is longer ---------------------------------------
#
# ISA names what an architecture has or lacks, "" for none of these:
# "f32x2"    one instruction multiplies (and adds) two float32 numbers; the compiler takes it for
#            sums only (sm_100)
# "no_bf16_cvt"  no instruction rounds to bfloat16 (gfx942)

_FMA_F32X2 = tl.constexpr("""{
.reg .b64 x, y, z;
mov.b64 x, {$2, $3};
mov.b64 y, {$4, $5};
mov.b64 z, {$6, $7};
fma.rn.f32x2 x, x, y, z;
mov.b64 {$0, $1}, x;
}""")


@triton.jit
def _multiply_add_pairs(a, b, c):
    """a * b + c, of tensors of one shape; a thread's numbers are even in number."""
    return tl.inline_asm_elementwise(
        _FMA_F32X2, "=f,=f,f,f,f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=2
    )


@triton.jit
def narrow(x, dtype: tl.constexpr, ISA: tl.constexpr):
    """float32 x in the type of keys.

    "no_bf16_cvt": the compiler's five instructions a number keep every NaN a NaN. Here it is one,
    and half of one that joins two numbers: half a unit is added, which rounds to nearest, ties
    away from zero. Infinities and the NaN that instructions make (0x7FC00000) stay.
    """
    if ISA == "no_bf16_cvt" and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True) + 0x8000
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


# -- softmax -----------------------------------------------------------------------------------


@triton.constexpr_function
def _skipping_multiply(n):
    """PTX: n numbers times n factors of at most 1, jumped over if all factors of the warp are 1.

    Every factor of every lane is asked, so it does not matter which lane holds what. Lanes hold
    few rows, so most of the n factors are one register, and `and` of a register with itself is
    none: only the bits of 1.0 and of numbers above keep all ones of 1.0.
    """
    lines = ["{", ".reg .pred moved;", f".reg .b32 t<{n}>;", f".reg .f32 x<{n}>;"]
    lines += [f"mov.b32 t{i}, ${2 * n + i};" for i in range(n)]
    half = n // 2
    while half:  # the second half of a tile's columns repeats the first
        lines += [f"and.b32 t{i}, t{i}, t{i + half};" for i in range(half)]
        half //= 2
    lines += ["setp.ne.b32 moved, t0, 0x3F800000;", "vote.sync.any.pred moved, moved, 0xFFFFFFFF;"]
    lines += [f"mov.b32 x{i}, ${n + i};" for i in range(n)]
    lines += ["@!moved bra KEPT;"]
    lines += [f"mul.f32 x{i}, x{i}, ${2 * n + i};" for i in range(n)]
    lines += ["KEPT:"] + [f"mov.b32 ${i}, x{i};" for i in range(n)] + ["}"]
    return "\n".join(lines)


@triton.constexpr_function
def _skipping_constraints(n):
    return ",".join(["=f"] * n + ["f"] * (2 * n))


@triton.jit
def _rescale(acc, row_scale, WARP_SKIP_ELEMENTS: tl.constexpr):
    if WARP_SKIP_ELEMENTS == 0:
        return acc * row_scale[:, None]
    else:
        return tl.inline_asm_elementwise(
            _skipping_multiply(WARP_SKIP_ELEMENTS), _skipping_constraints(WARP_SKIP_ELEMENTS),
            [acc, tl.broadcast_to(row_scale[:, None], acc.shape)],
            dtype=tl.float32, is_pure=True, pack=WARP_SKIP_ELEMENTS,
        )  # fmt: skip


@triton.jit
def _softmax_step(
    scores, scale, row_ref, row_sum, acc,
    RESCALE_THRESHOLD: tl.constexpr, WARP_SKIP_ELEMENTS: tl.constexpr, ISA: tl.constexpr,
):  # fmt: skip
    """Online softmax of a block of scores [M, N]: p = exp2(scores * scale - row_ref), and the
    running row_ref [M], row_sum [M, splits] and output acc [M, D], rescaled to row_ref. Everything
    is in powers of two: `scale` contains log2(e) and is positive, so a score costs one fused
    multiply-add and one exp2.

    row_ref is a lagging reference, not the row's maximum. It follows the maximum only where that
    is more than RESCALE_THRESHOLD above it. So p is at most 2^RESCALE_THRESHOLD, and most blocks
    leave the output as it is. WARP_SKIP_ELEMENTS: how many numbers of the output a thread may skip
    at a time; 0 always multiplies.

    row_ref is finite after a row's first block: that block must hold a key that the row sees.
    """
    top = tl.max(scores, 1) * scale
    if RESCALE_THRESHOLD == 0.0:
        new_ref = tl.maximum(row_ref, top)
    else:
        new_ref = tl.where(top > row_ref + RESCALE_THRESHOLD, top, row_ref)
    if ISA == "f32x2":
        factor = tl.full(scores.shape, 0.0, tl.float32) + scale
        below = tl.broadcast_to(-new_ref[:, None], scores.shape)
        p = tl.exp2(_multiply_add_pairs(scores, factor, below))
    else:
        p = tl.exp2(scores * scale - new_ref[:, None])
    row_scale = tl.exp2(row_ref - new_ref)
    ROW_SUM_SPLITS: tl.constexpr = row_sum.shape[1]
    parts = p.reshape(p.shape[0], p.shape[1] // ROW_SUM_SPLITS, ROW_SUM_SPLITS)
    row_sum = row_sum * row_scale[:, None] + tl.sum(parts, 1)
    return p, new_ref, row_sum, _rescale(acc, row_scale, WARP_SKIP_ELEMENTS)


@triton.jit
def score_block(
    q, k, offs_key, bound, scale, row_ref, row_sum, acc,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
    RESCALE_THRESHOLD: tl.constexpr, WARP_SKIP_ELEMENTS: tl.constexpr, ISA: tl.constexpr,
):  # fmt: skip
    """p of a block of keys, [M, N], and the rescaled state; the caller adds p x V. If MASKED,
    packed row i sees the keys below bound[i]. The other constants: see `_softmax_step`."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(offs_key[None, :] < bound[:, None], scores, float("-inf"))
    return _softmax_step(
        scores, scale, row_ref, row_sum, acc, RESCALE_THRESHOLD, WARP_SKIP_ELEMENTS, ISA
    )
