"""Launches of ragged calls, as `launch.py`: from shapes alone, memory `torch.empty`.

How many rows each sequence has is on the device. Grids and memory are bounded by what any
sequences of these shapes could need.
"""

from __future__ import annotations

import functools
import math

import torch

from .._arguments import fail
from . import architecture, configs, remember
from .attention_ragged import decode_ragged_kernel, merge_ragged_kernel, prefill_ragged_kernel
from .launch_common import (
    OPTIONS,
    Launch,
    cache_arguments,
    check_capacity,
    dense_heads,
    descriptors,
    power_of_two,
    precision,
)
from .ragged import plan_kernel
from .rope import rope_append_ragged_kernel

__all__ = [
    "plan_attention_varlen",
    "plan_rope_append_varlen",
    "rope_append_varlen",
    "rope_append_varlen_",
    "split_reads",
    "vst_attention_varlen",
]

_MAX_INT32 = 2**31 - 1
_BLOCK = 32  # sequences, or tiles, that `plan_kernel` looks at together
_MERGED = 32  # splits that the merge reads at once
Cache = tuple[torch.Tensor | None, ...]


def _strides(**tensors: torch.Tensor) -> dict[str, int]:
    """`q_row, q_head` for q=..., and so on, of tensors (rows, heads, head_dim)."""
    return {
        f"{name}_{axis}": x.stride(i)
        for name, x in tensors.items()
        for i, axis in enumerate(("row", "head"))
    }


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x itself, or a copy whose heads are dense, see `dense_heads`."""
    view = x[None]
    kept = dense_heads(view)
    return x if kept is view else kept[0]


@functools.lru_cache(256)
def part_programs(
    rows: int, group: int, capacity: int, block_m: int, splits: configs.RaggedSplits
) -> int:
    """Splits x tiles of the text of at most `rows` rows that has the most of them."""
    most = 0
    for packed in _steps(min(rows * group, splits.limit), splits):
        tiles = -(-packed // block_m)
        most = max(most, tiles * (1 + -(-capacity // splits.of(packed))))
    return most


@functools.lru_cache(256)
def part_rows(
    sequences: int, rows: int, group: int, capacity: int, splits: configs.RaggedSplits
) -> int:
    """Rows x splits that `sequences` texts of `rows` rows together can have at most.

    The most is sought under two conditions, on the number of sequences and on that of rows. For any
    price of a row, sequences that pay for their rows bound it; the least of these bounds is taken.
    """
    fewest = rows and max(1, splits.limit // group)
    each = {1} | {max(1, n // group) for n in _steps(min(rows, fewest) * group, splits)}
    parts = {n: n * (1 + -(-capacity // splits.of(n * group))) for n in each}
    prices = {0.0} | {x / n for n, x in parts.items()}
    prices |= {
        (y - x) / (m - n) for n, x in parts.items() for m, y in parts.items() if m > n and y > x
    }
    return min(
        math.ceil(sequences * max(0.0, *(x - price * n for n, x in parts.items())) + price * rows)
        for price in prices
    )


def split_reads(forks: int, rows: int, group: int, block_m: int) -> tuple[int, int]:
    """Programs of a KV head that read a split's keys: of `forks` texts that share its pages, and
    of as many that do not. group: query heads of the KV head."""
    return -(-forks * rows * group // block_m), forks * -(-rows * group // block_m)


def _steps(packed: int, splits: configs.RaggedSplits) -> list[int]:
    """The most packed rows of each size of a split, up to `packed`."""
    ends = [splits.rows << i for i in range(splits.doublings)]
    return [n for n in ends if n < packed] + [packed] if packed > 0 else []


def plan_attention_varlen(
    q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, chunks, scale,
    arch=None, prefill=None, decode=None,
) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:  # fmt: skip
    """Launches of `vst_attention_varlen` in their order, and the tensors that are made for them:
    output, LSE, then what passes between the kernels.

    layout: `VarlenLayout.table`. arch, prefill, decode: instead of the device's own and of the
    tables' tiles.
    """
    rows, heads, head_dim = q.shape
    sequences = len(layout)
    check_capacity(rows, k_cache, block_table)
    if scale < 0:  # the kernels take the largest product for the largest score
        q, scale = -q, -scale
    scale = max(scale, 1e-30) * math.log2(math.e)
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    if 0 in (rows, sequences):
        return [], (out, lse)
    q, k, v = (_dense(x) for x in (q, k, v))
    block_table = None if block_table is None else block_table.contiguous()
    cache_seqlens = None if cache_seqlens is None else cache_seqlens.contiguous()
    cache, layout = (k_cache, v_cache, block_table, cache_seqlens), layout.contiguous()
    block_d, itemsize = power_of_two(head_dim), q.element_size()
    device, arch = (None if arch else q.device), arch or architecture(q.device)
    prefill = prefill or configs.prefill_config(arch, block_d, itemsize, device)
    decode = decode or configs.decode_config(arch, block_d, itemsize, 64)
    shared = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "scale": scale, "rows": rows}
    shared |= _strides(q=q, k=k, v=v)
    outs = {"out_ptr": out, "lse_ptr": lse}
    plan, splits = _plan_plan(q, k, cache, layout, chunks, prefill)
    launches = [
        plan,
        _plan_prefill(shared | outs, cache, plan.arguments, arch, prefill),
        *_plan_decode(shared, outs, cache, plan.arguments, splits, arch, decode),
    ]
    made = [plan.arguments[f"{name}_ptr"] for name in _PLANNED]
    made += [launches[2].arguments[n] for n in ("partial_ptr", "partial_lse_ptr")]
    return launches, (out, lse, *(x for x in made if x is not None))


_PLANNED = ("tiles", "starts", "hashes", "leaders", "order", "ranks", "sizes", "firsts")


def _plan_plan(q, k, cache, layout, chunks, config) -> tuple[Launch, configs.RaggedSplits]:
    rows, heads = q.shape[:2]
    sequences, kv_heads = len(layout), k.shape[1]
    splits = configs.ragged_splits(kv_heads)
    group = heads // kv_heads
    arguments, constexprs = cache_arguments(cache, config)
    has_cache = constexprs["HAS_CACHE"]
    capacity = arguments["page_size"] * arguments["max_pages"]
    count = 1 + -(-capacity // splits.size)
    tiles = rows * group // config.block_m + chunks
    each = (count, sequences)
    shapes = {"tiles": (tiles, 2), "starts": (sequences,)}
    shapes |= dict.fromkeys(_PLANNED[2:], each)
    if not has_cache:
        del shapes["hashes"]
    numbers: dict[str, torch.Tensor | None] = {
        f"{name}_ptr": torch.empty(shape, dtype=torch.int32, device=q.device)
        for name, shape in shapes.items()
    }
    if not has_cache:
        numbers["hashes_ptr"] = None
    names = ("block_table_ptr", "cache_seqlens_ptr", "page_size", "max_pages")
    arguments = {name: arguments[name] for name in names} | numbers
    arguments |= {"table_ptr": layout, "sequences": sequences, "splits": count, "tiles": tiles}
    constexprs = {
        "HAS_CACHE": has_cache,
        "GROUP_SIZE": group,
        "BLOCK_M": config.block_m,
        "BLOCK": _BLOCK,
        **_split_constants(splits),
    }
    grid = (count + -(-tiles // _BLOCK) + 1,)
    return Launch(
        "plan_ragged", plan_kernel, grid, arguments, constexprs, 4, 1, {"sequences": _BLOCK}
    ), splits


def _split_constants(splits: configs.RaggedSplits) -> dict[str, int]:
    return {
        "SPLIT_SIZE": splits.size,
        "SPLIT_ROWS": splits.rows,
        "SPLIT_DOUBLINGS": splits.doublings,
        "SPLIT_LIMIT": splits.limit,
    }


def _attention(shared, cache, config, arch, of_call: bool) -> tuple[dict, dict]:
    """What prefill and decode take alike. of_call: whether TMA reads keys of the call too."""
    q, k, v = (shared[f"{name}_ptr"] for name in "qkv")
    arguments, constexprs = cache_arguments(cache, config)
    block_d = power_of_two(q.shape[2])
    constexprs |= {
        "KV_HEADS": k.shape[1],
        "GROUP_SIZE": q.shape[1] // k.shape[1],
        "HEAD_DIM": q.shape[2],
        "BLOCK_D": block_d,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "MASKED_BLOCK_N": config.masked_block_n,
        "PRECISION": precision(q.dtype, arch),
        "SAME_STRIDES": constexprs["SAME_STRIDES"] and k.stride() == v.stride(),
        **configs.softmax_constants(arch, config, block_d, q.element_size()),
    }
    own_k, own_v = (k[None], v[None]) if of_call else (None, None)
    views = descriptors(own_k, own_v, cache[0], cache[1], constexprs, arch)
    constexprs["TMA"] = views["k_desc" if of_call else "k_cache_desc"] is not None
    if not of_call:
        views = {name: views[name] for name in ("k_cache_desc", "v_cache_desc")}
    return arguments | shared | views, constexprs


def _tile(config: configs.AttentionConfig, constexprs: dict) -> dict[str, int]:
    return {
        "rows": config.block_m,
        "keys": config.block_n,
        "head_dim": constexprs["BLOCK_D"],
        "group": constexprs["GROUP_SIZE"],
    }


def _plan_prefill(shared, cache, plan, arch, config) -> Launch:
    arguments, constexprs = _attention(shared, cache, config, arch, True)
    arguments |= {name: plan[name] for name in ("table_ptr", "tiles_ptr")}
    return Launch(
        "prefill_ragged", prefill_ragged_kernel, (plan["tiles"] * constexprs["KV_HEADS"],),
        arguments, constexprs, config.num_warps, config.num_stages, _tile(config, constexprs),
        OPTIONS | configs.prefill_options(arch),
    )  # fmt: skip


def _plan_decode(shared, outs, cache, plan, splits, arch, config) -> list[Launch]:
    arguments, constexprs = _attention(shared, cache, config, arch, False)
    if config.block_m < 64 and arch.startswith("cuda"):  # all warps share all rows
        constexprs["ROW_SUM_SPLITS"] = min(8 * config.num_warps, config.masked_block_n)
    q, sequences = shared["q_ptr"], plan["sequences"]
    rows, heads, head_dim = q.shape
    group = constexprs["GROUP_SIZE"]
    capacity = plan["page_size"] * plan["max_pages"]
    parts = part_rows(sequences, rows, group, capacity, splits)
    if parts > _MAX_INT32:
        fail("block_table", f"{capacity} tokens", f"fewer for {sequences} sequences of {rows} rows")
    partial = {
        "partial_ptr": torch.empty((parts, heads, head_dim), dtype=torch.float32, device=q.device),
        "partial_lse_ptr": torch.empty((parts, heads), dtype=torch.float32, device=q.device),
    }
    names = ("table_ptr", "starts_ptr", "order_ptr", "ranks_ptr", "sizes_ptr", "firsts_ptr")
    numbers = {name: plan[name] for name in (*names, "sequences", "splits")}
    programs = part_programs(rows, group, capacity, config.block_m, splits)
    decode = Launch(
        "decode_ragged", decode_ragged_kernel,
        (sequences * constexprs["KV_HEADS"] * programs,),
        arguments | numbers | partial, constexprs | _split_constants(splits),
        config.num_warps, config.num_stages, _tile(config, constexprs),
    )  # fmt: skip
    lengths = ("cache_seqlens_ptr", "page_size", "max_pages", "rows")
    merged = {name: arguments[name] for name in lengths} | outs | partial
    merged |= {name: plan[name] for name in ("table_ptr", "starts_ptr", "sequences")}
    merge_constexprs = {
        "HEADS": heads,
        "BLOCK_S": _MERGED,
        **{name: constexprs[name] for name in ("GROUP_SIZE", "HEAD_DIM", "BLOCK_D", "HAS_CACHE")},
        **_split_constants(splits),
    }
    tile = {"splits": _MERGED, "head_dim": constexprs["BLOCK_D"]}
    merge = Launch(
        "merge_ragged", merge_ragged_kernel, (rows * heads,), merged, merge_constexprs, 4, 1, tile
    )
    return [decode, merge]


def vst_attention_varlen(
    q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, chunks, scale
):
    """Output and natural-log LSE; arguments as the op's schema in `ops.py`."""
    tensors = (q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout)

    def plan():
        return plan_attention_varlen(*tensors, chunks, scale)

    key = ("vst_attention_varlen", chunks, scale, configs.tuned_path())
    out, lse, *_ = remember.run(key, tensors, plan)
    return out, lse


# -- rope_append_varlen --------------------------------------------------------------------------


def plan_rope_append_varlen(
    q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq, q_out, k_out
) -> Launch:
    rows, heads, head_dim = q.shape
    check_capacity(rows, k_cache, block_table)
    tensors = {
        "q": q, "k": k, "v": v, "q_out": q_out, "k_out": k_out, "k_cache": k_cache,
        "v_cache": v_cache, "block_table": block_table.contiguous(),
        "cache_seqlens": cache_seqlens.contiguous(), "table": layout.contiguous(),
        "inv_freq": inv_freq.contiguous(),
    }  # fmt: skip
    arguments = {f"{name}_ptr": x for name, x in tensors.items()}
    arguments |= {
        "sequences": len(layout),
        "page_size": k_cache.shape[1],
        "max_pages": block_table.shape[1],
        **_strides(q=q, k=k, v=v, qo=q_out, ko=k_out),
        **dict(zip(("kc_page", "kc_slot", "kc_head"), k_cache.stride()[:3], strict=True)),
        **dict(zip(("vc_page", "vc_slot", "vc_head"), v_cache.stride()[:3], strict=True)),
    }
    kv_heads = k.shape[1]
    constexprs = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": power_of_two(head_dim // 2),
        "BLOCK_H": min(power_of_two(heads), 32),
        "BLOCK_KV": power_of_two(kv_heads),
    }
    tile = {"rows": 1, "head_dim": head_dim}
    grid = (rows if len(layout) else 0,)
    return Launch(
        "rope_append_ragged", rope_append_ragged_kernel, grid, arguments, constexprs, 4, 1, tile
    )


def rope_append_varlen(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq):
    """q and k rotated, in new tensors."""
    cache = (k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq)

    def plan():
        outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
        return [plan_rope_append_varlen(_dense(q), _dense(k), _dense(v), *cache, *outs)], outs

    q_out, k_out = remember.run(("rope_append_varlen",), (q, k, v, *cache), plan)
    return q_out, k_out


def rope_append_varlen_(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq):
    """q and k rotated in place."""
    cache = (k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq)
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def plan():
        q_own, k_own, v_own = (_dense(x) for x in (q, k, v))
        copies.extend((x, own) for x, own in ((q, q_own), (k, k_own)) if own is not x)
        return [plan_rope_append_varlen(q_own, k_own, v_own, *cache, q_own, k_own)], []

    remember.run(("rope_append_varlen_",), (q, k, v, *cache), plan)
    for x, own in copies:
        x.copy_(own)
