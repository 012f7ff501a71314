"""The decoder: a language model's layers with a second set of Q, K and V projections for the VSTs.

Norms, MLP and the rotation's frequencies are the language model's own (`qwen2.py`). What the rows
of a pass attend to, a cache in pages or one another, is the context's business (`context.py`).

Source: Video-XL section 3.2; parameter names of the released checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from ..auto_class import AutoClassMixin
from ..errors import fail
from .attention import VideoXLAttention
from .configuration import VideoXLConfig
from .context import AttentionContext, CacheContext
from .dense import linear, mlp
from .placement import execution_device, local
from .qwen2 import TextMLP, TextNorm, rotary_frequencies
from .single_rows import linear_rows, mlp_rows, norm_rows
from .vision_tower import VisionTower

__all__ = [
    "VideoXLDecoder",
    "VideoXLDecoderLayer",
    "VideoXLPreTrainedModel",
    "refuse_attentions",
]


class VideoXLDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each with a norm before it and a residual around it."""

    def __init__(self, config: VideoXLConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = VideoXLAttention(config, layer_idx)
        self.mlp = TextMLP(config)
        self.input_layernorm = TextNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = TextNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, context: AttentionContext, output_rows: int | None = None
    ) -> Tensor:
        """hidden `(batch, rows, hidden)` to the same, or to its last `output_rows` rows."""
        # A compiled function may sum in another order for another number of rows.
        if context.is_few(hidden) and "output_and_mlp" not in self.__dict__:
            return self._few_rows(hidden, context, output_rows)
        parts = context.parts(hidden)
        attended = self.self_attn([self.input_layernorm(x) for x in parts], context)
        if output_rows is None:
            out = [self.output_and_mlp(x, a) for x, a in zip(parts, attended, strict=True)]
            return context.join(out)
        last = [[context.last_rows(x, output_rows) for x in rows] for rows in (parts, attended)]
        out = [self.output_and_mlp(x, a) for x, a in zip(*last, strict=True)]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _few_rows(
        self, hidden: Tensor, context: AttentionContext, output_rows: int | None
    ) -> Tensor:
        """Few rows of each sequence, with the bits of a batch of one."""
        backend, apart = context.settings.backend, context.apart
        (attended,) = self.self_attn([norm_rows(self.input_layernorm, hidden, apart)], context)
        if output_rows is not None:
            hidden, attended = (context.last_rows(x, output_rows) for x in (hidden, attended))
        hidden = hidden + linear_rows(self.self_attn.o_proj, attended, backend, apart)
        normed = norm_rows(self.post_attention_layernorm, hidden, apart)
        return hidden + mlp_rows(self.mlp, normed, backend, apart)

    def append(self, hidden: Tensor, context: CacheContext) -> None:
        """Keeps K and V of these rows and computes nothing else. The last layer does only this
        for rows whose output nobody reads."""
        rows, vsts = context.cached_rows(hidden)
        self.self_attn.append(self.input_layernorm(rows), vsts, context)

    def compile_dense(self, backend: str = "inductor") -> None:
        """Compiles norms, MLP and residuals, once for all layers and lengths. The layer itself can
        be compiled too, without graph breaks, but once for each length of prefix, video and
        suffix, since they are constants of the context."""
        self.input_layernorm.compile(backend=backend, dynamic=True)
        self.output_and_mlp = torch.compile(  # type: ignore[method-assign]
            self.output_and_mlp, backend=backend, dynamic=True
        )

    def output_and_mlp(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: output projection, MLP and both residuals."""
        hidden = hidden + linear(self.self_attn.o_proj, attended)
        return hidden + mlp(self.mlp, self.post_attention_layernorm(hidden))


class VideoXLPreTrainedModel(AutoClassMixin, PreTrainedModel):
    default_auto_class = "AutoModel"
    config: VideoXLConfig
    config_class = VideoXLConfig
    base_model_prefix = "model"
    input_modalities = ("text", "image", "video")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VideoXLDecoderLayer", "CLIPEncoderLayer"]  # noqa: RUF012
    _supports_flash_attn = True  # of the vision tower only
    _supports_sdpa = True

    @property
    def device(self) -> torch.device:
        """Where it computes: with accelerate's offloading the weights are elsewhere."""
        return execution_device(self.get_input_embeddings())


class VideoXLDecoder(VideoXLPreTrainedModel):
    """The layers, the vision tower and the projector. `VideoXLModel` gives it a `forward`."""

    def __init__(self, config: VideoXLConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.beacon_embed_tokens = nn.Embedding(1, config.hidden_size)
        self.layers = nn.ModuleList(
            VideoXLDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = TextNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._inv_freq: dict[torch.device, Tensor] = {}
        clip = config.clip_config()
        if clip is not None:
            self.vision_tower = VisionTower(clip, config.mm_vision_select_layer)
            self.mm_projector = nn.Sequential(
                nn.Linear(clip.hidden_size, config.hidden_size),
                nn.GELU(),
                nn.Linear(config.hidden_size, config.hidden_size),
            )
        self.post_init()

    def inv_freq(self) -> Tensor:
        """Rotation per position, float32 whatever the model's dtype. It is not a buffer, because
        `model.half()` would round it."""
        device = self.device
        if device not in self._inv_freq:
            self._inv_freq[device] = rotary_frequencies(self.config, device)
        return self._inv_freq[device]

    @property
    def kv_heads(self) -> int:
        """KV heads that this process holds."""
        first: Any = self.layers[0]
        config, weight = self.config, getattr(first.self_attn.k_proj, "weight", None)
        if isinstance(weight, DTensor):
            return len(local(weight)) // config.head_dim
        # The shape of other weights may say nothing: two numbers of 4 bits are one byte.
        return config.num_key_value_heads or config.num_attention_heads

    def vst_embedding(self) -> Tensor:
        """The input row of a VST, `(1, hidden)`. Differentiable."""
        return self.beacon_embed_tokens(torch.zeros(1, dtype=torch.long, device=self.device))

    def run(
        self,
        hidden: Tensor,
        context: AttentionContext,
        output_rows: int | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor | None:
        """Embedded rows through the decoder.

        Args:
            hidden: `(batch, rows, hidden)`.
            context: what the rows are and what they attend to.
            output_rows: how many of the last rows are wanted; None for all. With 0 the last
                layer only appends what it keeps, which takes a `CacheContext`.
            states: a list that receives the input of each layer, and what is returned.

        Returns:
            Normed hidden states of the wanted rows, None for 0.
        """
        layers: list[Any] = list(self.layers)
        *first, last = layers
        for layer in first:
            if states is not None:
                states.append(hidden)
            hidden = layer(hidden, context)
        if states is not None:
            states.append(hidden)
        if output_rows == 0:
            last.append(hidden, context)
            return None
        # The argument is left out where it is not needed: a compiled layer is then one graph.
        wanted = () if output_rows is None else (output_rows,)
        hidden = last(hidden, context, *wanted)
        if context.is_few(hidden):
            out = norm_rows(self.norm, hidden, context.apart)
        else:
            normed = [self.norm(x) for x in context.parts(hidden)]
            out = normed[0] if len(normed) == 1 else torch.cat(normed)
        if states is not None:
            states.append(out)
        return out


def refuse_attentions(output_attentions: bool | None, config: VideoXLConfig) -> None:
    """Attention weights are never made, so they cannot be returned."""
    wanted = config.output_attentions if output_attentions is None else output_attentions
    if wanted:
        fail("output_attentions", True, "False: attention weights are never made")
