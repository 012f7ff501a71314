"""The CUDA operators. On a GPU, they are tested against the CPU's, captured in a graph and without
waiting for the GPU. Without one, only the record of the build is tested. tests/cpp runs the bodies
of the kernels on any machine."""

import dataclasses

import pytest
import torch

pytest.importorskip("hypothesis")

from helpers.strategies import calls
from hypothesis import given, settings

from vxl_kernels import ChunkLayout, _ext, rope_append
from vxl_kernels.__main__ import report
from vxl_kernels.testing import inverse_frequencies, make_inputs

needs_cuda = pytest.mark.skipif(not _ext.has_cuda, reason="the extension is built without CUDA")
TENSORS = ("q", "k", "v", "k_cache", "v_cache", "block_table", "cache_seqlens")


def on_gpu(inputs):
    return dataclasses.replace(inputs, **{n: getattr(inputs, n).cuda() for n in TENSORS})


def ulp_close(x, truth):
    """Equal within the last bit of the type, and of its float32 arithmetic."""
    eps = torch.finfo(truth.dtype).eps
    scale = float(truth.nan_to_num().abs().max()) if truth.numel() else 0.0
    torch.testing.assert_close(x.cpu(), truth, rtol=eps, atol=1e-6 * (1 + scale), equal_nan=True)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("inplace", [False, True])
@settings(max_examples=60)
@given(calls(even_head_dim=True))
def test_rope_against_the_cpu(inplace, inputs):
    inv_freq = inverse_frequencies(inputs.q.shape[3])
    gpu = on_gpu(inputs)
    expected = rope_append(*inputs.args(), inv_freq, backend="cpu", inplace=inplace)
    actual = rope_append(*gpu.args(), inv_freq.cuda(), inplace=inplace)
    for x, truth in zip((*actual, gpu.k_cache), (*expected, inputs.k_cache), strict=True):
        ulp_close(x, truth)
    assert torch.equal(gpu.v_cache.cpu().nan_to_num(), inputs.v_cache.nan_to_num())
    if inplace:
        assert actual[0] is gpu.q


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("offset", [0, 1])
def test_strided_rows(offset):
    """q, k and v as slices of one projection, aligned to 16 bytes or not."""
    inv_freq = inverse_frequencies(64)
    base = make_inputs((9,), rows=40, heads=4, kv_heads=2, head_dim=64, dtype=torch.float16)
    fused = torch.randn(1, 40, 8 * 64 + offset).half()

    def slices(x):
        heads = x[..., offset:].unflatten(2, (8, 64)).split([4, 2, 2], dim=2)
        return dict(zip("qkv", heads, strict=True))

    gpu = dataclasses.replace(on_gpu(base), **slices(fused.cuda()))
    base = dataclasses.replace(base, **slices(fused))
    expected = rope_append(*base.args(), inv_freq, backend="cpu")
    for x, truth in zip(rope_append(*gpu.args(), inv_freq.cuda()), expected, strict=True):
        ulp_close(x, truth)
    ulp_close(gpu.k_cache, base.k_cache)


@pytest.mark.gpu
@needs_cuda
def test_pages_against_the_cpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8):
        for head_dim in (64, 33):
            k = torch.randint(0, 200, (3, 12, 16, 2, head_dim)).to(dtype)
            v = k.flip(0).clone()
            gpu_k, gpu_v = k.cuda(), v.cuda()
            copies = torch.tensor([[0, 6, 16], [1, 7, 5], [-1, -1, 0]], dtype=torch.int32)
            torch.ops.vxl.copy_pages_(k, v, copies)
            torch.ops.vxl.copy_pages_(gpu_k, gpu_v, copies.cuda())
            table = torch.randperm(12).int()
            rows = torch.ops.vxl.gather_rows(k, table, 7, 150)
            gpu_rows = torch.ops.vxl.gather_rows(gpu_k, table.cuda(), 7, 150)
            assert torch.equal(gpu_rows.cpu(), rows)
            torch.ops.vxl.scatter_rows_(v, table, 20, rows)
            torch.ops.vxl.scatter_rows_(gpu_v, table.cuda(), 20, gpu_rows)
            assert torch.equal(gpu_k.cpu(), k)
            assert torch.equal(gpu_v.cpu(), v)


@pytest.mark.gpu
@needs_cuda
def test_a_step_in_a_graph():
    """A step is captured once, and then follows changes of lengths, pages and copies."""
    layout, inv_freq = ChunkLayout(32, 4), inverse_frequencies(64)
    inputs = make_inputs((37, 5), layout, head_dim=64, page_size=16, dtype=torch.float16)
    gpu, frequencies = on_gpu(inputs), inv_freq.cuda()
    copies = torch.zeros(2, 3, dtype=torch.int32, device="cuda")
    pools = [x[None] for x in (gpu.k_cache, gpu.v_cache)]

    def step():
        torch.ops.vxl.copy_pages_(*pools, copies)
        return rope_append(*gpu.args(), frequencies)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, _ = step()
    for lens, entry in (((20, 11), [0, 0, 0]), ((36, 0), [1, 0, 7])):
        fresh = make_inputs(lens, layout, head_dim=64, page_size=16, dtype=torch.float16, seed=3)
        table = inputs.block_table
        fresh = dataclasses.replace(
            fresh, k_cache=inputs.k_cache.clone(), v_cache=inputs.v_cache.clone(), block_table=table
        )
        for name in TENSORS:
            getattr(gpu, name).copy_(getattr(fresh, name))
        copies[0] = torch.tensor(entry, dtype=torch.int32)
        graph.replay()
        torch.ops.vxl.copy_pages_(fresh.k_cache[None], fresh.v_cache[None], copies.cpu())
        ulp_close(q, rope_append(*fresh.args(), inv_freq, backend="cpu")[0])
        ulp_close(gpu.k_cache, fresh.k_cache)


@pytest.mark.gpu
@needs_cuda
def test_nothing_waits_for_the_gpu():
    gpu = on_gpu(make_inputs((37, 5), rows=3, head_dim=64))
    inv_freq, table = inverse_frequencies(64).cuda(), torch.arange(4, dtype=torch.int32).cuda()
    copies = torch.zeros(1, 3, dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        rope_append(*gpu.args(), inv_freq)
        rope_append(*gpu.args(), inv_freq, inplace=True)
        torch.ops.vxl.copy_pages_(gpu.k_cache[None], gpu.v_cache[None], copies)
        rows = torch.ops.vxl.gather_rows(gpu.k_cache[None], table, 3, 20)
        torch.ops.vxl.scatter_rows_(gpu.k_cache[None], table, 3, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ["v_cache", "block_table", "cache_seqlens", "inv_freq", "copies"])
def test_tensors_of_another_device_are_refused(name):
    gpu, inv_freq = on_gpu(make_inputs((5,), rows=3)), inverse_frequencies(16).cuda()
    op, args = torch.ops.vxl.rope_append, [*gpu.args()[:7], [], inv_freq]
    if name == "copies":
        copies = torch.zeros(1, 3, dtype=torch.int32)
        op, args = torch.ops.vxl.copy_pages_, [gpu.k_cache[None], gpu.v_cache[None], copies]
    else:
        at = {"v_cache": 4, "block_table": 5, "cache_seqlens": 6, "inv_freq": 8}[name]
        args[at] = args[at].cpu()
    with pytest.raises(ValueError, match=rf"{name}: got .*cpu.*expected"):
        op(*args)


def test_the_report_tells_what_is_loaded(monkeypatch):
    """has_cuda comes from the compiled module, and the dispatcher agrees with it."""
    if _ext.extension is None:
        pytest.skip("no extension")
    for op in ("rope_append", "rope_append_", "copy_pages_", "gather_rows", "scatter_rows_"):
        dump = torch._C._dispatch_dump(f"vxl::{op}")
        compiled = any(
            line.startswith("CUDA") and "cuda_ops.cpp" in line for line in dump.splitlines()
        )
        assert compiled == _ext.has_cuda, dump
    line = next(x for x in report().splitlines() if x.startswith("  CUDA"))
    assert ("built in" in line) == _ext.has_cuda
    assert ("not" in line or "never" in line) == (not _ext.has_cuda)
    for has_cuda in (True, False):
        monkeypatch.setattr(_ext, "has_cuda", has_cuda)
        line = next(x for x in report().splitlines() if x.startswith("  CUDA"))
        assert ("rope_append and page copies are built in" in line) == has_cuda
        assert ("not" in line or "never" in line) != has_cuda  # never: a build without a record
