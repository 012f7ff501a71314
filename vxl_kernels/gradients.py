"""Gradients of the operators, registered with torch.library.

`vst_attention` has a backward operator of its own; `rope_append`'s gradient is a rotation the
other way, which its kernel does too; those of the linear operators are products. `vst_attention`
and `rope_append` go back by the backend that they came by.
"""

from __future__ import annotations

import torch

from . import ops  # noqa: F401  it defines the operators
from ._backends import BACKENDS
from .layout import layout_from_ints
from .linear import vst_linear
from .reference import rotate
from .varlen import kept_rows

__all__: list[str] = []

# -- vst_attention ---------------------------------------------------------------------------


def _save_attention(ctx, inputs, output):
    *tensors, layout, scale, backend = inputs
    if backend and "vst_attention_backward" not in BACKENDS[backend].implements:
        raise ValueError(
            f"backend {backend!r} cannot run this call: inputs require a gradient, it has none"
        )
    ctx.save_for_backward(*tensors, *output)
    ctx.settings, ctx.others = (layout, scale, backend), 5


def _save_ragged(ctx, inputs, output):
    *tensors, layout, chunks, scale, backend = inputs
    if backend and "vst_attention_varlen_backward" not in BACKENDS[backend].implements:
        raise ValueError(
            f"backend {backend!r} cannot run this call: inputs require a gradient, it has none"
        )
    ctx.save_for_backward(*tensors, *output)
    ctx.settings, ctx.others = (layout, chunks, scale, backend), 6


def _refuse_second_derivative(name: str) -> None:
    if torch.is_grad_enabled():  # create_graph=True: the result would silently be constant
        raise NotImplementedError(
            f"{name} has no second derivative; use backend='reference' for it"
        )


def _attention_backward(op: str):
    def backward(ctx, grad_out, grad_lse):
        _refuse_second_derivative(op)
        try:
            tensors = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(
                f"{op}: k_cache, v_cache, block_table or cache_seqlens was written between the "
                "call and the backward pass. A loop over windows that is trained has to run under "
                "torch.autograd.graph.allow_mutation_on_saved_tensors()"
            ) from error
        k_cache = tensors[3]
        run = getattr(torch.ops.vxl, f"{op}_backward")
        dq, dk, dv, dk_cache, dv_cache = run(grad_out, grad_lse, *tensors, *ctx.settings)
        if k_cache is None:
            dk_cache = dv_cache = None
        return dq, dk, dv, dk_cache, dv_cache, *[None] * ctx.others

    return backward


for _op, _save in (("vst_attention", _save_attention), ("vst_attention_varlen", _save_ragged)):
    torch.library.register_autograd(f"vxl::{_op}", _attention_backward(_op), setup_context=_save)

# -- rope_append -----------------------------------------------------------------------------


def _save_rope(ctx, inputs, output):
    _, k, v, k_cache, _, block_table, cache_seqlens, layout, inv_freq, backend = inputs
    ctx.save_for_backward(block_table, cache_seqlens, inv_freq)
    ctx.layout, ctx.backend = layout, backend
    ctx.v_shape, ctx.rows, ctx.page_size = v.shape, k.shape[1], k_cache.shape[1]


def _entries_back(grads, rows, pages, slots, inv_freq):
    """Adds what kept rows got from their cache entries, rotated back from their final positions.
    grads: dk, dv `(rows, ...)` and those of the caches. rows: of the kept tokens. Returns all four,
    the caches without these entries."""
    dk, dv, dk_cache, dv_cache = grads
    at = pages, slots % dk_cache.shape[1]
    dk = dk.index_add(0, rows, rotate(dk_cache[at], slots, -inv_freq))
    dv = dv.index_copy(0, rows, dv_cache[at])
    zero = dk_cache.new_zeros(())
    return dk, dv, *(x.index_put(at, zero) for x in (dk_cache, dv_cache))


def _rope_backward(ctx, dq_out, dk_out, dk_cache, dv_cache):
    """dq_out, dk_out as q and k; dk_cache, dv_cache as the caches that came out."""
    _refuse_second_derivative("rope_append")
    block_table, cache_seqlens, inv_freq = ctx.saved_tensors
    # What the kernel appends on this way back goes to pages that nobody reads.
    unread = torch.empty_like(dk_cache), torch.empty_like(dk_cache)
    dv = dk_out.new_zeros(ctx.v_shape)
    rest = block_table, cache_seqlens, ctx.layout, -inv_freq, ctx.backend
    dq, dk = torch.ops.vxl.rope_append(dq_out, dk_out, dv, *unread, *rest)
    layout = layout_from_ints(ctx.layout)
    device = dk.device
    kept = torch.arange(ctx.rows, device=device) if layout is None else layout.vst_rows(device)
    batch = torch.arange(len(cache_seqlens), device=device)[:, None]
    rows = (batch * ctx.rows + kept).flatten()
    slots = cache_seqlens[:, None] + torch.arange(len(kept), device=device)
    pages = block_table.gather(1, slots // ctx.page_size).long().flatten()
    grads = dk.flatten(0, 1), dv.flatten(0, 1), dk_cache, dv_cache
    *grads, dk_cache, dv_cache = _entries_back(grads, rows, pages, slots.flatten(), inv_freq)
    dk, dv = (x.unflatten(0, dk.shape[:2]) for x in grads)
    return dq, dk, dv, dk_cache, dv_cache, None, None, None, None, None


torch.library.register_autograd("vxl::rope_append_copy", _rope_backward, setup_context=_save_rope)


def _save_ragged_rope(ctx, inputs, output):
    *_, block_table, cache_seqlens, layout, inv_freq, backend = inputs
    ctx.save_for_backward(block_table, cache_seqlens, layout, inv_freq)
    ctx.backend = backend


def _ragged_rope_backward(ctx, dq_out, dk_out, dk_cache, dv_cache):
    _refuse_second_derivative("rope_append_varlen")
    block_table, cache_seqlens, table, inv_freq = ctx.saved_tensors
    unread = torch.empty_like(dk_cache), torch.empty_like(dk_cache)
    dv = torch.zeros_like(dk_out)
    rest = block_table, cache_seqlens, table, -inv_freq, ctx.backend
    dq, dk = torch.ops.vxl.rope_append_varlen(dq_out, dk_out, dv, *unread, *rest)
    if not dk.numel():
        return dq, dk, dv, dk_cache, dv_cache, None, None, None, None, None
    # No number of rows is read from the table, as that would wait for a GPU.
    kept, sequences, entries = kept_rows(table, dk.shape[0])
    slots = (cache_seqlens[sequences] + entries) * kept
    pages, page_size = dk_cache.shape[:2]
    page = block_table[sequences, slots // page_size].long() * kept
    at = page, slots % page_size
    kept_heads = kept[:, None, None]
    dk = dk + torch.where(kept_heads, rotate(dk_cache[at], slots, -inv_freq), 0)
    dv = torch.where(kept_heads, dv_cache[at], dv)
    entry = torch.where(kept, page * page_size + slots % page_size, pages * page_size)
    written = torch.zeros(pages * page_size + 1, dtype=torch.bool, device=dk.device)
    written = written.index_fill_(0, entry, True)[:-1].view(pages, page_size, 1, 1)
    dk_cache, dv_cache = (x.masked_fill(written, 0) for x in (dk_cache, dv_cache))
    return dq, dk, dv, dk_cache, dv_cache, None, None, None, None, None


torch.library.register_autograd(
    "vxl::rope_append_varlen_copy", _ragged_rope_backward, setup_context=_save_ragged_rope
)

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

# -- invariant_linear -------------------------------------------------------------------------


def _save_invariant(ctx, inputs, output):
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.biased = bias is not None


def _invariant_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    of_weight = rows.T @ x.reshape(-1, x.shape[-1])
    return grad @ weight, of_weight, rows.sum(0) if ctx.biased else None, None


torch.library.register_autograd(
    "vxl::invariant_linear", _invariant_backward, setup_context=_save_invariant
)
