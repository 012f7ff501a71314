"""Gradients of the operators, registered with torch.library.

`vst_attention` has a backward operator of its own; `rope_append`'s gradient is a rotation the
other way, which its kernel does too; `vst_linear` is made of differentiable products.
"""

from __future__ import annotations

import functools

import torch

from .ops import layout_from_ints
from .reference import rotate

__all__: list[str] = []

# -- vst_attention ---------------------------------------------------------------------------


def _save_attention(ctx, inputs, output):
    *tensors, layout, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.layout, ctx.scale = layout, scale


def _refuse_second_derivative(name: str) -> None:
    if torch.is_grad_enabled():  # create_graph=True: the result would silently be constant
        raise NotImplementedError(
            f"{name} has no second derivative; use backend='reference' for it"
        )


def _attention_backward(ctx, grad_out, grad_lse):
    _refuse_second_derivative("vst_attention")
    tensors = ctx.saved_tensors
    k_cache = tensors[3]
    dq, dk, dv, dk_cache, dv_cache = torch.ops.vxl.vst_attention_backward(
        grad_out, grad_lse, *tensors, ctx.layout, ctx.scale
    )
    if k_cache is None:
        dk_cache = dv_cache = None
    return dq, dk, dv, dk_cache, dv_cache, None, None, None, None


torch.library.register_autograd(
    "vxl::vst_attention", _attention_backward, setup_context=_save_attention
)

# -- rope_append -----------------------------------------------------------------------------


def _save_rope(ctx, inputs, output):
    _, k, v, k_cache, _, block_table, cache_seqlens, layout, inv_freq = inputs
    ctx.save_for_backward(block_table, cache_seqlens, inv_freq)
    ctx.layout, ctx.v_shape, ctx.rows, ctx.page_size = layout, v.shape, k.shape[1], k_cache.shape[1]


def _rope_backward(append, ctx, dq_out, dk_out, dk_cache, dv_cache):
    """append: the op that rotates, by its name; dq_out, dk_out as q and k; dk_cache, dv_cache as
    the caches that came out."""
    _refuse_second_derivative("rope_append")
    block_table, cache_seqlens, inv_freq = ctx.saved_tensors
    # What the kernel appends on this way back goes to pages that nobody reads.
    unread = torch.empty_like(dk_cache), torch.empty_like(dk_cache)
    dv = dk_out.new_zeros(ctx.v_shape)
    dq, dk = getattr(torch.ops.vxl, append)(
        dq_out, dk_out, dv, *unread, block_table, cache_seqlens, ctx.layout, -inv_freq
    )
    # A kept row also got the gradient of its cache entry, rotated to another position.
    layout = layout_from_ints(ctx.layout)
    device = dk.device
    rows = torch.arange(ctx.rows, device=device) if layout is None else layout.vst_rows(device)
    slots = cache_seqlens[:, None] + torch.arange(len(rows), device=device)
    pages = block_table.gather(1, slots // ctx.page_size).long()
    at = (pages, slots % ctx.page_size)
    batch, kept = slots.shape
    entries = dk_cache[at].flatten(0, 1)
    back = rotate(entries, slots.flatten(), -inv_freq).unflatten(0, (batch, kept))
    dk = dk.index_add(1, rows, back)
    dv = dv.index_copy(1, rows, dv_cache[at])
    zero = dk_cache.new_zeros(())
    dk_cache, dv_cache = (x.index_put(at, zero) for x in (dk_cache, dv_cache))
    return dq, dk, dv, dk_cache, dv_cache, None, None, None, None


for _copy, _append in (
    ("rope_append_copy", "rope_append"),
    ("rope_append_copy_launch", "rope_append_launch"),
):
    torch.library.register_autograd(
        f"vxl::{_copy}", functools.partial(_rope_backward, _append), setup_context=_save_rope
    )
