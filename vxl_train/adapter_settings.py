"""Configurations of PEFT and bitsandbytes from the recipe's settings."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["PROJECTOR", "VST_CHOICES", "adapter_config", "quantization_config"]

VST_CHOICES = ("full", "adapters")
_VST_PROJECTIONS = [f"beacon_{name}_proj" for name in "qkv"]
_VST_EMBEDDING = "beacon_embed_tokens"
PROJECTOR = "mm_projector"
_TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def adapter_config(given: dict[str, Any], vst: str) -> Any:
    """A configuration of PEFT, with the recipe's targets.

    Args:
        given: keys of PEFT's configuration; peft_type is LORA by default.
        vst: how the VSTs' projections learn, "full" or "adapters".

    Raises:
        ValueError: PEFT is missing, or refuses a key or a value.
    """
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PromptLearningConfig
    except ImportError:
        raise ValueError("peft: PEFT is not installed (pip install peft)") from None
    values = dict(given)
    kind = str(values.pop("peft_type", "LORA")).upper()
    maker: Any = {str(k.value): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(kind)
    if maker is None or issubclass(maker, PromptLearningConfig):
        raise ValueError(f"peft_type: got {kind!r}, expected one that adapts modules, as LORA")
    known = inspect.signature(maker).parameters
    for key in values:
        if key not in known:
            raise ValueError(f"peft: got the key {key!r}, which a {maker.__name__} does not have")
    targets = values.setdefault("target_modules", list(_TARGETS))
    whole = [*(values.get("modules_to_save") or ()), _VST_EMBEDDING, PROJECTOR]
    if vst == "full":
        whole += _VST_PROJECTIONS
    elif isinstance(targets, list | tuple | set):
        values["target_modules"] = [*targets, *_VST_PROJECTIONS]
    values["modules_to_save"] = list(dict.fromkeys(whole))
    try:
        return maker(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"peft: {' '.join(str(error).split())}") from None


def quantization_config(given: dict[str, Any], vst: str) -> Any:
    """A configuration of bitsandbytes that leaves what learns in full as it is.

    Raises:
        ValueError: bitsandbytes is missing, or refuses a key or a value.
    """
    from transformers import BitsAndBytesConfig

    known = inspect.signature(BitsAndBytesConfig).parameters
    for key in given:
        if key not in known:
            raise ValueError(f"quantization: got the key {key!r}, unknown to bitsandbytes")
    if not (given.get("load_in_4bit") or given.get("load_in_8bit")):
        raise ValueError(f"quantization: got {given!r}, expected load_in_4bit or load_in_8bit")
    kept = ["lm_head", "model.vision_tower", f"model.{PROJECTOR}"]
    kept += _VST_PROJECTIONS if vst == "full" else []
    try:
        import bitsandbytes  # noqa: F401

        return BitsAndBytesConfig(**{"llm_int8_skip_modules": kept, **given})
    except ImportError:
        raise ValueError(
            "quantization: bitsandbytes is not installed (pip install bitsandbytes)"
        ) from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"quantization: {' '.join(str(error).split())}") from None
