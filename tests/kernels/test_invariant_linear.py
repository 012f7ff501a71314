"""invariant_linear: a row has the same bits in every batch, and the error of float32 sums."""

import re

import pytest
import torch
from helpers.serving import serving
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vxl_kernels import invariant_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Whole tiles of every instruction set, parts of tiles, and neither.
SIZES = [(3584, 64), (64, 48), (100, 37), (1, 1), (33, 5), (5, 33), (63, 64), (0, 4), (512, 33)]
ROWS = (1, 2, 6, 7, 8, 16, 17, 31, 32, 33, 70)


def make(rows, features, outs, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, features), (outs, features), (outs,)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def check_error(out, x, weight, bias):
    """Against float64: one rounding to the dtype, and float32 sums. A sum of n products in any
    order rounds each of them at most n times."""
    x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
    truth = torch.nn.functional.linear(x, weight, bias)
    sizes = torch.nn.functional.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    steps = min(x.shape[-1] + 1, 3 * x.shape[-1] ** 0.5 + 16)  # a random walk of many roundings
    allowed = steps * 2.0**-24 * sizes
    if out.dtype != torch.float32:  # subnormals are rounded to a multiple of the smallest one
        allowed = allowed + torch.finfo(out.dtype).eps / 2 * (truth.abs() + allowed) + 2.0**-25
    assert ((out.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "outs"), SIZES)
def test_a_row_has_the_bits_that_it_has_alone(features, outs, dtype):
    most, weight, bias = make(max(ROWS), features, outs, dtype)
    for offset in (None, bias):
        alone = torch.cat([invariant_linear(row, weight, offset) for row in most.split(1)])
        check_error(alone, most, weight, offset)
        for rows in ROWS:
            assert torch.equal(invariant_linear(most[:rows], weight, offset), alone[:rows])
        # at another place in the batch, in a tensor of another shape
        assert torch.equal(invariant_linear(most.flip(0), weight, offset).flip(0), alone)
        assert torch.equal(invariant_linear(most[3], weight, offset), alone[3])
        turned = invariant_linear(most.unflatten(0, (2, 5, 7)), weight, offset)
        assert torch.equal(turned.flatten(0, 2), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype):
    x, weight, bias = make(40, 1000, 333, dtype)
    expected = invariant_linear(x, weight, bias)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(invariant_linear(x, weight, bias), expected)
    finally:
        torch.set_num_threads(before)


def test_many_rows():
    """More than are packed by one thread, and more than the memory that is kept for them."""
    x, weight, bias = make(3000, 400, 20, torch.bfloat16)
    out = invariant_linear(x, weight, bias)
    for part in (slice(0, 1), slice(1234, 1260), slice(2990, 3000)):
        assert torch.equal(out[part], invariant_linear(x[part], weight, bias))


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(0, 200), st.integers(1, 100), st.sampled_from(DTYPES))
def test_any_size(rows, features, outs, dtype):
    x, weight, bias = make(rows, features, outs, dtype, seed=rows)
    out = invariant_linear(x, weight, bias)
    check_error(out, x, weight, bias)
    assert torch.equal(out[-1], invariant_linear(x[-1], weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_row_holds_stays_in_it(dtype):
    x, weight, _ = make(20, 70, 40, dtype)
    expected = invariant_linear(x, weight)
    x[7, 69], x[8, 3] = float("nan"), float("inf")
    out = invariant_linear(x, weight)
    assert out[7].isnan().all()
    assert not out[8].isfinite().any()
    others = [i for i in range(20) if i not in (7, 8)]
    assert torch.equal(out[others], expected[others])
    weight[39, 69] = float("inf")  # neither in the zeros at the end of a row
    assert torch.equal(invariant_linear(x, weight)[others][:, :39], expected[others][:, :39])


@pytest.mark.parametrize("backend", serving())
def test_every_backend(backend):
    x, weight, bias = make(9, 70, 40, torch.float32)
    for offset in (None, bias):
        out = invariant_linear(x, weight, offset, backend=backend)
        check_error(out, x, weight, offset)
        assert torch.equal(out[3], invariant_linear(x[3], weight, offset, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_are_free(dtype):
    x, weight, bias = make(6, 40, 24, dtype)
    expected = invariant_linear(x, weight, bias)
    wide_x, wide_weight = x.new_full((6, 3, 43), torch.nan), x.new_full((24, 47), torch.nan)
    wide_x[:, 1, 1:41], wide_weight[:, 3:43] = x, weight
    assert torch.equal(invariant_linear(wide_x[:, 1, 1:41], weight, bias), expected)
    assert torch.equal(invariant_linear(x, wide_weight[:, 3:43], bias), expected)
    columns = x.T.contiguous().T, weight.T.contiguous().T, torch.stack([bias, bias], 1)[:, 1]
    assert torch.equal(invariant_linear(*columns), expected)
    row = x[:1].expand(6, -1)
    assert torch.equal(invariant_linear(row, weight, bias), expected[:1].expand(6, -1))


def test_nothing_to_do():
    weight, bias = torch.randn(5, 3), torch.randn(5)
    assert invariant_linear(torch.randn(2, 0, 3), weight, bias).shape == (2, 0, 5)
    assert invariant_linear(torch.randn(4, 3), weight[:0]).shape == (4, 0)
    out = invariant_linear(torch.randn(2, 4, 0), weight[:, :0], bias)
    assert torch.equal(out, bias.expand(2, 4, 5))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradients(backend):
    x, weight, bias = make(6, 7, 5, torch.float32)
    leaves = [t.requires_grad_() for t in (x.view(2, 3, 7), weight, bias)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    grad = torch.randn(2, 3, 5)
    out = invariant_linear(*leaves, backend=backend)
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(torch.nn.functional.linear(*doubles), doubles, grad.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    (alone,) = torch.autograd.grad(
        invariant_linear(leaves[0], weight.detach(), backend=backend), leaves[:1], grad
    )
    torch.testing.assert_close(alone, ours[0])


def test_the_operator_is_well_behaved():
    x, weight, bias = make(6, 7, 5, torch.float32)
    for backend in ("", "reference"):
        for offset in (bias, None):
            args = (x.view(2, 3, 7).requires_grad_(), weight.requires_grad_(), offset, backend)
            torch.library.opcheck(torch.ops.vxl.invariant_linear, args)
    step = torch.compile(
        lambda *t: invariant_linear(*t).relu(), fullgraph=True, backend="aot_eager"
    )
    args = tuple(t.detach() for t in (x, weight, bias))
    assert torch.equal(step(*args), invariant_linear(*args).relu())


class Products(TorchDispatchMode):
    """Notes the dtypes of PyTorch's own products."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", serving(dtype=torch.bfloat16))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, backend):
    """The inputs are rounded, products and sums are not."""
    x, weight, bias = make(3, 40, 24, torch.float32)
    rounded = [t.bfloat16() for t in (x, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        out = invariant_linear(x.to(dtype), weight, bias, backend=backend)
    assert torch.equal(out, invariant_linear(*rounded, backend=backend))
    assert products.dtypes == [torch.float32] * 3 * (backend == "reference")


@pytest.mark.parametrize("backend", serving())
def test_autocast_in_a_compiled_graph(backend):
    args = make(3, 40, 24, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def product(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return invariant_linear(*tensors, backend=backend)

    with torch.autocast("cpu", torch.bfloat16):
        expected = invariant_linear(*args, backend=backend)
    assert torch.equal(product(*args), expected)


GOOD = {"x": torch.ones(2, 3), "weight": torch.ones(5, 3), "bias": torch.ones(5)}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", [1.0], "x: got list, expected a tensor (..., in_features)"),
        ("x", torch.tensor(1.0), "x: got shape (), expected 1 dimensions (..., in_features)"),
        ("x", torch.ones(2, 3, dtype=torch.long), "x: got torch.int64, expected float32"),
        ("x", torch.ones(2, 3).double(), "weight: got torch.float32, expected torch.float64 as x"),
        ("weight", torch.ones(5, 4), "weight: got shape (5, 4), expected (out_features, 3) for x"),
        ("weight", torch.ones(3), "weight: got shape (3,), expected 2 dimensions"),
        ("weight", torch.ones(5, 3).half(), "weight: got torch.float16, expected torch.float32"),
        ("bias", torch.ones(4), "bias: got shape (4,), expected (5,)"),
        ("bias", torch.ones(5, 1), "bias: got shape (5, 1), expected 1 dimensions"),
        ("bias", torch.ones(5).half(), "bias: got torch.float16, expected torch.float32 as x"),
        ("bias", torch.ones(5, device="meta"), "bias: got device meta, expected cpu as x"),
        ("backend", "gpu", "backend: got 'gpu', expected"),
    ],
)
def test_refusals(name, value, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        invariant_linear(**{**GOOD, name: value})


def test_float64_has_the_reference_alone():
    doubles = [t.double() for t in GOOD.values()]
    with pytest.raises(ValueError, match=r"^x: got torch.float64, expected float32"):
        invariant_linear(*doubles)
    out = invariant_linear(*doubles, backend="reference")
    assert torch.equal(out, torch.full((2, 5), 4.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [((2, 3), (5, 4), None), ((2, 3), (5,), None), ((), (5, 3), None), ((2, 3), (5, 3), (4,))],
)
def test_the_operator_by_name_reads_nothing_outside(x, weight, bias):
    args = torch.ones(x), torch.ones(weight), None if bias is None else torch.ones(bias)
    with pytest.raises(ValueError, match="expected"):
        torch.ops.vxl.invariant_linear(*args)
