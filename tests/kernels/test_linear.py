"""vst_linear multiplies each row by its own weights."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers.strategies import layouts
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from vxl_kernels import ChunkLayout, linear, reference, vst_linear

pytestmark = pytest.mark.core


@settings(max_examples=30)
@given(layouts())
def test_against_the_reference(layout):
    torch.manual_seed(layout.rows)
    x = torch.randn(2, layout.rows, 24)
    sets = torch.randn(10, 24), torch.randn(10), torch.randn(10, 24), torch.randn(10)
    for biased in (True, False):
        weight, bias, vst_weight, vst_bias = sets
        if not biased:
            bias = vst_bias = None
        args = (x, weight, bias, vst_weight, vst_bias, layout)
        out = vst_linear(*args)
        torch.testing.assert_close(out, reference.vst_linear(*args), rtol=1e-5, atol=1e-5)


def test_without_a_layout_all_rows_are_raw():
    x, weight, bias = torch.randn(2, 5, 8), torch.randn(3, 8), torch.randn(3)
    out = vst_linear(x, weight, bias, None, None, None)
    torch.testing.assert_close(out, x @ weight.T + bias)


@pytest.mark.parametrize("order", ["split", "interleaved"])
def test_gradients(order):
    layout = ChunkLayout(5, 2, 2, order)
    torch.manual_seed(0)
    shapes = (2, layout.rows, 3), (4, 3), (4,), (4, 3), (4,)
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *a: vst_linear(*a, layout), leaves)


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def by_onednn(call):
    with Calls() as calls:
        call()
    return any("_linear_pointwise" in name for name in calls.names)


@pytest.fixture
def slow_mkl(monkeypatch):
    """A processor on which MKL multiplies float32 slowly."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(linear, "_mkl_is_slow", lambda: True)


@pytest.mark.parametrize("order", ["split", "interleaved"])
def test_onednn_multiplies_where_mkl_is_slow(slow_mkl, order):
    layout = ChunkLayout(600, 2, 1, order)
    torch.manual_seed(0)
    x = torch.randn(1, layout.rows, 70)[..., :64]  # rows are not dense
    sets = torch.randn(33, 64), torch.randn(33), torch.randn(33, 64), None
    assert by_onednn(lambda: vst_linear(x, *sets, layout))
    want = reference.vst_linear(*(None if t is None else t.double() for t in (x, *sets)), layout)
    torch.testing.assert_close(vst_linear(x, *sets, layout).double(), want, rtol=1e-5, atol=2e-5)


def test_onednn_multiplies_only_what_it_gains_from(slow_mkl):
    x, weight = torch.randn(1, 300, 64), torch.randn(32, 64)

    def product(x, weight):
        return vst_linear(x, weight, None, None, None, None)

    assert by_onednn(lambda: product(x, weight))
    assert not by_onednn(lambda: product(x[:, :200], weight))  # few rows
    assert not by_onednn(lambda: product(x.bfloat16(), weight.bfloat16()))
    assert not by_onednn(lambda: product(x.double(), weight.double()))
    wanted = weight.clone().requires_grad_()
    assert not by_onednn(lambda: product(x, wanted))
    with torch.no_grad():
        assert by_onednn(lambda: product(x, wanted))
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["strided", "expanded", "transposed"])
def test_a_bias_that_is_not_dense(slow_mkl, kind):
    x, weight = torch.randn(1, 300, 64), torch.randn(32, 64)
    bias = {
        "strided": torch.randn(64)[::2],
        "expanded": torch.randn(1).expand(32),
        "transposed": torch.randn(32, 5)[:, 1],
    }[kind]
    out = vst_linear(x, weight, bias, None, None, None)
    torch.testing.assert_close(out, x @ weight.T + bias, rtol=1e-5, atol=1e-4)


def test_forward_mode_has_its_tangent(slow_mkl):
    x, weight = torch.randn(1, 300, 64), torch.randn(32, 64)

    def product(x):
        return vst_linear(x, weight, None, None, None, None)

    tangent = torch.randn_like(x)
    _, found = torch.func.jvp(product, (x,), (tangent,))
    torch.testing.assert_close(found, tangent @ weight.T, rtol=1e-5, atol=1e-4)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(product(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(dual.tangent, tangent @ weight.T, rtol=1e-5, atol=1e-4)


def test_a_compiled_graph_holds_pytorchs_product(slow_mkl):
    x, weight = torch.randn(1, 300, 64), torch.randn(32, 64)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    product = torch.compile(
        lambda x: vst_linear(x, weight, None, None, None, None), backend=backend
    )
    torch.testing.assert_close(product(x), x @ weight.T, rtol=1e-5, atol=1e-4)
    assert seen
    assert not any("mkldnn" in name for name in seen)


def test_the_library_is_chosen_by_the_processor(monkeypatch):
    def slow(vendor, capability):
        linear._mkl_is_slow.cache_clear()
        monkeypatch.setattr(linear.Path, "read_text", lambda self: f"vendor_id : {vendor}\n")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return linear._mkl_is_slow()

    try:
        both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
        assert slow("AuthenticAMD", "AVX512") == both
        assert not slow("AuthenticAMD", "AVX2")  # MKL's code is the processor's best
        assert not slow("GenuineIntel", "AVX512")
    finally:
        linear._mkl_is_slow.cache_clear()
