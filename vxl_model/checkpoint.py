"""Checkpoints in the published layout: loading, and what a plain language model lacks.

The modules carry the published names, so transformers reads and writes the files: sharded
safetensors, or `.bin` through torch's weights-only unpickler.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

from .auto_class import AUTO_MODULE, write_auto_file
from .decoder.layers import VideoXLDecoder
from .decoder.placement import local
from .decoder.projections import is_plain, linear_map
from .errors import fail
from .json_files import check_json_files
from .streaming.ratios import Ratio

__all__ = ["CheckpointMixin", "initialize_vst"]

logger = logging.get_logger(__name__)


class CheckpointMixin:
    """`from_pretrained` for `VideoXLForConditionalGeneration`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        ratio: Ratio = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads a checkpoint in the published layout, or a plain Qwen2, whose VST weights then
        start as copies: projections of q, k and v, the VST embedding of the eos embedding.

        Args:
            ratio: ratios to use where a call gives none; by default the configuration's.
            output_loading_info: return also the lists of missing and unexpected keys.
            kwargs: of transformers' `from_pretrained`: `dtype`, `device_map`, ... With
                `tp_plan="auto"` under torchrun the processes share heads and cache, for inference.

        Returns:
            The model in evaluation mode, with `model.loading_info`; with
            `output_loading_info` a pair of both.

        Raises:
            ValueError: the checkpoint lacks weights that cannot be made of others, some but not
                all VST weights included, or holds another kind of model, or weights of other
                shapes than its configuration says; or a file is damaged.
        """
        if kwargs.get("weights_only") is False:
            fail(
                "weights_only",
                False,
                "True: a .bin file that needs False can run any code; convert it to safetensors",
            )
        if kwargs.get("tp_plan") is not None:
            kwargs |= _distributed(kwargs.pop("tp_plan"), kwargs.pop("tp_size", None))
        path = pretrained_model_name_or_path
        if path is not None and os.path.isdir(path) and not kwargs.get("subfolder"):
            check_json_files(path)
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except Exception as error:
            _name_damaged_file(pretrained_model_name_or_path, error)
            if "ignore_mismatched_sizes" in str(error):  # its report of the names is printed
                got = f"{os.fspath(pretrained_model_name_or_path)!r} with weights of other shapes"
                fail("checkpoint", got, "the shapes that its configuration says")
            raise
        _pack_whole_blocks(model)
        missing = set(info["missing_keys"])
        vst = {name for name, _ in model.named_parameters() if ".beacon_" in name}
        made = set() if vst - missing else initialize_vst(model.model, missing)
        lost = missing - made
        if model.config.tie_word_embeddings:
            lost -= {"lm_head.weight"}
        if lost:
            shown = ", ".join(sorted(lost)[:5])
            shown += f" and {len(lost) - 5} more" if len(lost) > 5 else ""
            got = f"{os.fspath(pretrained_model_name_or_path)!r} without {shown}"
            fail("checkpoint", got, "every weight of the model")
        if made:
            logger.warning(
                f"{len(made)} VST weights are not in the checkpoint and start as copies of q, k, "
                "v and the eos embedding: train them before you trust the answers."
            )
        if ratio is not None:
            model.make_plan(ratio)  # refuses what the model cannot do
            model.ratio = ratio
        model.loading_info = info
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Writes a folder that can be used alone: weights and configuration as transformers
        does, and the processor, if the model has one or came from a checkpoint with one."""
        entry = type(self).class_auto_map()  # type: ignore[attr-defined]
        if entry:
            entry |= {"AutoConfig": f"{AUTO_MODULE}.{type(self.config).__name__}"}  # type: ignore[attr-defined]
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **entry}  # type: ignore[attr-defined]
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]
        if not is_main_process:
            return
        if entry:
            write_auto_file(save_directory)
        processor = self._processor_to_save()
        if processor is not None:
            processor.save_pretrained(save_directory)

    def _processor_to_save(self) -> Any:
        try:
            return self.processor  # type: ignore[attr-defined]
        except (OSError, ValueError):  # made without a checkpoint, or that is gone
            return None


def _pack_whole_blocks(model: Any) -> None:
    """bitsandbytes repacks 4-bit weights for a CPU with AVX512_BF16 and fails where a row is not
    whole blocks. Such layers keep its general path."""
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = not (
                module.in_features % state.blocksize or module.out_features % 32
            )


def _name_damaged_file(path: str | os.PathLike[str], error: Exception) -> None:
    """Raises ValueError with the name of the first unreadable safetensors file, if there is one."""
    if not os.path.isdir(path):
        return
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as damage:
            raise ValueError(f"checkpoint: {file} is damaged or incomplete: {damage}") from error


def _distributed(tp_plan: Any, tp_size: int | None) -> dict[str, Any]:
    """A tensor-parallel plan as this release of transformers takes it."""
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan=tp_plan, tp_size=tp_size)}
    except (ImportError, TypeError):  # before plans went into a configuration
        return {"tp_plan": tp_plan, "tp_size": tp_size}


@torch.no_grad()
def initialize_vst(decoder: VideoXLDecoder, missing: set[str] | None = None) -> set[str]:
    """Fills VST weights from a model's own: `beacon_{q,k,v}_proj` from `{q,k,v}_proj`, the VST
    embedding from the eos token's.

    Args:
        missing: names of parameters of the whole model, of which those that are VST weights are
            filled; None for all VST weights.

    Returns:
        The names that were filled.

    Source: the published code's `_init_beacon_proj` and `beacon_embed_init = "eos"`.
    """
    filled = set()

    def wanted(name: str) -> bool:
        name = f"{decoder.base_model_prefix}.{name}"
        if missing is not None and name not in missing:
            return False
        filled.add(name)
        return True

    layers: Any = decoder.layers
    for i, layer in enumerate(layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            vst = f"beacon_{name}"
            empty = [wanted(f"layers.{i}.self_attn.{vst}.{kind}") for kind in ("weight", "bias")]
            if any(empty):
                _start_as_copy(layer.self_attn, name, vst, decoder)
    if wanted("beacon_embed_tokens.weight"):
        config = decoder.config
        eos = config.eos_token_id
        source = eos[0] if isinstance(eos, list | tuple) else eos
        if config.beacon_embed_init != "eos":
            source = config.bos_token_id
        elif eos is None:
            fail("eos_token_id", None, "the id whose embedding a VST gets")
        decoder.beacon_embed_tokens.weight.copy_(decoder.embed_tokens.weight[[source]])
    return filled


def _start_as_copy(attention: nn.Module, name: str, vst_name: str, decoder: VideoXLDecoder) -> None:
    """Gives a VST projection what the model's own computes. If it cannot hold that, quantised as
    it is, it becomes a copy of the module."""
    own, vst = getattr(attention, name), getattr(attention, vst_name)
    if not is_plain(vst):
        setattr(attention, vst_name, copy.deepcopy(own))
        return
    if is_plain(own):
        weight, bias = own.weight, own.bias
    else:
        row = decoder.embed_tokens.weight[:1].to(decoder.device)
        weight, bias = linear_map(own, decoder.config.hidden_size, row)
    local(vst.weight).copy_(local(weight))
    local(vst.bias).copy_(local(bias))
