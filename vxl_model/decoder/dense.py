"""Output projection and MLP of many rows.

Plain modules give their weights to `vst_linear`, which chooses the library that multiplies fastest.
Every other module is called.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vxl_kernels import vst_linear

from .projections import is_untouched, whole_weights
from .qwen2 import TextMLP

__all__ = ["linear", "mlp"]


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """Rows x `(batch, rows, in_features)` through a linear module."""
    weights = whole_weights(module)
    return module(x) if weights is None else vst_linear(x, *weights, None, None, None)


def mlp(module: Any, x: Tensor) -> Tensor:
    """Rows x `(batch, rows, hidden)` through an MLP."""
    if type(module) is not TextMLP or not is_untouched(module):
        return module(x)
    gate = module.act_fn(linear(module.gate_proj, x))
    return linear(module.down_proj, gate * linear(module.up_proj, x))
