"""backend="triton" runs Triton on a GPU, also where the extension has CUDA kernels of its own. On
fake CUDA tensors, this shows in the operators that are called and in what they are bound to."""

import contextlib
import dataclasses

import pytest
import torch
from helpers.recorder import Recorder
from helpers.step_gradients import step_gradients

pytest.importorskip("triton")

from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensorMode

from vxl_kernels import ChunkLayout, _triton, ops, rope_append
from vxl_kernels._backends import BACKENDS
from vxl_kernels._triton import launch, launch_backward
from vxl_kernels.testing import inverse_frequencies, make_inputs

LAYOUTS = [None, ChunkLayout(90, 8, 2)]


def fake_call(layout):
    """Arguments of `rope_append`, on the GPU of FakeTensorMode."""
    rows = 5 if layout is None else layout.rows
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.empty(2, rows, 4, 16, **options)
    k = torch.empty(2, rows, 1, 16, **options)
    cache = torch.empty(9, 64, 1, 16, **options)
    table = torch.empty(2, 4, dtype=torch.int32, device="cuda")
    lens = torch.empty(2, dtype=torch.int32, device="cuda")
    return q, k, k.clone(), cache, cache.clone(), table, lens, layout, torch.empty(8, device="cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_named_triton_reaches_the_operator(layout, inplace, monkeypatch):
    monkeypatch.setattr(_triton, "_too_old", lambda device: None)
    name = "rope_append_" if inplace else "rope_append"
    with FakeTensorMode(), torch.no_grad():
        args = fake_call(layout)
        for backend, passed in (("triton", "triton"), (None, "")):
            with Recorder() as recorder:
                q, k = rope_append(*args, inplace=inplace, backend=backend)
            assert recorder.seen == [(name, passed)]
            assert (q.shape, k.shape) == (args[0].shape, args[1].shape)


@pytest.fixture
def launched(monkeypatch):
    """Launches that would have started, from launchers with fake tensors."""
    started = []
    monkeypatch.setattr(launch.Launch, "__call__", lambda self: started.append(self.name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_triton, "_too_old", lambda device: None)
    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "architecture", lambda device: "cuda:80")
    return started


def on_cuda_key(name, *args):
    """The implementation for a GPU, not the fake."""
    op = getattr(torch.ops.vxl, name).default
    return op.redispatch(DispatchKeySet(DispatchKey.CUDA), *args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_implementations_under_the_cuda_key_read_no_value(layout, launched):
    """FakeTensorMode raises if a value is read on the host. The launches are Triton's."""
    ints, backward = ops.layout_to_ints(layout), ["delta", "backward_q", "backward_new"]
    with FakeTensorMode(), torch.no_grad():
        *tensors, _, inv_freq = fake_call(layout)
        on_cuda_key("rope_append", *tensors, ints, inv_freq, "triton")
        on_cuda_key("rope_append_", *tensors, ints, inv_freq, "triton")
        assert launched == ["rope_append", "rope_append"]
        launched.clear()
        out, lse = on_cuda_key("vst_attention", *tensors, ints, 0.25)
        assert launched == (["decode", "merge"] if layout is None else ["prefill"])
        launched.clear()
        grads = (out, lse, *tensors, out, lse, ints, 0.25)
        on_cuda_key("vst_attention_backward", *grads)
        assert launched == [*backward, "backward_cache", "sum_pages"]
        launched.clear()
        x = torch.empty(2, tensors[0].shape[1], 64, device="cuda")
        weight = torch.empty(8, 64, device="cuda")
        on_cuda_key("vst_linear", x, weight, None, weight, None, ints, "triton")
        assert launched == ["linear"]
        launched.clear()
        on_cuda_key("invariant_linear", x, weight, None)
        assert launched == ["invariant_linear"]


def test_an_append_tells_autograd_what_it_wrote(launched):
    """Autograd notices that a cache, saved for backward, was written."""
    for name, written in (("rope_append", (3, 4)), ("rope_append_", (0, 1, 3, 4))):
        with FakeTensorMode(), torch.no_grad():
            *tensors, _, inv_freq = fake_call(None)
            tensors[2] = tensors[1].clone()
            before = [x._version for x in tensors]
            on_cuda_key(name, *tensors, [], inv_freq, "triton")
        changed = [i for i, x in enumerate(tensors) if x._version > before[i]]
        assert tuple(changed) == written


@pytest.mark.parametrize("layout", [None, ChunkLayout(9, 2, 2)])
def test_gradients_go_back_by_the_named_backend(layout, monkeypatch):
    """Forward and backward run by the name. On the CPU, whose kernel is Triton's here."""
    called = []

    def kernel(op):
        called.append(op)
        return getattr(torch.ops.vxl, op)

    row = dataclasses.replace(BACKENDS["triton"], reasons=lambda x: [], kernel=kernel)
    monkeypatch.setitem(BACKENDS, "triton", row)
    inputs = make_inputs((5, 0), layout, rows=4)
    grads = []
    for backend in ("cpu", "triton"):
        grads.append(step_gradients(inputs, inverse_frequencies(16), backend))
        if backend == "cpu":
            assert not called
    assert called == ["rope_append", "vst_attention", "vst_attention_backward", "rope_append"]
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)
