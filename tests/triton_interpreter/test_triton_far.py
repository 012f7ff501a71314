"""Pages and heads beyond the reach of 32 bits give the same bits as near ones. The memory between
them is never touched."""

import dataclasses

import pytest
import torch
from helpers.triton_cases import attend

from vxl_kernels import rope_append
from vxl_kernels.testing import make_inputs

FAR = 2**28 + 2**27  # elements between pages or heads: six are more than 2^31


def far_pages(cache: torch.Tensor) -> torch.Tensor:
    """The values of the cache with FAR elements from page to page."""
    memory = torch.empty(cache.shape[0] * FAR, dtype=cache.dtype)
    return memory.as_strided(cache.shape, (FAR, *cache.stride()[1:])).copy_(cache)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("page_size", [32, 16, 17])
@pytest.mark.parametrize("rows", [1, 40])
def test_far_pages(page_size, rows):
    inputs = make_inputs(
        cache_seqlens=(page_size * 7 + 3,), rows=rows, page_size=page_size, heads=2, kv_heads=1,
        head_dim=16, dtype=torch.float16,
    )  # fmt: skip
    near = attend(inputs)
    assert int(inputs.block_table.max()) * FAR > 2**31
    far = {name: far_pages(getattr(inputs, name)) for name in ("k_cache", "v_cache")}
    found = attend(dataclasses.replace(inputs, **far))
    assert all(torch.equal(a, b) for a, b in zip(near, found, strict=True))


def test_far_heads_of_rope_append():
    rows, heads = 3, 7
    q, k, v = torch.randn(3, 1, rows, heads, 16, dtype=torch.float16)
    table, lens = torch.tensor([[0]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    near = torch.zeros(2, 1, 8, heads, 16, dtype=torch.float16)
    memory = torch.empty(2, heads * FAR, dtype=torch.float16)
    far = [m.as_strided((1, 8, heads, 16), (128, 16, FAR, 1)).zero_() for m in memory]
    inv_freq = torch.linspace(1.0, 0.1, 8)
    a = rope_append(q, k, v, near[0], near[1], table, lens, None, inv_freq, backend="triton")
    b = rope_append(q, k, v, *far, table, lens, None, inv_freq, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(near, far, strict=True))
    assert near.any()
