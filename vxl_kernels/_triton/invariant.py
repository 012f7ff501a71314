"""`x @ weight.T + bias` for few rows. A row has the same bits in every batch.

Weights are the left operand, so that their rows fill the matrix instruction and a row of x is one
of its columns. Every call has the same tiles, and a column is summed over `IN` in one order, so the
number of rows changes no bit. Tiles of rows that share a tile of weights are neighbours in the
grid: the first brings it into the L2 cache.
"""

import triton
import triton.language as tl

from .linear import multiply_rows

__all__ = ["invariant_linear_kernel"]


@triton.jit(do_not_specialize=["rows"])
def invariant_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, x_row, rows,
    OUT: tl.constexpr, IN: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of OUT * tiles of rows). x (rows, IN) with dense features, weight (OUT, IN) and
    out (rows, OUT) dense. BLOCK_M rows of weight, BLOCK_N rows of x."""
    tiles = tl.cdiv(rows, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = pid // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_m = offs_m < OUT

    w_at = tl.minimum(offs_m, OUT - 1).to(tl.int64) * IN
    x_at = tl.minimum(offs_n, rows - 1).to(tl.int64) * x_row
    w_ptrs = weight_ptr + w_at[:, None] + offs_k[None, :]
    x_ptrs = x_ptr + x_at[:, None] + offs_k[None, :]
    acc = multiply_rows(w_ptrs, x_ptrs, offs_k, IN, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)

    if BIAS:
        bias = tl.load(bias_ptr + offs_m, mask=in_m, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    out_ptrs = out_ptr + offs_n.to(tl.int64)[None, :] * OUT + offs_m[:, None]
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=in_m[:, None] & (offs_n < rows)[None, :])
