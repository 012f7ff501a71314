"""backend="triton" runs Triton on a GPU, also where the extension has CUDA kernels of its own:
told by the operators that are called, on fake CUDA tensors, and by what they are bound to."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vxl_kernels import ChunkLayout, _triton, api, ops, rope_append
from vxl_kernels._triton import launch
from vxl_kernels.testing import inverse_frequencies, make_inputs

LAYOUTS = [None, ChunkLayout(90, 8, 2)]


class Recorder(TorchDispatchMode):
    """Names of the vxl operators that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vxl":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def fake_call(layout):
    """Arguments of `rope_append`, on a GPU as FakeTensorMode plays it."""
    rows = 5 if layout is None else layout.rows
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.empty(2, rows, 4, 16, **options)
    k = torch.empty(2, rows, 1, 16, **options)
    cache = torch.empty(9, 64, 1, 16, **options)
    table = torch.empty(2, 4, dtype=torch.int32, device="cuda")
    lens = torch.empty(2, dtype=torch.int32, device="cuda")
    return q, k, k, cache, cache.clone(), table, lens, layout, torch.empty(8, device="cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_named_triton_has_operators_of_its_own(layout, inplace, monkeypatch):
    monkeypatch.setattr(_triton, "_too_old", lambda device: None)
    own = "rope_append_" if inplace else "rope_append"
    with FakeTensorMode(), torch.no_grad():
        args = fake_call(layout)
        for backend, name in (("triton", ops.LAUNCHES[own]), (None, own)):
            with Recorder() as seen:
                q, k = rope_append(*args, inplace=inplace, backend=backend)
            assert seen.names == [name]
            assert (q.shape, k.shape) == (args[0].shape, args[1].shape)


@pytest.fixture
def launched(monkeypatch):
    """Launches that would have started, where the launchers are given fake tensors."""
    started = []
    monkeypatch.setattr(launch.Launch, "__call__", lambda self: started.append(self.name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_triton, "_too_old", lambda device: None)
    for module in (launch, _triton.backward_kernels()):
        monkeypatch.setattr(module, "architecture", lambda device: "cuda:80")
    return started


def on_cuda_key(name, *args):
    """The implementation under the CUDA key itself, not the fake."""
    op = getattr(torch.ops.vxl, name).default
    return op.redispatch(DispatchKeySet(DispatchKey.CUDA), *args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_implementations_under_the_cuda_key_read_no_value(layout, launched):
    """A value that came to the host raises under FakeTensorMode; the launches are Triton's."""
    ints, backward = ops.layout_to_ints(layout), ["delta", "backward_q", "backward_new"]
    with FakeTensorMode(), torch.no_grad():
        *tensors, _, inv_freq = fake_call(layout)
        on_cuda_key("rope_append_launch", *tensors, ints, inv_freq)
        on_cuda_key("rope_append_launch_", *tensors, ints, inv_freq)
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
        on_cuda_key("vst_linear_one_launch", x, weight, None, weight, None, ints)
        assert launched == ["linear"]


def test_an_append_tells_autograd_what_it_wrote(launched):
    """Who saved a cache for backward notices that it was written."""
    for name, written in (("rope_append_launch", (3, 4)), ("rope_append_launch_", (0, 1, 3, 4))):
        with FakeTensorMode(), torch.no_grad():
            *tensors, _, inv_freq = fake_call(None)
            tensors[2] = tensors[1].clone()
            before = [x._version for x in tensors]
            on_cuda_key(name, *tensors, [], inv_freq)
        changed = [i for i, x in enumerate(tensors) if x._version > before[i]]
        assert tuple(changed) == written


@pytest.mark.parametrize("layout", [None, ChunkLayout(9, 2, 2)])
def test_gradients_through_the_named_launch(layout, monkeypatch):
    """There and back by the launch; the CPU plays the GPU, and its kernel Triton's."""
    called = []

    def cpu_kernel(*args):
        called.append(len(args))
        return torch.ops.vxl.rope_append(*args)

    monkeypatch.setitem(api._REASONS, "triton", lambda x: [])
    monkeypatch.setattr(api, "_interpret", lambda *args: False)
    inputs = make_inputs((5, 0), layout, rows=4)
    inputs.k_cache.nan_to_num_()
    inputs.v_cache.nan_to_num_()
    grads = []
    with torch.library._scoped_library("vxl", "IMPL") as played:
        played.impl("rope_append_launch", cpu_kernel, "CPU")
        for backend in ("cpu", "triton"):
            leaves = [x.detach().clone().requires_grad_() for x in inputs.args()[:5]]
            caches = [x.clone() for x in leaves[3:]]
            rest = (inputs.block_table, inputs.cache_seqlens, layout, inverse_frequencies(16))
            q, k = rope_append(*leaves[:3], *caches, *rest, backend=backend)
            sum(x.square().sum() for x in (q, k, *caches)).backward()
            grads.append([x.grad for x in leaves])
            assert called == ([] if backend == "cpu" else [9, 9])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)
