"""What Video-XL's own code does for every window of a video, whole model: a plain
reimplementation that shares a model's weights.

A window at a time, in interleaved order. Per window: the rows' embeddings are filled token by
token in Python, a dense float mask is built, and logits are computed for every row, in
float32. Per layer: both weight sets multiply every row and a choice is made afterwards, the
unrotated cache is joined with the window's K and V, all of K is rotated anew, K and V are
repeated for the query heads, and SDPA runs with the mask. The last layer does all of this too.
Dense products are those of vxl, by the library that is faster on the processor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.upstream import _mask, _repeat, _rotate_half
from vxl_model.decoder.dense import linear, mlp

__all__ = ["PublishedModel"]


class PublishedModel:
    """One sequence; `watch` takes a window, `read` text.

    Args:
        model: a `VideoXLForConditionalGeneration`.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.core = model, model.model
        self.inv_freq = self.core.inv_freq()
        config = model.config
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = config.head_dim
        self.past: list[tuple[Tensor, Tensor] | None] = [None] * config.num_hidden_layers

    @property
    def kept(self) -> int:
        return 0 if self.past[0] is None else self.past[0][0].shape[2]

    def watch(self, features: Tensor, ratio: int) -> Tensor:
        """A window `(tokens, hidden)`; returns the logits of its rows."""
        rows = len(features) + len(features) // ratio
        vst = torch.arange(rows, device=features.device) % (ratio + 1) == ratio
        hidden = features.new_empty(1, rows, features.shape[1])
        raw = 0
        for row, is_vst in enumerate(vst.tolist()):
            if is_vst:
                hidden[0, row] = self.core.beacon_embed_tokens.weight[0]
            else:
                hidden[0, row] = features[raw]
                raw += 1
        return self._run(hidden, vst)

    def read(self, ids: Tensor) -> Tensor:
        """Text `(tokens,)`, all of it kept; returns the logits of its rows."""
        return self._run(self.core.embed_tokens(ids[None]), None)

    def _run(self, hidden: Tensor, vst: Tensor | None) -> Tensor:
        past, rows = self.kept, hidden.shape[1]
        mask = _mask(rows, past, hidden.dtype, hidden.device)
        angle = torch.arange(past + rows, device=hidden.device).float()[:, None] * self.inv_freq
        angle = torch.cat([angle, angle], dim=-1)
        cos, sin = angle.cos().to(hidden.dtype), angle.sin().to(hidden.dtype)
        for i, layer in enumerate(self.core.layers):
            x = layer.input_layernorm(hidden)
            q, k, v = (self._project(layer.self_attn, n, x, vst) for n in ("q", "k", "v"))
            before = self.past[i]
            k_all = k if before is None else torch.cat([before[0], k], dim=2)
            v_all = v if before is None else torch.cat([before[1], v], dim=2)
            if vst is None:
                self.past[i] = (k_all, v_all)
            else:
                kept = torch.cat([vst.new_ones(past), vst])
                self.past[i] = (k_all[:, :, kept], v_all[:, :, kept])
            q = q * cos[past:] + _rotate_half(q) * sin[past:]
            k_turned = k_all * cos + _rotate_half(k_all) * sin
            out = F.scaled_dot_product_attention(
                q, _repeat(k_turned, self.group), _repeat(v_all, self.group), attn_mask=mask
            )
            hidden = hidden + linear(layer.self_attn.o_proj, out.transpose(1, 2).flatten(2))
            hidden = hidden + mlp(layer.mlp, layer.post_attention_layernorm(hidden))
        return self.model.lm_head(self.core.norm(hidden))[0].float()

    def _project(self, attn: Any, name: str, x: Tensor, vst: Tensor | None) -> Tensor:
        out = linear(getattr(attn, f"{name}_proj"), x)
        if vst is not None:
            out = torch.where(
                vst[None, :, None], linear(getattr(attn, f"beacon_{name}_proj"), x), out
            )
        return out.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def rotated_keys(self, layer: int) -> Tensor:
        """Kept K rotated to its final positions, `(tokens, kv_heads, head_dim)`."""
        past = self.past[layer]
        assert past is not None
        k = past[0][0]
        angle = torch.arange(k.shape[1], device=k.device).float()[:, None] * self.inv_freq
        angle = torch.cat([angle, angle], dim=-1)
        return (k * angle.cos() + _rotate_half(k) * angle.sin()).transpose(0, 1)
