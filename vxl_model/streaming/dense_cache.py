"""Sequences as a `DynamicCache` of transformers, for a plain decoder of the same weights, and back.

K is cached rotated to its final position, and text continues a sequence of cached tokens as it
continues a text. A plain decoder therefore needs nothing else to answer.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from vxl_kernels import rope_append

from ..errors import fail
from .batch import StreamBatch

__all__ = ["append_cache", "cache_rows", "dense_cache"]


def dense_cache(batch: StreamBatch, rows: int) -> Any:
    """Copies of all K and V as a `DynamicCache`, each sequence `rows` times."""
    lengths = sorted({state.sequence.length for state in batch.states})
    if len(lengths) > 1:
        got = f"videos of {', '.join(map(str, lengths))} cached tokens"
        fail("to_cache", got, "videos of one length: memory[i].to_cache()")
    cache = DynamicCache()
    places = [state.sequence.place for state in batch.states]
    for layer in range(places[0][0].num_layers):
        gathered = [pages.gather(seq, layer) for pages, seq in places]
        k, v = (
            torch.stack(part).transpose(1, 2).repeat_interleave(rows, 0)
            for part in zip(*gathered, strict=True)
        )
        cache.update(k, v, layer)
    return cache


def cache_rows(cache: Any) -> int:
    """Rows of the batch of a `DynamicCache`.

    Raises:
        ValueError: it is another cache, or empty.
    """
    if not isinstance(cache, DynamicCache):
        fail("cache", f"a {type(cache).__name__}", "a DynamicCache from to_cache()")
    if not cache.layers or cache.layers[0].keys is None:
        fail("cache", "an empty one", "one from to_cache()")
    return len(cache.layers[0].keys)


def append_cache(batch: StreamBatch, cache: Any) -> None:
    """Appends to the sequences what a cache holds after them, row i of it to sequence i.

    Raises:
        ValueError: it does not begin with the sequences. Nothing has changed then.
    """
    _refuse_other(batch, cache)
    sequences = [state.sequence for state in batch.states]
    length = sequences[0].length
    new = cache.get_seq_length() - length
    if new:
        with sequences[0].cache.step(sequences, new) as step:
            like = step.layer(0)[0]
            still = torch.zeros(like.shape[-1] // 2, device=like.device)  # K is rotated
            for i, layer in enumerate(cache.layers):
                k, v = (
                    x[:, :, length:].transpose(1, 2).to(like.device, like.dtype)
                    for x in (layer.keys, layer.values)
                )
                rope_append(k, k, v, *step.layer(i), None, still)
    for state in batch.states:
        state.vst_counts.append(0)
        state.finished = True


def _refuse_other(batch: StreamBatch, cache: Any) -> None:
    pages = batch.states[0].sequence.place[0]
    shape = (len(batch), pages.kv_heads, cache.get_seq_length(), pages.head_dim)
    layers = [tuple(layer.keys.shape) for layer in cache.layers if layer.keys is not None]
    if layers != [shape] * pages.num_layers:
        fail("cache", f"{len(layers)} layers of {layers[0]}", f"{pages.num_layers} of {shape}")
    for row, state in enumerate(batch.states):
        held, seq = state.sequence.place
        length = state.sequence.length
        if cache.get_seq_length() < length:
            fail(
                "cache", f"{cache.get_seq_length()} tokens", f"the {length} of the memory at least"
            )
        # What the last layer keeps of a token depends on all tokens before it.
        last = cache.layers[-1]
        for mine, given in zip(
            held.gather(seq, pages.num_layers - 1), (last.keys, last.values), strict=True
        ):
            given = given[row, :, :length].transpose(0, 1).to(mine.device, mine.dtype)
            if not torch.equal(mine, given):
                fail("cache", f"other tokens in row {row}", "one that begins with the memory's")
