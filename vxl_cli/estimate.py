"""Estimates the memory and arithmetic of a video; loads no weights."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vxl_kernels import ChunkLayout, VstCache
from vxl_model.decoder.configuration import VideoXLConfig
from vxl_model.decoder.vision_tower import FRAME_BATCH
from vxl_model.streaming.cache_pool import SLACK_TOKENS
from vxl_model.streaming.encoder import default_chunks

from .weights import empty_model, weight_bytes

__all__ = ["VideoEstimate", "device_memory", "estimate_video", "released_config"]


def released_config() -> VideoXLConfig:
    """The geometry of the released model: Qwen2-7B with CLIP-ViT-L/14-336."""
    settings: dict[str, Any] = {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "beacon_ratio": [2, 4, 8, 12, 16],
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_spatial_pool_mode": "average",
        "mm_spatial_pool_stride": 2,
        "eos_token_id": 151645,
    }
    return VideoXLConfig(**settings)


@dataclass(frozen=True)
class VideoEstimate:
    """What `estimate_video` counted. Bytes and FLOPs; a product of two numbers and its sum are 2.

    Attributes:
        frames, ratio, dtype: as given.
        visual_tokens: raw tokens. cached_tokens: prefix and VSTs.
        parameters: number of parameters of the model. weight_bytes: their bytes.
        cache_bytes: the pool that `watch` makes, with the cached tokens and room for questions.
        raw_cache_bytes: the same without compression.
        step_bytes: activations of the largest step, an estimate: vision tower or decoder.
        vision_flops: tower, projector and pooling, all frames.
        dense_flops: projections and MLP of the language model over the video.
        attention_flops: its attention over the video.
        raw_attention_flops: the same without compression, as in Qwen2.
        raw_dense_flops: dense_flops without compression (no VST rows).
        question_flops: reading a question and writing the answer.
    """

    frames: int
    ratio: int
    dtype: str
    visual_tokens: int
    cached_tokens: int
    parameters: int
    weight_bytes: int
    cache_bytes: int
    raw_cache_bytes: int
    step_bytes: int
    vision_flops: int
    dense_flops: int
    attention_flops: int
    raw_dense_flops: int
    raw_attention_flops: int
    question_flops: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.step_bytes

    @property
    def total_flops(self) -> int:
        return self.vision_flops + self.dense_flops + self.attention_flops + self.question_flops

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes": self.total_bytes, "total_flops": self.total_flops}


def estimate_video(
    config: VideoXLConfig,
    frames: int,
    ratio: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    prefix: int = 14,
    question: int = 64,
    answer: int = 256,
    page_size: int = 64,
    quantize: str | None = None,
) -> VideoEstimate:
    """Memory and FLOPs for one video of `frames` frames and a question.

    Args:
        config: of the model; no weight is read.
        ratio: raw tokens per VST.
        device: its memory decides how many windows a step takes.
        prefix, question, answer: tokens of text.

        quantize: "8bit" or "4bit", how bitsandbytes stores the decoder's linear modules; None.

    Raises:
        ValueError: no frames, a ratio larger than the window, or a model without a tower.
    """
    clip = config.clip_config()
    if clip is None:
        raise ValueError("model: got one without a vision tower, expected a Video-XL checkpoint")
    if frames < 1:
        raise ValueError(f"frames: got {frames}, expected at least 1")
    if not 1 <= ratio <= config.beacon_window:
        raise ValueError(f"ratio: got {ratio}, expected 1 to {config.beacon_window}")
    side = clip.image_size // clip.patch_size
    per_frame = (side // 2) ** 2
    cache = VstCache.memory_for(
        frames,
        ratio,
        prefix=prefix,
        suffix=max(question + answer, SLACK_TOKENS),
        window=config.beacon_window,
        tokens_per_frame=per_frame,
        num_layers=config.num_hidden_layers,
        kv_heads=_kv_heads(config),
        head_dim=config.head_dim,
        page_size=page_size,
        dtype=dtype,
    )
    tokens = cache.visual_tokens
    parameters = count_parameters(config)
    decoder = _Decoder(config)
    dense, attention = decoder.video(tokens, ratio, prefix)
    raw_dense, raw_attention = decoder.raw(tokens, prefix)
    chunks = default_chunks(config, torch.device(device), dtype)
    return VideoEstimate(
        frames=frames,
        ratio=ratio,
        dtype=str(dtype).removeprefix("torch."),
        visual_tokens=tokens,
        cached_tokens=cache.video_tokens,
        parameters=parameters,
        weight_bytes=weight_bytes(config, dtype, quantize),
        cache_bytes=cache.bytes,
        raw_cache_bytes=cache.raw_bytes,
        step_bytes=_step_bytes(config, clip, tokens, ratio, chunks, dtype),
        vision_flops=frames * _vision_flops(config, clip, side),
        dense_flops=dense,
        attention_flops=attention,
        raw_dense_flops=raw_dense,
        raw_attention_flops=raw_attention,
        question_flops=decoder.text(question, answer, cache.video_tokens),
    )


def _kv_heads(config: VideoXLConfig) -> int:
    return config.num_key_value_heads or config.num_attention_heads


def count_parameters(config: VideoXLConfig) -> int:
    """Number of parameters of the whole model; allocates none."""
    return sum(p.numel() for p in empty_model(config).parameters())  # tied parameters count once


class _Decoder:
    """FLOPs of the language model."""

    def __init__(self, config: VideoXLConfig) -> None:
        self.config = config
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        hidden, kv = config.hidden_size, _kv_heads(config) * config.head_dim
        self.kv_row = 2 * 2 * hidden * kv  # K and V of a row
        attention = 2 * hidden * self.heads * self.head_dim  # q; o takes the same
        self.row = 2 * attention + self.kv_row + 6 * hidden * config.intermediate_size
        self.layers = config.num_hidden_layers

    def video(self, tokens: int, ratio: int, prefix: int) -> tuple[int, int]:
        """Dense and attention FLOPs of prefix and windows. The last layer computes only K and V
        of the cached rows."""
        window, cached = self.config.beacon_window, prefix
        rows, attention = prefix, self._causal(prefix)
        for start in range(0, tokens, window):
            raw = min(window, tokens - start)
            if ratio > raw:  # yields no VST, so it is not computed
                continue
            layout = ChunkLayout(raw, ratio)
            attention += layout.flops(self.heads, self.head_dim, cached)
            cached += layout.vsts_per_chunk
            rows += raw + layout.vsts_per_chunk
        dense = (self.layers - 1) * rows * self.row + cached * self.kv_row
        return dense, (self.layers - 1) * attention

    def raw(self, tokens: int, prefix: int) -> tuple[int, int]:
        """The same without compression, as in Qwen2. The last layer computes only K and V too."""
        rows = tokens + prefix
        dense = (self.layers - 1) * rows * self.row + rows * self.kv_row
        return dense, (self.layers - 1) * self._causal(rows)

    def text(self, question: int, answer: int, cached: int) -> int:
        rows = question + answer
        pairs = rows * cached + rows * (rows + 1) // 2
        attention = 4 * self.heads * self.head_dim * pairs
        logits = 2 * self.config.hidden_size * self.config.vocab_size * max(answer, 1)
        return self.layers * (rows * self.row + attention) + logits

    def _causal(self, rows: int) -> int:
        return 4 * self.heads * self.head_dim * (rows * (rows + 1) // 2)


def _vision_flops(config: VideoXLConfig, clip: Any, side: int) -> int:
    """FLOPs of a frame."""
    width, rows = clip.hidden_size, side * side + 1
    patches = 2 * side * side * clip.num_channels * clip.patch_size**2 * width
    dense = 2 * rows * (4 * width * width + 2 * width * clip.intermediate_size)
    layers = config.mm_vision_select_layer % (clip.num_hidden_layers + 1)
    hidden = config.hidden_size
    projector = 2 * side * side * width * hidden + 2 * (side // 2) ** 2 * hidden * hidden
    return patches + layers * (dense + 4 * rows * rows * width) + projector


def _step_bytes(
    config: VideoXLConfig, clip: Any, tokens: int, ratio: int, chunks: int, dtype: torch.dtype
) -> int:
    """Bytes of activations alive at once, in the larger of a decoder step and a batch of frames."""
    raw = min(tokens, chunks * config.beacon_window)
    rows = raw + raw // ratio
    # Residual, normed rows, q, k, v, attention's result; gate, up and their product.
    decoder = rows * (6 * config.hidden_size + 3 * config.intermediate_size)
    patches = (clip.image_size // clip.patch_size) ** 2 + 1
    vision = FRAME_BATCH * patches * (6 * clip.hidden_size + 2 * clip.intermediate_size)
    projected = FRAME_BATCH * patches * 2 * config.hidden_size
    waiting = raw * config.hidden_size
    return (max(decoder, vision, projected) + waiting) * dtype.itemsize


def device_memory(device: torch.device) -> int:
    """Bytes free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
