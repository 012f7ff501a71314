"""A video's memory in a file: K and V as `VstCache.save` writes them, everything else in the
header."""

from __future__ import annotations

import base64
import hashlib
import json
import os

import torch
from torch import Tensor

from vxl_kernels import VstCache

from ..decoder.attention import local
from ..decoder.layers import VideoXLModel
from .cache_pool import SLACK_TOKENS
from .encoder import StreamEncoder
from .ratios import RatioPlan
from .state import VideoState

__all__ = ["first_row_bytes", "load_state", "model_fingerprint", "save_state"]

_FORMAT = "vxl-memory-1"


def save_state(path: str | os.PathLike[str], state: VideoState, decoder: VideoXLModel) -> None:
    """Writes a state, its pending visual tokens included.

    Raises:
        OSError: the file can't be written.
    """
    pending = torch.cat(state.pending).cpu() if state.pending else torch.empty(0)
    raw = pending.contiguous().flatten().view(torch.uint8).numpy().tobytes()
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
                "pending": list(pending.shape),
                "pending_dtype": str(pending.dtype).removeprefix("torch."),
            }
        ),
        "pending": base64.b64encode(raw).decode(),
    }
    cache.save(path, seq, metadata)


def load_state(path: str | os.PathLike[str], encoder: StreamEncoder) -> VideoState:
    """Reads what `save_state` wrote, into a cache of its own on the encoder's device.

    Raises:
        ValueError: the file is damaged, holds something else, or belongs to another model.
        OSError: the file can't be read.
    """
    metadata = VstCache.read_metadata(path)
    if metadata.get("memory") != _FORMAT:
        raise ValueError(f"path: got {os.fspath(path)!r}, expected a file that save() wrote")
    if metadata["model"] != model_fingerprint(encoder.decoder):
        raise ValueError(
            f"path: got {os.fspath(path)!r}, the memory of another model (other weights, "
            "geometry or dtype)"
        )
    fields = json.loads(metadata["state"])
    raw, pending = base64.b64decode(metadata["pending"]), []
    if raw:
        dtype = getattr(torch, fields["pending_dtype"])
        features = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(fields["pending"])
        pending.append(features.to(encoder.device))
    return VideoState(
        encoder.cache(fields["length"] + SLACK_TOKENS).load(path),
        RatioPlan.from_state(metadata["plan"]),
        pending,
        fields["sizes"],
        fields["visual_tokens"],
        fields["closed"],
        drawn_ratios=fields["drawn"],
    )


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
    for _, weight in [*decoder.layers.named_parameters(), *decoder.norm.named_parameters()]:
        digest.update(first_row_bytes(local(weight)))
    for embedding in (decoder.embed_tokens, decoder.beacon_embed_tokens):
        digest.update(first_row_bytes(embedding.weight))
    return digest.hexdigest()


def first_row_bytes(weight: Tensor) -> bytes:
    """The first row as float32, to tell one set of weights from another."""
    return weight.detach()[:1].float().cpu().contiguous().numpy().tobytes()
