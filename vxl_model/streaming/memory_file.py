"""A video's memory in a file: K, V and the pending visual tokens as `VstCache.save` writes them,
and counts in the header."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import torch
from torch import Tensor

from vxl_kernels import VstCache

from ..decoder.layers import VideoXLDecoder
from .cache_pool import SLACK_TOKENS
from .encoder import StreamEncoder
from .fingerprint import model_fingerprint, text_fingerprint
from .ratios import RatioPlan
from .state import VideoState, joined

__all__ = ["load_state", "read_counts", "save_state"]

_FORMAT = "vxl-memory-2"
_HEADER_FORMAT = "vxl-memory-1"  # pending tokens in base64 in the header, which holds 100 MB


def save_state(path: str | os.PathLike[str], state: VideoState, decoder: VideoXLDecoder) -> None:
    """Writes a state, its pending visual tokens included.

    Raises:
        OSError: the file can't be written.
    """
    cache, seq = state.sequence.place
    metadata = {
        "memory": _FORMAT,
        "model": model_fingerprint(decoder),
        "text_model": text_fingerprint(decoder),
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
    cpu = torch.device("cpu")
    pending = {"pending": joined(state.pending, cpu)} if state.pending else {}
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
    cache = encoder.cache(json.loads(metadata["state"])["length"] + SLACK_TOKENS)
    return _state(path, metadata, cache.load(path))


def read_counts(path: str | os.PathLike[str], encoder: StreamEncoder) -> tuple[int, int]:
    """Visual tokens of a saved memory, and the tokens that are cached once its last window is
    encoded. K and V are not read.

    Raises:
        ValueError: the file is damaged or holds something else.
        OSError: the file can't be read.
    """
    metadata = VstCache.read_metadata(path)
    state = _state(path, metadata, None)
    left = sum(encoder.final_vst_counts(state)) - sum(state.vst_counts)
    return state.visual_tokens, json.loads(metadata["state"])["length"] + left


def _state(path: str | os.PathLike[str], metadata: dict[str, str], sequence: Any) -> VideoState:
    fields = json.loads(metadata["state"])
    if metadata["memory"] == _FORMAT:
        pending = list(VstCache.read_tensors(path).values())
    else:
        pending = _pending_in_header(metadata["pending"], fields)
    return VideoState(
        sequence,
        RatioPlan.from_state(metadata["plan"]),
        pending,
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
