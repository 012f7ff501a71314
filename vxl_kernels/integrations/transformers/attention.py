"""The attention function that transformers calls in each layer of a decoder.

Its keys are those of transformers' cache, `(batch, kv_heads, keys, head_dim)`, already rotated.
They are read where they are: a sequence is one page. Keys of a `PagedCache` are in pages.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..._arguments import fail
from ..._backends import BACKENDS, backends
from ...api import vst_attention
from .cache import PagedRows
from .rows import RowPlan, row_plan, whole_cache

__all__ = ["register"]

# What an attention may be asked for beyond causal attention, and its name in words.
_REFUSED = {
    "softcap": "a softcap of the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "head_mask": "a mask of heads",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "cache": "a cache of continuous batching",
    "output_attentions": "attention weights",
}


def register(name: str = "vxl", backend: str | None = None) -> None:
    """Makes `attn_implementation=name` known to transformers, for this process.

    Args:
        name: by which models ask for it.
        backend: a name of `vxl_kernels.backends()`; None for the device's own.

    Raises:
        ValueError: there is no such backend, or it cannot run here.
    """
    if backend is not None and backend not in BACKENDS:
        fail("backend", repr(backend), f"{', '.join(map(repr, BACKENDS))} or None")
    reasons = [] if backend is None else backends()[backend]
    if reasons:
        fail("backend", f"{backend!r}, which cannot run: {'; '.join(reasons)}", "one that can")
    AttentionInterface.register(name, partial(attention, backend=backend))
    AttentionMaskInterface.register(name, row_plan)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RowPlan | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of query `(batch, heads, rows, head_dim)` over `[cached | rows]`.

    Args:
        key, value: `(batch, kv_heads, keys, head_dim)`, the last ones those of the rows.
        attention_mask: what `row_plan` made.

    Returns:
        `(batch, rows, heads, head_dim)`, and no weights. Differentiable.

    Raises:
        ValueError: it is asked for something else than that.
    """
    plan = attention_mask
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            fail(name, what, "None: attn_implementation='sdpa' or 'eager' may have it")
    if dropout:
        fail("attention_dropout", dropout, "0 in training")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        fail("is_causal", False, "True: causal attention")
    if plan is not None and not isinstance(plan, RowPlan):
        got = f"a {attention_mask.dim()}-dimensional mask" if isinstance(plan, Tensor) else plan
        fail("attention_mask", got, "None or a mask of padding, (batch, tokens)")
    if value.shape[3] != query.shape[3]:
        fail("value", f"head_dim {value.shape[3]}", f"{query.shape[3]} as query")
    count = query.shape[2]
    q = query.transpose(1, 2)
    if isinstance(key, PagedRows):
        start = key.sequences.length
    else:
        start = key.shape[2] - count if plan is None else plan.start
    whole = plan is None or not plan.takes  # `row_plan` has looked at sequences within rows
    if sliding_window is not None and whole and start + count > sliding_window:
        expected = f"at least the {start + count} tokens of the sequence"
        fail("sliding_window", f"a window of {sliding_window} tokens", expected)
    if isinstance(key, PagedRows):
        assert isinstance(value, PagedRows)
        k, v = (x.rows.transpose(1, 2) for x in (key, value))
        out = key.sequences.attend(key.layer, q, k, v, plan, scaling, backend)
        return out, None
    if value.dtype != key.dtype:  # autocast has cast one and not the other
        value = value.to(key.dtype)
    k, v = (x[:, :, start : start + count].transpose(1, 2) for x in (key, value))
    cache: Any = (None, None, None, None)
    if start:
        cache = whole_cache(key, value, start) if plan is None else plan.cached(key, value)
    settings: Any = (None, scaling, False, backend)  # layout, scale, return_lse, backend
    if plan is None:
        return vst_attention(q, k, v, *cache, *settings), None
    sequences = zip(*(plan.sequences(x) for x in (q, k, v)), strict=True)
    parts: Any = [vst_attention(*rows, *cache, *settings) for rows in sequences]
    return plan.rows(parts, q.shape), None
