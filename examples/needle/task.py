"""The needle task: videos of synthetic frame features, and questions about them.

A frame is 8 x 8 visual tokens of noise, a window 4 frames. A picture covers 4 x 4 tokens at a
random place of its frame and shows an animal: its look is added to the tokens. A *needle* is a
picture in colour: the colour's look is added too. Pictures without a colour lie scattered in
between. A video has at most one needle of a colour, so "Which animal is red?" has one answer, and
at most one in a window.

Source of the test: needle in a haystack on long videos, Video-XL section 4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from vxl_model.modeling import VideoXLForConditionalGeneration

__all__ = [
    "ANIMALS",
    "COLOURS",
    "FRAME_TOKENS",
    "NEW_COLOUR",
    "PALETTE",
    "TRAINED_FRAMES",
    "WEIGHTS",
    "WINDOW_FRAMES",
    "Needle",
    "add_new_colour",
    "answer",
    "appearances",
    "draw_needles",
    "load_needle_model",
    "make_video",
    "new_needle_model",
    "question",
]

ANIMALS = ["ant", "bear", "cat", "dog", "eel", "fox", "goat", "hare", "ibis", "jay"]
COLOURS = ["red", "orange", "yellow", "green", "blue", "violet", "white", "black"]
PALETTE = [*COLOURS, "pink"]  # one more than the shipped weights have seen
NEW_COLOUR = len(COLOURS)
SIDE, PICTURE, HIDDEN = 8, 4, 64  # tokens across a frame and a picture; features of a token
WINDOW_FRAMES = 4
FRAME_TOKENS = SIDE * SIDE
TRAINED_FRAMES = 32  # the longest video that the shipped weights saw in training
WEIGHTS = Path(__file__).parent / "weights"
_CONTRAST = 2.0  # length of a picture's features; noise has length 1
_PLAIN = 0.1  # share of frames with a picture that has no coloured frame
_CONTROL = ("<|im_start|>", "<|endoftext|>", "<|im_end|>")
_WORDS = [
    "system",
    "user",
    "assistant",
    "you",
    "are",
    "a",
    "helpful",
    ".",
    "which",
    "animal",
    "is",
    "?",
]


class Needle(NamedTuple):
    """A picture in colour: the video's frame it is in, and indices of its animal and colour."""

    frame: int
    animal: int
    colour: int


def question(colour: int) -> str:
    return f"Which animal is {PALETTE[colour]}?"


def answer(needle: Needle) -> str:
    """The colour again, then the animal, so the token before the animal names what to look for.
    With the animal alone as the answer, the same model learned nothing in 400 steps."""
    return f"{PALETTE[needle.colour]} {ANIMALS[needle.animal]}"


@functools.cache
def appearances() -> Tensor:
    """Features `(animals + palette, hidden)`, the same on every machine: NumPy's legacy generator
    never changes its numbers."""
    import numpy as np

    drawn = np.random.RandomState(0).standard_normal((len(ANIMALS) + len(PALETTE), HIDDEN))
    return normalize(torch.from_numpy(drawn).float(), dim=-1) * _CONTRAST


def draw_needles(
    generator: torch.Generator, frames: int | Sequence[int], count: int | None = None
) -> list[Needle]:
    """Needles of different colours in different windows, their animals drawn independently.

    Args:
        generator: for every draw.
        frames: how many the video has, or the very frames that get a needle each.
        count: how many needles; by default one a window, 8 at most.
    """
    if isinstance(frames, int):
        windows = torch.randperm(-(-frames // WINDOW_FRAMES), generator=generator)
        within = torch.rand(len(windows), generator=generator)
        lengths = (frames - windows * WINDOW_FRAMES).clamp(max=WINDOW_FRAMES)
        places = (windows * WINDOW_FRAMES + (within * lengths).long()).tolist()
    else:
        places = list(frames)
    most = min(len(places), len(COLOURS))
    count = most if count is None else count
    if not 1 <= count <= most:
        raise ValueError(f"count: got {count}, expected 1 to {most}")
    animals = torch.randint(len(ANIMALS), (count,), generator=generator).tolist()
    colours = torch.randperm(len(COLOURS), generator=generator)[:count].tolist()
    return [Needle(*n) for n in zip(places[:count], animals, colours, strict=True)]


def make_video(frames: int, needles: Sequence[Needle], generator: torch.Generator) -> Tensor:
    """Visual tokens `(frames * 64, 64)`, already projected."""
    looks = appearances()
    video = torch.randn(frames, SIDE, SIDE, HIDDEN, generator=generator) / math.sqrt(HIDDEN)

    def paste(frame: int, look: Tensor) -> None:
        top, left = torch.randint(SIDE - PICTURE + 1, (2,), generator=generator).tolist()
        video[frame, top : top + PICTURE, left : left + PICTURE] += look

    taken = {needle.frame for needle in needles}
    plain = torch.rand(frames, generator=generator) < _PLAIN
    others = torch.randint(len(ANIMALS), (frames,), generator=generator)
    for frame in plain.nonzero().flatten().tolist():
        if frame not in taken:
            paste(frame, looks[others[frame]])
    for needle in needles:
        paste(needle.frame, looks[needle.animal] + looks[len(ANIMALS) + needle.colour])
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
    from vxl_model.decoder.configuration import VideoXLConfig
    from vxl_model.inputs.processing import VideoXLProcessor
    from vxl_model.modeling import VideoXLForConditionalGeneration

    tokenizer = _tokenizer()
    config = VideoXLConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=2 * HIDDEN,
        vocab_size=len(tokenizer),
        rope_theta=1e9,  # slow enough for caches eight times as long as in training
        beacon_ratio=[8],
        beacon_window=WINDOW_FRAMES * FRAME_TOKENS,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoXLForConditionalGeneration(config)
    # Words start at their looks, as after the alignment stage of the recipe.
    names = tokenizer.convert_tokens_to_ids([*ANIMALS, *COLOURS])
    model.model.embed_tokens.weight.data[names] = appearances()[: len(names)] / _CONTRAST
    model.processor = VideoXLProcessor(tokenizer)
    return model


def add_new_colour(model: VideoXLForConditionalGeneration) -> None:
    """Gives a model the word of `NEW_COLOUR`: its look as the embedding, as after the alignment
    stage, and the mean of the other colours' rows in the head."""
    tokenizer, word = model.processor.tokenizer, PALETTE[NEW_COLOUR]
    tokenizer.add_tokens([word])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    row = tokenizer.convert_tokens_to_ids(word)
    known = tokenizer.convert_tokens_to_ids(COLOURS)
    embeddings, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embeddings[row] = normalize(appearances()[-1], dim=0) * embeddings[known].norm(dim=1).mean()
    head[row] = head[known].mean(0)


def load_needle_model(path: Path = WEIGHTS) -> VideoXLForConditionalGeneration:
    """The trained model: the shipped one, or what `examples/needle/train.py` wrote to a folder."""
    from vxl_model.modeling import VideoXLForConditionalGeneration

    return VideoXLForConditionalGeneration.from_pretrained(path).eval()
