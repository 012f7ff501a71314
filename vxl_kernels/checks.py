"""Refusals: one ValueError that names the argument, what came and what was expected.

`*_shapes` look at shapes, dtypes and devices only, so they cost no synchronisation and
trace under `torch.compile`. `paging` reads block table and lengths: the ops' CPU
implementations do that before they write (the compiled one in C++, with the same words).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from ._arguments import fail
from .layout import ChunkLayout
from .varlen import VarlenLayout

# Private to torch, and asked in every call: a torch without it has no such transforms to lose.
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _tensor(name: str, x: object, rank: int, dims: str) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        fail(name, type(x).__name__, f"a tensor {dims}")
    if x.layout is not torch.strided or x.is_nested:
        kind = {torch.jagged: "jagged", torch.strided: "nested"}.get(x.layout, "sparse")
        fail(name, f"a {kind} tensor", f"a dense one {dims}")
    if x.dim() != rank:
        fail(name, f"shape {tuple(x.shape)}", f"{rank} dimensions {dims}")
    return x


def _like(
    name: str, x: torch.Tensor, other: torch.Tensor, other_name: str, any_dtype: bool = False
) -> None:
    if x.dtype != other.dtype and not any_dtype:
        fail(name, x.dtype, f"{other.dtype} as {other_name}")
    if x.device != other.device:
        fail(name, f"device {x.device}", f"{other.device} as {other_name}")


def layout_rows(layout: object, rows: int, name: str) -> None:
    if layout is None:
        return
    if not isinstance(layout, ChunkLayout):
        fail("layout", type(layout).__name__, "a ChunkLayout or None")
    if layout.rows != rows:
        fail(name, f"{rows} rows", f"{layout.rows} rows by {layout}")


def qkv_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: object) -> None:
    dims = "(batch, rows, heads, head_dim)"
    _tensor("q", q, 4, dims)
    _tensor("k", k, 4, "(batch, rows, kv_heads, head_dim)")
    _tensor("v", v, 4, "(batch, rows, kv_heads, head_dim)")
    _heads(q, k, v)
    layout_rows(layout, q.shape[1], "q")


def varlen_shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: object
) -> VarlenLayout:
    """Checks the rows of a ragged call; returns its layout."""
    _tensor("q", q, 3, "(rows, heads, head_dim)")
    _tensor("k", k, 3, "(rows, kv_heads, head_dim)")
    _tensor("v", v, 3, "(rows, kv_heads, head_dim)")
    _heads(q, k, v)
    return varlen_rows(layout, q, "q")


def varlen_rows(layout: object, x: torch.Tensor, name: str) -> VarlenLayout:
    if not isinstance(layout, VarlenLayout):
        fail("layout", type(layout).__name__, "a VarlenLayout")
    if layout.rows != x.shape[0]:
        fail(name, f"{x.shape[0]} rows", f"{layout.rows} rows by {layout}")
    if layout.table.device != x.device:
        fail("layout", f"a table on {layout.table.device}", f"on {x.device} as {name}")
    return layout


def _heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """q `(..., rows, heads, head_dim)` and k, v `(..., rows, kv_heads, head_dim)` fit."""
    if q.dtype not in FLOATS:
        fail("q", q.dtype, "float32, bfloat16, float16 or float64")
    _like("k", k, q, "q")
    _like("v", v, q, "q")
    *rows, heads, head_dim = q.shape
    kv_heads = k.shape[-2]
    if tuple(k.shape) != (*rows, kv_heads, head_dim):
        expected = ", ".join(map(str, [*rows, "kv_heads", head_dim]))
        fail("k", f"shape {tuple(k.shape)}", f"({expected}) as q")
    if v.shape != k.shape:
        fail("v", f"shape {tuple(v.shape)}", f"{tuple(k.shape)} as k")
    if not 16 <= head_dim <= 256:
        fail("q", f"head_dim {head_dim}", "16 to 256")
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        fail("q", f"{heads} heads", f"a multiple of the {kv_heads} KV heads of k")


def cache_shapes(
    k: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    required: bool,
    batch: int | None = None,
) -> bool:
    """Checks the four cache arguments; returns whether there is a cache. batch: sequences of the
    call; default those of k `(batch, rows, kv_heads, head_dim)`."""
    parts = {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": block_table,
        "cache_seqlens": cache_seqlens,
    }
    missing = [name for name, x in parts.items() if x is None]
    if len(missing) == len(parts) and not required:
        return False
    if missing:
        fail(missing[0], None, "a tensor" if required else "a tensor as the rest of the cache")
    kv_heads, head_dim = k.shape[2:]
    batch = k.shape[0] if batch is None else batch
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        cache = _tensor(name, cache, 4, "(pages, page_size, kv_heads, head_dim)")
        _like(name, cache, k, "k")
        if tuple(cache.shape[2:]) != (kv_heads, head_dim):
            fail(name, f"shape {tuple(cache.shape)}", f"(pages, page_size, {kv_heads}, {head_dim})")
        if cache.shape[1] == 0:
            fail(name, "page_size 0", "at least 1")
        if cache.stride(3) != 1:
            fail(name, f"head_dim stride {cache.stride(3)}", "1 (a copy would be the whole cache)")
    assert k_cache is not None
    assert v_cache is not None
    if v_cache.shape != k_cache.shape:
        fail("v_cache", f"shape {tuple(v_cache.shape)}", f"{tuple(k_cache.shape)} as k_cache")
    for name, x, rank, dims in (
        ("block_table", block_table, 2, "(batch, max_pages)"),
        ("cache_seqlens", cache_seqlens, 1, "(batch,)"),
    ):
        x = _tensor(name, x, rank, dims)
        if x.dtype != torch.int32:
            fail(name, x.dtype, "torch.int32")
        if x.device != k.device:
            fail(name, f"device {x.device}", f"{k.device} as k")
        if x.shape[0] != batch:
            fail(name, f"shape {tuple(x.shape)}", f"{dims} with batch {batch}")
    return True


def _overlaps_itself(x: torch.Tensor) -> bool:
    """Whether two elements share memory."""
    dims = sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1)
    if torch.compiler.is_compiling() or (dims and dims[0][0] == 0):
        return any(s == 0 for s, _ in dims)
    reach = 0
    for stride, size in dims:
        if stride <= reach:  # a step lands among the smaller ones: look at each element
            offsets = np.zeros(1, np.int64)
            for s, n in dims:
                offsets = np.add.outer(offsets, s * np.arange(n)).ravel()
            return len(np.unique(offsets)) < len(offsets)
        reach += stride * (size - 1)
    return False


def _span(x: torch.Tensor) -> tuple[int, int]:
    """The first byte of x and the one after its last; (0, 0) for a tensor without memory."""
    if isinstance(x, FakeTensor):
        return 0, 0
    try:
        start = x.data_ptr()
    except RuntimeError:  # torch.func has wrapped it
        return 0, 0
    if start == 0 or x.is_contiguous():
        return start, start and start + x.nbytes
    reach = sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True))
    return start, start + (reach + 1) * x.element_size()


class _Memory:
    """The elements of a tensor, on any device, as NumPy reasons about them; nothing is read."""

    def __init__(self, x: torch.Tensor) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(x.shape),
            "strides": tuple(s * x.element_size() for s in x.stride()),
            "typestr": f"|V{x.element_size()}",
            "data": (x.data_ptr(), False),
        }


def _share(x: torch.Tensor, y: torch.Tensor) -> bool:
    try:
        one, other = (np.asarray(_Memory(t)) for t in (x, y))
        return np.shares_memory(one, other, max_work=10**6)  # type: ignore[arg-type]
    except RuntimeError:  # numpy's TooHardError: strides that nothing here makes
        return True


def writable(written: dict[str, torch.Tensor], read: dict[str, torch.Tensor]) -> None:
    """Refuses a written tensor of which elements share memory, or that shares some with another
    argument. In a graph that is compiled addresses are not known: there it finds expanded tensors
    and a tensor given twice."""
    for name, x in written.items():
        if not x.is_contiguous() and _overlaps_itself(x):
            got = f"elements that share memory (strides {x.stride()})"
            fail(name, got, "memory of its own, to write")
    tensors = written | read
    compiling = torch.compiler.is_compiling()
    spans = {name: (0, 0) if compiling else _span(x) for name, x in tensors.items()}
    for name, x in written.items():
        first, end = spans.pop(name)
        for other, (start, stop) in spans.items():
            y = tensors[other]
            if y is x or (start < end and first < stop and _share(x, y)):
                expected = f"memory of its own, as {name} is written"
                fail(other, f"memory that {name} shares", expected)


def transforms_active() -> bool:
    """Whether forward-mode AD or a transform of `torch.func` may hold tensors."""
    return getattr(forward_ad, "_current_level", -1) >= 0 or _functorch_active()


def transforms(op: str, *tensors: torch.Tensor | None, writes: bool = False) -> None:
    """Raises NotImplementedError for tensors of forward-mode AD and of `torch.func`: an operator
    would drop their derivatives without a word. writes: it cannot run under vmap either."""
    if not transforms_active():
        return
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{op}: got tensors of torch.func in a compiled graph, expected none there"
        )
    functorch = torch._C._functorch
    for x in tensors:
        while x is not None and functorch.is_functorch_wrapped_tensor(x):
            if functorch.is_gradtrackingtensor(x):
                raise NotImplementedError(
                    f"{op}: got a tensor of torch.func (grad, vjp, jvp, ...), which only "
                    "backend='reference' supports; torch.autograd works with every backend"
                )
            if writes and functorch.is_batchedtensor(x):
                raise NotImplementedError(
                    f"{op}: got a tensor of torch.vmap, expected rows of the batch: it writes the "
                    "cache in place"
                )
            x = functorch.get_unwrapped(x)
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{op}: got a tensor of forward-mode AD, which only backend='reference' supports"
            )


def inv_freq_shape(inv_freq: torch.Tensor, k: torch.Tensor) -> None:
    _tensor("inv_freq", inv_freq, 1, "(head_dim / 2,)")
    head_dim = k.shape[3]
    if head_dim % 2:
        fail("k", f"head_dim {head_dim}", "an even number, for the rotary halves")
    if inv_freq.shape[0] != head_dim // 2:
        fail("inv_freq", f"shape {tuple(inv_freq.shape)}", f"({head_dim // 2},)")
    if inv_freq.dtype not in (torch.float32, torch.float64):
        fail("inv_freq", inv_freq.dtype, "torch.float32")
    if inv_freq.device != k.device:
        fail("inv_freq", f"device {inv_freq.device}", f"{k.device} as k")


def linear_shapes(
    x: torch.Tensor,
    sets: dict[str, torch.Tensor | None],
    layout: object,
    any_dtype: bool,
) -> None:
    """any_dtype: the dtypes need not be equal, as `torch.autocast` makes them so."""
    ragged = isinstance(layout, VarlenLayout)
    if ragged:
        _tensor("x", x, 2, "(rows, in_features)")
    else:
        _tensor("x", x, 3, "(batch, rows, in_features)")
    weight = _tensor("weight", sets["weight"], 2, "(out_features, in_features)")
    if weight.shape[1] != x.shape[-1]:
        fail("weight", f"shape {tuple(weight.shape)}", f"(out_features, {x.shape[-1]}) for x")
    for name, value in sets.items():
        if value is None:
            continue
        is_bias = name.endswith("bias")
        value = _tensor(name, value, 1 if is_bias else 2, "as weight")
        _like(name, value, x, "x", any_dtype)
        want = (weight.shape[0],) if is_bias else tuple(weight.shape)
        if tuple(value.shape) != want:
            fail(name, f"shape {tuple(value.shape)}", want)
    if ragged:
        varlen_rows(layout, x, "x")
    else:
        layout_rows(layout, x.shape[1], "x")
    if layout is not None and sets["vst_weight"] is None:
        fail("vst_weight", None, "a tensor, since layout has VST rows")


def invariant_shapes(x: object, weight: object, bias: object) -> None:
    rank = max(x.dim(), 1) if isinstance(x, torch.Tensor) else 2
    x = _tensor("x", x, rank, "(..., in_features)")
    if x.dtype not in FLOATS:
        fail("x", x.dtype, "float32, bfloat16, float16 or float64")
    weight = _tensor("weight", weight, 2, "(out_features, in_features)")
    if weight.shape[1] != x.shape[-1]:
        fail("weight", f"shape {tuple(weight.shape)}", f"(out_features, {x.shape[-1]}) for x")
    _like("weight", weight, x, "x")
    if bias is None:
        return
    bias = _tensor("bias", bias, 1, "(out_features,)")
    _like("bias", bias, x, "x")
    if len(bias) != len(weight):
        fail("bias", f"shape {tuple(bias.shape)}", f"({len(weight)},)")


def paging(
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    pages: int,
    page_size: int,
    extra: int | Sequence[int],
    written: bool = False,
) -> None:
    """Every sequence's first `cache_seqlens + extra` tokens lie in existing pages. written: the
    extra ones are written, and no other entry names their pages. Reads both tensors on the host."""
    lengths = cache_seqlens.tolist()
    extras = [extra] * len(lengths) if isinstance(extra, int) else extra
    capacity = block_table.shape[1] * page_size
    for b, length in enumerate(lengths):
        if length < 0:
            fail("cache_seqlens", f"{length} at sequence {b}", "at least 0")
        need = length + extras[b]
        if need > capacity:
            fail(
                "block_table",
                f"{block_table.shape[1]} pages of {page_size} tokens",
                f"room for {need} tokens (cache_seqlens {length} + {extras[b]}) of sequence {b}",
            )
        used = block_table[b, : -(-need // page_size)]
        bad = used[(used < 0) | (used >= pages)]
        if len(bad):
            fail(
                "block_table", f"page {int(bad[0])} at sequence {b}", f"0 to {pages - 1} in k_cache"
            )
    if not written:
        return
    sequence_of: dict[int, int] = {}
    for appended in (True, False):  # the pages that are written, then all others
        for b, entries in enumerate(block_table.tolist()):
            used = -(-(lengths[b] + extras[b]) // page_size)
            kept = lengths[b] // page_size if extras[b] else used
            for page in entries[kept:used] if appended else entries[:kept]:
                other = sequence_of.get(page)
                if other is not None:
                    where = f"at sequences {min(b, other)} and {max(b, other)}"
                    where = f"twice at sequence {b}" if other == b else where
                    got = f"page {page} {where}"
                    fail("block_table", got, "one place for what is appended")
                if appended:
                    sequence_of[page] = b
