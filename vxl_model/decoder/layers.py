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
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel

from ..auto_class import AutoClassMixin
from ..errors import fail
from ..settings import ExecutionSettings
from .attention import VideoXLAttention
from .configuration import VideoXLConfig
from .context import AttentionContext, CacheContext, Segment, TrainingContext
from .placement import execution_device, local
from .qwen2 import TextMLP, TextNorm, rotary_frequencies
from .rows import check_positions, token_spans
from .vision_tower import VisionTower

__all__ = [
    "VideoXLDecoderLayer",
    "VideoXLModel",
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
        parts = context.parts(hidden)
        attended = self.self_attn([self.input_layernorm(x) for x in parts], context)
        if output_rows is not None:
            parts = [x[:, -output_rows:] for x in parts]
            attended = [x[:, -output_rows:] for x in attended]
        out = [self.output_and_mlp(x, a) for x, a in zip(parts, attended, strict=True)]
        return out[0] if len(out) == 1 else torch.cat(out)

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
        hidden = hidden + self.self_attn.o_proj(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


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


class VideoXLModel(VideoXLPreTrainedModel):
    """Decoder, vision tower and projector under their published names."""

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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Tensor | tuple[Tensor, ...], ...]:
        """Text alone through the decoder, differentiable where gradients are enabled. A video
        and a cache need `VideoXLForConditionalGeneration`.

        Args:
            input_ids: `(batch, tokens)`.
            attention_mask: 0 for padding at either end of a row.
            position_ids: only checked: they have to count up by one.
            inputs_embeds: `(batch, tokens, hidden)` in place of `input_ids`.
            use_cache: for callers of transformers. There is no cache.
            output_hidden_states: return also the embeddings, the output of each layer, and in
                place of the last layer's that of the norm: `(batch, tokens, hidden)` each.
            return_dict: False for a tuple.

        Returns:
            `last_hidden_state (batch, tokens, hidden)`, 0 for padding.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`, or another argument
                that does not fit.
        """
        refuse_attentions(output_attentions, self.config)
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            fail("input_ids and inputs_embeds", got, "one of the two")
        if input_ids is not None:
            outside = (input_ids < 0) | (input_ids >= self.config.vocab_size)
            if bool(outside.any()):
                got = f"id {int(input_ids[outside][0])}"
                fail("input_ids", got, f"0 to {self.config.vocab_size - 1}")
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        batch, columns = inputs_embeds.shape[:2]
        spans = token_spans(attention_mask, (batch, columns))
        check_positions(position_ids, spans, columns)
        wanted = output_hidden_states
        if wanted is None:
            wanted = self.config.output_hidden_states
        rows: list[list[Tensor]] = [[] for _ in spans]
        for span in dict.fromkeys(spans):  # rows of one length and place go together
            members = [b for b, other in enumerate(spans) if other == span]
            states = self._text_states(inputs_embeds[members, span[0] : span[1]], bool(wanted))
            pad = (0, 0, span[0], columns - span[1])
            for i, b in enumerate(members):
                rows[b] = [nn.functional.pad(x[i], pad) for x in states]
        stacked = tuple(torch.stack(x) for x in zip(*rows, strict=True))
        out = BaseModelOutput(
            last_hidden_state=stacked[-1], hidden_states=stacked if wanted else None
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return out if as_dict else out.to_tuple()

    def _text_states(self, hidden: Tensor, every: bool) -> list[Tensor]:
        """Normed hidden states of embedded text `(batch, tokens, hidden)`, with `every` after
        those that `run` collects."""
        segments = [Segment(None, hidden.shape[1], 0)]
        settings = ExecutionSettings()
        context = TrainingContext(segments, len(hidden), self.inv_freq(), settings)
        states: list[Tensor] | None = [] if every else None
        last = self.run(hidden, context, states=states)
        assert last is not None
        return [last] if states is None else states

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
        parts = context.parts(hidden)
        out = self.norm(hidden) if len(parts) == 1 else torch.cat([self.norm(x) for x in parts])
        if states is not None:
            states.append(out)
        return out


def refuse_attentions(output_attentions: bool | None, config: VideoXLConfig) -> None:
    """Attention weights are never made, so they cannot be returned."""
    wanted = config.output_attentions if output_attentions is None else output_attentions
    if wanted:
        fail("output_attentions", True, "False: attention weights are never made")
