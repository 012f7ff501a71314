"""From tensors to launches. Reads shapes, strides and dtypes only: no value of a tensor ever
comes to the host, so a step can be captured in a CUDA graph, and all memory is `torch.empty`.

`plan_*` makes a `Launch` and starts nothing: given tensors on the meta device it tells what
would be compiled and how often memory is read, which is how `catalog.py` and the tests use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .._arguments import fail
from . import architecture, configs, interpreted, primitives
from .decode import decode_kernel, merge_kernel
from .linear import linear_kernel
from .prefill import prefill_kernel
from .rope import rope_append_kernel

__all__ = [
    "Launch",
    "plan_attention",
    "plan_linear",
    "plan_rope_append",
    "rope_append",
    "rope_append_",
    "vst_attention",
    "vst_linear",
]

_NEVER = 1 << 30  # a ratio that no position reaches: plain rows are a chunk without VSTs
_MAX_INT32 = 2**31 - 1
_MAX_TOKENS = _MAX_INT32 - 2048
# Said to the compiler because Triton 3.10 is to change its default.
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """A kernel with all it takes. `tile` names its block sizes for reports."""

    name: str
    fn: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    tile: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=lambda: _OPTIONS)

    def __call__(self) -> None:
        if 0 in self.grid:
            return
        self.fn[self.grid](
            **self.arguments,
            **self.constexprs,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            **(_OPTIONS if interpreted() else self.options),
        )


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _precision(dtype: torch.dtype, arch: str) -> str:
    """float32 products: three tf32 ones, 21 bits of mantissa; AMD has a float32 instruction."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("cuda") else "ieee"


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    """x with head_dim dense, and a row not far from the next."""
    if x.stride(-1) == 1 and x.stride(1) <= primitives.MAX_STRIDE.value:
        return x
    # `contiguous` would keep the stride of a single row, and the kernels rely on the bound
    return x.clone(memory_format=torch.contiguous_format)


def _pages(page_size: int, max_pages: int, k_cache, v_cache, block_n: int) -> str:
    """See `primitives.locate`. A cache of one page a sequence is never left by a block."""
    if not (_within_reach(k_cache) and _within_reach(v_cache)):
        return "gather"
    if page_size % block_n == 0 or max_pages == 1:
        return "block_in_page"
    return "pages_in_block" if block_n % page_size == 0 else "gather"


def _within_reach(cache: torch.Tensor) -> bool:
    """Whether keys start at multiples of 8 elements, 32 bits count to the last of them, and one
    is not far from the next."""
    pages, page_size = cache.shape[:2]
    page, slot = cache.stride()[:2]
    reach = pages * page + page_size * slot
    return (
        page % 8 == 0
        and slot % 8 == 0
        and reach // 8 <= _MAX_INT32
        and slot <= primitives.MAX_STRIDE.value
    )


def _cache_arguments(cache: tuple, config) -> tuple[dict, dict]:
    """Arguments and constexprs of the attention kernels' cache; all None without one."""
    names = ("k_cache_ptr", "v_cache_ptr", "block_table_ptr", "cache_seqlens_ptr")
    k_cache, v_cache, block_table, _ = cache
    if k_cache is None or block_table.shape[1] == 0:
        strides = dict.fromkeys(
            ("kc_page", "kc_slot", "kc_head", "vc_page", "vc_slot", "vc_head"), 0
        )
        numbers = {**strides, "page_size": 1, "max_pages": 0}
        constexprs = {"HAS_CACHE": False, "PAGE_MODE": "block_in_page", "SAME_STRIDES": True}
        return {**dict.fromkeys(names), **numbers}, constexprs
    page_size, max_pages = k_cache.shape[1], block_table.shape[1]
    kc, vc = k_cache.stride(), v_cache.stride()
    arguments = {
        **dict(zip(names, cache, strict=True)),
        **dict(zip(("kc_page", "kc_slot", "kc_head"), kc[:3], strict=True)),
        **dict(zip(("vc_page", "vc_slot", "vc_head"), vc[:3], strict=True)),
        "page_size": page_size,
        "max_pages": max_pages,
    }
    pages = _pages(page_size, max_pages, k_cache, v_cache, config.block_n)
    return arguments, {"HAS_CACHE": True, "PAGE_MODE": pages, "SAME_STRIDES": kc == vc}


def _row_strides(**tensors: torch.Tensor) -> dict[str, int]:
    """`q_batch, q_row, q_head` for q=..., and so on.

    Triton compiles a stride for whether 16 divides it: the widest loads rest on that. Those of rows
    and heads are the model's; a batch's is a multiple of its rows, so where heads x head_dim is no
    multiple of 16, rows decide. A batch of one has no next sequence: its stride counts as 0, and
    its calls, of whatever length, are one compilation.
    """
    return {
        f"{name}_{axis}": 0 if axis == "batch" and x.shape[0] == 1 else x.stride(i)
        for name, x in tensors.items()
        for i, axis in enumerate(("batch", "row", "head"))
    }


def _check_capacity(rows: int, k_cache, block_table) -> None:
    """Refuses a table whose entries, a call's rows behind them and the rest of a split behind
    those, 32 bits do not count."""
    if k_cache is None:
        return
    page_size, max_pages = k_cache.shape[1], block_table.shape[1]
    if max_pages * page_size + rows > _MAX_TOKENS:
        fail(
            "block_table",
            f"{max_pages} pages of {page_size} tokens",
            f"at most {_MAX_TOKENS} tokens, the call's {rows} rows included",
        )


def _descriptor(x: torch.Tensor, block_n: int) -> TensorDescriptor | None:
    """Blocks of `block_n` keys of x (batch or page, row, head, head_dim); None where TMA
    cannot reach them."""
    size, block_d = x.element_size(), x.shape[3]
    if not x.numel():
        return None
    aligned = x.data_ptr() % 16 == 0 and all(n * size % 16 == 0 for n in x.stride()[:3])
    if not aligned or block_d != _power_of_two(block_d) or min(x.stride()[:3]) <= 0:
        return None
    x = x.transpose(1, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block_n, block_d])


def _descriptors(k, v, k_cache, v_cache, constexprs: dict, arch: str) -> dict[str, Any]:
    """TMA's view of each tensor, all of them or none."""
    tensors = {"k_desc": k, "v_desc": v, "k_cache_desc": k_cache, "v_cache_desc": v_cache}
    if not constexprs["HAS_CACHE"]:
        tensors |= {"k_cache_desc": None, "v_cache_desc": None}
    if not configs.has_tma(arch) or constexprs["PAGE_MODE"] != "block_in_page":
        return dict.fromkeys(tensors)
    found = {
        name: None if x is None else _descriptor(x, constexprs["BLOCK_N"])
        for name, x in tensors.items()
    }
    missing = any(found[name] is None for name, x in tensors.items() if x is not None)
    return dict.fromkeys(tensors) if missing else found


# -- vst_attention -----------------------------------------------------------------------------


def plan_attention(
    q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, scale, arch=None, config=None
) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """Launches of `vst_attention` in their order, and the tensors that they fill.

    layout: `[window, ratio, chunks, split]`, or `[]` for plain rows. arch, config: instead of
    the device's own and of the table's.
    """
    batch, rows, heads, head_dim = q.shape
    _check_capacity(rows, k_cache, block_table)
    # The kernels take the largest product for the largest score, so scale has to be positive.
    if scale < 0:
        q, scale = -q, -scale
    scale = max(scale, 1e-30) * math.log2(math.e)
    block_table = None if block_table is None else block_table.contiguous()
    cache_seqlens = None if cache_seqlens is None else cache_seqlens.contiguous()
    group = heads // k.shape[2]
    out = torch.empty((batch, rows, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    # The kernels' offsets are 32 bits wide within a block of keys.
    q, k, v = (_dense_heads(x) for x in (q, k, v))
    cache = (k_cache, v_cache, block_table, cache_seqlens)
    each = configs.split_size(rows * group) if not layout else None
    if 0 in (batch, rows):
        return [], out, lse
    block_d, itemsize = _power_of_two(head_dim), q.element_size()
    device, arch = (None if arch else q.device), arch or architecture(q.device)
    if each is None:
        config = config or configs.prefill_config(arch, block_d, itemsize, device)
        launches = _plan_prefill(q, k, v, cache, layout, scale, out, lse, arch, config)
    else:
        config = config or configs.decode_config(arch, block_d, itemsize, rows * group)
        launches = _plan_decode(q, k, v, cache, scale, out, lse, arch, config, each)
    return launches, out, lse


def _shared(q, k, cache, config, arch) -> tuple[dict, dict]:
    """What prefill and decode take alike."""
    arguments, constexprs = _cache_arguments(cache, config)
    head_dim = q.shape[3]
    constexprs = {
        "KV_HEADS": k.shape[2],
        "GROUP_SIZE": q.shape[2] // k.shape[2],
        "HEAD_DIM": head_dim,
        "BLOCK_D": _power_of_two(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": _precision(q.dtype, arch),
        **constexprs,
    }
    return arguments, constexprs


def _tile(config: configs.AttentionConfig, constexprs: dict) -> dict[str, int]:
    return {
        "rows": config.block_m,
        "keys": config.block_n,
        "head_dim": constexprs["BLOCK_D"],
        "group": constexprs["GROUP_SIZE"],
    }


def _softmax_constants(arch: str, config, block_d: int, itemsize: int) -> dict[str, Any]:
    """Constants of `primitives.score_block` and the number of sums. In the interpreter the pivot
    moves as seldom as on a GPU, every block is multiplied, and arithmetic is the plain one.
    float32 would spill."""
    skips = configs.has_warp_skip(arch)
    each = config.block_m * block_d // (32 * config.num_warps)
    skip = min(each, 64) if skips and itemsize == 2 and not interpreted() else 0
    # Sums in parts save shuffles: worth it on sm_90 and gfx942, and on sm_80 where a tile's
    # products are few (head_dim 64: 462 -> 454 instructions; at 128 it is 554 -> 564).
    small = block_d <= 64 and itemsize == 2
    worth = {"cuda:80": small, "cuda:86": small, "cuda:90": True, "hip:gfx942": True}
    return {
        "RESCALE_THRESHOLD": 8.0 if skips else 0.0,
        "WARP_SKIP_ELEMENTS": skip,
        "ROW_SUM_SPLITS": 8 if worth.get(configs.family(arch)) else 1,
        "ISA": "" if interpreted() else configs.isa(arch),
    }


def _plan_prefill(q, k, v, cache, layout, scale, out, lse, arch, config) -> list[Launch]:
    batch, rows = q.shape[:2]
    arguments, constexprs = _shared(q, k, cache, config, arch)
    window, ratio, chunks, split = layout or (rows, _NEVER, 1, 1)
    kept = window // ratio
    if not split:  # rows in the order of their positions are a chunk of raw tokens alone
        window, ratio = window + kept, _NEVER
    constexprs["MASKED_BLOCK_N"] = config.masked_block_n
    constexprs["SAME_STRIDES"] &= k.stride() == v.stride()
    arguments |= {"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "lse_ptr": lse}
    arguments |= {"scale": scale, "window": window, "ratio": ratio, "kept": kept, "chunks": chunks}
    arguments |= _row_strides(q=q, k=k, v=v)
    descriptors = _descriptors(k, v, cache[0], cache[1], constexprs, arch)
    constexprs["TMA"] = descriptors["k_desc"] is not None
    constexprs |= _softmax_constants(arch, config, constexprs["BLOCK_D"], q.element_size())
    arguments |= descriptors
    packed_rows = (window + window // ratio) * constexprs["GROUP_SIZE"]
    tiles = -(-packed_rows // config.block_m)
    return [
        Launch(
            "prefill",
            prefill_kernel,
            (tiles * chunks * k.shape[2], batch),
            arguments,
            constexprs,
            config.num_warps,
            config.num_stages,
            _tile(config, constexprs),
            _OPTIONS | configs.prefill_options(arch),
        )
    ]


def _plan_decode(q, k, v, cache, scale, out, lse, arch, config, each) -> list[Launch]:
    batch, rows, heads, head_dim = q.shape
    packed_rows = rows * (heads // k.shape[2])
    arguments, constexprs = _shared(q, k, cache, config, arch)
    constexprs |= {"SPLIT_SIZE": each, "MASKED_BLOCK_N": config.masked_block_n}
    constexprs |= _softmax_constants(arch, config, constexprs["BLOCK_D"], q.element_size())
    if config.block_m < 64 and arch.startswith("cuda"):  # all warps share all rows
        constexprs["ROW_SUM_SPLITS"] = min(8 * config.num_warps, config.masked_block_n)
    constexprs["SAME_STRIDES"] &= k.stride() == v.stride()
    descriptors = _descriptors(None, None, cache[0], cache[1], constexprs, arch)
    constexprs["TMA"] = descriptors["k_cache_desc"] is not None
    capacity = arguments["page_size"] * arguments["max_pages"]
    splits = 1 + -(-capacity // each)
    partial = torch.empty(
        (batch, splits, rows, heads, head_dim), dtype=torch.float32, device=q.device
    )
    partial_lse = torch.empty((batch, splits, rows, heads), dtype=torch.float32, device=q.device)
    shared = {
        "partial_ptr": partial,
        "partial_lse_ptr": partial_lse,
        "rows": rows,
        "splits": splits,
    }
    merge = {name: arguments[name] for name in ("cache_seqlens_ptr", "page_size", "max_pages")}
    arguments |= {"q_ptr": q, "k_ptr": k, "v_ptr": v, "scale": scale}
    arguments |= _row_strides(q=q, k=k, v=v)
    arguments |= {name: descriptors[name] for name in ("k_cache_desc", "v_cache_desc")}
    merge_constexprs = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": constexprs["BLOCK_D"],
        "HAS_CACHE": constexprs["HAS_CACHE"],
        "SPLIT_SIZE": each,
        "BLOCK_S": 16,
    }
    tiles = -(-packed_rows // config.block_m)
    return [
        Launch(
            "decode",
            decode_kernel,
            (tiles * k.shape[2] * splits, batch),
            arguments | shared,
            constexprs,
            config.num_warps,
            config.num_stages,
            _tile(config, constexprs),
        ),
        Launch(
            "merge",
            merge_kernel,
            (rows * heads, batch),
            {**merge, **shared, "out_ptr": out, "lse_ptr": lse},
            merge_constexprs,
            4,
            1,
            {"splits": 16, "head_dim": constexprs["BLOCK_D"]},
        ),
    ]


def vst_attention(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, scale):
    """Output and natural-log LSE; arguments as the op's schema in `ops.py`."""
    launches, out, lse = plan_attention(
        q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, scale
    )
    for launch in launches:
        launch()
    return out, lse


# -- rope_append ---------------------------------------------------------------------------------


def plan_rope_append(
    q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq, q_out, k_out
) -> Launch:
    batch, rows, heads, head_dim = q.shape
    _check_capacity(rows, k_cache, block_table)
    window, ratio, chunks, split = layout or (rows, _NEVER, 1, 1)
    kv_heads = k.shape[2]
    tensors = {
        "q": q, "k": k, "v": v, "q_out": q_out, "k_out": k_out, "k_cache": k_cache,
        "v_cache": v_cache, "block_table": block_table.contiguous(),
        "cache_seqlens": cache_seqlens.contiguous(), "inv_freq": inv_freq.contiguous(),
    }  # fmt: skip
    numbers = {
        "rows": rows,
        "window": window,
        "ratio": ratio,
        "chunks": chunks,
        "page_size": k_cache.shape[1],
        "max_pages": block_table.shape[1],
        **_row_strides(q=q, k=k, v=v, qo=q_out, ko=k_out),
        **dict(zip(("kc_page", "kc_slot", "kc_head"), k_cache.stride()[:3], strict=True)),
        **dict(zip(("vc_page", "vc_slot", "vc_head"), v_cache.stride()[:3], strict=True)),
    }
    constexprs = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": _power_of_two(head_dim // 2),
        "SPLIT": split == 1,
        "KEEP_ALL": not layout,
        "BLOCK_H": min(_power_of_two(heads), 32),
        "BLOCK_KV": _power_of_two(kv_heads),
    }
    arguments = {f"{name}_ptr": x for name, x in tensors.items()} | numbers
    return Launch(
        "rope_append", rope_append_kernel, (rows, batch), arguments, constexprs, 4, 1,
        {"rows": 1, "head_dim": head_dim},
    )  # fmt: skip


def rope_append(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq):
    """q and k rotated, in new tensors."""
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    q, k, v = (_dense_heads(x) for x in (q, k, v))
    plan_rope_append(
        q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq, q_out, k_out
    )()
    return q_out, k_out


def rope_append_(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq):
    """q and k rotated in place."""
    q_dense, k_dense = _dense_heads(q), _dense_heads(k)
    plan_rope_append(
        q_dense, k_dense, _dense_heads(v), k_cache, v_cache, block_table, cache_seqlens, layout,
        inv_freq, q_dense, k_dense,
    )()  # fmt: skip
    for x, dense in ((q, q_dense), (k, k_dense)):
        if dense is not x:
            x.copy_(dense)


# -- vst_linear ------------------------------------------------------------------------------------


def plan_linear(x, weight, bias, vst_weight, vst_bias, layout, out, arch=None) -> Launch:
    arch = arch or architecture(x.device)
    batch, rows, features = x.shape
    window, ratio, chunks, split = layout or (rows, _NEVER, 1, 1)
    config = configs.linear_config(arch, x.element_size())
    raw, vst = batch * chunks * window, batch * chunks * (window // ratio)
    tiles_m = -(-raw // config.block_m) + -(-vst // config.block_m)
    tiles_n = -(-weight.shape[0] // config.block_n)
    arguments = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "vst_weight_ptr": weight if vst_weight is None else vst_weight,
        "vst_bias_ptr": vst_bias,
        "out_ptr": out,
        "x_batch": x.stride(0) if batch > 1 else 0,  # as `_row_strides`
        "x_row": x.stride(1),
        "batch": batch,
        "window": window,
        "ratio": ratio,
        "chunks": chunks,
    }
    constexprs = {
        "OUT": weight.shape[0],
        "IN": features,
        "SPLIT": split == 1,
        "BIAS": bias is not None,
        "VST_BIAS": vst_bias is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PRECISION": _precision(x.dtype, arch),
    }
    return Launch(
        "linear", linear_kernel, (tiles_m * tiles_n,), arguments, constexprs,
        config.num_warps, config.num_stages,
        {"m": config.block_m, "n": config.block_n, "k": config.block_k},
    )  # fmt: skip


def vst_linear(x, weight, bias, vst_weight, vst_bias, layout):
    """Both weight sets in one launch."""
    weight, bias, vst_weight, vst_bias = (
        None if t is None else t.contiguous() for t in (weight, bias, vst_weight, vst_bias)
    )
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty((*x.shape[:2], weight.shape[0]), dtype=x.dtype, device=x.device)
    if out.numel():
        plan_linear(x, weight, bias, vst_weight, vst_bias, layout, out)()
    return out
