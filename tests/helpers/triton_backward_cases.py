"""Calls that together take every compile-time branch of the backward kernels."""

import torch

from vxl_kernels import ChunkLayout, ops
from vxl_kernels._triton import configs, launch, launch_backward
from vxl_kernels.testing import Inputs, make_inputs

HALF = torch.float16
SMALL = configs.BackwardConfig(
    configs.DqConfig(32, 32, 16, 4, 2),
    configs.DkvConfig(32, 32, 16, 4, 2),
    configs.DkvConfig(32, 32, 16, 4, 2, False),
)

# name: arguments of make_inputs. Under `small_tiles`, BLOCK_N 32: pages of 64 and one page a
# sequence hold whole blocks, pages of 16 and 17 do not.
CASES = {
    "split, one page": {
        "cache_seqlens": (29,), "layout": ChunkLayout(37, 5, 3), "page_size": 80, "heads": 3,
        "kv_heads": 1,
    },
    "split, whole pages": {
        "cache_seqlens": (70,), "layout": ChunkLayout(41, 4, 2), "page_size": 64,
        "heads": 2,
    },
    "split, small pages": {
        "cache_seqlens": (33, 7), "layout": ChunkLayout(34, 5, 2), "page_size": 16, "dtype": HALF,
        "heads": 2,
    },
    "split, odd pages and head": {
        "cache_seqlens": (50,), "layout": ChunkLayout(71, 71), "page_size": 17, "head_dim": 40,
    },
    "interleaved": {
        "cache_seqlens": (40,), "layout": ChunkLayout(37, 5, 2, "interleaved"), "page_size": 128,
        "dtype": HALF,
    },
    "one raw token a VST": {"cache_seqlens": (3,), "layout": ChunkLayout(40, 1), "head_dim": 17},
    "many chunks": {"cache_seqlens": (1,), "layout": ChunkLayout(6, 3, 14), "page_size": 40},
    "tiny": {"cache_seqlens": (0, 1), "layout": ChunkLayout(1, 1), "heads": 2, "kv_heads": 2},
    "text": {"cache_seqlens": (40, 0), "rows": 45, "page_size": 16, "dtype": HALF},
    "few rows": {"cache_seqlens": (130, 0), "rows": 2, "heads": 14, "page_size": 64},
    "large head": {"cache_seqlens": (20,), "rows": 5, "head_dim": 256, "dtype": HALF},
}  # fmt: skip
WITHOUT_CACHE = {
    "split, no cache": {"layout": ChunkLayout(40, 7)},
    "text, no cache": {"rows": 37, "dtype": HALF},
}


def call(name: str) -> Inputs:
    if name in CASES:
        return make_inputs(**CASES[name])
    return make_inputs(cache_seqlens=(0, 0), **WITHOUT_CACHE[name])


def backward(inputs: Inputs, grads=None, cache: bool = True, scale: float | None = None):
    """(grad_out, grad_lse, the kernels' five gradients for them); random ones by default."""
    scale = inputs.q.shape[3] ** -0.5 if scale is None else scale
    args = list(inputs.args()[:7])
    if not cache:
        args[3:] = [None] * 4
    layout = ops.layout_to_ints(inputs.layout)
    out, lse = launch.vst_attention(*args, layout, scale)
    if grads is None:
        generator = torch.Generator().manual_seed(1)
        grads = (
            torch.randn(out.shape, generator=generator).to(out.dtype),
            torch.randn(lse.shape, generator=generator),
        )
    results = launch_backward.vst_attention_backward(*grads, *args, out, lse, layout, scale)
    return *grads, results
