"""Two windows through one layer of attention, over a paged cache that keeps only the VSTs."""

import torch

from vxl_kernels import ChunkLayout, VstCache, rope_append, vst_attention

layout = ChunkLayout(window=1440, ratio=8)  # 1440 raw rows, then 180 VST rows
cache = VstCache(num_layers=1, kv_heads=4, head_dim=128, num_pages=8)
video = cache.batch(cache.new())  # one sequence
inv_freq = 1e6 ** (-torch.arange(0, 128, 2) / 128)  # RoPE

for _ in range(2):
    q, k, v = (torch.randn(1, layout.rows, heads, 128) for heads in (28, 4, 4))
    video.reserve(layout.vsts_per_chunk)  # room for the VSTs of this window
    q, k = rope_append(q, k, v, *video.layer(0), layout, inv_freq)
    out = vst_attention(q, k, v, *video.layer(0), layout)  # (1, 1620, 28, 128)
    video.commit(layout.vsts_per_chunk)  # the next window sees 180 more cached tokens
