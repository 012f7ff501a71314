"""Generation that begins with a cache which holds part of the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["skip_cached"]


@contextmanager
def skip_cached(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block a decoder does not compute tokens again that its cache holds.

    Greedy search, sampling and beams of `generate` take care of that themselves. Assisted decoding
    and prompt lookup give the whole prompt to the first forward, whatever is cached (transformers
    5.17 to 5.24).
    """
    handle = model.register_forward_pre_hook(_leave_out_cached, with_kwargs=True)
    try:
        yield model
    finally:
        handle.remove()


def _leave_out_cached(
    module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    caches = [kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None]
    ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
    if not caches or ids is None or positions is None:
        return None
    cached = caches[0].get_seq_length()
    if not 0 < cached < ids.shape[1] or bool(positions[..., 0].any()):
        return None  # it begins where the cache ends
    rest = {"input_ids": ids[:, cached:], "position_ids": positions[..., cached:]}
    return args, {**kwargs, **rest}
