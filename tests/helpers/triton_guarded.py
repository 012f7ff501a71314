"""Runs calls in which every tensor borders on a protected page of memory. Reading or writing one
element outside ends the process. `python -m helpers.triton_guarded end|start [broken]`: "broken"
reads one page too far in the block table, to prove that the guard works.
"""

import ctypes
import dataclasses
import mmap
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from helpers.ragged import Ragged
from helpers.triton_backward_cases import CASES as BACKWARD_CASES
from helpers.triton_backward_cases import SMALL, backward
from helpers.triton_backward_cases import call as backward_call
from helpers.triton_cases import CASES, WITHOUT_CACHE, attend, call

from vxl_kernels import (
    ChunkLayout,
    invariant_linear,
    rope_append,
    rope_append_varlen,
    vst_linear,
)
from vxl_kernels._triton import (
    configs,
    keys,
    launch,
    launch_backward,
    launch_backward_ragged,
    launch_ragged,
)
from vxl_kernels.testing import check_attention, check_gradients, inverse_frequencies, make_inputs

END = sys.argv[1] == "end"
_libc = ctypes.CDLL(None, use_errno=True)


def empty(shape, dtype, device="cpu"):
    """As torch.empty, filled with NaN, between two protected pages. It borders on one of them."""
    x = torch.empty(0, dtype=dtype)
    count = torch.Size(shape).numel()
    size = count * x.element_size()
    page = mmap.PAGESIZE
    body = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, body + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (address, address + page + body):
        if _libc.mprotect(ctypes.c_void_p(forbidden), page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    offset = page + (body - size if END else 0)
    x = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
    return x.fill_(torch.nan if dtype.is_floating_point else 10**6).view(shape)


def guard(x):
    return empty(x.shape, x.dtype).copy_(x)


class GuardedTorch:
    """Takes torch's place in the launcher, so that the memory it allocates is guarded too."""

    empty = staticmethod(empty)

    def __getattr__(self, name):
        return getattr(torch, name)


@triton.jit
def unclamped_page_of(table, entry):
    return tl.load(table.ptr + entry).to(tl.int64)


def ragged() -> None:
    """A ragged call of texts that share pages, a window, and a sequence without rows."""
    x = Ragged([1, 1, ChunkLayout(7, 3, 2), 0, 5], [70, 66, 9, 3, 0], 64, dim=20, heads=4)
    for name in ("q", "k", "v", "k_cache", "v_cache", "table", "lens"):
        setattr(x, name, guard(getattr(x, name)))
    x.layout.table = guard(x.layout.table)
    inv_freq = guard(inverse_frequencies(20))
    for inplace in (False, True):
        copies = [guard(t) for t in (x.q, x.k, x.v, x.k_cache, x.v_cache)]
        paged = x.table, x.lens, x.layout, inv_freq
        rope_append_varlen(*copies, *paged, inplace=inplace, backend="triton")
    for table, length, vsts in zip(x.table, x.lens, (0, 0, 2, 0, 0), strict=True):
        table[-(-int(length + vsts) // x.k_cache.shape[1]) :] = 10**6  # no such page
    out, lse = x.run(backend="triton")
    for i in (0, 1, 2, 4):
        rows = x.layout.rows_of(i)
        check_attention(x.alone(i), out[rows][None], lse[:, rows][None])
    grads = guard(torch.randn(out.shape)), guard(torch.randn(lse.shape))
    args = x.q, x.k, x.v, *x.cache(), guard(out), guard(lse), x.layout.table, x.layout.chunks, 0.25
    found = launch_backward_ragged.vst_attention_varlen_backward(*grads, *args)
    assert all(grad.isfinite().all() for grad in found)


def main() -> None:
    small = configs.AttentionConfig(32, 32, 16, 4, 2)
    configs.prefill_config = configs.decode_config = lambda *args: small
    configs.linear_config = lambda *args: configs.LinearConfig(32, 16, 16, 2, 4, 2)
    configs.invariant_config = lambda *args: configs.LinearConfig(32, 16, 16, 1, 4, 2)
    configs.split_size = lambda packed_rows, kv_heads: 64 if packed_rows <= 32 else None
    configs.backward_config = lambda *args: SMALL
    configs.ragged_splits = lambda kv_heads: configs.RaggedSplits(64, 8, 2, 64)
    for module in (launch, launch_backward, launch_ragged, launch_backward_ragged):
        module.torch = GuardedTorch()
    if "broken" in sys.argv:
        keys.page_of = unclamped_page_of
    ragged()
    names = ("q", "k", "v", "k_cache", "v_cache", "block_table", "cache_seqlens")
    for name in CASES:
        x = call(name)
        # Table entries past the length are invalid too.
        x = dataclasses.replace(x, **{n: guard(getattr(x, n)) for n in names})
        check_attention(x, *attend(x))
    for name in WITHOUT_CACHE:
        x = call(name)
        x = dataclasses.replace(x, **{n: guard(getattr(x, n)) for n in names})
        check_attention(x, *attend(x, cache=False))
    for name in ("split, odd pages and head", "many chunks", "text"):
        assert name in BACKWARD_CASES
        x = backward_call(name)
        x = dataclasses.replace(x, **{n: guard(getattr(x, n)) for n in names})
        grads = guard(torch.randn(x.q.shape).to(x.q.dtype)), guard(torch.randn(*x.q.shape[:3])).mT
        check_gradients(x, *grads, backward(x, grads)[2])
    for layout in (None, ChunkLayout(7, 2, 2), ChunkLayout(7, 2, 1, "interleaved")):
        x = make_inputs((5, 0), layout, rows=3, heads=6, head_dim=20, page_size=4)
        x = dataclasses.replace(x, **{n: guard(getattr(x, n)) for n in names})
        inv_freq = guard(inverse_frequencies(20))
        for inplace in (False, True):
            rope_append(*x.args(), inv_freq, inplace=inplace, backend="triton")
            no_pages = dataclasses.replace(x, block_table=guard(x.block_table[:, :0]))
            rope_append(*no_pages.args(), inv_freq, inplace=inplace, backend="triton")
        rows = 3 if layout is None else layout.rows
        shapes = ((2, rows, 20), (18, 20), (18,), (18, 20), (18,))
        vst_linear(*(guard(torch.randn(s)) for s in shapes), layout, backend="triton")
    for shapes in (((1, 20), (18, 20), (18,)), ((17, 32), (64, 32), (64,))):
        invariant_linear(*(guard(torch.randn(s)) for s in shapes), backend="triton")


if __name__ == "__main__":
    main()
