"""Checkpoints in the published layout: loading, what a plain Qwen2 lacks, saving.

The modules carry the published names, so transformers reads and writes the files: sharded
safetensors, or `.bin` through torch's weights-only unpickler.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from .decoder.attention import local
from .streaming.ratios import WindowRatios

if TYPE_CHECKING:
    from .modeling import VideoXLForConditionalGeneration

__all__ = ["CheckpointMixin", "initialize_vst"]

logger = logging.get_logger(__name__)

_TOWER = ("model.vision_tower.", "model.mm_projector.")


class CheckpointMixin:
    """`from_pretrained` for `VideoXLForConditionalGeneration`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        ratio: int | Sequence[int] | WindowRatios | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads a checkpoint in the published layout, or a plain Qwen2, whose VST weights then
        start as copies: projections of q, k and v, the VST embedding of the eos embedding.

        Args:
            ratio: ratios to use where a call names none; by default the configuration's.
            output_loading_info: return also the lists of missing and unexpected keys.
            kwargs: transformers' `from_pretrained`: `dtype`, `device_map`, ...; `tp_plan="auto"`
                under torchrun cuts heads and cache among the processes, for inference.

        Returns:
            The model in evaluation mode, with `model.loading_info`; with
            `output_loading_info` a pair of both.

        Raises:
            ValueError: the checkpoint lacks weights that cannot be made of others, or is of
                another kind.
        """
        if kwargs.get("weights_only") is False:
            raise ValueError(
                "weights_only: got False, expected True: a .bin file that needs it can run any "
                "code; convert it to safetensors"
            )
        if kwargs.get("tp_plan") is not None:
            kwargs |= _distributed(kwargs.pop("tp_plan"), kwargs.pop("tp_size", None))
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        missing = set(info["missing_keys"])
        made = initialize_vst(model, missing)
        lost = sorted(
            missing - made - {"lm_head.weight"}
            if model.config.tie_word_embeddings
            else missing - made
        )
        if lost:
            shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
            raise ValueError(
                f"checkpoint: got {os.fspath(pretrained_model_name_or_path)!r} without {shown}, "
                "expected every weight of the model"
            )
        if made:
            logger.warning(
                f"{len(made)} VST weights are not in the checkpoint and start as copies of q, k, "
                "v and the eos embedding: train them before you trust the answers."
            )
        if ratio is not None:
            model.make_plan(ratio)  # refuses what cannot be
            model.ratio = ratio
        model.loading_info = info
        return (model, info) if output_loading_info else model


def _distributed(tp_plan: Any, tp_size: int | None) -> dict[str, Any]:
    """A tensor-parallel plan as this release of transformers takes it."""
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan=tp_plan, tp_size=tp_size)}
    except (ImportError, TypeError):  # before plans went into a configuration
        return {"tp_plan": tp_plan, "tp_size": tp_size}


@torch.no_grad()
def initialize_vst(
    model: VideoXLForConditionalGeneration, missing: set[str] | None = None
) -> set[str]:
    """Fills VST weights from a model's own: `beacon_{q,k,v}_proj` of `{q,k,v}_proj`, the VST
    embedding of the eos token's.

    Args:
        missing: names of the parameters to fill, those of them that are VST weights; None for
            all.

    Returns:
        The names that were filled.

    Source: the published code's `_init_beacon_proj` and `beacon_embed_init = "eos"`.
    """
    filled = set()

    def wanted(name: str) -> bool:
        if missing is not None and name not in missing:
            return False
        filled.add(name)
        return True

    for i, layer in enumerate(model.model.layers):
        attn = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            own, vst = getattr(attn, name), getattr(attn, f"beacon_{name}")
            for kind in ("weight", "bias"):
                if wanted(f"model.layers.{i}.self_attn.beacon_{name}.{kind}"):
                    local(getattr(vst, kind)).copy_(local(getattr(own, kind)))
    if wanted("model.beacon_embed_tokens.weight"):
        eos = model.config.eos_token_id
        eos = eos[0] if isinstance(eos, list | tuple) else eos
        kind = model.config.beacon_embed_init
        if kind == "eos" and eos is None:
            raise ValueError("eos_token_id: got None, expected the id whose embedding a VST gets")
        source = eos if kind == "eos" else model.config.bos_token_id
        model.model.beacon_embed_tokens.weight.copy_(model.model.embed_tokens.weight[[source]])
    return filled
