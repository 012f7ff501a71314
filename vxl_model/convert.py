"""From a plain language model to a Video-XL with untrained VST weights."""

from __future__ import annotations

from typing import Any

import torch

from .checkpoint import initialize_vst
from .decoder.configuration import VideoXLConfig
from .decoder.qwen2 import TextForCausalLM
from .errors import fail
from .modeling import VideoXLForConditionalGeneration

__all__ = ["apply_vst_to_qwen2"]

# What transformers notes on a quantised model, and Trainer and PEFT read.
_QUANTISATION = (
    "hf_quantizer",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "is_quantized",
    "quantization_method",
)


def apply_vst_to_qwen2(model: TextForCausalLM, **config: Any) -> VideoXLForConditionalGeneration:
    """Makes a plain Qwen2 watch: `model = apply_vst_to_qwen2(model)`.

    Args:
        model: a `Qwen2ForCausalLM`, quantised or not. It stays as it is.
        config: keys of `VideoXLConfig`: `beacon_window`, `beacon_ratio`, ...

    Returns:
        A model made of the same modules (nothing is copied, so training it changes `model` too)
        and of new VST weights, which start as copies of its q, k, v and eos embedding.

    Raises:
        ValueError: `model` is something else, holds adapters, is offloaded, or uses sliding
            windows.
    """
    if type(model) is not TextForCausalLM:
        fail("model", type(model).__name__, TextForCausalLM.__name__)
    _refuse_adapters(model)
    if any(p.device.type == "meta" for p in model.parameters()):
        fail("model", "weights that are offloaded", "all of them on a device")
    old = model.config.to_dict()
    old.pop("model_type", None)
    weight = model.model.embed_tokens.weight  # of the dtype that is not quantised
    with torch.device("meta"):
        new = VideoXLForConditionalGeneration(VideoXLConfig(**{**old, **config}))
    new.model.embed_tokens = model.model.embed_tokens
    new.model.norm = model.model.norm
    new.lm_head = model.lm_head
    new.model.beacon_embed_tokens = _like(new.model.beacon_embed_tokens, weight)
    for target, source in zip(new.model.layers, model.model.layers, strict=True):
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            setattr(target, name, getattr(source, name))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(target.self_attn, name, getattr(source.self_attn, name))
        for name in ("beacon_q_proj", "beacon_k_proj", "beacon_v_proj"):
            setattr(target.self_attn, name, _like(getattr(target.self_attn, name), weight))
    initialize_vst(new.model)
    for name in _QUANTISATION:
        if hasattr(model, name):
            setattr(new, name, getattr(model, name))
    new.generation_config = model.generation_config
    new.config.name_or_path = model.config.name_or_path
    return new.train(model.training)


def _refuse_adapters(model: TextForCausalLM) -> None:
    """An adapter's configuration and names belong to the model it was made for."""
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            fail(
                "model",
                f"an adapter of PEFT at {name}",
                "merge_and_unload() first, or the adapter added to the Video-XL",
            )


def _like(module: Any, weight: torch.Tensor) -> Any:
    return module.to_empty(device=weight.device).to(weight.dtype)
