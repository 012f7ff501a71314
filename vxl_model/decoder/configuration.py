"""The configuration of a Video-XL checkpoint, in the published layout.

`config.json` of the released model (`model_type` "llava_qwen", architecture
`LlavaQwenForCausalLM`) is the language model's with `beacon_*`, `mm_*` and `image_*` keys added.
The shape of the vision tower is in a file of its own, `vision_config.json`, or is known by the
name in `mm_vision_tower`.
"""

from __future__ import annotations

import json
import os
from dataclasses import field
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig
from transformers.utils import cached_file

from ..auto_class import AutoClassMixin, write_auto_file
from ..json_files import check_json_files, read_json_object
from .qwen2 import MODEL_TYPE, ROPE_TYPES, TENSOR_PARALLEL_PLAN, TextConfig

__all__ = ["VideoXLConfig"]

ARCHITECTURE = "LlavaQwenForCausalLM"
VISION_FILE = "vision_config.json"

# CLIP-ViT-L/14-336, which the released checkpoint names and does not describe.
_KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
}

# What this package computes. Another value means another model.
_SUPPORTED = {
    "beacon_attn": "full-coverage",
    "beacon_pos": "interleave",
    "beacon_param": ["q", "k", "v"],
    "beacon_attend_prev": True,
    "beacon_accum": True,
    "beacon_parallel_window": 1,
}
_SUPPORTED_VISION = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_spatial_pool_mode": "average",
    "mm_spatial_pool_stride": 2,
}
# Keys that this release of transformers adds to a configuration and the layout does not have.
_NOT_IN_LAYOUT = {
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "layer_types",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "rope_parameters",
    "vision_config",
    "_name_or_path",
    "pad_token_id",
    "per_layer_config",
}


@strict
class VideoXLConfig(AutoClassMixin, TextConfig):
    """The language model's configuration and Video-XL's own keys. Every other key of a file is
    kept as an attribute.

    Attributes:
        beacon_window: raw visual tokens of a window, `beacon_stride` the same.
        beacon_ratio: raw tokens per VST. Of several, one is drawn for each window.
        head_dim: dimensions of an attention head, by default `hidden_size / heads`.
        vision_config: the tower's shape, a `CLIPVisionConfig` or its keys. None without a tower.
            A tower that `mm_vision_tower` names and whose shape is known needs no such key.

    Raises:
        ValueError: a key has a value that means another model than the one computed here.
    """

    model_type = "llava_qwen"
    default_auto_class = "AutoConfig"
    sub_configs = {"vision_config": CLIPVisionConfig}  # noqa: RUF012
    # What an output holds beside numbers: HF's Trainer gathers the rest from all processes.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "memory"]  # noqa: RUF012
    base_model_tp_plan = {  # noqa: RUF012  (the VST projections are cut as the others)
        **TENSOR_PARALLEL_PLAN,
        "layers.*.self_attn.beacon_q_proj": "colwise",
        "layers.*.self_attn.beacon_k_proj": "colwise",
        "layers.*.self_attn.beacon_v_proj": "colwise",
    }

    head_dim: Any = None
    beacon_window: int = 1440
    beacon_stride: int | None = None
    beacon_ratio: list[int] | int = field(default_factory=lambda: [8])
    beacon_ratio_mix: str = "step-random"
    beacon_attn: str = "full-coverage"
    beacon_param: list[str] = field(default_factory=lambda: ["q", "k", "v"])
    beacon_pos: str = "interleave"
    beacon_sink_size: int = 0
    beacon_embed_init: str = "eos"
    mm_vision_tower: str | None = None
    mm_hidden_size: int | None = None
    mm_vision_select_layer: int = -2
    vision_config: dict | CLIPVisionConfig | None = None

    def __post_init__(self, **kwargs):
        self._vision_source: dict[str, Any] | None = None
        self.vision_config = self._tower_config(self.vision_config)
        super().__post_init__(**kwargs)
        if not self.head_dim:
            self.head_dim = self._default_head_dim
        if isinstance(self.beacon_ratio, int):
            self.beacon_ratio = [self.beacon_ratio]
        if self.beacon_stride is None:
            self.beacon_stride = self.beacon_window
        self._source: dict[str, Any] = {}
        self._refuse_other_models()

    def _refuse_other_models(self) -> None:
        wanted: dict[str, Any] = {**_SUPPORTED, "beacon_stride": self.beacon_window}
        if self.mm_vision_tower is not None:
            wanted |= _SUPPORTED_VISION
        wrong = [
            f"{key}: got {getattr(self, key)!r}, expected {value!r}"
            for key, value in wanted.items()
            if getattr(self, key, value) != value
        ]
        if self.use_sliding_window:
            wrong.append("use_sliding_window: got True, expected False")
        if self.beacon_window < 1:
            wrong.append(f"beacon_window: got {self.beacon_window}, expected at least 1")
        rope = (self.rope_parameters or {}).get("rope_type", "default")
        if rope not in ROPE_TYPES:
            wrong.append(f"rope_scaling: got {rope!r}, expected one of {list(ROPE_TYPES)}")
        if wrong:
            raise ValueError("configuration: " + "; ".join(wrong))

    @property
    def _default_head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def clip_config(self) -> CLIPVisionConfig | None:
        """The vision tower's configuration, None for a language model alone.

        Raises:
            ValueError: `mm_vision_tower` is a name whose shape is unknown.
        """
        if self.mm_vision_tower is None:
            return None
        if self.vision_config is None:
            raise ValueError(
                f"mm_vision_tower: got {self.mm_vision_tower!r}, whose shape is unknown; expected "
                f"{VISION_FILE} beside config.json, a folder with CLIP's config.json, or one of "
                f"{sorted(_KNOWN_TOWERS)}"
            )
        return self.vision_config

    def _tower_config(self, given: Any) -> CLIPVisionConfig | None:
        """The tower's configuration from an object, keys, or the tower's name. The keys are kept
        in `_vision_source` as they were given."""
        if self.mm_vision_tower is None or isinstance(given, CLIPVisionConfig):
            return given if isinstance(given, CLIPVisionConfig) else None
        self._vision_source = given or None
        shape = given or _known_tower(self.mm_vision_tower)
        return None if shape is None else _clip_config(shape)

    # -- reading and writing the published layout ---------------------------------------

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        if os.path.isdir(pretrained_model_name_or_path) and not kwargs.get("subfolder"):
            check_json_files(pretrained_model_name_or_path, ("config.json", VISION_FILE))
        loaded, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        kind = loaded.get("model_type")
        if kind not in (cls.model_type, MODEL_TYPE, None):
            raise ValueError(
                f"config.json: got model_type {kind!r}, expected {cls.model_type!r} or "
                f"{MODEL_TYPE!r}"
            )
        loaded["model_type"] = cls.model_type
        return _with_tower(loaded, pretrained_model_name_or_path, kwargs), rest

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # Auto classes read the file themselves and tell where it was.
        source = kwargs.get("name_or_path") or config_dict.get("_name_or_path")
        config_dict = _with_tower(config_dict, source, kwargs)
        try:
            made = super().from_dict(config_dict, **kwargs)
            config = made[0] if isinstance(made, tuple) else made
            fresh = cls(**{k: v for k, v in config_dict.items() if k != "model_type"})
        except StrictDataclassError as error:
            where = f"{source}: " if source else ""
            text = " ".join(str(error).split())
            raise ValueError(f"{where}configuration: {text}") from None
        # transformers changes some values when it reads them. A file that says
        # `"use_sliding_window": false, "sliding_window": 131072` gives a configuration with
        # `sliding_window` None, and writing None would change a file that was not edited. So each
        # key is kept with what the file said and with what was made of it (by `fresh`, which
        # no keyword argument has touched). `published` writes what the file said as long as the
        # value is still what was made of it, and the new value otherwise.
        config._source = {
            key: (value, fresh._layout_value(key))
            for key, value in config_dict.items()
            if key != "name_or_path"  # auto classes add it; the file does not have it
        }
        return made

    def _layout_value(self, key: str) -> Any:
        """What a key of the published layout is now."""
        rope = self.rope_parameters or {}
        if key == "torch_dtype":
            return None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        if key == "rope_theta":
            return rope.get("rope_theta")
        if key == "rope_scaling":
            plain = rope.get("rope_type", "default") == "default"
            return None if plain else {k: v for k, v in rope.items() if k != "rope_theta"}
        return getattr(self, key, None)

    def published(self) -> dict[str, Any]:
        """The contents of `config.json` in the published layout."""
        keys = {k for k in super().to_dict() if k not in _NOT_IN_LAYOUT and not k.startswith("_")}
        keys |= {"torch_dtype", "rope_theta", "rope_scaling"} | self._source.keys()
        keys -= {"vision_config", "architectures", "model_type", "_commit_hash"}
        if "head_dim" not in self._source and self.head_dim == self._default_head_dim:
            keys -= {"head_dim"}
        result: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": self.model_type}
        for key in keys:
            value = self._layout_value(key)
            source = self._source.get(key)
            result[key] = source[0] if source is not None and value == source[1] else value
        return dict(sorted(result.items()))

    def published_vision(self) -> dict[str, Any] | None:
        """The contents of `vision_config.json`. None if there is no tower, or if the tower's name
        tells its shape."""
        now: Any = self.vision_config
        if now is None:
            return None
        source = self._vision_source
        if source is not None:  # the file as it was read, but for what has changed since
            made = _clip_config(source).to_dict()
            changed = {k: v for k, v in now.to_dict().items() if k in made and v != made[k]}
            return {**source, **changed}
        known = _known_tower(self.mm_vision_tower or "")
        if known is not None and _clip_config(known).to_dict() == now.to_dict():
            return None
        return {k: v for k, v in now.to_diff_dict().items() if k != "transformers_version"}

    def to_dict(self) -> dict[str, Any]:
        result = super().to_dict()
        for name in ("_source", "_vision_source"):
            result.pop(name, None)
        return result

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        entry = self.class_auto_map()
        if entry:
            self.auto_map = {**(getattr(self, "auto_map", None) or {}), **entry}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        if entry:
            write_auto_file(folder)
        (folder / "config.json").write_text(json.dumps(self.published(), indent=1) + "\n")
        vision = self.published_vision()
        if vision is not None:
            (folder / VISION_FILE).write_text(json.dumps(vision, indent=1) + "\n")


def _clip_config(shape: dict[str, Any]) -> CLIPVisionConfig:
    return CLIPVisionConfig(**{k: v for k, v in shape.items() if k != "model_type"})


def _known_tower(name: str) -> dict[str, Any] | None:
    file = Path(name) / "config.json"
    if file.is_file():
        shape = read_json_object(file)
        return shape.get("vision_config", shape)
    return _KNOWN_TOWERS.get(name.rstrip("/").rsplit("/", 1)[-1])


def _with_tower(
    loaded: dict[str, Any], source: str | os.PathLike[str] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The contents of config.json with the tower's shape from the file beside it."""
    if not source or not loaded.get("mm_vision_tower") or loaded.get("vision_config"):
        return loaded
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    path = cached_file(
        source,
        VISION_FILE,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **{k: v for k, v in options.items() if k in names and v is not None},
    )
    return loaded if path is None else {**loaded, "vision_config": read_json_object(path)}
