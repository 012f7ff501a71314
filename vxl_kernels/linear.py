"""`vst_linear` as two dense products of PyTorch: any device and dtype, differentiable."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .layout import ChunkLayout
from .varlen import VarlenLayout

__all__ = ["vst_linear"]


def vst_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vst_weight: torch.Tensor | None,
    vst_bias: torch.Tensor | None,
    layout: ChunkLayout | VarlenLayout | None,
) -> torch.Tensor:
    """`(batch, rows, out_features)`; arguments as in `api.vst_linear`."""
    if layout is None:
        return linear(x, weight, bias)
    assert vst_weight is not None
    raw, vst = layout.split_rows(x)
    raw, vst = linear(raw, weight, bias), linear(vst, vst_weight, vst_bias)
    if isinstance(layout, VarlenLayout):
        return torch.cat([raw, vst])
    return layout.join_rows(raw, vst)
