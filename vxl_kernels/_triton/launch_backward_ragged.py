"""Launches of `vst_attention_varlen_backward`, as `launch_backward.py`."""

from __future__ import annotations

import torch

from . import architecture
from .backward_ragged import dkv_ragged_kernel, dq_ragged_kernel, plan_backward_kernel
from .launch_backward import (
    dq_arguments,
    plan_delta,
    plan_dkv,
    plan_sum,
    shared_arguments,
    tile_of,
)
from .launch_common import Launch, check_capacity, dense_heads, row_strides

__all__ = ["plan_attention_varlen_backward", "vst_attention_varlen_backward"]

_BLOCK = 32  # tiles, or sequences, that `plan_backward_kernel` looks at together


def _without_batch(arguments: dict, *tensors: str) -> dict:
    """Arguments of one flat sequence: the kernels take no stride from it to a next."""
    return {n: x for n, x in arguments.items() if n not in {f"{t}_batch" for t in tensors}}


def plan_attention_varlen_backward(
    grad_out, grad_lse, q, k, v, k_cache, v_cache, block_table, cache_seqlens, out, lse, layout,
    chunks, scale, arch=None, config=None,
) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:  # fmt: skip
    """Launches in their order, and the gradients that they fill, as `plan_attention_backward`."""
    arch = arch or architecture(q.device)
    rows = len(q)
    check_capacity(rows, k_cache, block_table)
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    nothing = 0 in (rows, len(layout))
    cache = (k_cache, v_cache, block_table, cache_seqlens)
    of_cache = tuple(q.new_empty(0) for _ in range(2))
    if k_cache is not None:
        cache = (k_cache, v_cache, block_table.contiguous(), cache_seqlens.contiguous())
        make = torch.zeros if nothing else torch.empty
        of_cache = tuple(make(x.shape, dtype=x.dtype, device=x.device) for x in cache[:2])
    if nothing:
        return [], (*grads, *of_cache)
    q, k, v, grad_out, out = (dense_heads(x[None]) for x in (q, k, v, grad_out, out))
    layout = layout.contiguous()
    queries, constexprs, config = shared_arguments(q, k, grad_out, arch, config)
    plan = _plan_plan(layout, rows, constexprs["GROUP_SIZE"], chunks, config)
    shared = _without_batch(queries, "q", "grad_out")
    shared |= {"scale": scale, "rows": rows, "table_ptr": layout}
    launches = [
        plan,
        plan_delta(queries, out, lse[None], grad_lse[None], scale),
        _plan_dq(shared, constexprs, k, v, cache, grads[0], config.dq, arch, plan),
        _plan_new(shared, constexprs, k, v, grads, config.dkv_new, arch, plan),
    ]
    if k_cache is not None:
        launches += _plan_cached(shared, constexprs, cache, of_cache, config.dkv_cached, arch)
    return launches, (*grads, *of_cache)


def _plan_plan(layout, rows: int, group: int, chunks: int, config) -> Launch:
    tiles = rows * group // config.dq.block_m + chunks
    blocks = rows // config.dkv_new.block_n + 2 * chunks
    arguments = {"table_ptr": layout, "sequences": len(layout), "tiles": tiles, "blocks": blocks}
    for name in ("tiles", "blocks"):
        arguments[f"{name}_ptr"] = torch.empty(
            (arguments[name], 2), dtype=torch.int32, device=layout.device
        )
    constexprs = {
        "GROUP_SIZE": group,
        "BLOCK_M": config.dq.block_m,
        "BLOCK_N": config.dkv_new.block_n,
        "BLOCK": _BLOCK,
    }
    grid = (-(-tiles // _BLOCK) - (-blocks // _BLOCK),)
    return Launch(
        "plan_backward", plan_backward_kernel, grid, arguments, constexprs, 4, 1, {"tiles": _BLOCK}
    )


def _plan_dq(shared, constexprs, k, v, cache, dq, config, arch, plan) -> Launch:
    arguments, constexprs = dq_arguments(shared, constexprs, k, v, cache, dq, config, arch)
    arguments = _without_batch(arguments, "k", "v") | {"tiles_ptr": plan.arguments["tiles_ptr"]}
    return Launch(
        "backward_q_ragged", dq_ragged_kernel,
        (plan.arguments["tiles"] * constexprs["KV_HEADS"],), arguments, constexprs,
        config.num_warps, config.num_stages,
        tile_of(config.block_m, config.block_n, constexprs, 3),
    )  # fmt: skip


def _plan_new(shared, constexprs, k, v, grads, config, arch, plan) -> Launch:
    of_keys = {
        "k_ptr": k, "v_ptr": v, "dk_ptr": grads[1], "dv_ptr": grads[2],
        "block_table_ptr": None, "cache_seqlens_ptr": None, "page_size": 1, "max_pages": 0,
        "blocks_ptr": plan.arguments["blocks_ptr"], **row_strides(k=k, v=v),
    }  # fmt: skip
    grid = (plan.arguments["blocks"] * constexprs["KV_HEADS"],)
    return plan_dkv(
        "backward_new_ragged", dkv_ragged_kernel, grid, shared, constexprs, of_keys, config, arch
    )


def _plan_cached(shared, constexprs, cache, of_cache, config, arch) -> list[Launch]:
    k_cache, v_cache, block_table, cache_seqlens = cache
    _, page_size, kv_heads, head_dim = k_cache.shape
    sequences, max_pages = block_table.shape
    capacity = page_size * max_pages
    sums = tuple(
        torch.empty((sequences, capacity, kv_heads, head_dim), dtype=torch.float32, device=x.device)
        for x in of_cache
    )
    of_keys = {
        "k_ptr": k_cache, "v_ptr": v_cache, "dk_ptr": sums[0], "dv_ptr": sums[1],
        "block_table_ptr": block_table, "cache_seqlens_ptr": cache_seqlens, "blocks_ptr": None,
        "page_size": page_size, "max_pages": max_pages, **row_strides(k=k_cache, v=v_cache),
    }  # fmt: skip
    grid = (-(-capacity // config.block_n) * sequences * kv_heads,)
    lengths = {
        "kept": 0, "chunks": 1, "page_size": page_size, "max_pages": max_pages,
        "batch": sequences, "chunk_splits": 1,
    }  # fmt: skip
    dkv = plan_dkv(
        "backward_cache_ragged", dkv_ragged_kernel, grid, shared, constexprs, of_keys, config, arch
    )
    return [dkv, plan_sum(sums, cache, of_cache, lengths, shared["table_ptr"])]


def vst_attention_varlen_backward(*args):
    """Gradients of q, k, v, k_cache, v_cache; arguments as the op's schema in `ops.py`."""
    launches, grads = plan_attention_varlen_backward(*args)
    for launch in launches:
        launch()
    return grads
