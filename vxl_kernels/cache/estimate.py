"""How much memory a video takes in a cache, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._arguments import at_least
from ..layout import ChunkLayout

__all__ = ["MemoryPlan", "plan_memory"]


@dataclass(frozen=True)
class MemoryPlan:
    """What `VstCache.memory_for` counted.

    Attributes:
        visual_tokens: raw tokens of the video.
        video_tokens: rows that every question shares: prompt and VSTs.
        tokens: rows of all questions, shared ones counted once.
        pages: pages of the pool (`num_pages`) that this takes.
        bytes: of those pages, K and V in all layers.
        raw_bytes: of a cache that keeps every token of the same questions, shared alike.
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
    prompt: int = 64,
    tail: int = 512,
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
        frames: of the video.
        ratio: raw tokens per VST.
        prompt: tokens before the video.
        tail: tokens of a question and its answer, at most.
        questions: asked over the same encoded video, all kept at once.

    Raises:
        ValueError: an argument is no integer of at least 1 (0 for frames, prompt and tail), or
            `ratio > window`.

    >>> plan = plan_memory(2048, 8, prompt=14, tail=256)
    >>> plan.video_tokens, plan.pages, plan.bytes / 2**30, plan.raw_bytes / 2**30
    (36878, 292, 1.99..., 15.76...)
    """
    counts = {"frames": frames, "prompt": prompt, "tail": tail}
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
    each = ChunkLayout(window, ratio).vsts_per_chunk
    visual = frames * tokens_per_frame
    vsts = visual // window * each + visual % window // ratio
    video = prompt + vsts
    # A question shares the full pages and has a copy of the partly filled one.
    pages = -(-video // page_size) + questions * -(-(video % page_size + tail) // page_size)
    token_bytes = 2 * num_layers * kv_heads * head_dim * dtype.itemsize
    return MemoryPlan(
        visual_tokens=visual,
        video_tokens=video,
        tokens=video + questions * tail,
        pages=pages,
        bytes=pages * page_size * token_bytes,
        raw_bytes=(prompt + visual + questions * tail) * token_bytes,
    )
