"""Adapters of PEFT in the recipe: what they are put on, what learns beside them, and their files.

The base stays frozen. Adapters learn, and so do the projector and the VSTs' embedding in full, and
the VSTs' projections in full or through adapters. A result is the adapter as PEFT writes it and,
merged into the base, a checkpoint in the published layout.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vxl_model.modeling import VideoXLForConditionalGeneration

from .adapter_settings import PROJECTOR, adapter_config
from .settings import TrainSettings

__all__ = ["add_adapters", "export"]


def add_adapters(
    net: VideoXLForConditionalGeneration, settings: TrainSettings, seed: int = 0
) -> Any:
    """Puts adapters into a model. They and what is saved in full require gradients, nothing else.
    With `train_vision_tower`, targets in the vision tower get adapters too, except in layers that
    the model does not run.

    Args:
        seed: of the adapters' first weights.

    Returns:
        PEFT's model around `net`.

    Raises:
        ValueError: PEFT finds no module to adapt.
    """
    from peft import get_peft_model

    assert settings.peft is not None
    config = adapter_config(settings.peft, settings.vst)
    tower: Any = getattr(net.model, "vision_tower", None)
    if tower is not None and getattr(config, "exclude_modules", False) is None:
        config.exclude_modules = r".*vision_tower\..*"
        if settings.train_vision_tower:
            last = len(tower.vision_tower.vision_model.encoder.layers)
            idle = "|".join(map(str, range(tower.layers_run, last))) or "none"
            config.exclude_modules = rf".*vision_tower\..*\.layers\.({idle})\..*"
    if tower is None:
        config.modules_to_save = [x for x in config.modules_to_save if x != PROJECTOR]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(net, config)
        except ValueError as error:
            raise ValueError(f"peft: {' '.join(str(error).split())}") from None


def export(
    model: str | os.PathLike[str],
    settings: TrainSettings,
    weights: dict[str, Tensor],
    adapter: Path,
    merged: Path | None,
) -> None:
    """Writes the adapter as PEFT does, and the checkpoint that it was trained on with it merged in,
    in the published layout. Both are made on the CPU of a fresh copy of that checkpoint, which is
    neither quantised nor sharded.

    Args:
        model: the checkpoint.
        weights: what learned, by its name in the model.
        adapter, merged: folders; None for no merged checkpoint.

    Raises:
        ValueError: a merged weight is not finite.
    """
    dtype = getattr(torch, settings.dtype)
    net = VideoXLForConditionalGeneration.from_pretrained(model, dtype=dtype)
    wrapped = add_adapters(net, settings)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    net.load_state_dict(weights, strict=False)
    wrapped.save_pretrained(adapter, save_embedding_layers=False)
    if merged is not None:
        wrapped.merge_and_unload(safe_merge=True).to(dtype).save_pretrained(merged)
