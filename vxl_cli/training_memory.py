"""Estimates the memory of training; loads no weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from vxl_kernels import ChunkLayout
from vxl_model.decoder.configuration import VideoXLConfig

from .weights import empty_model, linear_modules, weight_bytes

__all__ = ["TRAINED", "TrainingEstimate", "estimate_training"]

TRAINED = ("full", "lora")
_PROJECTIONS = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
_VST = tuple(f"beacon_{name}_proj" for name in "qkv")
_WHOLE = ("mm_projector", "beacon_embed_tokens")  # learn in full beside adapters


@dataclass(frozen=True)
class TrainingEstimate:
    """Bytes of one process that trains one video a step, with AdamW, unsharded.

    Attributes:
        learning: number of weights that learn.
        weight_bytes: all weights, those that learn in float32 under autocast.
        gradient_bytes, optimizer_bytes: of what learns; AdamW holds two numbers for each.
        activation_bytes: an estimate: with gradient checkpointing the input of every layer, and of
            one layer what its backward pass needs; and the logits.
    """

    learning: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        states = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        return states + self.activation_bytes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes": self.total_bytes}


def estimate_training(
    config: VideoXLConfig,
    frames: int,
    ratio: int,
    *,
    train: str = "full",
    rank: int = 32,
    vst: str = "full",
    quantize: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    text: int = 512,
) -> TrainingEstimate:
    """Memory of stage "finetune" on one video of `frames` frames and `text` tokens a step.

    Args:
        train: "full", everything but the vision tower learns; "lora", adapters of `rank` on the
            projections of the decoder.
        vst: with "lora", how the VSTs' projections learn: "full" or "adapters".
        dtype: of the frozen weights and of the activations.

    Raises:
        ValueError: quantised weights that learn in full.
    """
    if train == "full" and quantize is not None:
        raise ValueError(f"quantize: got {quantize!r} with train 'full', expected train 'lora'")
    model = empty_model(config)
    names = {n: p.numel() for n, p in model.named_parameters()}
    whole = (*_WHOLE, *(_VST if vst == "full" else ()))
    if train == "full":
        learning = sum(count for name, count in names.items() if "vision_tower" not in name)
        held = sum(names.values()) - learning
        weights = held * dtype.itemsize + 4 * learning
    else:
        targets = (*_PROJECTIONS, *(() if vst == "full" else _VST))
        learning = sum(
            rank * (module.in_features + module.out_features)
            for name, module in linear_modules(model).items()
            if ".layers." in name
            and "vision_tower" not in name
            and name.rpartition(".")[2] in targets
        )
        learning += sum(c for n, c in names.items() if any(part in n for part in whole))
        kept = _VST if vst == "full" else ()
        weights = weight_bytes(config, dtype, quantize, kept) + 4 * learning
    activations = _activation_bytes(config, frames, ratio, text, dtype)
    return TrainingEstimate(learning, weights, 4 * learning, 8 * learning, activations)


def _activation_bytes(
    config: VideoXLConfig, frames: int, ratio: int, text: int, dtype: torch.dtype
) -> int:
    clip = config.clip_config()
    per_frame = 0 if clip is None else (clip.image_size // clip.patch_size // 2) ** 2
    tokens, rows, kept = frames * per_frame, text, text
    for start in range(0, tokens, config.beacon_window):
        raw = min(config.beacon_window, tokens - start)
        rows += raw
        if ratio <= raw:
            vsts = ChunkLayout(raw, ratio).vsts_per_chunk
            rows, kept = rows + vsts, kept + vsts
    heads = config.num_attention_heads * config.head_dim
    kv = (config.num_key_value_heads or config.num_attention_heads) * config.head_dim
    inputs = config.num_hidden_layers * rows * config.hidden_size
    # Of the layer whose backward pass runs: two norms, q, k, v before and after the rotation, the
    # attention's result, gate, up, their product, and as much again of gradients; and its cache.
    layer = rows * (4 * config.hidden_size + 3 * heads + 4 * kv + 3 * config.intermediate_size)
    cache = 2 * kept * kv
    logits = 2 * text * config.vocab_size * 4
    return (inputs + 2 * (layer + cache)) * dtype.itemsize + logits
