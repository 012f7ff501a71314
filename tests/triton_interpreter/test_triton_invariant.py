"""invariant_linear's kernel: a row has the bits that it has alone."""

import pytest
import torch

from vxl_kernels import invariant_linear
from vxl_kernels._triton import configs
from vxl_kernels.testing import poisoned_memory

core = pytest.mark.core


@core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("features", "outs"), [(256, 64), (40, 50), (1, 1), (0, 3)])
@pytest.mark.parametrize("tiles", ["shipped", "small"])
def test_against_float64(dtype, features, outs, tiles, monkeypatch):
    if tiles == "small":
        small = configs.LinearConfig(16, 16, 32, 1, 4, 2)
        monkeypatch.setattr(configs, "invariant_config", lambda *args: small)
    torch.manual_seed(0)
    x, weight = torch.randn(2, 18, features).to(dtype), torch.randn(outs, features).to(dtype)
    for bias in (None, torch.randn(outs).to(dtype)):
        with poisoned_memory():
            out = invariant_linear(x, weight, bias, backend="triton")
        double = None if bias is None else bias.double()
        truth = torch.nn.functional.linear(x.double(), weight.double(), double)
        allowed = torch.finfo(dtype).eps * float(truth.abs().max()) + 1e-5
        assert (out.double() - truth).abs().max() <= allowed
        for rows in (1, 2, 17):
            some = invariant_linear(x[0, :rows], weight, bias, backend="triton")
            assert torch.equal(some, out[0, :rows])


def test_strides_and_sizes():
    torch.manual_seed(0)
    x, weight = torch.randn(16, 9).T, torch.randn(16, 4).T
    out = invariant_linear(x, weight, backend="triton")
    torch.testing.assert_close(out, x @ weight.T)
    assert invariant_linear(x[:0], weight, backend="triton").shape == (0, 4)
    assert torch.equal(invariant_linear(x[::2], weight, backend="triton"), out[::2])
    one = invariant_linear(x[3], weight, backend="triton")
    assert torch.equal(one, out[3])


@pytest.mark.parametrize("wrong", ["rows swapped", "outputs swapped"])
def test_a_mistake_would_show(wrong):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 8), torch.randn(4, 8)
    out = invariant_linear(x, weight, backend="triton")
    other = (x.flip(0), weight) if wrong == "rows swapped" else (x, weight.flip(0))
    assert (out - invariant_linear(*other, backend="triton")).abs().max() > 0.1
