"""Rows through two linear modules, ordinary tokens through one and VSTs through the other.

Plain `nn.Linear` modules give their weights to `vst_linear`, which takes both products at once.
Anything else is called as a module: adapters, quantised weights, hooks, parametrizations, weights
that come to the device for the call alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as torch_module

from vxl_kernels import ChunkLayout, vst_linear

from .placement import local

__all__ = ["is_plain", "linear_map", "project_rows"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WEIGHTS = (nn.Parameter, DTensor, type(None))


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is the product with its `weight` and `bias`, and no more."""
    if type(module) is not nn.Linear:  # a parametrization makes a class of its own
        return False
    state = module.__dict__
    if "forward" in state or any(state[name] for name in _HOOKS):
        return False
    held = state["_parameters"]  # pruning takes the weight out of it
    if held.keys() != {"weight", "bias"} or any(type(w) not in _WEIGHTS for w in held.values()):
        return False
    return not torch_module._has_any_global_hook()


def project_rows(
    x: Tensor,
    own: nn.Module,
    vst: nn.Module,
    layout: ChunkLayout | None,
    backend: str | None = None,
) -> Tensor:
    """Rows x `(batch, rows, in_features)` through `own`, those of VSTs through `vst`:
    `(batch, rows, out_features)`.

    Args:
        layout: what the rows are; None for rows that all go through `own`.
        backend: of `vst_linear`, for plain modules.
    """
    if is_plain(own) and (layout is None or is_plain(vst)):
        weight, bias = _weights(own)
        vst_weight, vst_bias = (None, None) if layout is None else _weights(vst)
        return vst_linear(x, weight, bias, vst_weight, vst_bias, layout, backend=backend)
    if layout is None:
        return own(x)
    raw, summaries = layout.split_rows(x)
    return layout.join_rows(own(raw), vst(summaries))


def _weights(module: nn.Module) -> list[Any]:
    """`weight` and `bias` of a plain module, which need not be in this order in it."""
    held = module._parameters
    return [None if w is None else local(w) for w in (held["weight"], held["bias"])]


@torch.no_grad()
def linear_map(module: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight `(out_features, width)` and bias of what a module computes, whatever it is made of.

    Args:
        width: its in_features.
        like: a tensor of the dtype and device of its input.
    """
    training = module.training
    module.eval()  # an adapter's dropout
    try:
        bias = module(like.new_zeros(1, width))[0]
        weight = module(torch.eye(width, dtype=like.dtype, device=like.device)) - bias
    finally:
        module.train(training)
    return weight.T.contiguous(), bias
