"""Random calls for hypothesis: layouts, lengths, pages and batches, odd sizes included."""

import torch
from hypothesis import strategies as st

from vxl_kernels import ChunkLayout
from vxl_kernels.testing import Inputs, make_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def layouts(draw, most_window: int = 60) -> ChunkLayout:
    window = draw(st.integers(1, most_window))
    return ChunkLayout(
        window=window,
        ratio=draw(st.integers(1, min(window, 17))),
        chunks=draw(st.integers(1, 4)),
        order=draw(st.sampled_from(["split", "interleaved"])),
    )


@st.composite
def calls(draw, dtypes=DTYPES, even_head_dim: bool = False) -> Inputs:
    layout = draw(st.none() | layouts())
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    head_dims = [16, 32, 40, 64, 100, 128] if even_head_dim else [16, 17, 32, 40, 75, 100, 128]
    return make_inputs(
        cache_seqlens=draw(st.lists(st.integers(0, 300), min_size=1, max_size=3)),
        layout=layout,
        rows=draw(st.sampled_from([1, 1, 2, 5, 33, 70])),
        heads=kv_heads * draw(st.sampled_from([1, 2, 7])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from(head_dims)),
        page_size=draw(st.sampled_from([1, 2, 16, 17, 64, 512])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**16)),
        spread=draw(st.sampled_from([0.1, 1.0, 8.0])),
    )
