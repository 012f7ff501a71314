"""From tensors to launches. Reads shapes, strides and dtypes only: no value of a tensor ever
comes to the host, so a step can be captured in a CUDA graph, and all memory is `torch.empty`.

`plan_*` makes a `Launch` and starts nothing: given tensors on the meta device it tells what
would be compiled and how often memory is read, which is how `catalog.py` and the tests use it.
"""

from __future__ import annotations

import math

import torch

from . import architecture, configs, remember
from .decode import decode_kernel, merge_kernel
from .invariant import invariant_linear_kernel
from .launch_common import (
    NEVER,
    OPTIONS,
    Launch,
    cache_arguments,
    check_capacity,
    dense_heads,
    descriptors,
    power_of_two,
    precision,
    row_strides,
)
from .linear import linear_kernel
from .prefill import prefill_kernel
from .rope import rope_append_kernel

__all__ = [
    "invariant_linear",
    "plan_attention",
    "plan_invariant_linear",
    "plan_linear",
    "plan_rope_append",
    "rope_append",
    "rope_append_",
    "vst_attention",
    "vst_linear",
]

# -- vst_attention -----------------------------------------------------------------------------


def plan_attention(
    q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, scale, arch=None, config=None
) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """Launches of `vst_attention` in their order, and the tensors that they fill.

    layout: `[window, ratio, chunks, split]`, or `[]` for plain rows. arch, config: instead of
    the device's own and of the table's.
    """
    batch, rows, heads, head_dim = q.shape
    check_capacity(rows, k_cache, block_table)
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
    q, k, v = (dense_heads(x) for x in (q, k, v))
    cache = (k_cache, v_cache, block_table, cache_seqlens)
    each = configs.split_size(rows * group, k.shape[2]) if not layout else None
    if 0 in (batch, rows):
        return [], out, lse
    block_d, itemsize = power_of_two(head_dim), q.element_size()
    device, arch = (None if arch else q.device), arch or architecture(q.device)
    if each is None:
        config = config or configs.prefill_config(arch, block_d, itemsize, device, head_dim)
        launches = _plan_prefill(q, k, v, cache, layout, scale, out, lse, arch, config)
    else:
        config = config or configs.decode_config(arch, block_d, itemsize, rows * group, head_dim)
        launches = _plan_decode(q, k, v, cache, scale, out, lse, arch, config, each)
    return launches, out, lse


def _shared(q, k, cache, config, arch) -> tuple[dict, dict]:
    """What prefill and decode take alike."""
    arguments, constexprs = cache_arguments(cache, config)
    head_dim = q.shape[3]
    constexprs = {
        "KV_HEADS": k.shape[2],
        "GROUP_SIZE": q.shape[2] // k.shape[2],
        "HEAD_DIM": head_dim,
        "BLOCK_D": power_of_two(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": precision(q.dtype, arch),
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


def _plan_prefill(q, k, v, cache, layout, scale, out, lse, arch, config) -> list[Launch]:
    batch, rows = q.shape[:2]
    arguments, constexprs = _shared(q, k, cache, config, arch)
    window, ratio, chunks, split = layout or (rows, NEVER, 1, 1)
    kept = window // ratio
    if not split:  # rows in the order of their positions are a chunk of raw tokens alone
        window, ratio = window + kept, NEVER
    constexprs["MASKED_BLOCK_N"] = config.masked_block_n
    constexprs["SAME_STRIDES"] &= k.stride() == v.stride()
    arguments |= {"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "lse_ptr": lse}
    arguments |= {"scale": scale, "window": window, "ratio": ratio, "kept": kept, "chunks": chunks}
    arguments |= row_strides(q=q, k=k, v=v)
    views = descriptors(k, v, cache[0], cache[1], constexprs, arch)
    constexprs["TMA"] = views["k_desc"] is not None
    constexprs |= configs.softmax_constants(arch, config, constexprs["BLOCK_D"], q.element_size())
    arguments |= views
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
            OPTIONS | configs.prefill_options(arch),
        )
    ]


_PARTS = ("partial_ptr", "partial_lse_ptr")
# Parts of a decode that are in memory at once, in bytes, if more than one sequence has them.
_PARTS_BYTES = 256 << 20


def _plan_decode(q, k, v, cache, scale, out, lse, arch, config, each) -> list[Launch]:
    """Launches of groups of sequences, one after the other, with the same memory for parts."""
    batch, rows, heads, head_dim = q.shape
    has_cache = cache[0] is not None
    capacity = cache[0].shape[1] * cache[2].shape[1] if has_cache else 0
    splits = 1 + -(-capacity // each)
    group = max(1, min(batch, _PARTS_BYTES // (4 * splits * rows * heads * head_dim)))
    shape = (group, splits, rows, heads, head_dim)
    partial = torch.empty(shape, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(shape[:-1], dtype=torch.float32, device=q.device)
    parts = partial, partial_lse
    if group == batch:
        return _decode_and_merge(q, k, v, cache, scale, out, lse, parts, arch, config, each)
    launches = []
    for first in range(0, batch, group):
        own = slice(first, first + group)
        pages = (*cache[:2], *(x[own] for x in cache[2:])) if has_cache else cache
        launches += _decode_and_merge(
            q[own], k[own], v[own], pages, scale, out[own], lse[own], parts, arch, config, each
        )
    return launches


def _decode_and_merge(q, k, v, cache, scale, out, lse, parts, arch, config, each) -> list[Launch]:
    batch, rows, heads, head_dim = q.shape
    packed_rows = rows * (heads // k.shape[2])
    arguments, constexprs = _shared(q, k, cache, config, arch)
    constexprs |= {"SPLIT_SIZE": each, "MASKED_BLOCK_N": config.masked_block_n}
    constexprs |= configs.softmax_constants(arch, config, constexprs["BLOCK_D"], q.element_size())
    if config.block_m < 64 and arch.startswith("cuda"):  # all warps share all rows
        constexprs["ROW_SUM_SPLITS"] = min(8 * config.num_warps, config.masked_block_n)
    constexprs["SAME_STRIDES"] &= k.stride() == v.stride()
    views = descriptors(None, None, cache[0], cache[1], constexprs, arch)
    constexprs["TMA"] = views["k_cache_desc"] is not None
    splits = parts[0].shape[1]
    shared = {"partial_ptr": parts[0], "partial_lse_ptr": parts[1], "rows": rows, "splits": splits}
    merge = {name: arguments[name] for name in ("cache_seqlens_ptr", "page_size", "max_pages")}
    arguments |= {"q_ptr": q, "k_ptr": k, "v_ptr": v, "scale": scale}
    arguments |= row_strides(q=q, k=k, v=v)
    arguments |= {name: views[name] for name in ("k_cache_desc", "v_cache_desc")}
    merge_constexprs = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": constexprs["BLOCK_D"],
        "HAS_CACHE": constexprs["HAS_CACHE"],
        "SPLIT_SIZE": each,
        "BLOCK_S": configs.merge_block(each),
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
            {"splits": merge_constexprs["BLOCK_S"], "head_dim": constexprs["BLOCK_D"]},
        ),
    ]


def vst_attention(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, scale):
    """Output and natural-log LSE; arguments as the op's schema in `ops.py`."""
    tensors = (q, k, v, k_cache, v_cache, block_table, cache_seqlens)

    def plan():
        launches, out, lse = plan_attention(*tensors, layout, scale)
        parts = [x.arguments[n] for x in launches for n in _PARTS if n in x.arguments]
        return launches, (out, lse, *dict.fromkeys(parts))

    key = ("vst_attention", tuple(layout), scale, configs.tuned_path())
    out, lse, *_ = remember.run(key, tensors, plan)
    return out, lse


# -- rope_append ---------------------------------------------------------------------------------


def plan_rope_append(
    q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq, q_out, k_out
) -> Launch:
    batch, rows, heads, head_dim = q.shape
    check_capacity(rows, k_cache, block_table)
    window, ratio, chunks, split = layout or (rows, NEVER, 1, 1)
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
        **row_strides(q=q, k=k, v=v, qo=q_out, ko=k_out),
        **dict(zip(("kc_page", "kc_slot", "kc_head"), k_cache.stride()[:3], strict=True)),
        **dict(zip(("vc_page", "vc_slot", "vc_head"), v_cache.stride()[:3], strict=True)),
    }
    constexprs = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": power_of_two(head_dim // 2),
        "SPLIT": split == 1,
        "KEEP_ALL": not layout,
        "BLOCK_H": min(power_of_two(heads), 32),
        "BLOCK_KV": power_of_two(kv_heads),
    }
    arguments = {f"{name}_ptr": x for name, x in tensors.items()} | numbers
    return Launch(
        "rope_append", rope_append_kernel, (rows, batch), arguments, constexprs, 4, 1,
        {"rows": 1, "head_dim": head_dim},
    )  # fmt: skip


def rope_append(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq):
    """q and k rotated, in new tensors."""
    cache = (k_cache, v_cache, block_table, cache_seqlens)

    def plan():
        outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
        rows = (dense_heads(q), dense_heads(k), dense_heads(v))
        return [plan_rope_append(*rows, *cache, layout, inv_freq, outs[0], outs[1])], outs

    q_out, k_out = remember.run(("rope_append", tuple(layout)), (q, k, v, *cache, inv_freq), plan)
    return q_out, k_out


def rope_append_(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq):
    """q and k rotated in place."""
    cache = (k_cache, v_cache, block_table, cache_seqlens)
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def plan():
        q_own, k_own, v_own = (dense_heads(x) for x in (q, k, v))
        copies.extend((x, own) for x, own in ((q, q_own), (k, k_own)) if own is not x)
        call = (q_own, k_own, v_own, *cache, layout, inv_freq, q_own, k_own)
        return [plan_rope_append(*call)], []

    remember.run(("rope_append_", tuple(layout)), (q, k, v, *cache, inv_freq), plan)
    for x, own in copies:
        x.copy_(own)


# -- vst_linear ------------------------------------------------------------------------------------


def plan_linear(x, weight, bias, vst_weight, vst_bias, layout, out, arch=None) -> Launch:
    arch = arch or architecture(x.device)
    batch, rows, features = x.shape
    window, ratio, chunks, split = layout or (rows, NEVER, 1, 1)
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
        "x_batch": x.stride(0) if batch > 1 else 0,  # as `row_strides`
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
        "PRECISION": precision(x.dtype, arch),
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


# -- invariant_linear ------------------------------------------------------------------------------


def plan_invariant_linear(x, weight, bias, out, arch=None) -> Launch:
    """x `(rows, in)`, out `(rows, out)`."""
    arch = arch or architecture(x.device)
    rows, features = x.shape
    config = configs.invariant_config(arch, x.element_size())
    tiles = -(-len(weight) // config.block_m) * -(-rows // config.block_n)
    arguments = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "out_ptr": out,
        "x_row": x.stride(0) if rows > 1 else features,
        "rows": rows,
    }
    constexprs = {
        "OUT": len(weight),
        "IN": features,
        "BIAS": bias is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PRECISION": precision(x.dtype, arch),
    }
    return Launch(
        "invariant_linear", invariant_linear_kernel, (tiles,), arguments, constexprs,
        config.num_warps, config.num_stages,
        {"m": config.block_m, "n": config.block_n, "k": config.block_k},
    )  # fmt: skip


def invariant_linear(x, weight, bias):
    """Arguments as the op's schema in `ops.py`."""
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    shape = (*x.shape[:-1], len(weight))
    if 0 in shape:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    x = x.reshape(math.prod(shape[:-1]), weight.shape[1])
    x = x if x.stride(1) == 1 else x.contiguous()

    def plan():
        out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
        return [plan_invariant_linear(x, weight, bias, out)], [out]

    out = remember.run(("invariant_linear",), (x, weight, bias), plan)[0]
    assert out is not None
    return out.view(shape)
