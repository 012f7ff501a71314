"""Rows through two linear modules, ordinary tokens through one and VSTs through the other.

Plain `nn.Linear` modules give their weights to `vst_linear`, which takes both products at once, or
in a decoding step to `invariant_linear`.
Anything else is called as a module: adapters, quantised weights, hooks, parametrizations, weights
that come to the device for the call alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as torch_module

from vxl_kernels import ChunkLayout, VarlenLayout, invariant_linear, vst_linear

from .placement import local

__all__ = [
    "Apart",
    "is_plain",
    "is_untouched",
    "linear_map",
    "one_by_one",
    "project_rows",
    "whole_weights",
]

Apart = Callable[[Tensor], list[Tensor]]
"""The rows of each sequence, of the rows of all."""

_WEIGHTS = (nn.Parameter, DTensor, type(None))


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is the product with its `weight` and `bias`, and no more."""
    if type(module) is not nn.Linear:  # a parametrization makes a class of its own
        return False
    # In every layer of every step, so without generators.
    held = module.__dict__["_parameters"]  # pruning takes the weight out of it
    if len(held) != 2 or "weight" not in held or "bias" not in held:
        return False
    if type(held["weight"]) not in _WEIGHTS or type(held["bias"]) not in _WEIGHTS:
        return False
    return is_untouched(module)


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module is the `forward` of its class, and no more."""
    state = module.__dict__
    hooks = state["_forward_hooks"] or state["_forward_pre_hooks"]
    if hooks or state["_backward_hooks"] or state["_backward_pre_hooks"] or "forward" in state:
        return False
    if state.get("_compiled_call_impl") is not None:
        return False
    return not torch_module._has_any_global_hook()


def whole_weights(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a plain module. None where the module has to be called, also if its weight
    is a part of one (tensor parallelism)."""
    if not is_plain(module) or type(module._parameters["weight"]) is not nn.Parameter:
        return None
    return module._parameters["weight"], module._parameters["bias"]


def one_by_one(module: Any, x: Tensor, apart: Apart) -> Tensor:
    """Calls a module with the rows of one sequence at a time."""
    rows = apart(x)
    if len(rows) == 1:
        return module(x)
    return torch.cat([module(own) for own in rows], dim=0 if len(x) == len(rows) else 1)


def project_rows(
    x: Tensor,
    own: nn.Module,
    vst: nn.Module,
    layout: ChunkLayout | VarlenLayout | None,
    backend: str | None = None,
    apart: Apart | None = None,
) -> Tensor:
    """Rows x `(batch, rows, in_features)` through `own`, those of VSTs through `vst`:
    `(batch, rows, out_features)`.

    Args:
        layout: what the rows are, of a batch of one if it is a `VarlenLayout`; None for rows that
            all go through `own`.
        backend: of the operators, for plain modules.
        apart: of few rows of each sequence, without a layout: the rows of each. See
            `single_rows.py`.
    """
    if isinstance(layout, VarlenLayout):
        return _project_flat(x[0], own, vst, layout, backend)[None]
    if apart is not None and is_plain(own):
        return invariant_linear(x, *_weights(own), backend=backend)
    if apart is not None:
        return one_by_one(own, x, apart)
    if is_plain(own) and (layout is None or is_plain(vst)):
        weight, bias = _weights(own)
        vst_weight, vst_bias = (None, None) if layout is None else _weights(vst)
        return vst_linear(x, weight, bias, vst_weight, vst_bias, layout, backend=backend)
    if layout is None:
        return own(x)
    raw, summaries = layout.split_rows(x)
    return layout.join_rows(own(raw), vst(summaries))


def _project_flat(
    x: Tensor, own: nn.Module, vst: nn.Module, layout: VarlenLayout, backend: str | None
) -> Tensor:
    if is_plain(own) and is_plain(vst):
        (weight, bias), (vst_weight, vst_bias) = _weights(own), _weights(vst)
        return vst_linear(x, weight, bias, vst_weight, vst_bias, layout, backend=backend)
    raw, summaries = layout.split_rows(x)
    return torch.cat([own(raw), vst(summaries)])


def _weights(module: nn.Module) -> list[Any]:
    """`weight` and `bias` of a plain module, in this order."""
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
