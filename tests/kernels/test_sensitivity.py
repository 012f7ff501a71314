"""Tests the tests: a wrong mask, position, ratio or page must exceed the tolerance.

Each case gives the kernel a call that is wrong in one thing. The checker, which knows the right
call, must notice.
"""

import dataclasses

import pytest
import torch

from vxl_kernels import ChunkLayout, rope_append, vst_attention
from vxl_kernels.testing import check_attention, inverse_frequencies, make_inputs

LAYOUT = ChunkLayout(96, 8, 2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def right(dtype):
    inputs = make_inputs((100, 40), LAYOUT, heads=14, kv_heads=2, head_dim=64, dtype=dtype)
    for cache in (inputs.k_cache, inputs.v_cache):  # numbers wherever a wrong call may look
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(cache.shape, generator=generator).to(dtype)
        cache.copy_(torch.where(cache.isnan(), noise, cache))
    return inputs


def wrong_page(x):
    """A page that is seen takes the place of one that is not. Two full pages that are both seen
    could be swapped, as attention has no order."""
    table = x.block_table.clone()
    table[0, [1, -1]] = table[0, [-1, 1]]
    return table


WRONG = {
    "one cache entry too few": lambda x: {"cache_seqlens": x.cache_seqlens - 1},
    "one cache entry too many": lambda x: {"cache_seqlens": x.cache_seqlens + 1},
    "another ratio": lambda x: {"layout": ChunkLayout(99, 11, 2)},
    "the other order": lambda x: {"layout": dataclasses.replace(LAYOUT, order="interleaved")},
    "one chunk": lambda x: {"layout": ChunkLayout(192, 8)},
    "no layout": lambda x: {"layout": None},
    "a wrong page": lambda x: {"block_table": wrong_page(x)},
    "the neighbour's pages": lambda x: {"block_table": x.block_table.flip(0)},
    "rows shifted by one": lambda x: {"k": x.k.roll(1, 1), "v": x.v.roll(1, 1)},
    "swapped KV heads": lambda x: {"k": x.k.flip(2)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_noticed(name, dtype):
    inputs = right(dtype)
    check_attention(inputs, *vst_attention(*inputs.args(), return_lse=True))
    wrong = dataclasses.replace(inputs, **WRONG[name](inputs))
    out, lse = vst_attention(*wrong.args(), return_lse=True)
    with pytest.raises(AssertionError, match="output error"):
        check_attention(inputs, out)
    if name not in ("rows shifted by one", "swapped KV heads"):  # the LSE is over other keys too
        with pytest.raises(AssertionError, match="error"):
            check_attention(inputs, out, lse)


@pytest.mark.parametrize("row", [0, 95, 96, 110])
def test_one_mask_bit_is_noticed(row):
    """A single row sees one key more. The difference of the other rows is hidden."""
    inputs = right(torch.float32)
    out = vst_attention(*inputs.args())
    more = dataclasses.replace(inputs, cache_seqlens=inputs.cache_seqlens + 1)
    out[0, row] = vst_attention(*more.args())[0, row]
    with pytest.raises(AssertionError, match="output error"):
        check_attention(inputs, out)


def test_a_position_off_by_one_is_noticed():
    """Scores depend only on differences of positions, so the cache must move against the rows."""
    inputs, inv_freq = right(torch.float32), inverse_frequencies(64)
    shifted = dataclasses.replace(inputs.clone(), cache_seqlens=inputs.cache_seqlens + 1)
    q, k = rope_append(*inputs.clone().args(), inv_freq)
    q_off, k_off = rope_append(*shifted.args(), inv_freq)
    check = dataclasses.replace(inputs, q=q, k=k)
    out = vst_attention(*dataclasses.replace(inputs, q=q_off, k=k_off).args())
    with pytest.raises(AssertionError, match="output error"):
        check_attention(check, out)
