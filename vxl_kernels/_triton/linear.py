"""`x @ weight.T + bias` in one launch, with one set of weights for raw rows and one for VST rows.

Tiles of both kinds share a grid. So the few VST tiles (one row in ratio + 1) run in the last wave
of the raw tiles, and the results need no copy to be joined.
"""

import triton
import triton.language as tl

from .primitives import chunk_row

__all__ = ["linear_kernel", "multiply_rows"]

_LENGTHS = ["batch", "window", "ratio", "chunks"]


@triton.jit
def multiply_rows(
    a_ptrs, b_ptrs, offs_k, IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`a @ b.T` in float32: BLOCK_M rows by BLOCK_N rows of IN features, summed in one order."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, IN, BLOCK_K):
        if IN % BLOCK_K:
            in_k = offs_k < IN - start
            a = tl.load(a_ptrs + start, mask=in_k[None, :], other=0.0)
            b = tl.load(b_ptrs + start, mask=in_k[None, :], other=0.0)
        else:
            a = tl.load(a_ptrs + start)
            b = tl.load(b_ptrs + start)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=_LENGTHS)
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, vst_weight_ptr, vst_bias_ptr, out_ptr,
    x_batch, x_row, batch, window, ratio, chunks,
    OUT: tl.constexpr, IN: tl.constexpr, SPLIT: tl.constexpr,
    BIAS: tl.constexpr, VST_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: ((raw tiles + VST tiles) * tiles of OUT). x (batch, rows, IN) with dense features,
    weights (OUT, IN) and out (batch, rows, OUT) dense."""
    vsts = window // ratio
    rows = chunks * (window + vsts)
    raw_tiles = tl.cdiv(batch * chunks * window, BLOCK_M)
    tiles_m = raw_tiles + tl.cdiv(batch * chunks * vsts, BLOCK_M)
    tiles_n: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N

    # GROUP_M tiles of rows run together and share their weights in the L2 cache.
    pid = tl.program_id(0)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    i_m = first_m + within % group_m
    i_n = within // group_m

    # Rows of the tile, numbered within their kind over chunks and batch.
    is_vst = i_m >= raw_tiles
    each = tl.where(is_vst, vsts, window)
    count = batch * chunks * each
    number = tl.where(is_vst, i_m - raw_tiles, i_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    stored = number < count
    number = tl.minimum(number, count - 1)
    i_batch = number // (chunks * each)
    chunk = number // each % chunks
    row = chunk_row(is_vst, number % each, chunk, window, ratio, chunks, SPLIT)
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_n = offs_n < OUT

    row_at = i_batch.to(tl.int64) * x_batch + row.to(tl.int64) * x_row
    x_ptrs = x_ptr + row_at[:, None] + offs_k[None, :]
    w_at = tl.minimum(offs_n, OUT - 1).to(tl.int64) * IN
    if is_vst:
        w_ptrs = vst_weight_ptr + w_at[:, None] + offs_k[None, :]
    else:
        w_ptrs = weight_ptr + w_at[:, None] + offs_k[None, :]
    acc = multiply_rows(x_ptrs, w_ptrs, offs_k, IN, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)

    if BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < tl.where(is_vst, 0, OUT), other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if VST_BIAS:
        bias = tl.load(vst_bias_ptr + offs_n, mask=offs_n < tl.where(is_vst, OUT, 0), other=0.0)
        acc += bias.to(tl.float32)[None, :]
    out_row = i_batch.to(tl.int64) * rows + row
    out_ptrs = out_ptr + out_row[:, None] * OUT + offs_n[None, :]
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=stored[:, None] & in_n[None, :])
