"""The public operators. All tensors are `(batch, rows, heads, head_dim)`.

The cache is paged as in FlashAttention and FlashInfer: `k_cache, v_cache (pages, page_size,
kv_heads, head_dim)`, `block_table (batch, max_pages)` int32, `cache_seqlens (batch,)` int32 =
tokens kept before the call. A plain contiguous cache is one page a sequence. K in the cache
is stored rotated at its final position and never touched again.

`layout` is a `ChunkLayout`, or None for ordinary tokens (prompt, text, decode).

`backend` is a name of `backends()` ("cpu", "triton", "reference"), or None for the device's own. A
named backend that cannot run the call raises a ValueError with every reason. It never falls back.

Under `torch.autocast` results have the dtype that it gives, as those of PyTorch's attention and
linear layers. What is rotated, kept and attended to has the cache's dtype where there is a cache:
rows are cast to it, the cache never is.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch

from . import checks, gradients, linear, reference  # noqa: F401  gradients: by import
from ._arguments import fail, finite
from ._backends import backends, chosen, serves
from .layout import ChunkLayout, layout_to_ints
from .varlen import VarlenLayout

__all__ = ["backends", "invariant_linear", "rope_append", "serves", "vst_attention", "vst_linear"]


def _is_plain(name: str) -> bool:
    """Whether to call the reference itself: autograd goes through it, twice if asked to. In a graph
    that is compiled it is an operator like any other backend, for it reads values."""
    return name == "reference" and not torch.compiler.is_compiling()


# Private to torch, and asked in every call. Without it the public question is, which is slower.
_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def _autocast(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that `torch.autocast` gives tensors like x, if it is on for their device."""
    if not _any_autocast() or not _is_cast(x):
        return None
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _is_cast(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _cast(dtype: torch.dtype, *tensors: Any) -> tuple[Any, ...]:
    return tuple(x.to(dtype) if _is_cast(x) else x for x in tensors)


@overload
def vst_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor | None = ...,
    v_cache: torch.Tensor | None = ...,
    block_table: torch.Tensor | None = ...,
    cache_seqlens: torch.Tensor | None = ...,
    layout: ChunkLayout | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...
@overload
def vst_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor | None = ...,
    v_cache: torch.Tensor | None = ...,
    block_table: torch.Tensor | None = ...,
    cache_seqlens: torch.Tensor | None = ...,
    layout: ChunkLayout | None = ...,
    scale: float | None = ...,
    *,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def vst_attention(
    q,
    k,
    v,
    k_cache=None,
    v_cache=None,
    block_table=None,
    cache_seqlens=None,
    layout=None,
    scale=None,
    return_lse=False,
    backend=None,
):
    """Attention of the rows of a call over `[cache | own chunk]`.

    Rows of chunk c see the first `cache_seqlens + c * layout.vsts_per_chunk` cache entries and,
    in their own chunk, the rows at or before their position. With `layout=None`: causal over
    `[cache | rows]`; one row a sequence is decode. The call's own rows are read from k and v,
    not from the cache, whether or not `rope_append` has put them there.

    Finite inputs: a sequence's result depends neither on the other sequences of the batch nor
    on the number of threads, to the bit. Inf or NaN in a sequence stays in that sequence, but
    which of its earlier rows it reaches is not defined (a masked key weighs 0, and 0 * inf is
    NaN).

    Args:
        q: `(batch, rows, heads, head_dim)`, rotated; head_dim 16 to 256.
        k, v: `(batch, rows, kv_heads, head_dim)`, k rotated; heads a multiple of kv_heads.
        k_cache, v_cache: `(pages, page_size, kv_heads, head_dim)`; None (all four) for no cache.
        block_table: int32 `(batch, max_pages)`, page indices of each sequence.
        cache_seqlens: int32 `(batch,)`, tokens kept before this call.
        layout: what the rows are.
        scale: of the scores before the softmax, any finite number; default `head_dim ** -0.5`.
        return_lse: also return the log-sum-exp of the scaled scores, natural logarithm.

    Returns:
        `(batch, rows, heads, head_dim)` in q's dtype, and with `return_lse` also float32
        `(batch, heads, rows)`. Differentiable in q, k, v and the cache. The backward pass needs the
        cache as it was. A loop over windows keeps writing to it, and is trained under
        `torch.autograd.graph.allow_mutation_on_saved_tensors()`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `scale` is not finite; on a CPU
            also a block table entry outside k_cache, too few pages, or a negative length. Nothing
            is computed then.
        NotImplementedError: inside `torch.func.grad`, `vjp` or `jvp`, or forward-mode AD, which
            only backend="reference" supports. `torch.vmap` runs one call after the other.

    Source: Video-XL section 3.2 (chunks, VSTs); published `Qwen2SdpaAttention.forward`.
    """
    dtype = _autocast(q)
    if dtype is not None:
        q, k, v = _cast(getattr(k_cache, "dtype", dtype), q, k, v)
        cache = (k_cache, v_cache, block_table, cache_seqlens)
        with torch.autocast(q.device.type, enabled=False):
            out, lse = vst_attention(
                q, k, v, *cache, layout, scale, return_lse=True, backend=backend
            )
        return (out.to(dtype), lse) if return_lse else out.to(dtype)
    checks.qkv_shapes(q, k, v, layout)
    needed = layout is not None and layout.chunks > 1  # later chunks see earlier VSTs there
    checks.cache_shapes(k, k_cache, v_cache, block_table, cache_seqlens, required=needed)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else finite("scale", scale)
    cache = (k_cache, v_cache, block_table, cache_seqlens)
    name = chosen(backend, "vst_attention", q)
    if _is_plain(name):
        out, lse = reference.vst_attention(q, k, v, *cache, layout, scale)
    else:
        ints = layout_to_ints(layout)
        checks.transforms("vst_attention", q, k, v, k_cache, v_cache)
        out, lse = torch.ops.vxl.vst_attention(q, k, v, *cache, ints, scale, name)
    return (out, lse) if return_lse else out


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    layout: ChunkLayout | None,
    inv_freq: torch.Tensor,
    *,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates q and k to their positions and appends what is kept to the cache.

    Row r of chunk c is rotated to position `cache_seqlens + c * vsts_per_chunk + r`. VST j of
    chunk c is written to cache entry `cache_seqlens + c * vsts_per_chunk + j`: its K rotated to
    that position, its final one, and its V. With `layout=None` every row is appended.
    `cache_seqlens` itself is not changed: attention of the same call takes the same lengths.

    Args:
        q: `(batch, rows, heads, head_dim)`, not rotated; head_dim even.
        k, v: `(batch, rows, kv_heads, head_dim)`, k not rotated.
        k_cache, v_cache: `(pages, page_size, kv_heads, head_dim)`, written in place.
        block_table: int32 `(batch, max_pages)` with room for the appended tokens.
        cache_seqlens: int32 `(batch,)`, tokens kept before this call.
        layout: what the rows are.
        inv_freq: float32 `(head_dim / 2,)`, rotation per position in radians.
        inplace: overwrite q and k and return them: no new memory, for inference.

    Returns:
        q and k rotated, in the half-split ("rotate_half") form. Differentiable in q, k, v and
        the caches, which then carry the history of what was appended; the two caches are
        copied for it.

    Raises:
        ValueError: as `vst_attention`, before anything is written; for `inplace` with an input
            that requires a gradient; and where what is written shares memory: elements of a
            tensor, two arguments, or on a CPU a page that two entries of block_table name.

    Source: Video-XL section 3.2; positions as measured on the published code, which keeps K
    unrotated and rotates the whole cache anew in every layer of every chunk.
    """
    cache = (k_cache, v_cache, block_table, cache_seqlens)
    if _autocast(q) is not None:
        call = (*_cast(getattr(k_cache, "dtype", q.dtype), q, k, v), *cache, layout, inv_freq)
        with torch.autocast(q.device.type, enabled=False):
            rotated = rope_append(*call, inplace=inplace, backend=backend)
            return (q.copy_(rotated[0]), k.copy_(rotated[1])) if inplace else rotated
    checks.qkv_shapes(q, k, v, layout)
    checks.cache_shapes(k, *cache, required=True)
    checks.inv_freq_shape(inv_freq, k)
    return _append("rope_append", (q, k, v), cache, layout, inv_freq, inplace, backend)


def _append(
    op: str,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    layout: ChunkLayout | VarlenLayout | None,
    inv_freq: torch.Tensor,
    inplace: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope_append` and `rope_append_varlen` (op) after their checks of shapes."""
    (q, k, v), (k_cache, v_cache, *_) = qkv, cache
    rows, caches = {"q": q, "k": k}, {"k_cache": k_cache, "v_cache": v_cache}
    checks.writable(caches | rows if inplace else caches, {**rows, "v": v})
    name = chosen(backend, f"{op}_" if inplace else op, q)
    wants_grad = torch.is_grad_enabled() and any(
        x.requires_grad for x in (q, k, v, k_cache, v_cache)
    )
    if wants_grad and inplace:
        raise ValueError(
            "inplace: got True with inputs that require a gradient, expected False (or "
            "torch.no_grad(), for inference)"
        )
    if _is_plain(name):
        given = layout.table if isinstance(layout, VarlenLayout) else layout
        rotated = getattr(reference, op)(*qkv, *cache, given, inv_freq)
        return (q.copy_(rotated[0]), k.copy_(rotated[1])) if inplace else rotated
    checks.transforms(op, q, k, v, k_cache, v_cache, writes=True)
    data = layout.table if isinstance(layout, VarlenLayout) else layout_to_ints(layout)
    args = (*qkv, *cache, data, inv_freq.float(), name)
    if inplace:
        getattr(torch.ops.vxl, f"{op}_")(*args)
        return q, k
    if not wants_grad:
        return getattr(torch.ops.vxl, op)(*args)
    q, k, new_k_cache, new_v_cache = getattr(torch.ops.vxl, f"{op}_copy")(*args)
    k_cache.copy_(new_k_cache)
    v_cache.copy_(new_v_cache)
    return q, k


def vst_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vst_weight: torch.Tensor | None,
    vst_bias: torch.Tensor | None,
    layout: ChunkLayout | VarlenLayout | None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Raw rows through one weight set, VST rows through the other.

    Args:
        x: `(batch, rows, in_features)`; `(rows, in_features)` with a `VarlenLayout`.
        weight, vst_weight: `(out_features, in_features)`; vst_weight may be None without a
            layout.
        bias, vst_bias: `(out_features,)` or None.
        layout: what the rows are; None sends all through `weight`.
        backend: by default the platform's own dense products, for any device and dtype. "triton"
            is one launch for both weight sets, and the two products where a gradient is wanted.

    Returns:
        x's shape with out_features; differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: `beacon_{q,k,v}_proj` of the published code, which computes both sets for
    every row and chooses afterwards.
    """
    sets = {"weight": weight, "bias": bias, "vst_weight": vst_weight, "vst_bias": vst_bias}
    dtype = _autocast(x)
    checks.linear_shapes(x, sets, layout, any_dtype=dtype is not None)
    args = (x, weight, bias, vst_weight, vst_bias)
    name = "" if backend is None else chosen(backend, "vst_linear", x)
    if _is_plain(name):
        return reference.vst_linear(*args, layout)
    if isinstance(layout, VarlenLayout):
        if name == "triton":
            fail("backend", repr(name), "None, 'cpu' or 'reference' with a VarlenLayout")
        return linear.vst_linear(*args, layout)
    # A kernel has no gradient to offer that the two products do not have.
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args):
        return linear.vst_linear(*args, layout)
    if name in ("", "cpu"):  # as PyTorch's own operations, which compilers and DTensor see through
        return linear.vst_linear(*args, layout)
    checks.transforms("vst_linear", *args)
    cast = args if dtype is None else _cast(dtype, *args)
    return torch.ops.vxl.vst_linear(*cast, layout_to_ints(layout), name)


def invariant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias` for few rows, such as those of a decoding step. The result of a row
    is bitwise independent of the other rows.

    The order of a row's sums depends only on `in_features`, not on the number of rows or threads.
    Products and sums are float32's, and the result is rounded once. Weights are read from memory
    once for all rows. `torch.nn.functional.linear` gives a row other bits in another batch, because
    matrix libraries choose their kernel by the number of rows.

    Args:
        x: `(..., in_features)`.
        weight: `(out_features, in_features)`, as `nn.Linear` holds it.
        bias: `(out_features,)` or None.

    Returns:
        `(..., out_features)` in x's dtype. Differentiable: the gradients are PyTorch's products,
        whose bits do depend on the batch.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: as `vst_attention`.
    """
    dtype = _autocast(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):  # it would cast the reference's products
            return invariant_linear(*_cast(dtype, x, weight, bias), backend=backend)
    checks.invariant_shapes(x, weight, bias)
    args = (x, weight, bias)
    name = chosen(backend, "invariant_linear", x, "x")
    if _is_plain(name):
        return reference.invariant_linear(*args)
    checks.transforms("invariant_linear", *args)
    return torch.ops.vxl.invariant_linear(*args, name)
