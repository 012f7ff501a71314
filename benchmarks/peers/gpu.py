"""flash-attn and FlashInfer, imported only when a call is prepared.

Both align the causal mask to the lower right, which is the mask of one chunk over its cache. They
make one call for each chunk, each over its own cache, which is laid out ahead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.common.cases import Inputs

__all__ = ["flash_attn", "flashinfer"]

Prepared = tuple[Callable[[], object], Callable[..., torch.Tensor]]


def _joined(x: Inputs, outs: list[torch.Tensor]) -> torch.Tensor:
    """Outputs of each chunk `(batch, rows, heads, head_dim)`, back to the case's rows."""
    return torch.cat(outs, dim=1)[:, x.case.sequence_rows().flatten().argsort()]


def flash_attn(x: Inputs) -> Prepared:
    """`flash_attn_with_kvcache`, which also appends the chunk's K and V to the cache."""
    from flash_attn import flash_attn_with_kvcache

    calls = []
    for rows, seen in x.case.each_chunk():
        q, k, v = (t[:, rows].contiguous() for t in (x.q_rotated, x.k_rotated, x.v))
        caches = (
            torch.cat([past[:, :seen], own], dim=1) for past, own in ((x.k_seen, k), (x.v_seen, v))
        )
        lens = torch.full((x.case.batch,), seen, dtype=torch.int32, device=q.device)
        calls.append((q, *caches, k, v, lens))

    def call() -> list[torch.Tensor]:
        return [
            flash_attn_with_kvcache(*tensors, cache_seqlens=lens, causal=True)
            for *tensors, lens in calls
        ]

    return call, lambda outs: _joined(x, outs)


def flashinfer(x: Inputs) -> Prepared:
    """The paged prefill wrapper, planned ahead. It computes decode too."""
    import flashinfer

    case, g = x.case, x.case.geometry
    calls = []
    for rows, seen in case.each_chunk():
        q = x.q_rotated[:, rows].flatten(0, 1)
        k = torch.cat([x.k_seen[:, :seen], x.k_rotated[:, rows]], dim=1)
        v = torch.cat([x.v_seen[:, :seen], x.v[:, rows]], dim=1)
        paged = x.pages(k, v)
        pages = paged.block_table.shape[1]
        steps = torch.arange(case.batch + 1, dtype=torch.int32, device=q.device)
        last = torch.full((case.batch,), k.shape[1] - (pages - 1) * g.page_size, device=q.device)
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            steps * len(rows),
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
        calls.append((wrapper, q, (paged.k, paged.v)))

    def call() -> list[torch.Tensor]:
        return [wrapper.run(q, cache) for wrapper, q, cache in calls]

    def back(outs: list[torch.Tensor]) -> torch.Tensor:
        return _joined(x, [out.unflatten(0, (case.batch, -1)) for out in outs])

    return call, back
