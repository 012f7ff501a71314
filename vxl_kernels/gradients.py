"""Gradients of the operators, registered with torch.library.

`vst_attention` has a backward operator of its own; `rope_append`'s gradient is a rotation the
other way, which its kernel does too; `vst_linear`'s is products. Each goes back by the backend
that it came by.
"""

from __future__ import annotations

import torch

from . import ops  # noqa: F401  it defines the operators
from ._backends import BACKENDS
from .layout import layout_from_ints
from .linear import vst_linear
from .reference import rotate

__all__: list[str] = []

# -- vst_attention ---------------------------------------------------------------------------


def _save_attention(ctx, inputs, output):
    *tensors, layout, scale, backend = inputs
    if backend and "vst_attention_backward" not in BACKENDS[backend].implements:
        raise ValueError(
            f"backend {backend!r} cannot serve this call: inputs require a gradient, it has none"
        )
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = layout, scale, backend


def _refuse_second_derivative(name: str) -> None:
    if torch.is_grad_enabled():  # create_graph=True: the result would silently be constant
        raise NotImplementedError(
            f"{name} has no second derivative; use backend='reference' for it"
        )


def _attention_backward(ctx, grad_out, grad_lse):
    _refuse_second_derivative("vst_attention")
    try:
        tensors = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(
            "vst_attention: k_cache, v_cache, block_table or cache_seqlens was written between the "
            "call and the backward pass. A loop over windows that is trained has to run under "
            "torch.autograd.graph.allow_mutation_on_saved_tensors()"
        ) from error
    k_cache = tensors[3]
    dq, dk, dv, dk_cache, dv_cache = torch.ops.vxl.vst_attention_backward(
        grad_out, grad_lse, *tensors, *ctx.settings
    )
    if k_cache is None:
        dk_cache = dv_cache = None
    return dq, dk, dv, dk_cache, dv_cache, None, None, None, None, None


torch.library.register_autograd(
    "vxl::vst_attention", _attention_backward, setup_context=_save_attention
)

# -- rope_append -----------------------------------------------------------------------------


def _save_rope(ctx, inputs, output):
    _, k, v, k_cache, _, block_table, cache_seqlens, layout, inv_freq, backend = inputs
    ctx.save_for_backward(block_table, cache_seqlens, inv_freq)
    ctx.layout, ctx.backend = layout, backend
    ctx.v_shape, ctx.rows, ctx.page_size = v.shape, k.shape[1], k_cache.shape[1]


def _rope_backward(ctx, dq_out, dk_out, dk_cache, dv_cache):
    """dq_out, dk_out as q and k; dk_cache, dv_cache as the caches that came out."""
    _refuse_second_derivative("rope_append")
    block_table, cache_seqlens, inv_freq = ctx.saved_tensors
    # What the kernel appends on this way back goes to pages that nobody reads.
    unread = torch.empty_like(dk_cache), torch.empty_like(dk_cache)
    dv = dk_out.new_zeros(ctx.v_shape)
    rest = block_table, cache_seqlens, ctx.layout, -inv_freq, ctx.backend
    dq, dk = torch.ops.vxl.rope_append(dq_out, dk_out, dv, *unread, *rest)
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
    return dq, dk, dv, dk_cache, dv_cache, None, None, None, None, None


torch.library.register_autograd("vxl::rope_append_copy", _rope_backward, setup_context=_save_rope)

# -- vst_linear -------------------------------------------------------------------------------


def _save_linear(ctx, inputs, output):
    *tensors, layout, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.layout = layout_from_ints(layout)


def _linear_backward(ctx, grad):
    x, weight, bias, vst_weight, vst_bias = ctx.saved_tensors
    layout = ctx.layout
    turned = weight.T, None, None if vst_weight is None else vst_weight.T, None
    of_sets = [None] * 4
    parts = zip(*((t,) if layout is None else layout.split_rows(t) for t in (grad, x)), strict=True)
    for i, (dy, rows) in enumerate(parts):
        of_sets[2 * i] = dy.flatten(0, 1).T @ rows.flatten(0, 1)
        if (bias, vst_bias)[i] is not None:
            of_sets[2 * i + 1] = dy.sum((0, 1))
    return vst_linear(grad, *turned, layout), *of_sets, None, None


torch.library.register_autograd("vxl::vst_linear", _linear_backward, setup_context=_save_linear)
