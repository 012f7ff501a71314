"""Passes few rows of every sequence, single tokens or short questions, through the modules. A row
has the same bits in every batch, and each weight is read once.

A plain `nn.Linear` gives its weight to `invariant_linear`. Every other module is called with one
sequence at a time: adapters, quantised weights, hooks. Other operations either treat each row by
itself, or they are called with one sequence at a time too. Which ones depends on the device:

- PyTorch's mean of a row, which a norm takes, has one order of sums on a CPU, up to 32768 values.
  On a GPU the order depends on the number of rows. PyTorch's fused norm of a GPU gives a block of
  threads, always of the same size, to each row.
- PyTorch's SiLU on a CPU computes the last elements of a thread by another function than the
  others. On a GPU all elements have the same one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from vxl_kernels import invariant_linear

from .projections import Apart, is_untouched, one_by_one, whole_weights
from .qwen2 import TextMLP, TextNorm

__all__ = ["linear_rows", "mlp_rows", "norm_rows", "single"]

_MEAN_IN_ONE_ORDER = 32768  # values


def single(x: Tensor) -> list[Tensor]:
    """The rows of each sequence of a batch."""
    return list(x.split(1))


def _product(module: nn.Module, x: Tensor, backend: str | None) -> Tensor | None:
    """None where the module has to be called."""
    weights = whole_weights(module)
    return None if weights is None else invariant_linear(x, *weights, backend=backend)


def linear_rows(module: nn.Module, x: Tensor, backend: str | None, apart: Apart = single) -> Tensor:
    """Rows x `(batch, rows, in_features)` of sequences through a linear module."""
    out = _product(module, x, backend)
    return one_by_one(module, x, apart) if out is None else out


def norm_rows(norm: Any, x: Tensor, apart: Apart = single) -> Tensor:
    """Rows x `(batch, rows, hidden)` of sequences through a norm."""
    if type(norm) is TextNorm and norm._compiled_call_impl is None:
        if x.device.type == "cpu" and x.shape[-1] <= _MEAN_IN_ONE_ORDER:
            return norm(x)
        if _is_fused(norm, x):
            return rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    return one_by_one(norm, x, apart)


def _is_fused(norm: Any, x: Tensor) -> bool:
    """Whether `rms_norm` is the norm's result by one kernel. It rounds 16-bit results once, the
    module twice. Other dtypes of the weight, and autocast, take PyTorch's mean or another dtype."""
    weight = norm._parameters["weight"]
    return (
        x.device.type == "cuda"
        and type(weight) is nn.Parameter
        and weight.dtype == x.dtype
        and not torch.is_autocast_enabled("cuda")
        and is_untouched(norm)
    )


def mlp_rows(mlp: Any, x: Tensor, backend: str | None, apart: Apart = single) -> Tensor:
    """Rows x `(batch, rows, hidden)` of sequences through an MLP."""
    if type(mlp) is not TextMLP or not is_untouched(mlp):
        return one_by_one(mlp, x, apart)
    gate, up = (linear_rows(m, x, backend, apart) for m in (mlp.gate_proj, mlp.up_proj))
    act = mlp.act_fn
    gate = one_by_one(act, gate, apart) if x.device.type == "cpu" else act(gate)
    return linear_rows(mlp.down_proj, gate * up, backend, apart)
