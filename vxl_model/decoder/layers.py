"""Qwen2's decoder with a second set of Q, K and V projections for the VSTs.

Norms, MLP, embeddings and the rotation's frequencies are transformers' own; attention is
`vxl_kernels`'. What a layer attends to, a cache in pages or the rows of a training pass, is the
step's business (`steps.py`).

Source: Video-XL section 3.2; parameter names of the released checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, Qwen2RotaryEmbedding

from .configuration import VideoXLConfig

if TYPE_CHECKING:
    from .context import Step
from .attention import VideoXLAttention, local

__all__ = ["VideoXLDecoderLayer", "VideoXLModel", "VideoXLPreTrainedModel"]


class VideoXLDecoderLayer(GradientCheckpointingLayer):
    """Qwen2's layer; what its rows attend to comes from the step."""

    def __init__(self, config: VideoXLConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = VideoXLAttention(config, layer_idx)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, step: Step, keep_rows: int | None = None) -> Tensor:
        """hidden `(batch, rows, hidden)` to the same, or to its last `keep_rows` rows."""
        parts = step.parts(hidden)
        attended = step.attention(self.self_attn, [self.input_layernorm(x) for x in parts])
        if keep_rows is not None:
            parts = [x[:, -keep_rows:] for x in parts]
            attended = [x[:, -keep_rows:] for x in attended]
        out = [self._rest(x, a) for x, a in zip(parts, attended, strict=True)]
        return out[0] if len(out) == 1 else torch.cat(out)

    def keep(self, hidden: Tensor, step: Step) -> None:
        """Appends what the layer keeps of these rows and computes nothing else: all that the
        last layer has to do for rows whose output nobody reads."""
        kept, vsts = step.kept_rows(hidden)
        step.append(
            self.self_attn.layer_idx, *self.self_attn.project_kept(self.input_layernorm(kept), vsts)
        )

    def compile_dense(self, backend: str = "inductor") -> None:
        """Compiles norms, MLP and residuals, once for all layers and lengths. Compiling the layer
        itself works too, without graph breaks, but anew for each length of prompt, video and tail:
        they are constants of the step."""
        self.input_layernorm.compile(backend=backend, dynamic=True)
        self._rest = torch.compile(self._rest, backend=backend, dynamic=True)  # type: ignore[method-assign]

    def _rest(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + self.self_attn.o_proj(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class VideoXLPreTrainedModel(PreTrainedModel):
    config: VideoXLConfig
    config_class = VideoXLConfig
    base_model_prefix = "model"
    input_modalities = ("text", "image", "video")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VideoXLDecoderLayer", "CLIPEncoderLayer"]  # noqa: RUF012
    _supports_flash_attn = True  # of the vision tower; the decoder's attention is vxl_kernels'
    _supports_sdpa = True


class VideoXLModel(VideoXLPreTrainedModel):
    """Decoder, vision tower and projector under their published names."""

    def __init__(self, config: VideoXLConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.beacon_embed_tokens = nn.Embedding(1, config.hidden_size)
        self.layers = nn.ModuleList(
            VideoXLDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._inv_freq: dict[torch.device, Tensor] = {}
        clip = config.clip_config()
        if clip is not None:
            from .vision_tower import VisionTower

            self.vision_tower = VisionTower(clip, config.mm_vision_select_layer)
            self.mm_projector = nn.Sequential(
                nn.Linear(clip.hidden_size, config.hidden_size),
                nn.GELU(),
                nn.Linear(config.hidden_size, config.hidden_size),
            )
        self.post_init()

    def inv_freq(self) -> Tensor:
        """Rotation per position, float32 whatever the model's dtype. No buffer: `model.half()`
        would round it."""
        device = self.embed_tokens.weight.device
        if device not in self._inv_freq:
            rotary = Qwen2RotaryEmbedding(self.config)
            self._inv_freq[device] = rotary.inv_freq.float().to(device).as_subclass(Tensor)
        return self._inv_freq[device]

    @property
    def kv_heads(self) -> int:
        """KV heads that this process holds."""
        first: Any = self.layers[0]
        return len(local(first.self_attn.k_proj.weight)) // self.config.head_width

    def forward(self, hidden: Tensor, step: Step, keep_rows: int | None = None) -> Tensor | None:
        """Embedded rows through the decoder.

        Args:
            hidden: `(batch, rows, hidden)`.
            step: what the rows are and what they attend to.
            keep_rows: how many of the last rows are wanted; None for all. 0: none, and the
                last layer only appends what it keeps.

        Returns:
            Normed hidden states of the wanted rows, None for 0.
        """
        layers: list[Any] = list(self.layers)
        *first, last = layers
        for layer in first:
            hidden = layer(hidden, step)
        if keep_rows == 0:
            last.keep(hidden, step)
            return None
        # Without a third argument where none is needed: a compiled layer is one graph for all.
        hidden = last(hidden, step) if keep_rows is None else last(hidden, step, keep_rows)
        parts = step.parts(hidden)
        return self.norm(hidden) if len(parts) == 1 else torch.cat([self.norm(x) for x in parts])
