"""Launches that are remembered are those that would be planned. On the CPU, by a played driver."""

import functools
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has no driver", allow_module_level=True)

from unittest import mock

from helpers.fake_driver import FakeDriver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from vxl_kernels import ChunkLayout, VarlenLayout, ops
from vxl_kernels._triton import configs, launch, launch_common, launch_ragged, remember

F16 = torch.float16


class _Kernel:
    """A compiled kernel of the played driver. Nothing is compiled."""

    def __init__(self, driver, function):
        self.driver, self.name = driver, function.__name__

    def __getitem__(self, grid):
        return lambda *args: self.driver.launches.append((self.name, grid, args))


@pytest.fixture
def driver(monkeypatch):
    """Records every launch as (kernel, grid, arguments in the order of the parameters)."""
    played = FakeDriver(90)

    def started(function, *args, grid, warmup, **kwargs):
        kernel = _Kernel(played, function)
        kernel[(*grid, 1, 1)[:3]](*(kwargs.get(p.name) for p in function.params))
        return kernel

    monkeypatch.setattr(JITFunction, "run", started)
    monkeypatch.setattr(launch, "architecture", lambda device: "cuda:90")
    monkeypatch.setattr(remember, "remembered", {})
    return played


def call(rows=1, layout=None, batch=1, page_size=128, pages=12, dtype=F16, offset=0):
    """Tensors of a call, in memory of their own."""
    rows = rows if layout is None else layout.rows

    def empty(*shape):
        count = torch.Size(shape).numel()
        return torch.zeros(count + offset, dtype=dtype)[offset:].view(shape)

    tensors = [empty(batch, rows, h, 64) for h in (4, 2, 2)]
    tensors += [empty(pages, page_size, 2, 64) for _ in range(2)]
    table = torch.zeros(batch, pages // batch, dtype=torch.int32)
    return [*tensors, table, torch.zeros(batch, dtype=torch.int32)]


def seen(value, names):
    """An argument as a launch takes it: tensors by their place in the call."""
    if isinstance(value, torch.Tensor):
        return names.get(value.data_ptr(), (tuple(value.shape), value.stride(), value.dtype))
    if isinstance(value, TensorDescriptor):
        fields = {n: x for n, x in vars(value).items() if n != "base"}
        return names[value.base.data_ptr()], tuple(sorted((n, str(x)) for n, x in fields.items()))
    return value


def launches_of(driver, tensors, run):
    driver.launches.clear()
    results = run()
    names = {x.data_ptr(): f"tensor {i}" for i, x in enumerate(tensors)}
    names |= {x.data_ptr(): f"result {i}" for i, x in enumerate(results)}
    return [(n, grid, [seen(a, names) for a in args]) for n, grid, args in driver.launches]


CALLS = {
    "decode": {"rows": 1},
    "decode of a batch": {"rows": 3, "batch": 3},
    "text": {"rows": 700, "pages": 12},
    "chunks": {"layout": ChunkLayout(90, 8, 2)},
    "interleaved": {"layout": ChunkLayout(90, 8, 2, "interleaved")},
    "small pages": {"rows": 1, "page_size": 16},
    "not aligned": {"rows": 1, "offset": 1},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_remembered_attention_is_the_planned_one(driver, name):
    options = CALLS[name]
    layout = ops.layout_to_ints(options.get("layout"))
    first, second, third = (call(**options) for _ in range(3))
    planned = launches_of(driver, first, lambda: launch.vst_attention(*first, layout, 0.1))
    assert planned
    assert len(remember.remembered) == 1
    (plan,) = remember.remembered.values()
    assert all(x.untyped_storage().nbytes() <= 4 for x in plan.made)  # no memory of a call is kept
    with mock.patch.object(launch, "plan_attention", side_effect=AssertionError):
        again = launches_of(driver, second, lambda: launch.vst_attention(*second, layout, 0.1))
    assert again == planned
    remember.remembered.clear()
    assert launches_of(driver, third, lambda: launch.vst_attention(*third, layout, 0.1)) == planned


@pytest.mark.parametrize("cache", [True, False])
def test_a_remembered_ragged_call_is_the_planned_one(driver, cache, monkeypatch):
    monkeypatch.setattr(launch_ragged, "architecture", lambda device: "cuda:90")
    found = []
    for _ in range(2):
        tensors = [x[0] if i < 3 else x for i, x in enumerate(call(rows=5))]
        tensors[5:] = torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
        layout = VarlenLayout([1, 4, 0]).table
        paged = tensors[3:] if cache else [None] * 4
        run = functools.partial(
            launch_ragged.vst_attention_varlen, *tensors[:3], *paged, layout, 3, 0.1
        )
        found.append(launches_of(driver, [*tensors, layout], run))
    assert len(remember.remembered) == 1
    assert found[0] == found[1] != []


@pytest.mark.parametrize("op", ["rope_append", "rope_append_"])
def test_a_remembered_append_is_the_planned_one(driver, op):
    found = []
    for _ in range(2):
        tensors = [*call(rows=5), torch.zeros(32)]
        *most, inv_freq = tensors
        call_op = functools.partial(getattr(launch, op), *most, [], inv_freq)
        found.append(launches_of(driver, tensors, lambda run=call_op: run() or ()))
    assert len(remember.remembered) == 1
    assert found[0] == found[1] != []


@pytest.mark.parametrize("bias", [True, False])
def test_a_remembered_product_is_the_planned_one(driver, bias):
    """Of other weights and rows, at other addresses. A decoding step has seven in each layer."""
    found = []
    for _ in range(2):
        x, weight = torch.zeros(3, 1, 64, dtype=F16), torch.zeros(32, 64, dtype=F16)
        tensors = [x, weight, *([torch.zeros(32, dtype=F16)] if bias else [])]
        call_op = functools.partial(launch.invariant_linear, x, weight, *tensors[2:] or [None])
        found.append(launches_of(driver, tensors, lambda run=call_op: [run()]))
        assert call_op().shape == (3, 1, 32)
        if len(found) == 1:
            planned = mock.patch.object(launch, "plan_invariant_linear", side_effect=AssertionError)
            planned.start()
    planned.stop()
    assert len(remember.remembered) == 1
    assert found[0] == found[1] != []


def test_what_differs_is_planned_anew(driver, monkeypatch):
    """Shape, stride, dtype, alignment, layout, scale, and the file of tuned tiles."""
    base = call(rows=40)
    wide = [torch.zeros(1, 40, 8, 64, dtype=F16)[:, :, :4], *base[1:]]
    calls = [
        (base, [], 0.1),
        (call(rows=41), [], 0.1),
        (call(rows=40, pages=13), [], 0.1),
        (call(rows=40, page_size=64), [], 0.1),
        (call(rows=40, dtype=torch.bfloat16), [], 0.1),
        (call(rows=40, offset=1), [], 0.1),
        (wide, [], 0.1),
        (base, [32, 4, 1, 1], 0.1),
        (base, [32, 4, 1, 0], 0.1),
        (base, [], 0.2),
        ([*base[:3], None, None, None, None], [], 0.1),
    ]
    for n, (tensors, layout, scale) in enumerate(calls, 1):
        launch.vst_attention(*tensors, layout, scale)
        assert len(remember.remembered) == n
    monkeypatch.setattr(configs, "tuned_path", lambda: "file")
    launch.vst_attention(*base, [], 0.1)
    assert len(remember.remembered) == len(calls) + 1


def test_copies_and_aliases_are_not_remembered(driver, monkeypatch):
    """A launch that takes a copy of a tensor, or one that is given twice."""
    tensors = call(rows=4)
    spread = torch.zeros(1, 4, 4, 128, dtype=F16)[..., ::2]
    launch.vst_attention(spread, *tensors[1:], [], 0.1)
    launch.vst_attention(*tensors, [], -0.1)  # the negated queries are made for it
    launch.vst_attention(tensors[0], tensors[1], tensors[1], *tensors[3:], [], 0.1)
    monkeypatch.setattr(launch, "_PARTS_BYTES", 1)
    launch.vst_attention(*call(rows=4, batch=2), [], 0.1)  # two groups: parts of the tensors
    assert not remember.remembered


def test_the_memory_of_plans_is_bounded(driver, monkeypatch):
    monkeypatch.setattr(remember, "_MAX_CALLS", 3)
    for rows in range(1, 9):
        launch.vst_attention(*call(rows=rows), [], 0.1)
        assert len(remember.remembered) <= 3


def test_a_launch_that_has_no_work_is_planned(driver):
    q = torch.zeros(1, 0, 4, 64, dtype=F16)
    k = torch.zeros(1, 0, 2, 64, dtype=F16)
    out, lse = launch.vst_attention(q, k, k.clone(), None, None, None, None, [], 0.1)
    assert (out.shape, lse.shape) == (q.shape, (1, 4, 0))
    assert not driver.launches


def test_a_launch_returns_what_triton_compiled(driver):
    one = launch.plan_rope_append(*call(), [], torch.zeros(32), *call()[:2])
    assert isinstance(one, launch_common.Launch)
    assert isinstance(one(), _Kernel)
