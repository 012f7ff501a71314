"""vst_linear in one launch multiplies each row by its own weights."""

import pytest
import torch

from vxl_kernels import ChunkLayout, reference, vst_linear
from vxl_kernels._triton import configs
from vxl_kernels.testing import poisoned_memory

core = pytest.mark.core
LAYOUTS = [None, ChunkLayout(50, 4, 2), ChunkLayout(9, 2, 3, "interleaved"), ChunkLayout(3, 3)]


@core
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("features", [64, 40])  # whole blocks of features, and a partial one
@pytest.mark.parametrize("tiles", ["shipped", "small"])
def test_against_the_reference(layout, dtype, features, tiles, monkeypatch):
    if tiles == "small":
        small = configs.LinearConfig(16, 16, 32, 2, 4, 2)
        monkeypatch.setattr(configs, "linear_config", lambda *args: small)
    torch.manual_seed(0)
    rows = 37 if layout is None else layout.rows
    x = torch.randn(2, rows, features).to(dtype)
    weight, vst_weight = torch.randn(2, 50, features).to(dtype)
    bias = torch.randn(50).to(dtype)
    for biases in ((bias, None), (None, -bias), (None, None), (bias, -bias)):
        args = (x, weight, biases[0], vst_weight, biases[1], layout)
        with poisoned_memory():
            out = vst_linear(*args, backend="triton")
        doubles = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
        truth = reference.vst_linear(*doubles)
        eps = torch.finfo(dtype).eps
        allowed = eps * float(truth.abs().max()) + 1e-5
        assert (out.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("wrong", ["kinds swapped", "one row late"])
def test_a_mistake_would_show(wrong):
    layout = ChunkLayout(9, 2)
    torch.manual_seed(0)
    x, weight, vst_weight = torch.randn(1, 13, 8), torch.randn(4, 8), torch.randn(4, 8)
    out = vst_linear(x, weight, None, vst_weight, None, layout, backend="triton")
    if wrong == "kinds swapped":
        other = vst_linear(x, vst_weight, None, weight, None, layout, backend="triton")
    else:
        other = vst_linear(x.roll(1, 1), weight, None, vst_weight, None, layout, backend="triton")
    assert (out - other).abs().max() > 0.1


@pytest.mark.parametrize(("batch", "features"), [(0, 8), (2, 0)])
def test_zero_sizes(batch, features):
    layout = ChunkLayout(4, 2)
    x, weight = torch.randn(batch, 6, features), torch.randn(5, features)
    bias = torch.randn(5)
    out = vst_linear(x, weight, bias, weight, bias, layout, backend="triton")
    assert out.shape == (batch, 6, 5)
    assert torch.equal(out, bias.expand(batch, 6, 5))


def test_strides_are_free():
    torch.manual_seed(0)
    layout = ChunkLayout(6, 2)
    x = torch.randn(9, 2, 16).transpose(0, 1)
    weight = torch.randn(16, 4).T
    out = vst_linear(x, weight, None, weight, None, layout, backend="triton")
    torch.testing.assert_close(out, x @ weight.T)
