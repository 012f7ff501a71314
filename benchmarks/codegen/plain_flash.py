"""The baseline of `machine_code.py`: flash attention 2, forward, as Triton's tutorial teaches it.

Contiguous K and V of `(batch, heads, rows, head_dim)`, as many key heads as query heads, one
tile of query rows of one head per program, a loop over full tiles and one over the tiles that
the causal diagonal crosses. It has nothing of Video-XL: what the
project's own kernel adds (pages, positions, chunks, packed heads) must cost nothing in the hot
loop.

Its result is tested in the interpreter (tests/benchmarks/test_codegen_compiled.py). It is given
its best configuration: machine_code.py compiles every entry of `sweep()` and compares with the
one that its own model likes best.
"""

# ruff: noqa: N803 - compile-time constants of a kernel are upper case
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vxl_kernels._triton.catalog import Compilation

__all__ = ["plain_flash", "plain_flash_kernel", "sweep"]


@triton.jit
def _load(
    source,
    first,
    limit,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows `first` to `first + ROWS` of K or V; those from `limit` on are zero if MASKED, and
    always with a descriptor."""
    if TMA:
        rows = source.load([first, 0])
    else:
        # one address a block and 32-bit offsets from it, which stay the same: a tile of pointers
        # that is carried through the loop takes twice the registers, and spills
        o_rows = tl.arange(0, ROWS)[:, None]
        pointers = source + first * D + (o_rows * D + tl.arange(0, D)[None, :])
        if MASKED:
            rows = tl.load(pointers, mask=first + o_rows < limit, other=0.0)
        else:
            rows = tl.load(pointers)
    return rows


@triton.jit
def _tiles(
    acc,
    l_i,
    m_i,
    q,
    k_source,
    v_source,
    qk_scale,
    start,
    stop,
    o_rows,
    n_rows,
    BN: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    for first in tl.range(start, stop, BN):
        k = _load(k_source, first, n_rows, BN, D, MASKED, TMA)  # [BN, D]
        s = tl.dot(q, k.T)  # [BM, BN]
        if MASKED:
            seen = o_rows[:, None] >= first + tl.arange(0, BN)[None, :]
            s = tl.where(seen, s, -1.0e30)
        # the scale is positive, so that it may be applied to the maximum alone
        m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
        p = tl.exp2(s * qk_scale - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = _load(v_source, first, n_rows, BN, D, MASKED, TMA)  # [BN, D]
        acc = tl.dot(p.to(v.dtype), v, acc)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit
def plain_flash_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    scale,
    n_rows,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    TMA: tl.constexpr,
):
    # the last tiles have the most keys and go first
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_head = tl.program_id(1).to(tl.int64)
    base = i_head * n_rows * D
    o_rows = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, D)
    p_rows = o_rows[:, None] * D + o_d[None, :]  # [BM, D]
    q = tl.load(q_ptr + base + p_rows, mask=o_rows[:, None] < n_rows, other=0.0)

    if TMA:
        k_source = tl.make_tensor_descriptor(k_ptr + base, [n_rows, D], [D, 1], [BN, D])
        v_source = tl.make_tensor_descriptor(v_ptr + base, [n_rows, D], [D, 1], [BN, D])
    else:
        k_source = k_ptr + base
        v_source = v_ptr + base

    acc = tl.zeros([BM, D], dtype=tl.float32)
    l_i = tl.zeros([BM], dtype=tl.float32)
    m_i = tl.full([BM], -1.0e30, dtype=tl.float32)
    qk_scale = scale * 1.4426950408889634
    # BM is a multiple of BN: the tiles before the diagonal are full
    acc, l_i, m_i = _tiles(
        acc,
        l_i,
        m_i,
        q,
        k_source,
        v_source,
        qk_scale,
        0,
        i_m * BM,
        o_rows,
        n_rows,
        BN,
        D,
        False,
        TMA,
    )
    acc, l_i, m_i = _tiles(
        acc,
        l_i,
        m_i,
        q,
        k_source,
        v_source,
        qk_scale,
        i_m * BM,
        tl.minimum((i_m + 1) * BM, n_rows),
        o_rows,
        n_rows,
        BN,
        D,
        True,
        TMA,
    )
    # program_id(2) is always 0 but opaque to the compiler, which then recomputes addresses
    # instead of keeping them in registers through both loops
    o_rows += tl.program_id(2)
    p_rows = o_rows[:, None] * D + o_d[None, :]  # [BM, D]
    out = acc / l_i[:, None]
    tl.store(
        out_ptr + base + p_rows, out.to(out_ptr.dtype.element_ty), mask=o_rows[:, None] < n_rows
    )


def plain_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    *,
    rows: int = 64,
    keys: int = 32,
    tma: bool = False,
) -> torch.Tensor:
    """Causal attention of contiguous `(batch, heads, rows, head_dim)` tensors; a GPU or the
    interpreter. `rows` and `keys` are the tile; `rows` must be a multiple of `keys`."""
    if rows % keys:
        raise ValueError(f"rows={rows} must be a multiple of keys={keys}")
    batch, heads, n_rows, head_dim = q.shape
    q, k, v = (t.contiguous() for t in (q, k, v))
    out = torch.empty_like(q)
    plain_flash_kernel[(triton.cdiv(n_rows, rows), batch * heads)](
        q,
        k,
        v,
        out,
        head_dim**-0.5 if scale is None else scale,
        n_rows,
        BM=rows,
        BN=keys,
        D=head_dim,
        TMA=tma,
    )
    return out


def _compilation(
    rows: int, keys: int, warps: int, stages: int, tma: bool, head_dim: int, dtype: str
) -> Compilation:
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}")
    constexprs: dict[str, object] = {"BM": rows, "BN": keys, "D": head_dim, "TMA": tma}
    return Compilation(
        kernel="plain_flash",
        config=f"{rows}x{keys} w{warps} s{stages}" + (" tma" if tma else ""),
        fn=plain_flash_kernel,
        signature={
            **pointers,
            "scale": "fp32",
            "n_rows": "i32",
            **dict.fromkeys(constexprs, "constexpr"),
        },
        constexprs=constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
        num_warps=warps,
        num_stages=stages,
        options={},
        tile={"rows": rows, "keys": keys, "head_dim": head_dim, "group": 1},
        head_dim=head_dim,
        dtype=dtype,
    )


def sweep(arch: str, *, head_dim: int = 128, dtype: str = "bf16") -> list[Compilation]:
    """The baseline's candidates on one architecture: the tutorial's own grid of tiles, warps and
    stages, without those that spill or do not fit. `arch` is "cuda:80", "cuda:90",
    "cuda:100" or "hip:gfx942"."""
    # (rows, keys, warps, stages)
    shapes = {
        "cuda:80": [
            (128, 32, 4, 3),
            (128, 32, 8, 3),
            (128, 64, 8, 3),
            (128, 64, 8, 2),
            (64, 64, 4, 3),
            (128, 128, 8, 2),
        ],
        "cuda:90": [(128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 4, 3), (128, 128, 8, 2)],
        "cuda:100": [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)],
        "hip:gfx942": [(128, 64, 4, 1), (128, 32, 4, 1), (64, 32, 2, 1), (128, 64, 4, 2)],
    }
    if arch not in shapes:
        raise ValueError(f"arch is {arch!r}, expected one of {', '.join(shapes)}")
    chosen = shapes[arch]
    if head_dim != 128:  # fewer candidates: wide tiles, and half of one where registers are short
        chosen = [s for s in chosen if s[0] == 128 and s[1] >= 64] or chosen[:1]
    if head_dim > 128:
        chosen = [(64, 64, 8, 2), (64, 32, 4, 2), *((m, n // 2, w, st) for m, n, w, st in chosen)]
    loads = (False, True) if arch in ("cuda:90", "cuda:100") else (False,)
    return [_compilation(*shape, tma, head_dim, dtype) for shape in chosen for tma in loads]
