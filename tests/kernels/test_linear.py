"""vst_linear multiplies each row by its own weights."""

import pytest
import torch
from helpers.strategies import layouts
from hypothesis import given, settings

from vxl_kernels import ChunkLayout, reference, vst_linear

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
