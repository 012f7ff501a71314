"""The operators as torch.library sees them: schema, fake, gradient and implementations.

Implementations are looked up when they are called: importing this file loads no backend
but the compiled CPU extension, which registers its own kernels for the CPU key.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from . import _ext, _triton
from .cache import page_ops
from .layout import ChunkLayout

__all__ = ["layout_from_ints", "layout_to_ints"]

# A layout crosses the dispatcher as [window, ratio, chunks, split]; [] is layout=None.
SCHEMAS = {
    "vst_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? k_cache, Tensor? v_cache, "
        "Tensor? block_table, Tensor? cache_seqlens, int[] layout, float scale) -> (Tensor, Tensor)"
    ),
    "vst_attention_backward": (
        "(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor? k_cache, "
        "Tensor? v_cache, Tensor? block_table, Tensor? cache_seqlens, Tensor out, Tensor lse, "
        "int[] layout, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "rope_append": (
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor block_table, Tensor cache_seqlens, int[] layout, Tensor inv_freq) "
        "-> (Tensor, Tensor)"
    ),
    "rope_append_copy": (
        "(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor block_table, "
        "Tensor cache_seqlens, int[] layout, Tensor inv_freq) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "rope_append_": (
        "(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor(c!) k_cache, Tensor(d!) v_cache, "
        "Tensor block_table, Tensor cache_seqlens, int[] layout, Tensor inv_freq) -> ()"
    ),
    "vst_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? vst_weight, Tensor? vst_bias, "
        "int[] layout) -> Tensor"
    ),
    # The same in one launch over both weight sets; without a gradient, for inference.
    "vst_linear_one_launch": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? vst_weight, Tensor? vst_bias, "
        "int[] layout) -> Tensor"
    ),
    # Pages of all layers, k_cache and v_cache (layers, pages, page_size, kv_heads, head_dim).
    # copies: int32 (n, 3), source page, target page, rows; targets are distinct and no
    # sources; rows == 0 marks an unused entry, so that n may be fixed in a CUDA graph.
    "copy_pages_": "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor copies) -> ()",
    # Rows [first, first + rows) of a sequence, (layers, rows, kv_heads, head_dim) dense.
    "gather_rows": ("(Tensor cache, Tensor block_table_row, SymInt first, SymInt rows) -> Tensor"),
    "scatter_rows_": (
        "(Tensor(a!) cache, Tensor block_table_row, SymInt first, Tensor rows) -> ()"
    ),
}

# What backend="triton" takes on a GPU, where the extension's own CUDA kernels have the first name.
LAUNCHES = {
    name: name[:-1] + "_launch_" if name.endswith("_") else name + "_launch"
    for name in ("rope_append", "rope_append_", "rope_append_copy")
}
SCHEMAS |= {launch: SCHEMAS[name] for name, launch in LAUNCHES.items()}

_library = torch.library.Library("vxl", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def layout_to_ints(layout: ChunkLayout | None) -> list[int]:
    if layout is None:
        return []
    return [layout.window, layout.ratio, layout.chunks, int(layout.order == "split")]


def layout_from_ints(ints: list[int]) -> ChunkLayout | None:
    if not ints:
        return None
    window, ratio, chunks, split = ints
    return ChunkLayout(window, ratio, chunks, "split" if split else "interleaved")


# -- fakes --------------------------------------------------------------------------------


@torch.library.register_fake("vxl::vst_attention", lib=_library)
def _(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, scale):
    batch, rows, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, rows), dtype=dtype)


@torch.library.register_fake("vxl::vst_attention_backward", lib=_library)
def _(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    k_cache,
    v_cache,
    block_table,
    cache_seqlens,
    out,
    lse,
    layout,
    scale,
):
    none = q.new_empty(0)
    caches = [none if c is None else c.new_empty(c.shape) for c in (k_cache, v_cache)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *caches


@torch.library.register_fake("vxl::rope_append", lib=_library)
@torch.library.register_fake("vxl::rope_append_launch", lib=_library)
def _(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("vxl::rope_append_copy", lib=_library)
@torch.library.register_fake("vxl::rope_append_copy_launch", lib=_library)
def _(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq):
    return tuple(x.new_empty(x.shape) for x in (q, k, k_cache, v_cache))


@torch.library.register_fake("vxl::rope_append_", lib=_library)
@torch.library.register_fake("vxl::rope_append_launch_", lib=_library)
def _(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq):
    return None


@torch.library.register_fake("vxl::vst_linear_one_launch", lib=_library)
def _(x, weight, bias, vst_weight, vst_bias, layout):
    return x.new_empty((*x.shape[:2], weight.shape[0]))


@torch.library.register_fake("vxl::copy_pages_", lib=_library)
def _(k_cache, v_cache, copies):
    return None


@torch.library.register_fake("vxl::gather_rows", lib=_library)
def _(cache, block_table_row, first, rows):
    return cache.new_empty((cache.shape[0], rows, *cache.shape[3:]))


@torch.library.register_fake("vxl::scatter_rows_", lib=_library)
def _(cache, block_table_row, first, rows):
    return None


# -- pages: plain PyTorch wherever the extension registers nothing better --------------------

for _name in ("copy_pages_", "gather_rows", "scatter_rows_"):
    _library.impl(_name, getattr(page_ops, _name), "CompositeExplicitAutograd")


# -- vst_linear: two dense products, the same on every device -----------------------------


def _one_launch_is_better(x, weight, bias, vst_weight, vst_bias, layout) -> bool:
    """On a GPU, in inference, where all tiles of both products fit the GPU at once. Two products
    are two rounds then, each as long as one tile takes; with more tiles than that, the library's
    faster product wins. Modelled, not measured: `_triton.one_wave`."""
    if x.device.type != "cuda" or not layout:
        return False
    tensors = (x, weight, bias, vst_weight, vst_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    return _triton.one_wave(x, weight, layout) and not _triton.reasons(x)


def _vst_linear(x, weight, bias, vst_weight, vst_bias, layout):
    if _one_launch_is_better(x, weight, bias, vst_weight, vst_bias, layout):
        args = (x, weight, bias, vst_weight, vst_bias, layout)
        return torch.ops.vxl.vst_linear_one_launch(*args)
    shape = layout_from_ints(layout)
    linear = torch.nn.functional.linear
    if shape is None:
        return linear(x, weight, bias)
    if shape.order == "split":
        raw, vst = x.split([shape.chunks * shape.window, shape.chunks * shape.vsts_per_chunk], 1)
        return torch.cat([linear(raw, weight, bias), linear(vst, vst_weight, vst_bias)], dim=1)
    # Interleaved: gather each kind, multiply, put the rows back.
    raw_rows, vst_rows = shape.raw_rows(x.device), shape.vst_rows(x.device)
    raw = linear(x.index_select(1, raw_rows), weight, bias)
    vst = linear(x.index_select(1, vst_rows), vst_weight, vst_bias)
    out = raw.new_empty(x.shape[0], x.shape[1], weight.shape[0])
    return out.index_copy(1, raw_rows, raw).index_copy(1, vst_rows, vst)


_library.impl("vst_linear", _vst_linear, "CompositeImplicitAutograd")


# -- rope_append that returns new caches, for gradients: the same on every device -------------


def _install_rope_copy(name: str, append: str) -> None:
    def call(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq):
        caches = k_cache.clone(), v_cache.clone()
        rotated = getattr(torch.ops.vxl, append)(
            q, k, v, *caches, block_table, cache_seqlens, layout, inv_freq
        )
        return *rotated, *caches

    _library.impl(name, call, "CompositeExplicitAutograd")


_install_rope_copy("rope_append_copy", "rope_append")
_install_rope_copy("rope_append_copy_launch", "rope_append_launch")


# -- the reference, where CPU or CUDA have no kernel of their own ---------------------------

_warned: set[str] = set()


def _warn_once(device: str, reason: str) -> None:
    if device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"vxl_kernels: no kernels for {device} ({reason}); the slow reference runs instead. "
            "`python -m vxl_kernels` tells what is installed.",
            RuntimeWarning,
            stacklevel=4,
        )


def _reference_attention(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, scale):
    from . import reference

    shape = layout_from_ints(layout)
    return reference.vst_attention(
        q, k, v, k_cache, v_cache, block_table, cache_seqlens, shape, scale
    )


def _reference_rope(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq):
    from . import reference

    shape = layout_from_ints(layout)
    torch.autograd.graph.increment_version([k_cache, v_cache])
    return reference.rope_append(
        q, k, v, k_cache, v_cache, block_table, cache_seqlens, shape, inv_freq
    )


def _reference_rope_(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq):
    q_out, k_out = _reference_rope(
        q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq
    )
    q.copy_(q_out)
    k.copy_(k_out)
    torch.autograd.graph.increment_version([q, k])


def _reference_attention_backward(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    k_cache,
    v_cache,
    block_table,
    cache_seqlens,
    out,
    lse,
    layout,
    scale,
):
    """Recomputes the reference and differentiates it."""
    if q.numel() == 0:
        return tuple(
            q.new_empty(0) if x is None else torch.zeros_like(x)
            for x in (q, k, v, k_cache, v_cache)
        )
    inputs = [q, k, v, k_cache, v_cache]
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        outputs = _reference_attention(*[*leaves, block_table, cache_seqlens, layout, scale])
    present = [x for x in leaves if x is not None]
    grads = iter(
        torch.autograd.grad(outputs, present, [grad_out, grad_lse], materialize_grads=True)
    )
    return tuple(q.new_empty(0) if x is None else next(grads) for x in leaves)


_REFERENCE: dict[str, Callable] = {
    "vst_attention": _reference_attention,
    "vst_attention_backward": _reference_attention_backward,
    "rope_append": _reference_rope,
    "rope_append_": _reference_rope_,
}


def _install_reference(key: str, device: str, reason: str) -> None:
    def warned(fn):
        def call(*args):
            _warn_once(device, reason)
            return fn(*args)

        return call

    for name, fn in _REFERENCE.items():
        _library.impl(name, warned(fn), key)


# Which arguments an op of `_REFERENCE` writes.
_WRITTEN = {"rope_append": (3, 4), "rope_append_": (0, 1, 3, 4)}


def _launcher(name: str) -> Callable:
    """Triton's launcher on the tensors' GPU, looked up when it is called."""
    module = _triton.backward_kernels if name.endswith("_backward") else _triton.kernels

    def launch(*args):
        with torch.cuda.device(args[0].device):
            result = getattr(module(), name)(*args)
        if name in _WRITTEN:
            torch.autograd.graph.increment_version([args[i] for i in _WRITTEN[name]])
        return result

    return launch


def _install_triton(name: str) -> None:
    """The Triton kernel under the CUDA key; the reference where it cannot serve."""
    launch = _launcher(name)

    def call(*args):
        reasons = _triton.reasons(args[0])
        if reasons:
            _warn_once("CUDA", "; ".join(reasons))
            return _REFERENCE[name](*args)
        return launch(*args)

    _library.impl(name, call, "CUDA")


if _ext.extension is None:
    _install_reference("CPU", "CPU", f"extension not loaded: {_ext.reason_missing}")
for _name in _REFERENCE:
    # rope_append: else the extension has registered it
    if _name.startswith("vst_attention") or not _ext.has_cuda:
        _install_triton(_name)


# The launches by name: whoever calls one has asked `_triton.reasons`, and nothing falls back.
_library.impl("vst_linear_one_launch", _launcher("vst_linear"), "CUDA")
for _name in ("rope_append", "rope_append_"):
    _library.impl(LAUNCHES[_name], _launcher(_name), "CUDA")
