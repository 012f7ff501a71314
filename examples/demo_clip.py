"""Material of the demonstration and the tests: a tokenizer of bytes and a short clip."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

CONTROL = ("<|im_start|>", "<|endoftext|>", "<|im_end|>")


def byte_tokenizer(vocab_size: int = 259) -> Any:
    """A transformers tokenizer without learned words: the first `vocab_size - 3` bytes, then the
    control tokens of the released model's prompt; the last, <|im_end|>, is eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level BPE writes a byte as a printable sign: its own, or the next from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    signs = [chr(b if b in printable else next(others)) for b in range(256)]
    vocabulary = {sign: i for i, sign in enumerate(signs[: vocab_size - len(CONTROL)])}
    vocabulary |= {token: vocab_size - len(CONTROL) + i for i, token in enumerate(CONTROL)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=CONTROL[2], additional_special_tokens=list(CONTROL[:2])
    )


def write_demo_clip(path: Path, seconds: int = 40, fps: int = 8, size: tuple = (640, 360)) -> Path:
    """A coloured square that wanders over a gradient, encoded as H.264 in MP4."""
    import av

    width, height = size
    x, y = np.meshgrid(np.linspace(0, 160, width), np.linspace(0, 160, height))
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(fps), options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(seconds * fps):
            frame = np.stack((x, y, np.full_like(x, i % 160)), axis=2).astype(np.uint8)
            left = int((width - 80) * (0.5 + 0.5 * np.cos(i / 17)))
            top = int((height - 80) * (0.5 + 0.5 * np.sin(i / 11)))
            frame[top : top + 80, left : left + 80] = (250, 60 + i % 190, 40)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    return path
