"""`vst_linear` as two dense products of PyTorch: any device and dtype, differentiable."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .layout import ChunkLayout

__all__ = ["join_rows", "split_rows", "vst_linear"]


def split_rows(x: torch.Tensor, layout: ChunkLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The raw rows of x `(batch, rows, ...)`, and its VST rows."""
    if layout.order == "split":
        raw, vst = x.split(
            [layout.chunks * layout.window, layout.chunks * layout.vsts_per_chunk], 1
        )
        return raw, vst
    rows = layout.raw_rows(x.device), layout.vst_rows(x.device)
    return x.index_select(1, rows[0]), x.index_select(1, rows[1])


def join_rows(raw: torch.Tensor, vst: torch.Tensor, layout: ChunkLayout) -> torch.Tensor:
    """What `split_rows` has split, in the order of the layout."""
    if layout.order == "split":
        return torch.cat([raw, vst], dim=1)
    out = raw.new_empty(raw.shape[0], layout.rows, *raw.shape[2:])
    out = out.index_copy(1, layout.raw_rows(raw.device), raw)
    return out.index_copy(1, layout.vst_rows(raw.device), vst)


def vst_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vst_weight: torch.Tensor | None,
    vst_bias: torch.Tensor | None,
    layout: ChunkLayout | None,
) -> torch.Tensor:
    """`(batch, rows, out_features)`; arguments as in `api.vst_linear`."""
    if layout is None:
        return linear(x, weight, bias)
    assert vst_weight is not None
    raw, vst = split_rows(x, layout)
    raw, vst = linear(raw, weight, bias), linear(vst, vst_weight, vst_bias)
    return join_rows(raw, vst, layout)
