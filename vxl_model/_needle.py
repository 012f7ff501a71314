"""A small world to lose a needle in: videos of synthetic frame features, and questions on them.

A frame is 12 x 12 visual tokens of noise, as many as the released model has, and windows are as
long as its (10 frames, 1440 tokens). A picture covers 4 x 4 tokens at a random place of its
frame: the four inside show an animal, and a *needle* has a frame of one colour around them. The
same pictures without a coloured frame lie scattered in between. A video has at most one needle of
a colour, so "Which animal is framed in red?" has one answer.

Neither colour nor animal stands in one token: whoever answers has put the two together while the
frame could still be seen, kept that in the VSTs, and found it among all the others.

Source of the test: needle in a haystack on long videos, Video-XL section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from .modeling import VideoXLForConditionalGeneration

__all__ = [
    "ANIMALS", "COLOURS", "FRAME_TOKENS", "TRAINED_FRAMES", "WEIGHTS", "Needle", "draw_needles",
    "load_needle_model", "make_video", "new_needle_model", "question",
]  # fmt: skip

ANIMALS = ["ant", "bear", "cat", "dog", "eel", "fox", "goat", "hare", "ibis", "jay"]
COLOURS = ["red", "orange", "yellow", "green", "blue", "violet", "white", "black"]
SIDE, PICTURE, HIDDEN = 12, 4, 64  # tokens across a frame and a picture; features of a token
FRAME_TOKENS = SIDE * SIDE
TRAINED_FRAMES = 32  # the longest video that the shipped weights saw in training
WEIGHTS = Path(__file__).parent / "needle"
_CONTRAST = 2.0  # length of a picture's features; noise has length 1
_PLAIN = 0.1  # share of frames with a picture that has no coloured frame
_CONTROL = ("<|im_start|>", "<|endoftext|>", "<|im_end|>")
_WORDS = [
    "system", "user", "assistant", "you", "are", "a", "helpful", ".",
    "which", "animal", "is", "framed", "in", "?",
]  # fmt: skip


class Needle(NamedTuple):
    """A picture in a coloured frame: the video's frame it is in, and indices of its animal and
    colour."""

    frame: int
    animal: int
    colour: int


def question(colour: int) -> str:
    return f"Which animal is framed in {COLOURS[colour]}?"


def _appearances() -> Tensor:
    """Features `(animals + colours, hidden)`, the same everywhere: from NumPy's legacy generator,
    whose numbers never change."""
    import numpy as np

    drawn = np.random.RandomState(0).standard_normal((len(ANIMALS) + len(COLOURS), HIDDEN))
    return normalize(torch.from_numpy(drawn).float(), dim=-1) * _CONTRAST


def draw_needles(
    generator: torch.Generator, frames: int | Sequence[int], count: int | None = None
) -> list[Needle]:
    """Needles of different colours in different frames, their animals drawn independently.

    Args:
        generator: for every draw.
        frames: how many the video has, or the very frames that get a needle each.
        count: how many needles; by default a frame each, 8 at most.
    """
    if isinstance(frames, int):
        places = torch.randperm(frames, generator=generator).tolist()
    else:
        places = list(frames)
    count = min(len(places), len(COLOURS)) if count is None else count
    if not 1 <= count <= min(len(places), len(COLOURS)):
        most = min(len(places), len(COLOURS))
        raise ValueError(f"count: got {count}, expected 1 to {most}")
    animals = torch.randint(len(ANIMALS), (count,), generator=generator).tolist()
    colours = torch.randperm(len(COLOURS), generator=generator)[:count].tolist()
    return [Needle(*n) for n in zip(places[:count], animals, colours, strict=True)]


def make_video(frames: int, needles: Sequence[Needle], generator: torch.Generator) -> Tensor:
    """Visual tokens `(frames * 144, 64)`, already projected."""
    looks = _appearances()
    video = torch.randn(frames, SIDE, SIDE, HIDDEN, generator=generator) / math.sqrt(HIDDEN)

    def paste(frame: int, animal: int, colour: int | None) -> None:
        top, left = torch.randint(SIDE - PICTURE + 1, (2,), generator=generator).tolist()
        place = video[frame, top : top + PICTURE, left : left + PICTURE]
        inside = place[1:-1, 1:-1]
        if colour is not None:
            place += looks[len(ANIMALS) + colour]
            inside -= looks[len(ANIMALS) + colour]
        inside += looks[animal]

    taken = {needle.frame for needle in needles}
    plain = torch.rand(frames, generator=generator) < _PLAIN
    others = torch.randint(len(ANIMALS), (frames,), generator=generator)
    for frame in plain.nonzero().flatten().tolist():
        if frame not in taken:
            paste(frame, int(others[frame]), None)
    for needle in needles:
        paste(*needle)
    return video.reshape(-1, HIDDEN)


# -- the model ---------------------------------------------------------------------------------


def _tokenizer() -> Any:
    """A word a token, with the control tokens of the released model's prompt."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_CONTROL, *_WORDS, *COLOURS, *ANIMALS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex("[.?]"), behavior="isolated"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=_CONTROL[2],
        additional_special_tokens=list(_CONTROL[:2]),
    )


def new_needle_model(seed: int = 0) -> VideoXLForConditionalGeneration:
    """A Video-XL of 3 layers and 64 features without a vision tower, weights drawn at random."""
    from .configuration import VideoXLConfig
    from .modeling import VideoXLForConditionalGeneration
    from .processing import VideoXLProcessor

    tokenizer = _tokenizer()
    config = VideoXLConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=2 * HIDDEN,
        vocab_size=len(tokenizer),
        rope_theta=1e6,
        beacon_ratio=[8],
        beacon_window=10 * FRAME_TOKENS,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoXLForConditionalGeneration(config)
    model.processor = VideoXLProcessor(tokenizer)
    return model


def load_needle_model(path: Path = WEIGHTS) -> VideoXLForConditionalGeneration:
    """The trained model: the shipped one, or what `examples/needle.py` wrote to a folder."""
    from .modeling import VideoXLForConditionalGeneration

    return VideoXLForConditionalGeneration.from_pretrained(path).eval()
