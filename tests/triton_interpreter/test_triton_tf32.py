"""float32 by three emulated tf32 products is within the tolerance of float32."""

import numpy as np
import pytest
import triton
from helpers.triton_backward_cases import SMALL, backward
from helpers.triton_backward_cases import call as backward_call
from helpers.triton_cases import attend, call
from triton.runtime import interpreter

from vxl_kernels._triton import configs
from vxl_kernels.testing import check_attention, check_gradients


def _tf32(x):
    """What a tensor core reads of float32. The last 13 bits of the mantissa count as zero."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _emulate(monkeypatch, products):
    """Emulates a product by 1 (plain tf32) or 3 tf32 products. As in Triton, the two small ones
    come first. Triton rounds the high parts, where cutting them leaves a bit less for the low
    parts."""
    dots = []

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        assert a.data.dtype == b.data.dtype == np.float32
        (a_high, b_high) = (_tf32(np.ascontiguousarray(x.data)) for x in (a, b))
        a_low, b_low = (_tf32(x.data - high) for x, high in ((a, a_high), (b, b_high)))
        total = d.data
        if products == 3:
            total = np.matmul(a_low, b_high) + np.matmul(a_high, b_low) + total
        dots.append(input_precision)
        return interpreter.TensorHandle(np.matmul(a_high, b_high) + total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return dots


FLOAT32 = ["split, whole pages", "interleaved, odd head", "sharp, float32", "decode, any pages"]


@pytest.mark.parametrize("name", FLOAT32)
@pytest.mark.usefixtures("small_tiles")
def test_three_products(name, monkeypatch):
    dots = _emulate(monkeypatch, 3)
    inputs = call(name)
    check_attention(inputs, *attend(inputs))
    x3 = triton._C.libtriton.ir.INPUT_PRECISION.TF32x3
    assert set(dots) == {x3}  # what the launcher asks for


@pytest.mark.parametrize("name", FLOAT32)
@pytest.mark.usefixtures("small_tiles")
def test_one_product_would_show(name, monkeypatch):
    dots = _emulate(monkeypatch, 1)
    inputs = call(name)
    with pytest.raises(AssertionError, match="output error"):
        check_attention(inputs, *attend(inputs))
    assert dots


@pytest.mark.parametrize("products", [3, 1])
def test_gradients(products, monkeypatch):
    monkeypatch.setattr(configs, "backward_config", lambda *args: SMALL)
    inputs = backward_call("one raw token a VST")
    grads = backward(inputs)[:2]
    dots = _emulate(monkeypatch, products)
    found = backward(inputs, grads)[2]
    assert dots
    if products == 3:
        check_gradients(inputs, *grads, found)
    else:
        with pytest.raises(AssertionError, match="gradient of"):
            check_gradients(inputs, *grads, found)
