"""The operators as torch.library sees them: schemas, fakes, and the kernel for every device.

On a CPU, and on a GPU for what csrc/cuda has, the compiled extension registers kernels of its own.
All other calls, and those that name another backend, come to `_on_any_device`, which looks into
the table of `_backends.py` and loads what it needs then.
"""

from __future__ import annotations

import contextlib
import warnings

import torch

from . import _backends, _ext, checks
from .cache import page_ops
from .layout import layout_from_ints, layout_to_ints

__all__ = ["layout_from_ints", "layout_to_ints"]

# A layout crosses the dispatcher as [window, ratio, chunks, split]; [] is layout=None. backend is a
# name of `_backends.BACKENDS`, or "" for the device's own.
_CACHE = "Tensor? k_cache, Tensor? v_cache, Tensor? block_table, Tensor? cache_seqlens, "
SCHEMAS = {
    "vst_attention": (
        f"(Tensor q, Tensor k, Tensor v, {_CACHE}int[] layout, float scale, "
        'str backend="") -> (Tensor, Tensor)'
    ),
    "vst_attention_backward": (
        f"(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, {_CACHE}Tensor out, "
        'Tensor lse, int[] layout, float scale, str backend="") '
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "rope_append": (
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor block_table, Tensor cache_seqlens, int[] layout, Tensor inv_freq, "
        'str backend="") -> (Tensor, Tensor)'
    ),
    "rope_append_copy": (
        "(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor block_table, "
        'Tensor cache_seqlens, int[] layout, Tensor inv_freq, str backend="") '
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "rope_append_": (
        "(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor(c!) k_cache, Tensor(d!) v_cache, "
        "Tensor block_table, Tensor cache_seqlens, int[] layout, Tensor inv_freq, "
        'str backend="") -> ()'
    ),
    # Ragged calls, tensors (rows, heads, head_dim). layout: VarlenLayout.table. chunks: of all
    # sequences, which bounds a grid.
    "vst_attention_varlen": (
        f"(Tensor q, Tensor k, Tensor v, {_CACHE}Tensor layout, SymInt chunks, float scale, "
        'str backend="") -> (Tensor, Tensor)'
    ),
    "vst_attention_varlen_backward": (
        f"(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, {_CACHE}Tensor out, "
        'Tensor lse, Tensor layout, SymInt chunks, float scale, str backend="") '
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "rope_append_varlen": (
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor block_table, Tensor cache_seqlens, Tensor layout, Tensor inv_freq, "
        'str backend="") -> (Tensor, Tensor)'
    ),
    "rope_append_varlen_copy": (
        "(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor block_table, "
        'Tensor cache_seqlens, Tensor layout, Tensor inv_freq, str backend="") '
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "rope_append_varlen_": (
        "(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor(c!) k_cache, Tensor(d!) v_cache, "
        "Tensor block_table, Tensor cache_seqlens, Tensor layout, Tensor inv_freq, "
        'str backend="") -> ()'
    ),
    "vst_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? vst_weight, Tensor? vst_bias, "
        'int[] layout, str backend="") -> Tensor'
    ),
    "invariant_linear": '(Tensor x, Tensor weight, Tensor? bias, str backend="") -> Tensor',
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

_library = torch.library.Library("vxl", "DEF")
for _name, _schema in SCHEMAS.items():
    try:
        _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    except RuntimeError as error:  # the extension has registered kernels of other arguments
        raise ImportError(
            f"vxl_kernels: {_ext.extension} was built from other sources than these; build it "
            "again (`pip install .`, or `python setup.py build_ext --inplace`)"
        ) from error


# -- fakes --------------------------------------------------------------------------------


@torch.library.register_fake("vxl::vst_attention", lib=_library)
def _(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, scale, backend=""):
    batch, rows, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, rows), dtype=dtype)


@torch.library.register_fake("vxl::vst_attention_varlen", lib=_library)
def _(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, chunks, scale, backend=""):
    rows, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((heads, rows), dtype=dtype)


@torch.library.register_fake("vxl::vst_attention_varlen_backward", lib=_library)
@torch.library.register_fake("vxl::vst_attention_backward", lib=_library)
def _(grad_out, grad_lse, q, k, v, k_cache, v_cache, *rest):
    none = q.new_empty(0)
    caches = [none if c is None else c.new_empty(c.shape) for c in (k_cache, v_cache)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *caches


@torch.library.register_fake("vxl::rope_append_varlen", lib=_library)
@torch.library.register_fake("vxl::rope_append", lib=_library)
def _(q, k, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("vxl::rope_append_varlen_copy", lib=_library)
@torch.library.register_fake("vxl::rope_append_copy", lib=_library)
def _(q, k, v, k_cache, v_cache, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, k_cache, v_cache))


@torch.library.register_fake("vxl::rope_append_varlen_", lib=_library)
@torch.library.register_fake("vxl::rope_append_", lib=_library)
def _(*args):
    return None


@torch.library.register_fake("vxl::vst_linear", lib=_library)
def _(x, weight, *rest):
    return x.new_empty((*x.shape[:2], weight.shape[0]))


@torch.library.register_fake("vxl::invariant_linear", lib=_library)
def _(x, weight, *rest):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("vxl::copy_pages_", lib=_library)
def _(k_cache, v_cache, copies):
    return None


@torch.library.register_fake("vxl::gather_rows", lib=_library)
def _(cache, block_table_row, first, rows):
    return cache.new_empty((cache.shape[0], rows, *cache.shape[3:]))


@torch.library.register_fake("vxl::scatter_rows_", lib=_library)
def _(cache, block_table_row, first, rows):
    return None


# -- the kernel for every device --------------------------------------------------------------

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


def _refuse_derivatives(op: str, args: tuple) -> None:
    """What the operator has no formula for would come out as zero, as csrc/bindings/backends.h."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    checks.transforms(f"vxl::{op}", *tensors)
    if op.endswith("_") and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise NotImplementedError(
            f"vxl::{op}: got a tensor that requires a gradient, expected none (or "
            "torch.no_grad(), for inference)"
        )


def _on_any_device(op: str) -> None:
    arguments = getattr(torch.ops.vxl, op).default._schema.arguments
    written = [i for i, x in enumerate(arguments) if x.alias_info and x.alias_info.is_write]

    def call(*args):
        x = args[0]
        _refuse_derivatives(op, args)
        if len(args) == len(arguments):
            backend, args = _backends.named(args[-1], op, x), args[:-1]
        else:  # the dispatcher leaves a default argument out
            backend, reasons = _backends.default(op, x)
            if reasons:
                _warn_once(x.device.type, "; ".join(reasons))
        real = x.is_cuda and torch.cuda.is_initialized()  # a fake tensor needs no CUDA
        elsewhere = real and x.device.index != torch.cuda.current_device()
        with torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext():
            result = backend.kernel(op)(*args)
        if written:  # so that a backward that saved them notices
            changed = [args[i] for i in written if not args[i].is_inference()]
            torch.autograd.graph.increment_version(changed)
        return result

    _library.impl(op, call, "CompositeExplicitAutograd")


for _name in _backends.OPERATORS:
    _on_any_device(_name)


def _copying(op: str) -> None:
    """`op` that returns new caches, for gradients."""

    def call(q, k, v, k_cache, v_cache, *rest):
        caches = k_cache.clone(), v_cache.clone()
        return *getattr(torch.ops.vxl, op)(q, k, v, *caches, *rest), *caches

    _library.impl(f"{op}_copy", call, "CompositeExplicitAutograd")


_copying("rope_append")
_copying("rope_append_varlen")

# Pages: plain PyTorch wherever the extension registers nothing better.
for _name in ("copy_pages_", "gather_rows", "scatter_rows_"):
    _library.impl(_name, getattr(page_ops, _name), "CompositeExplicitAutograd")
