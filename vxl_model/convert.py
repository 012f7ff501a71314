"""From a plain Qwen2 to a Video-XL with untrained VST weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Qwen2ForCausalLM

from .decoder.configuration import VideoXLConfig

if TYPE_CHECKING:
    from .modeling import VideoXLForConditionalGeneration
from .checkpoint import initialize_vst

__all__ = ["apply_vst_to_qwen2"]


def apply_vst_to_qwen2(model: Qwen2ForCausalLM, **config: Any) -> VideoXLForConditionalGeneration:
    """Makes a plain Qwen2 watch: `apply_vst_to_qwen2(model)`.

    The model itself becomes a `VideoXLForConditionalGeneration`, with the same parameters (not
    copies) and new VST weights that start as copies of its q, k, v and eos embedding.

    Args:
        model: a `Qwen2ForCausalLM`.
        config: keys of `VideoXLConfig`: `beacon_window`, `beacon_ratio`, ...

    Returns:
        The same object.

    Raises:
        ValueError: it is no `Qwen2ForCausalLM`, or uses sliding windows.
    """
    from .modeling import VideoXLForConditionalGeneration

    if type(model) is not Qwen2ForCausalLM:
        raise ValueError(f"model: got {type(model).__name__}, expected Qwen2ForCausalLM")
    old = model.config.to_dict()
    old.pop("model_type", None)
    weight = model.model.embed_tokens.weight
    with torch.device("meta"):
        new = VideoXLForConditionalGeneration(VideoXLConfig(**{**old, **config}))
    new.model.embed_tokens = model.model.embed_tokens
    new.model.norm = model.model.norm
    new.lm_head = model.lm_head
    new.model.beacon_embed_tokens = _like(new.model.beacon_embed_tokens, weight)
    for to, of in zip(new.model.layers, model.model.layers, strict=True):
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            setattr(to, name, getattr(of, name))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(to.self_attn, name, getattr(of.self_attn, name))
        for name in ("beacon_q_proj", "beacon_k_proj", "beacon_v_proj"):
            setattr(to.self_attn, name, _like(getattr(to.self_attn, name), weight))
    initialize_vst(new)
    new.generation_config = model.generation_config
    new.config.name_or_path = model.config.name_or_path
    new.train(model.training)
    model.__class__ = VideoXLForConditionalGeneration
    model.__dict__ = new.__dict__
    return model


def _like(module: Any, weight: torch.Tensor) -> Any:
    return module.to_empty(device=weight.device).to(weight.dtype)
