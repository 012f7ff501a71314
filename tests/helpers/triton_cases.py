"""Calls that together take every compile-time branch of the attention kernels."""

import torch

from vxl_kernels import ChunkLayout, vst_attention
from vxl_kernels.testing import Inputs, make_inputs

HALF = torch.float16
SPLIT, INTERLEAVED = ChunkLayout(37, 5, 2), ChunkLayout(37, 5, 2, "interleaved")

# name: (arguments of make_inputs, whether there is a cache). Under `small_tiles`, BLOCK_N 32:
# pages of 64 hold whole blocks, pages of 16 are parts of one, pages of 17 neither.
CASES = {
    "split, whole pages": {"cache_seqlens": (150, 0), "layout": SPLIT, "page_size": 64},
    "split, parts": {"cache_seqlens": (33, 96), "layout": SPLIT, "page_size": 16, "dtype": HALF},
    "split, any pages": {
        "cache_seqlens": (50,),
        "layout": SPLIT,
        "page_size": 17,
        "heads": 3,
        "kv_heads": 1,
    },
    "interleaved": {"cache_seqlens": (70,), "layout": INTERLEAVED, "page_size": 64, "dtype": HALF},
    "interleaved, odd head": {
        "cache_seqlens": (9,),
        "layout": INTERLEAVED,
        "page_size": 1,
        "head_dim": 17,
    },
    "one raw token a VST": {"cache_seqlens": (3,), "layout": ChunkLayout(40, 1), "head_dim": 40},
    "no whole group": {"cache_seqlens": (64,), "layout": ChunkLayout(71, 71), "heads": 6},
    "tiny": {"cache_seqlens": (0, 1), "layout": ChunkLayout(1, 1), "heads": 2, "kv_heads": 2},
    "text": {"cache_seqlens": (40, 0), "rows": 70, "page_size": 16, "dtype": HALF},
    # Maxima move by less and by more than the rescale threshold of 8; sharp in float32.
    "sharp": {"cache_seqlens": (90, 0), "layout": SPLIT, "spread": 12.0, "dtype": HALF},
    "sharp, float32": {"cache_seqlens": (90, 0), "layout": INTERLEAVED, "spread": 6.0},
    "one page a sequence": {"cache_seqlens": (90,), "rows": 50, "page_size": 200},
    "decode, whole pages": {"cache_seqlens": (300, 0, 63), "rows": 1, "heads": 14, "page_size": 64},
    "decode, pages of half a split": {"cache_seqlens": (130, 64), "rows": 1, "page_size": 32},
    "decode, parts": {"cache_seqlens": (130, 64), "rows": 3, "page_size": 16, "dtype": HALF},
    "decode, any pages": {"cache_seqlens": (130,), "rows": 2, "page_size": 17, "head_dim": 100},
    "decode, two tiles": {"cache_seqlens": (70,), "rows": 9, "heads": 6, "page_size": 64},
    "sharp, decode": {"cache_seqlens": (130, 64), "rows": 4, "spread": 12.0, "dtype": HALF},
    "decode, large head": {"cache_seqlens": (70,), "rows": 1, "head_dim": 256, "dtype": HALF},
}
WITHOUT_CACHE = {
    "split, no cache": {"layout": ChunkLayout(40, 7)},
    "text, no cache": {"rows": 70, "dtype": HALF},
    "decode, no cache": {"rows": 5},
}


def call(name: str) -> Inputs:
    if name in CASES:
        return make_inputs(**CASES[name])
    return make_inputs(cache_seqlens=(0, 0), **WITHOUT_CACHE[name])


def attend(inputs: Inputs, cache: bool = True, **options):
    if not cache:
        options["layout"] = inputs.layout
        return vst_attention(
            inputs.q, inputs.k, inputs.v, return_lse=True, backend="triton", **options
        )
    return vst_attention(*inputs.args(), return_lse=True, backend="triton", **options)
