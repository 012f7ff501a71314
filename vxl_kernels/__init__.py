"""Kernels for Video-XL: attention over a growing cache of visual summary tokens (VSTs).

Importable without triton, transformers or a GPU. `python -m vxl_kernels` tells what is
installed and what runs where.
"""

from ._version import __version__
from .api import backends, rope_append, vst_attention, vst_linear
from .cache.pool import CacheBatch, HostSequence, PoolExhausted, VstCache
from .layout import ChunkLayout

__all__ = [
    "CacheBatch",
    "ChunkLayout",
    "HostSequence",
    "PoolExhausted",
    "VstCache",
    "__version__",
    "backends",
    "rope_append",
    "vst_attention",
    "vst_linear",
]
