"""`vst_linear` as two dense products of PyTorch: any device and dtype, differentiable."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch.nn import functional

from .checks import transforms_active
from .layout import ChunkLayout
from .varlen import VarlenLayout

__all__ = ["vst_linear"]

# oneDNN reorders the weight in every call. From this number of rows on, the product takes far
# longer than that.
_MANY_ROWS = 256


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether MKL, which multiplies PyTorch's float32 matrices on x86-64, does so by its code for
    AVX2 although the processor has AVX-512, as on AMD's. With a prepacked weight, oneDNN is 1.3 to
    2.5 times as fast there (`docs/numbers.md`)."""
    try:
        vendor = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    has = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return vendor and has and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _is_for_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(
            t.device.type == "cpu"
            and t.dtype == torch.float32
            and type(t) in (torch.Tensor, torch.nn.Parameter)
            for t in tensors
        )
        and x.shape[:-1].numel() >= _MANY_ROWS
        and (bias is None or bias.is_contiguous())  # oneDNN reads it as if it were
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        # oneDNN's product has no derivatives.
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not transforms_active()
    )


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product, by the library that is faster on this processor. The weight is not kept in
    another form."""
    compiling = torch.compiler.is_compiling()  # first, as a compiler reads no files
    if not compiling and _mkl_is_slow() and _is_for_onednn(x, weight, bias):
        onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # not a public name
        if onednn is not None:
            return onednn(x, weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)


def vst_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vst_weight: torch.Tensor | None,
    vst_bias: torch.Tensor | None,
    layout: ChunkLayout | VarlenLayout | None,
) -> torch.Tensor:
    """`(batch, rows, out_features)`; arguments as in `api.vst_linear`."""
    if layout is None:
        return _linear(x, weight, bias)
    assert vst_weight is not None
    raw, vst = layout.split_rows(x)
    raw, vst = _linear(raw, weight, bias), _linear(vst, vst_weight, vst_bias)
    if isinstance(layout, VarlenLayout):
        return torch.cat([raw, vst])
    return layout.join_rows(raw, vst)
