"""A loaded model and one video in its memory."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import clock, output_file, placement, quiet
from .progress import Progress

if TYPE_CHECKING:
    from vxl_model.inputs.processing import VideoXLProcessor
    from vxl_model.streaming.memory import VideoMemory

__all__ = ["Session"]


class Session:
    """Watches the video of some options, then answers questions.

    What costs little is checked first: a wrong file or question is reported before gigabytes of
    weights are read.

    Args:
        options: of `ask`, `chat` or `watch`.
        questions: known ones; each is checked before the model is loaded.
    """

    def __init__(self, options: argparse.Namespace, questions: Sequence[str] = ()) -> None:
        from vxl_model import VideoXLForConditionalGeneration
        from vxl_model.inputs.processing import VideoXLProcessor

        quiet()
        self.options = options
        if getattr(options, "save", None):
            self._output("--save", options.save)
        device, dtype = placement(options)
        self.processor: VideoXLProcessor = VideoXLProcessor.from_pretrained(options.model)
        for question in questions:
            self._suffix(question)
        self.processor.prefix_ids()
        source = self._open()
        begin = time.perf_counter()
        self.model = VideoXLForConditionalGeneration.from_pretrained(options.model, dtype=dtype).to(
            device
        )
        self.model.processor = self.processor
        loaded = clock(device)
        self.memory = self._remember(source)
        self.about: dict[str, Any] = {
            "model": options.model,
            "source": options.video or options.image or options.memory,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "frames": self.memory.visual_tokens[0] // self.model.tokens_per_frame,
            "visual_tokens": self.memory.visual_tokens[0],
            "cached_tokens": self.memory.cached_tokens[0],
            "memory_bytes": self.memory.bytes,
            "load_seconds": round(loaded - begin, 3),
            "watch_seconds": round(clock(device) - loaded, 3),
        }
        self._trained = self.model.config.max_position_embeddings
        self._warn_beyond(self.memory.cached_tokens[0], "the video")
        if getattr(options, "save", None):
            self.save("--save", options.save)

    def _output(self, option: str, path: str) -> Path:
        """The file to write. ValueError if it would take the place of anything but a memory."""
        from vxl_kernels import VstCache

        options = self.options
        inputs = [options.model, options.video, *(options.image or ())]
        target = output_file(option, path, [*inputs, getattr(options, "memory", None)])
        if target.exists() and target.stat().st_size:
            try:
                known = "memory" in VstCache.read_metadata(target)
            except ValueError:
                known = False
            if not known:
                raise ValueError(
                    f"{option}: got {path}, which exists and is not a memory, "
                    "expected a new file or a memory"
                )
        return target

    def save(self, option: str, path: str) -> Path:
        """Writes the memory; ValueError names `option` where `path` cannot be written."""
        target = self._output(option, path)
        self.memory.save(target, final=getattr(self.options, "final", False))
        return target

    def print_watched(self) -> None:
        """What `watch` prints, once its memory is saved."""
        target = Path(self.options.save)
        about = {**self.about, "saved": str(target), "file_bytes": target.stat().st_size}
        if self.options.json:
            print(json.dumps(about))
        else:
            print(
                f"{target}: {about['frames']} frames, {about['visual_tokens']} visual tokens, "
                f"{about['cached_tokens']} cached tokens, {about['file_bytes'] / 2**20:.1f} MiB"
            )

    def _open(self) -> dict[str, Any]:
        """Arguments of `watch`; empty for a memory."""
        from vxl_model.inputs.images import open_frames, open_image

        options = self.options
        if getattr(options, "memory", None):
            for name in ("frames", "fps", "ratio"):
                if getattr(options, name) is not None:
                    raise ValueError(f"--{name}: the memory has been made already")
            with open(options.memory, "rb"):
                return {}
        if options.video:
            size = self.processor.size
            frames, _ = open_frames(options.video, size, options.frames, options.fps)
            return {"video": frames}
        if options.frames is not None or options.fps is not None:
            raise ValueError("--frames, --fps: for --video only")
        if len(options.image) > 1:
            return {"pixel_values": self.processor.images_to_pixels(options.image)}
        picture = open_image(options.image[0])
        pixels = self.processor.image_to_pixels(picture)
        return {"pixel_values": pixels, "image_sizes": picture.size}

    def _remember(self, source: dict[str, Any]) -> VideoMemory:
        from vxl_model.streaming.memory import VideoMemory

        if not source:
            return VideoMemory.load(self.options.memory, self.model)
        bar = Progress("watching", "frames" if "video" in source else "tiles")
        try:
            memory = self.model.watch(
                **source,
                input_ids=self.processor.prefix_ids(),
                ratio=self.options.ratio,
                progress=bar,
            )
        finally:
            bar.close()
        return memory

    def _suffix(self, question: str) -> Any:
        """The ids of a question; ValueError where it holds bytes that are not UTF-8."""
        prefix = self.options.answer_prefix
        for name, text in (("question", question), ("--answer-prefix", prefix)):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{name}: got {text!a}, expected text in UTF-8") from None
        return self.processor.suffix_ids(question, prefix)[0]

    def _warn_beyond(self, positions: int, what: str) -> None:
        if positions > self._trained:
            _warn(
                f"{what} takes {positions:,} positions, more than the {self._trained:,} that the "
                "model was trained for; a larger --ratio takes fewer"
            )

    def answer(self, question: str) -> None:
        """Prints the answer, word by word as it comes, or as JSON."""
        from transformers import TextStreamer

        options = self.options
        suffix = self._suffix(question)
        positions = self.memory.cached_tokens[0] + len(suffix) + options.max_new_tokens
        if self.memory.cached_tokens[0] <= self._trained:  # else it has been said
            self._warn_beyond(positions, "the video with this question and the longest answer")
        streamer = None
        if not options.json:
            streamer = TextStreamer(
                self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
            )
        begin = time.perf_counter()
        ids = self.memory.ask(
            suffix,
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            streamer=streamer,
            eos_token_id=self.processor.stop_ids,
            pad_token_id=self.processor.stop_ids[0],
        )
        seconds = time.perf_counter() - begin
        if options.json:
            answer = {
                "question": question,
                "answer_prefix": options.answer_prefix,
                "answer": self.processor.decode(ids),
                "new_tokens": len(ids),
                "answer_seconds": round(seconds, 3),
            }
            print(json.dumps({**self.about, **answer}), flush=True)


def _warn(text: str) -> None:
    print(f"vxl: warning: {text}", file=sys.stderr)
