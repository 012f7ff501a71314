"""Launches of `vst_attention_backward`, as `launch.py`: from shapes alone, memory `torch.empty`."""

from __future__ import annotations

import torch

from . import architecture, configs
from .backward_kv import dkv_kernel, sum_pages_kernel
from .backward_q import delta_kernel, dq_kernel
from .launch_common import (
    NEVER,
    Launch,
    cache_arguments,
    check_capacity,
    dense_heads,
    descriptor,
    descriptors,
    power_of_two,
    precision,
    row_strides,
)

__all__ = [
    "dq_arguments",
    "plan_attention_backward",
    "plan_delta",
    "plan_dkv",
    "plan_sum",
    "shared_arguments",
    "tile_of",
    "vst_attention_backward",
]

_ROWS_OF_DELTA = 32
_MAX_CHUNK_SPLITS = 8
_ROWS_OF_A_SPLIT = 4096


def plan_attention_backward(
    grad_out, grad_lse, q, k, v, k_cache, v_cache, block_table, cache_seqlens, out, lse, layout,
    scale, arch=None, config=None,
) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:  # fmt: skip
    """Launches in their order, and the gradients that they fill: of q, k, v, k_cache, v_cache
    (of no elements without a cache), all dense.

    Arguments as the op's schema in `ops.py`; arch and config instead of the device's own and of
    the table's.
    """
    arch = arch or architecture(q.device)
    rows = q.shape[1]
    check_capacity(rows, k_cache, block_table)
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    window, ratio, chunks, split = layout or (rows, NEVER, 1, 1)
    kept = window // ratio
    if not split:  # rows in the order of positions: no run of VSTs
        window, ratio = window + kept, NEVER
    q, k, v, grad_out, out = (dense_heads(x) for x in (q, k, v, grad_out, out))
    shape = {
        "window": window, "ratio": ratio, "kept": kept, "chunks": chunks, "scale": scale,
    }  # fmt: skip
    queries, constexprs, config = shared_arguments(q, k, grad_out, arch, config)
    cache = (k_cache, v_cache, block_table, cache_seqlens)
    if k_cache is not None:
        cache = (k_cache, v_cache, block_table.contiguous(), cache_seqlens.contiguous())
    launches = []
    if grads[0].numel():
        launches = [
            plan_delta(queries, out, lse, grad_lse, scale),
            _plan_dq(queries | shape, constexprs, k, v, cache, grads[0], config.dq, arch),
            _plan_new(queries | shape, constexprs, k, v, grads, config.dkv_new, arch),
        ]
    if k_cache is None:
        return launches, (*grads, *(q.new_empty(0) for _ in range(2)))
    of_cache = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in cache[:2])
    launches += _plan_cached(queries | shape, constexprs, cache, of_cache, config.dkv_cached, arch)
    return launches, (*grads, *of_cache)


def shared_arguments(q, k, grad_out, arch, config) -> tuple[dict, dict, configs.BackwardConfig]:
    """Arguments and constexprs that dQ, dK and dV take alike, and the table's config in place of
    None. q, k and grad_out are (batch, rows, heads, head_dim). `plan_delta` fills log2 and delta.
    """
    batch, rows, heads, head_dim = q.shape
    block_d = power_of_two(head_dim)
    if config is None:
        config = configs.backward_config(arch, block_d, q.element_size(), head_dim != block_d)
    delta, log2 = (
        torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device) for _ in range(2)
    )
    queries = {"q_ptr": q, "grad_out_ptr": grad_out, "log2_ptr": log2, "delta_ptr": delta}
    constexprs = {
        "KV_HEADS": k.shape[2],
        "GROUP_SIZE": heads // k.shape[2],
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "PRECISION": precision(q.dtype, arch),
    }
    return queries | row_strides(q=q, grad_out=grad_out), constexprs, config


def plan_delta(queries, out, lse, grad_lse, scale) -> Launch:
    """queries: of `shared_arguments`."""
    batch, rows, heads, head_dim = out.shape
    arguments = {name: queries[name] for name in ("grad_out_ptr", "delta_ptr", "log2_ptr")}
    arguments |= {
        "out_ptr": out, "lse_ptr": lse.contiguous(), "grad_lse_ptr": grad_lse.contiguous(),
        "scale": scale, "rows": rows,
        **row_strides(grad_out=queries["grad_out_ptr"], out=out),
    }  # fmt: skip
    constexprs = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": power_of_two(head_dim),
        "BLOCK_M": _ROWS_OF_DELTA,
    }
    return Launch(
        "delta", delta_kernel, (-(-rows // _ROWS_OF_DELTA) * heads, batch), arguments, constexprs,
        4, 1, {"rows": _ROWS_OF_DELTA, "head_dim": constexprs["BLOCK_D"]},
    )  # fmt: skip


def tile_of(rows: int, keys: int, constexprs: dict, products: int) -> dict[str, int]:
    return {
        "rows": rows,
        "keys": keys,
        "head_dim": constexprs["BLOCK_D"],
        "group": constexprs["GROUP_SIZE"],
        "products": products,
    }


def _lookup(config, constexprs, arch) -> dict:
    """How dQ looks up keys of the cache: constants of `dq_kernel`.

    Modelled shares of peak over pages of 16 at head_dim 128: on sm_80 73.0 % if places are advanced
    and 71.2 % if they are located, on gfx942 63.7 % with "pages_in_block", 65.5 % with "gather" and
    65.9 % with SUM_KEYS too. At head_dim 256, "pages_in_block" spills 104 bytes on sm_90. There,
    with four warps, REMAKE avoids 8 spilled bytes on sm_90 and raises gfx942 from 68.3 to 71.4 %.
    """
    amd, wide = arch.startswith("hip"), constexprs["BLOCK_D"] > 128
    mode = constexprs["PAGE_MODE"]
    if mode == "pages_in_block" and (amd or wide):
        mode = "gather"
    return {
        "PAGE_MODE": mode,
        "ADVANCE": not amd and mode != "gather",
        "REMAKE": wide and config.num_warps == 4,
        "SUM_KEYS": amd and not wide,
    }


def dq_arguments(shared, constexprs, k, v, cache, dq, config, arch) -> tuple[dict, dict]:
    """Arguments and constexprs of dQ; k and v (batch, rows, kv_heads, head_dim)."""
    arguments, of_cache = cache_arguments(cache, config)
    constexprs = constexprs | {
        "HAS_CACHE": of_cache["HAS_CACHE"],
        "PAGE_MODE": of_cache["PAGE_MODE"],
        "SAME_STRIDES": of_cache["SAME_STRIDES"] and k.stride() == v.stride(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "MASKED_BLOCK_N": config.masked_block_n,
        "ALLOW_LICM": config.allow_licm,
    }
    arguments |= shared | {"k_ptr": k, "v_ptr": v, "dq_ptr": dq} | row_strides(k=k, v=v)
    arguments |= descriptors(k, v, cache[0], cache[1], constexprs, arch)
    constexprs["TMA"] = arguments["k_desc"] is not None
    return arguments, constexprs | _lookup(config, constexprs, arch)


def _plan_dq(shared, constexprs, k, v, cache, dq, config, arch) -> Launch:
    arguments, constexprs = dq_arguments(shared, constexprs, k, v, cache, dq, config, arch)
    window, ratio, chunks, kv_heads = (
        *(shared[name] for name in ("window", "ratio", "chunks")), constexprs["KV_HEADS"],
    )  # fmt: skip
    tiles = -(-(window + window // ratio) * constexprs["GROUP_SIZE"] // config.block_m)
    return Launch(
        "backward_q", dq_kernel, (tiles * chunks * kv_heads, dq.shape[0]), arguments, constexprs,
        config.num_warps, config.num_stages,
        tile_of(config.block_m, config.block_n, constexprs, 3),
    )  # fmt: skip


def plan_dkv(name, kernel, grid, shared, constexprs, of_keys, config, arch) -> Launch:
    """dK and dV of the keys that `of_keys` describes: new ones, or with a block table the cache's.
    q and grad_out are (batch, rows, heads, head_dim)."""
    constexprs = constexprs | {
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "MASKED_BLOCK_M": config.masked_block_m,
        "ALLOW_LICM": config.allow_licm,
        "CACHE": of_keys["block_table_ptr"] is not None,
    }
    names = ("q_desc", "grad_out_desc")
    views: dict = dict.fromkeys(names)
    if configs.has_tma(arch):
        found = [descriptor(shared[f"{n}_ptr"], config.block_m) for n in ("q", "grad_out")]
        if None not in found:
            views = dict(zip(names, found, strict=True))
            constexprs["MASKED_BLOCK_M"] = config.block_m  # one size of blocks for TMA
    constexprs["TMA"] = views["q_desc"] is not None
    return Launch(
        name, kernel, grid, shared | of_keys | views, constexprs,
        config.num_warps, config.num_stages,
        tile_of(config.block_m, config.block_n, constexprs, 4),
    )  # fmt: skip


def _plan_new(shared, constexprs, k, v, grads, config, arch) -> Launch:
    window, ratio, chunks = (shared[name] for name in ("window", "ratio", "chunks"))
    blocks = -(-window // config.block_n) - (-(window // ratio) // config.block_n)
    of_keys = {
        "k_ptr": k, "v_ptr": v, "dk_ptr": grads[1], "dv_ptr": grads[2],
        "block_table_ptr": None, "cache_seqlens_ptr": None,
        "page_size": 1, "max_pages": 0, "chunk_splits": 1, **row_strides(k=k, v=v),
    }  # fmt: skip
    grid = (blocks * chunks * constexprs["KV_HEADS"], k.shape[0])
    return plan_dkv("backward_new", dkv_kernel, grid, shared, constexprs, of_keys, config, arch)


def _chunk_splits(rows: int, chunks: int) -> int:
    """Ranges of chunks whose gradients of the cache are summed separately. A short cache gives few
    programs, and each walks all rows, so many rows are cut into ranges. The number depends on the
    rows of a sequence alone. The width of the table does not raise it, because each range takes
    float32 K and V of the whole table."""
    return max(1, min(chunks, rows // _ROWS_OF_A_SPLIT, _MAX_CHUNK_SPLITS))


def _plan_cached(shared, constexprs, cache, of_cache, config, arch) -> list[Launch]:
    k_cache, v_cache, block_table, cache_seqlens = cache
    _, page_size, kv_heads, head_dim = k_cache.shape
    batch, max_pages = block_table.shape
    capacity, rows, chunks = max_pages * page_size, shared["q_ptr"].shape[1], shared["chunks"]
    chunk_splits = _chunk_splits(rows, chunks)
    sums = tuple(
        torch.empty(
            (chunk_splits, batch, capacity, kv_heads, head_dim),
            dtype=torch.float32,
            device=x.device,
        )
        for x in of_cache
    )
    numbers = {"page_size": page_size, "max_pages": max_pages, "chunk_splits": chunk_splits}
    of_keys = {
        "k_ptr": k_cache, "v_ptr": v_cache, "dk_ptr": sums[0], "dv_ptr": sums[1],
        "block_table_ptr": block_table, "cache_seqlens_ptr": cache_seqlens,
        **numbers, **row_strides(k=k_cache, v=v_cache),
    }  # fmt: skip
    grid = (-(-capacity // config.block_n) * chunk_splits * kv_heads, batch)
    lengths = {"kept": shared["kept"], "chunks": chunks, "batch": batch if rows else 0, **numbers}
    total = plan_sum(sums, cache, of_cache, lengths, None)
    if not shared["q_ptr"].numel():
        return [total]
    dkv = plan_dkv("backward_cache", dkv_kernel, grid, shared, constexprs, of_keys, config, arch)
    return [dkv, total]


def plan_sum(sums, cache, of_cache, lengths, table) -> Launch:
    """Adds `sums` of all sequences to the gradients of pages. table: of a ragged call."""
    pages, page_size, kv_heads, head_dim = of_cache[0].shape
    arguments = {
        "dk_partial_ptr": sums[0], "dv_partial_ptr": sums[1],
        "block_table_ptr": cache[2], "cache_seqlens_ptr": cache[3], "table_ptr": table,
        "dk_ptr": of_cache[0], "dv_ptr": of_cache[1], **lengths,
    }  # fmt: skip
    width, block = kv_heads * head_dim, 512
    return Launch(
        "sum_pages", sum_pages_kernel, (-(-page_size * width // block) * pages,), arguments,
        {"WIDTH": width, "BLOCK": block}, 4, 1, {"numbers": block},
    )  # fmt: skip


def vst_attention_backward(*args):
    """Gradients of q, k, v, k_cache, v_cache; arguments as the op's schema in `ops.py`."""
    launches, grads = plan_attention_backward(*args)
    for launch in launches:
        launch()
    return grads
