"""flash-attn and FlashInfer, imported only when they are asked for a call.

Both align the causal mask to the lower right, which is one chunk over its cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _cases import Inputs

__all__ = ["flash_attn", "flashinfer"]

Prepared = tuple[Callable[[], object], Callable[..., torch.Tensor]]


def flash_attn(x: Inputs) -> Prepared:
    """`flash_attn_with_kvcache`, which also copies the chunk's K and V behind the cache."""
    from flash_attn import flash_attn_with_kvcache

    order = x.case.sequence_rows().flatten()
    q, k, v = (t[:, order].contiguous() for t in (x.q_rotated, x.k_rotated, x.v))
    k_cache, v_cache = (torch.cat(pair, dim=1) for pair in ((x.k_seen, k), (x.v_seen, v)))
    lens = torch.full((x.case.batch,), x.case.cache_len, dtype=torch.int32, device=q.device)

    def call() -> torch.Tensor:
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lens, causal=True)

    return call, lambda out: out[:, order.argsort()]


def flashinfer(x: Inputs) -> Prepared:
    """The paged prefill wrapper, planned ahead; it serves decode too."""
    import flashinfer

    case, g = x.case, x.case.geometry
    order = case.sequence_rows().flatten()
    q = x.q_rotated[:, order].flatten(0, 1)
    k = torch.cat([x.k_seen, x.k_rotated[:, order]], dim=1)
    v = torch.cat([x.v_seen, x.v[:, order]], dim=1)
    paged = x.pages(k, v)
    keys, pages = k.shape[1], paged.block_table.shape[1]
    steps = torch.arange(case.batch + 1, dtype=torch.int32, device=q.device)
    last = torch.full((case.batch,), keys - (pages - 1) * g.page_size, device=q.device)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        steps * case.rows,
        steps * pages,
        paged.block_table.flatten(),
        last.int(),
        g.heads,
        g.kv_heads,
        g.head_dim,
        g.page_size,
        causal=True,
        q_data_type=case.dtype,
    )
    return (
        lambda: wrapper.run(q, (paged.k, paged.v)),
        lambda out: out.view(case.batch, case.rows, g.heads, g.head_dim)[:, order.argsort()],
    )
