"""Counts the weights of a model and their bytes, quantised or not; loads none."""

from __future__ import annotations

import torch
from torch import nn

from vxl_model.decoder.configuration import VideoXLConfig

__all__ = ["QUANTIZED", "empty_model", "linear_modules", "weight_bytes"]

# Bits of a weight, and how many share a float32 scale; 0: those of a row.
QUANTIZED = {"8bit": (8, 0), "4bit": (4, 64)}
_NOT_QUANTIZED = ("lm_head", "vision_tower", "mm_projector")


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def empty_model(config: VideoXLConfig) -> nn.Module:
    from vxl_model.modeling import VideoXLForConditionalGeneration

    with torch.device("meta"):
        return VideoXLForConditionalGeneration(config)


def weight_bytes(
    config: VideoXLConfig,
    dtype: torch.dtype,
    quantize: str | None = None,
    kept: tuple[str, ...] = (),
) -> int:
    """Bytes of the weights.

    Args:
        dtype: of what is not quantised.
        quantize: "8bit" or "4bit", as bitsandbytes stores the linear modules of the decoder; None.
        kept: parts of names of modules that are not quantised, besides head, tower and projector.
    """
    model = empty_model(config)
    total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if quantize is None:
        return total
    bits, group = QUANTIZED[quantize]
    for name, module in linear_modules(model).items():
        if any(part in name for part in (*_NOT_QUANTIZED, *kept)):
            continue
        count = module.weight.numel()
        scales = count // group if group else module.out_features
        total += count * bits // 8 + 4 * scales - count * dtype.itemsize
    return total
