"""Kernels for Video-XL: attention over a growing cache of visual summary tokens (VSTs).

Importable without triton, transformers or a GPU. `python -m vxl_kernels` tells what is
installed and what runs where.
"""

from ._version import __version__
from .api import backends, invariant_linear, rope_append, serves, vst_attention, vst_linear
from .api_varlen import rope_append_varlen, vst_attention_varlen
from .cache.pool import CacheBatch, HostSequence, PoolExhausted, VstCache
from .layout import ChunkLayout
from .varlen import VarlenLayout

__all__ = [
    "CacheBatch",
    "ChunkLayout",
    "HostSequence",
    "PoolExhausted",
    "VarlenLayout",
    "VstCache",
    "__version__",
    "backends",
    "invariant_linear",
    "rope_append",
    "rope_append_varlen",
    "serves",
    "vst_attention",
    "vst_attention_varlen",
    "vst_linear",
]
