"""One attention layer with two sets of projections.

Source: Video-XL section 3.2; parameter names of the released checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration import VideoXLConfig
from .context import AttentionContext, CacheContext, RowLayout
from .projections import Apart, project_rows
from .qwen2 import OUTPUT_BIAS, QKV_BIAS

__all__ = ["VideoXLAttention"]


class VideoXLAttention(nn.Module):
    """Raw rows go through `*_proj`, VSTs through `beacon_*_proj`."""

    def __init__(self, config: VideoXLConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        hidden = config.hidden_size
        query = config.num_attention_heads * self.head_dim
        kept = (config.num_key_value_heads or config.num_attention_heads) * self.head_dim
        for prefix in ("", "beacon_"):
            for name, width in (("q", query), ("k", kept), ("v", kept)):
                self.add_module(f"{prefix}{name}_proj", nn.Linear(hidden, width, bias=QKV_BIAS))
        self.o_proj = nn.Linear(query, hidden, bias=OUTPUT_BIAS)

    def forward(self, parts: list[Tensor], context: AttentionContext) -> list[Tensor]:
        """Attention of each part `(batch, rows, hidden)` up to `o_proj`, which the layer compiles
        together with its MLP: `(batch, rows, heads * head_dim)`."""
        backend = context.settings.backend
        apart = context.apart if context.is_few(parts[0]) else None
        qkv = [self.project(x, layout, backend, apart) for x, layout in context.segments(parts)]
        attended = context.attend(self.layer_idx, qkv)
        if context.idle_vsts:
            idle = self._idle_vsts(parts[0])
            attended = [x + idle for x in attended]
        return attended

    def append(self, x: Tensor, vsts: bool, context: CacheContext) -> None:
        """Keeps K and V of rows `(batch, rows, hidden)` that are all VSTs or all ordinary
        tokens, and computes nothing else."""
        prefix = "beacon_" if vsts else ""
        k, v = (self._linear(x, name, None, None, prefix) for name in ("k", "v"))
        context.append(self.layer_idx, k, v)

    def project(
        self, x: Tensor, layout: RowLayout, backend: str | None, apart: Apart | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `(batch, rows, heads, head_dim)`, not rotated, of x `(batch, rows, hidden)`."""
        names = ("q", "k", "v")
        q, k, v = (self._linear(x, name, layout, backend, apart=apart) for name in names)
        return q, k, v

    def _idle_vsts(self, like: Tensor) -> Tensor:
        """0, with a graph through the VSTs' projections."""
        row = like.new_zeros(1, like.shape[-1])
        parts = (getattr(self, f"beacon_{name}_proj") for name in ("q", "k", "v"))
        return 0 * torch.stack([part(row).sum() for part in parts]).sum()

    def _linear(
        self,
        x: Tensor,
        name: str,
        layout: RowLayout,
        backend: str | None,
        prefix: str = "",
        apart: Apart | None = None,
    ) -> Tensor:
        own = getattr(self, f"{prefix}{name}_proj")
        vst = getattr(self, f"beacon_{name}_proj")
        rows = project_rows(x, own, vst, layout, backend, apart)
        return rows.unflatten(-1, (-1, self.head_dim))
