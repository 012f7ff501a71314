"""The public operators. All tensors are `(batch, rows, heads, head_dim)`.

The cache is paged as in FlashAttention and FlashInfer: `k_cache, v_cache (pages, page_size,
kv_heads, head_dim)`, `block_table (batch, max_pages)` int32, `cache_seqlens (batch,)` int32 =
tokens kept before the call. A plain contiguous cache is one page a sequence. K in the cache
is stored rotated at its final position and never touched again.

`layout` is a `ChunkLayout`, or None for ordinary tokens (prompt, text, decode).

`backend` is "cpu", "triton", "reference", or None for the device's own. A named backend
that cannot serve raises a ValueError with every reason; it never falls back.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch

from . import _ext, _triton, checks, gradients, ops, reference  # noqa: F401  gradients registers itself
from .layout import ChunkLayout

__all__ = ["backends", "rope_append", "vst_attention", "vst_linear"]

Backend = Literal["cpu", "triton", "reference"]
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _cpu_reasons(x: torch.Tensor | None) -> list[str]:
    """Why the CPU kernels cannot serve x (or anything, for None)."""
    reasons = []
    if _ext.extension is None:
        reasons.append(f"the extension is not built or does not load ({_ext.reason_missing})")
    if x is not None and x.device.type != "cpu":
        reasons.append(f"tensors are on {x.device}")
    if x is not None and x.dtype not in _CPU_DTYPES:
        reasons.append(f"dtype {x.dtype} is not float32, bfloat16 or float16")
    return reasons


_REASONS = {"cpu": _cpu_reasons, "triton": _triton.reasons, "reference": lambda x: []}


def backends() -> dict[str, list[str]]:
    """Every backend with the reasons why it cannot run here; an empty list means it can."""
    return {name: reasons(None) for name, reasons in _REASONS.items()}


def _interpret(backend: str | None, name: str, *tensors: torch.Tensor | None) -> bool:
    """True for Triton's interpreter, which serves CPU tensors past the dispatcher."""
    if backend != "triton" or (tensors[0] is not None and tensors[0].device.type != "cpu"):
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(f"{name}: got inputs that require a gradient, the interpreter has none")
    return True


def _use_reference(backend: str | None, x: torch.Tensor) -> bool:
    """Refuses a backend that cannot serve; True if the reference was asked for."""
    if backend is not None and backend not in _REASONS:
        checks.fail("backend", repr(backend), "'cpu', 'triton', 'reference' or None")
    if backend is None:
        if x.device.type == "cpu" and x.dtype == torch.float64:
            checks.fail("q", x.dtype, "float32, bfloat16 or float16 (or backend='reference')")
        return False
    reasons = _REASONS[backend](x)
    if reasons:
        raise ValueError(f"backend {backend!r} cannot serve this call: {'; '.join(reasons)}")
    return backend == "reference"


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
    backend: Backend | None = ...,
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
    backend: Backend | None = ...,
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
        scale: of the scores before the softmax; default `head_dim ** -0.5`.
        return_lse: also return the log-sum-exp of the scaled scores, natural logarithm.

    Returns:
        `(batch, rows, heads, head_dim)` in q's dtype, and with `return_lse` also float32
        `(batch, heads, rows)`. Differentiable in q, k, v and the cache.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on a CPU also a block table entry
            outside k_cache, too few pages, or a negative length. Nothing is computed then.

    Source: Video-XL section 3.2 (chunks, VSTs); published `Qwen2SdpaAttention.forward`.
    """
    checks.qkv_shapes(q, k, v, layout)
    needed = layout is not None and layout.chunks > 1  # later chunks see earlier VSTs there
    checks.cache_shapes(k, k_cache, v_cache, block_table, cache_seqlens, required=needed)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    cache = (k_cache, v_cache, block_table, cache_seqlens)
    if _use_reference(backend, q):
        out, lse = reference.vst_attention(q, k, v, *cache, layout, scale)
    elif _interpret(backend, "vst_attention", q, k, v, k_cache, v_cache):
        ints = ops.layout_to_ints(layout)
        out, lse = _triton.kernels().vst_attention(q, k, v, *cache, ints, scale)
    else:
        ints = ops.layout_to_ints(layout)
        out, lse = torch.ops.vxl.vst_attention(q, k, v, *cache, ints, scale)
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
    backend: Backend | None = None,
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
        ValueError: as `vst_attention`, before anything is written; and for `inplace` with an
            input that requires a gradient.

    Source: Video-XL section 3.2; positions as measured on the published code, which keeps K
    unrotated and rotates the whole cache anew in every layer of every chunk.
    """
    checks.qkv_shapes(q, k, v, layout)
    checks.cache_shapes(k, k_cache, v_cache, block_table, cache_seqlens, required=True)
    checks.inv_freq_shape(inv_freq, k)
    checks.writable(k_cache=k_cache, v_cache=v_cache)
    if inplace:
        checks.writable(q=q, k=k)
    use_reference = _use_reference(backend, q)
    wants_grad = torch.is_grad_enabled() and any(
        x.requires_grad for x in (q, k, v, k_cache, v_cache)
    )
    if wants_grad and inplace:
        raise ValueError(
            "inplace: got True with inputs that require a gradient, expected False (or "
            "torch.no_grad(), for inference)"
        )
    cache = (k_cache, v_cache, block_table, cache_seqlens)
    if use_reference:
        rotated = reference.rope_append(q, k, v, *cache, layout, inv_freq)
        if inplace:
            return q.copy_(rotated[0]), k.copy_(rotated[1])
        return rotated
    ints = ops.layout_to_ints(layout)
    inv_freq = inv_freq.float()
    if _interpret(backend, "rope_append", q, k, v):
        launcher = _triton.kernels()
        if inplace:
            launcher.rope_append_(q, k, v, *cache, ints, inv_freq)
            return q, k
        return launcher.rope_append(q, k, v, *cache, ints, inv_freq)
    # Where the extension has CUDA kernels, the ops are those: a named Triton has ops of its own.
    names = ops.LAUNCHES if backend == "triton" else {}
    name = "rope_append_" if inplace else "rope_append_copy" if wants_grad else "rope_append"
    op = getattr(torch.ops.vxl, names.get(name, name))
    done = op(q, k, v, *cache, ints, inv_freq)
    if inplace:
        return q, k
    if wants_grad:
        q, k, *caches = done
        k_cache.copy_(caches[0])
        v_cache.copy_(caches[1])
        return q, k
    return done


def vst_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vst_weight: torch.Tensor | None,
    vst_bias: torch.Tensor | None,
    layout: ChunkLayout | None,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Raw rows through one weight set, VST rows through the other.

    Args:
        x: `(batch, rows, in_features)`.
        weight, vst_weight: `(out_features, in_features)`; vst_weight may be None without a
            layout.
        bias, vst_bias: `(out_features,)` or None.
        layout: what the rows are; None sends all through `weight`.
        backend: by default the platform's own dense products, for any device and dtype, or on
            a GPU in inference the one launch of "triton" where it is modelled to be faster.
            With a gradient wanted, "triton" takes the two products on a GPU.

    Returns:
        `(batch, rows, out_features)`; differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: `beacon_{q,k,v}_proj` of the published code, which computes both sets for
    every row and chooses afterwards.
    """
    sets = {"weight": weight, "bias": bias, "vst_weight": vst_weight, "vst_bias": vst_bias}
    checks.linear_shapes(x, sets, layout)
    if backend is not None and _use_reference(backend, x):
        return reference.vst_linear(x, weight, bias, vst_weight, vst_bias, layout)
    ints = ops.layout_to_ints(layout)
    args = (x, weight, bias, vst_weight, vst_bias)
    if _interpret(backend, "vst_linear", *args):
        return _triton.kernels().vst_linear(*args, ints)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args)
    if backend == "triton" and not wants_grad:  # the one launch has no gradient
        return torch.ops.vxl.vst_linear_one_launch(*args, ints)
    return torch.ops.vxl.vst_linear(*args, ints)
