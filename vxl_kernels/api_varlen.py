"""The public operators of ragged calls: sequences of any lengths and layouts in one call.

Tensors are flat, `(rows, heads, head_dim)`, in the order of a `VarlenLayout`: the raw rows of all
sequences, then all VST rows. Everything else is as in `api.py`.
"""

from __future__ import annotations

import math

import torch

from . import checks, reference
from ._arguments import finite
from ._backends import chosen
from .api import _append, _autocast, _cast, _is_plain
from .varlen import VarlenLayout

__all__ = ["rope_append_varlen", "vst_attention_varlen"]


def vst_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    layout: VarlenLayout | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
):
    """`vst_attention` of sequences with different rows and layouts, in one launch.

    On a CPU, where the block tables of several short sequences (ordinary tokens, up to 672 rows x
    query heads of a KV head) name the same pages for a range of keys, these keys are read once for
    all of their rows. Forks of a `VstCache` sequence share pages in this way. No argument says who
    shares. In Triton, texts of equal numbers of rows share tiles in this way.

    For finite inputs, the result of a sequence has the same bits as in a call of its own, no matter
    which sequences share its pages. On a CPU, `vst_attention` gives these bits too.

    Args:
        q: `(rows, heads, head_dim)`, rotated; head_dim 16 to 256.
        k, v: `(rows, kv_heads, head_dim)`, k rotated; heads a multiple of kv_heads.
        k_cache, v_cache: `(pages, page_size, kv_heads, head_dim)`; None (all four) for no cache.
        block_table: int32 `(sequences, max_pages)`, page indices of each sequence.
        cache_seqlens: int32 `(sequences,)`, tokens kept before this call.
        layout: what the rows are.
        scale: of the scores before the softmax, any finite number; default `head_dim ** -0.5`.
        return_lse: also return the log-sum-exp of the scaled scores, natural logarithm.

    Returns:
        `(rows, heads, head_dim)` in q's dtype, and with `return_lse` also float32 `(heads, rows)`.
        Differentiable in q, k, v and the cache, as `vst_attention`.

    Raises:
        ValueError: as `vst_attention`; on a CPU also where `layout.table` does not fit the rows.
        NotImplementedError: as `vst_attention`.
    """
    dtype = _autocast(q)
    cache = (k_cache, v_cache, block_table, cache_seqlens)
    if dtype is not None:
        q, k, v = _cast(getattr(k_cache, "dtype", dtype), q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            out, lse = vst_attention_varlen(
                q, k, v, *cache, layout, scale, return_lse=True, backend=backend
            )
        return (out.to(dtype), lse) if return_lse else out.to(dtype)
    layout = checks.varlen_shapes(q, k, v, layout)
    needed = layout.chunks > len(layout)  # later chunks see earlier VSTs in the cache
    checks.cache_shapes(k[None], *cache, required=needed, batch=len(layout))
    scale = 1.0 / math.sqrt(q.shape[2]) if scale is None else finite("scale", scale)
    name = chosen(backend, "vst_attention_varlen", q)
    args = (q, k, v, *cache, layout.table, layout.chunks, scale)
    if _is_plain(name):
        out, lse = reference.vst_attention_varlen(*args)
    else:
        checks.transforms("vst_attention_varlen", q, k, v, k_cache, v_cache)
        out, lse = torch.ops.vxl.vst_attention_varlen(*args, name)
    return (out, lse) if return_lse else out


def rope_append_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    layout: VarlenLayout,
    inv_freq: torch.Tensor,
    *,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope_append` of sequences with different rows and layouts, in one launch.

    Args:
        q: `(rows, heads, head_dim)`, not rotated; head_dim even.
        k, v: `(rows, kv_heads, head_dim)`, k not rotated.
        k_cache, v_cache: `(pages, page_size, kv_heads, head_dim)`, written in place.
        block_table: int32 `(sequences, max_pages)` with room for the appended tokens, which are
            `layout.appended()`.
        cache_seqlens: int32 `(sequences,)`, tokens kept before this call; not changed.
        layout: what the rows are.
        inv_freq: float32 `(head_dim / 2,)`, rotation per position in radians.
        inplace: overwrite q and k and return them: no new memory, for inference.

    Returns:
        q and k rotated. Differentiable as `rope_append`.

    Raises:
        ValueError: as `rope_append`, before anything is written.
    """
    cache = (k_cache, v_cache, block_table, cache_seqlens)
    if _autocast(q) is not None:
        q_cast, k_cast, v_cast = _cast(getattr(k_cache, "dtype", q.dtype), q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            rotated = rope_append_varlen(
                q_cast, k_cast, v_cast, *cache, layout, inv_freq, inplace=inplace, backend=backend
            )
            return (q.copy_(rotated[0]), k.copy_(rotated[1])) if inplace else rotated
    layout = checks.varlen_shapes(q, k, v, layout)
    checks.cache_shapes(k[None], *cache, required=True, batch=len(layout))
    checks.inv_freq_shape(inv_freq, k[None])
    return _append("rope_append_varlen", (q, k, v), cache, layout, inv_freq, inplace, backend)
