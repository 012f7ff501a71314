"""Digests that tell one model's memories from another's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from ..decoder.configuration import VideoXLConfig
from ..decoder.layers import VideoXLDecoder
from ..decoder.placement import local, onloaded
from ..errors import fail
from ..json_files import read_json_object

__all__ = [
    "checkpoint_text_fingerprint",
    "first_row_bytes",
    "model_fingerprint",
    "text_fingerprint",
]

# One row of every weight is enough: 9 MB for the 28 layers of Qwen2-7B.


def model_fingerprint(decoder: VideoXLDecoder) -> str:
    """A digest of geometry, dtype, and the first row of every weight."""
    config = decoder.config
    digest = _geometry(config, decoder.beacon_embed_tokens.weight.dtype, config.beacon_window)
    embeddings = decoder.embed_tokens, decoder.beacon_embed_tokens
    for part in (decoder.layers, decoder.norm, *embeddings):
        for _, row in _rows(part):
            digest.update(row)
    return digest.hexdigest()


def text_fingerprint(decoder: VideoXLDecoder) -> str:
    """The same of what a question needs: the language model without its VST weights."""
    rows = {name: row for name, row in _rows(decoder) if _is_text(f"model.{name}")}
    return _text(decoder.config, decoder.embed_tokens.weight.dtype, rows)


def _rows(part: torch.nn.Module) -> Iterator[tuple[str, bytes]]:
    for prefix, module in part.named_modules():
        if not module._parameters:
            continue
        with onloaded(module):
            for name, weight in module.named_parameters(recurse=False):
                packed = not weight.dtype.is_floating_point
                row = (_first_codes if packed else first_row_bytes)(local(weight))
                yield f"{prefix}.{name}", row


def checkpoint_text_fingerprint(path: str | os.PathLike[str], dtype: torch.dtype) -> str:
    """`text_fingerprint` of a checkpoint that would be loaded in this dtype. Reads first rows
    only, so it takes no memory.

    Args:
        path: a folder or a name on the Hub, in safetensors; Video-XL or a plain Qwen2.

    Raises:
        ValueError: the checkpoint has no safetensors files.
        OSError: it can't be read.
    """
    config = VideoXLConfig.from_pretrained(path)
    rows = {}
    for file in _safetensors_files(path):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a dict)
                part = weights.get_slice(name)
                if _is_text(name):
                    row = first_row_bytes(part[:1].to(dtype))
                    rows[name.removeprefix("model.")] = row
    return _text(config, dtype, rows)


def _is_text(name: str) -> bool:
    """Whether a weight of this name in a checkpoint takes part in reading text."""
    return name.startswith(_TEXT) and "beacon_" not in name


_TEXT = ("model.embed_tokens.", "model.layers.", "model.norm.")  # not the vision tower's


def _safetensors_files(path: str | os.PathLike[str]) -> list[str]:
    index = cached_file(
        path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False
    )
    if index is None:
        single = cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False)
        if single is None:
            fail("checkpoint", f"{os.fspath(path)!r} without safetensors files", "safetensors")
        return [single]
    shards = read_json_object(index)["weight_map"].values()
    return [str(cached_file(path, name)) for name in sorted(set(shards))]


def _geometry(config: VideoXLConfig, dtype: torch.dtype, *more: int):
    fields = [
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        *more,
        config.published()["rope_theta"],
        str(dtype),
    ]
    return hashlib.sha256(json.dumps(fields).encode())


def _text(config: VideoXLConfig, dtype: torch.dtype, rows: Mapping[str, bytes]) -> str:
    digest = _geometry(config, dtype)
    for name in sorted(rows):
        digest.update(name.encode() + rows[name])
    return digest.hexdigest()


def first_row_bytes(weight: Tensor) -> bytes:
    """The first row as float32, to tell one set of weights from another."""
    return weight.detach()[:1].dequantize().float().cpu().contiguous().numpy().tobytes()


def _first_codes(weight: Tensor) -> bytes:
    """How often each number of 4 bits occurs in the first 32 rows of a quantised weight. The first
    call on a CPU makes bitsandbytes reorder them, 32 rows by 32 rows."""
    state = getattr(weight, "quant_state", None)
    width = weight.shape[-1] if state is None else state.shape[-1] // 2
    codes = weight.detach().flatten()[: 32 * width].contiguous().view(torch.uint8)
    counts = torch.bincount(torch.cat([codes & 15, codes >> 4]).int(), minlength=16)
    return counts.cpu().numpy().tobytes()
