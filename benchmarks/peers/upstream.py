"""What Video-XL's own code does in every layer of every chunk, after the projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.common.cases import Inputs

__all__ = ["published"]


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _repeat(x: torch.Tensor, group: int) -> torch.Tensor:
    batch, kv_heads, keys, head_dim = x.shape
    many = x[:, :, None].expand(batch, kv_heads, group, keys, head_dim)
    return many.reshape(batch, kv_heads * group, keys, head_dim)


def _mask(rows: int, past: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Dense, float, 4-D: 0 where a row may attend, the lowest number elsewhere."""
    lowest = torch.finfo(dtype).min
    own = torch.full((rows, rows), lowest, dtype=dtype, device=device).triu_(1)
    mask = torch.cat([torch.zeros(rows, past, dtype=dtype, device=device), own], dim=-1)
    return mask[None, None]


def published(x: Inputs) -> tuple[Callable[[], object], Callable[..., torch.Tensor]]:
    """A chunk at a time, in interleaved order. Timed: joining the unrotated cache with the
    chunk, RoPE of q and of all K, repeating K and V for the query heads, SDPA with a dense
    mask. Free: permuting the rows, the tables of cos and sin, the append after the last chunk,
    and the mask itself, which all layers of a chunk share."""
    case, g = x.case, x.case.geometry
    group, order = g.heads // g.kv_heads, x.case.sequence_rows()
    length = order.shape[1]
    in_chunk = torch.arange(length, device=case.device)
    vsts = None
    if case.layout is not None:
        vsts = in_chunk[in_chunk % (case.layout.ratio + 1) == case.layout.ratio]

    kept = case.layout.vsts_per_chunk if case.layout else 0
    seen = [case.cache_len + c * kept for c in range(len(order))]
    places = torch.arange(case.cache_len + case.earlier_vsts + length, device=case.device)
    angle = (places.float()[:, None] * x.inv_freq[None, :]).repeat(1, 2)
    cos, sin = angle.cos().to(case.dtype), angle.sin().to(case.dtype)
    chunks = [[t[:, rows].transpose(1, 2).contiguous() for t in (x.q, x.k, x.v)] for rows in order]
    masks = [
        _mask(length, length_before, case.dtype, x.q.device) if length > 1 else None
        for length_before in seen
    ]
    k_kept, v_kept = (t.transpose(1, 2).contiguous() for t in (x.k_kept, x.v_kept))

    def call() -> list[torch.Tensor]:
        outs = []
        k_past, v_past = k_kept, v_kept
        for c, (q, k, v) in enumerate(chunks):
            k_all, v_all = torch.cat([k_past, k], dim=2), torch.cat([v_past, v], dim=2)
            keys = k_all.shape[2]
            past = keys - length
            q = q * cos[past:keys] + _rotate_half(q) * sin[past:keys]
            k_turned = k_all * cos[:keys] + _rotate_half(k_all) * sin[:keys]
            k_many, v_many = _repeat(k_turned, group), _repeat(v_all, group)
            outs.append(F.scaled_dot_product_attention(q, k_many, v_many, attn_mask=masks[c]))
            if vsts is not None and c + 1 < len(chunks):
                k_past = torch.cat([k_past, k[:, :, vsts]], dim=2)
                v_past = torch.cat([v_past, v[:, :, vsts]], dim=2)
        return outs

    def rows(outs: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(outs, dim=2).transpose(1, 2)[:, order.flatten().argsort()]

    return call, rows
