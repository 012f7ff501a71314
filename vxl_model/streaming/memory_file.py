"""A video's memory in a file: K, V and the pending visual tokens as `VstCache.save` writes them,
and counts in the header."""

from __future__ import annotations

import base64
import hashlib
import json
import os

import torch
from torch import Tensor

from vxl_kernels import VstCache

from ..decoder.layers import VideoXLModel
from ..decoder.placement import local, onloaded
from .cache_pool import SLACK_TOKENS
from .encoder import StreamEncoder
from .ratios import RatioPlan
from .state import VideoState

__all__ = ["first_row_bytes", "load_state", "model_fingerprint", "save_state"]

_FORMAT = "vxl-memory-2"
_HEADER_FORMAT = "vxl-memory-1"  # pending tokens in base64 in the header, which holds 100 MB


def save_state(path: str | os.PathLike[str], state: VideoState, decoder: VideoXLModel) -> None:
    """Writes a state, its pending visual tokens included.

    Raises:
        OSError: the file can't be written.
    """
    cache, seq = state.sequence.place
    metadata = {
        "memory": _FORMAT,
        "model": model_fingerprint(decoder),
        "plan": state.plan.state(),
        "state": json.dumps(
            {
                "length": cache.length(seq),
                "sizes": state.vst_counts,
                "visual_tokens": state.visual_tokens,
                "closed": state.finished,
                "drawn": state.drawn_ratios,
            }
        ),
    }
    pending = {"pending": torch.cat(state.pending)} if state.pending else {}
    cache.save(path, seq, metadata, pending)


def load_state(path: str | os.PathLike[str], encoder: StreamEncoder) -> VideoState:
    """Reads what `save_state` wrote, into a cache of its own on the encoder's device.

    Raises:
        ValueError: the file is damaged, holds something else, or belongs to another model.
        OSError: the file can't be read.
    """
    metadata = VstCache.read_metadata(path)
    if metadata.get("memory") not in (_FORMAT, _HEADER_FORMAT):
        raise ValueError(f"path: got {os.fspath(path)!r}, expected a file that save() wrote")
    if metadata["model"] != model_fingerprint(encoder.decoder):
        raise ValueError(
            f"path: got {os.fspath(path)!r}, the memory of another model (other weights, "
            "geometry or dtype)"
        )
    fields = json.loads(metadata["state"])
    if metadata["memory"] == _FORMAT:
        pending = list(VstCache.read_tensors(path).values())
    else:
        pending = _pending_in_header(metadata["pending"], fields)
    return VideoState(
        encoder.cache(fields["length"] + SLACK_TOKENS).load(path),
        RatioPlan.from_state(metadata["plan"]),
        [x.to(encoder.device) for x in pending],
        fields["sizes"],
        fields["visual_tokens"],
        fields["closed"],
        drawn_ratios=fields["drawn"],
    )


def _pending_in_header(text: str, fields: dict) -> list[Tensor]:
    raw = bytearray(base64.b64decode(text))
    if not raw:
        return []
    dtype = getattr(torch, fields["pending_dtype"])
    return [torch.frombuffer(raw, dtype=dtype).reshape(fields["pending"])]


def model_fingerprint(decoder: VideoXLModel) -> str:
    """What tells one model's memories from another's: geometry, dtype, and a digest of weights
    from every layer."""
    config = decoder.config
    fields = [
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.beacon_window,
        config.published()["rope_theta"],
        str(decoder.beacon_embed_tokens.weight.dtype),
    ]
    digest = hashlib.sha256(json.dumps(fields).encode())
    # One row of every parameter is enough: 9 MB for the 28 layers of Qwen2-7B.
    embeddings = decoder.embed_tokens, decoder.beacon_embed_tokens
    for part in (decoder.layers, decoder.norm, *embeddings):
        for module in part.modules():
            if not module._parameters:
                continue
            with onloaded(module):
                for weight in module.parameters(recurse=False):
                    packed = not weight.dtype.is_floating_point
                    digest.update((_first_codes if packed else first_row_bytes)(local(weight)))
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
