"""Rows far out in a sequence, up to the last position of int32."""

import torch

from vxl_kernels import rope_append
from vxl_kernels.testing import Inputs, inverse_frequencies

FAR_OUT = [0, 1, 20_250, 300_000, 2**20, 6_700_000, 2**24 + 1, 10**9 + 7, 2**31 - 9000, 2**31 - 2]
PAGE_SIZE = 4096


def far_inputs(position: int) -> Inputs:
    """One row at `position`. All earlier entries of the table are one other page."""
    table = torch.zeros(1, position // PAGE_SIZE + 1, dtype=torch.int32)
    table[0, -1] = 1
    q, k, v = (torch.zeros(1, 1, 1, 128) for _ in range(3))
    for x in (q, k):
        x[..., :64] = 1
    cache = [torch.zeros(2, PAGE_SIZE, 1, 128) for _ in range(2)]
    lens = torch.tensor([position], dtype=torch.int32)
    return Inputs(q, k, v, *cache, table, lens, None)


def check_angles(position: int, backend: str) -> None:
    """Checks rotated rows and the cache's entry against cosines of the exactly rounded float32
    angle."""
    inputs = far_inputs(position)
    q, k = rope_append(*inputs.args(), inverse_frequencies(128), backend=backend)
    angle = (torch.tensor(float(position)) * inverse_frequencies(128)).double()
    expected = torch.cat([angle.cos(), angle.sin()])
    kept = inputs.k_cache[1, position % PAGE_SIZE]
    for x in (q, k, kept):
        assert (x.flatten().double() - expected).abs().max() < 2e-7
