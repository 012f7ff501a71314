"""Computes how much memory a video will take in a cache. Allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._arguments import at_least, fail
from ..layout import ChunkLayout

__all__ = ["MemoryPlan", "plan_memory"]


@dataclass(frozen=True)
class MemoryPlan:
    """Result of `VstCache.memory_for`.

    Attributes:
        visual_tokens: raw tokens of the video.
        video_tokens: cached tokens that every question shares: prefix and VSTs.
        tokens: cached tokens of all questions; shared ones count once.
        pages: pages of the pool (`num_pages`) that they take.
        bytes: bytes of these pages, K and V of all layers.
        raw_bytes: bytes of a cache without compression, in which the questions share the same.
    """

    visual_tokens: int
    video_tokens: int
    tokens: int
    pages: int
    bytes: int
    raw_bytes: int


def plan_memory(
    frames: int,
    ratio: int,
    *,
    prefix: int = 64,
    suffix: int = 512,
    questions: int = 1,
    window: int = 1440,
    tokens_per_frame: int = 144,
    num_layers: int = 28,
    kv_heads: int = 4,
    head_dim: int = 128,
    page_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> MemoryPlan:
    """Pages and bytes for one video and the questions to it. Defaults are Video-XL-7B's.

    Args:
        frames: frames of the video.
        ratio: raw tokens per VST.
        prefix: tokens before the video.
        suffix: tokens of a question and its answer, at most.
        questions: questions about the video that are in the cache at the same time.

    Raises:
        ValueError: an argument is not an integer of at least 1 (0 for frames, prefix and suffix),
            or `ratio > window`.

    >>> plan = plan_memory(2048, 8, prefix=14, suffix=256)
    >>> plan.video_tokens, plan.pages, plan.bytes / 2**30, plan.raw_bytes / 2**30
    (36878, 292, 1.99..., 15.76...)
    """
    counts = {"frames": frames, "prefix": prefix, "suffix": suffix}
    sizes = {
        "questions": questions,
        "tokens_per_frame": tokens_per_frame,
        "num_layers": num_layers,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
    }
    for least, group in ((0, counts), (1, sizes)):
        for name, value in group.items():
            at_least(name, value, least)
    if not isinstance(dtype, torch.dtype):
        fail("dtype", repr(dtype), "a torch.dtype")
    each = ChunkLayout(window, ratio).vsts_per_chunk
    visual = frames * tokens_per_frame
    vsts = visual // window * each + visual % window // ratio
    video = prefix + vsts
    # A question shares the full pages and has a copy of the partly filled one.
    pages = -(-video // page_size) + questions * -(-(video % page_size + suffix) // page_size)
    token_bytes = 2 * num_layers * kv_heads * head_dim * dtype.itemsize
    return MemoryPlan(
        visual_tokens=visual,
        video_tokens=video,
        tokens=video + questions * suffix,
        pages=pages,
        bytes=pages * page_size * token_bytes,
        raw_bytes=(prefix + visual + questions * suffix) * token_bytes,
    )
