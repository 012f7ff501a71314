"""`vxl`, also `python -m vxl_model`: ask a video from the command line.

Answers go to stdout, everything else to stderr. Other packages add commands by entry points of
the group `vxl.commands`: functions that take argparse's subparsers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .common import (
    Parser,
    add_device_arguments,
    complain,
    count,
    one_line,
    placement,
    quiet,
    ratio,
    run,
)
from .progress import Progress

if TYPE_CHECKING:
    from ..inputs.processing import VideoXLProcessor
    from ..modeling import VideoXLForConditionalGeneration
    from ..streaming.memory import VideoMemory


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    return run(_parser(), arguments)


# -- arguments -----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vxl", description="Video-XL: ask questions of a video.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="watch a video and answer questions about it")
    ask.add_argument("questions", nargs="+", metavar="QUESTION")
    _source_arguments(ask, memory=True)
    _answer_arguments(ask)
    ask.set_defaults(run=_ask)

    chat = commands.add_parser("chat", help="many questions, a line each, over one video")
    _source_arguments(chat, memory=True)
    _answer_arguments(chat)
    chat.set_defaults(run=_chat)

    watch = commands.add_parser("watch", help="watch a video and keep what remains of it")
    _source_arguments(watch, memory=False)
    watch.add_argument("--save", required=True, metavar="FILE", help="for ask and chat --memory")
    watch.add_argument("--json", action="store_true", help="print one JSON object")
    watch.set_defaults(run=_watch)

    plan = commands.add_parser("plan", help="memory and arithmetic of a video, nothing loaded")
    plan.add_argument("--frames", type=count, required=True)
    plan.add_argument("--ratio", type=count, required=True)
    plan.add_argument("--model", metavar="PATH", help="folder or Hub name; default: Video-XL-7B")
    add_device_arguments(plan)
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=_plan)

    for entry in sorted(entry_points(group="vxl.commands"), key=lambda entry: entry.name):
        entry.load()(commands)
    return parser


def _source_arguments(parser: argparse.ArgumentParser, memory: bool) -> None:
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="checkpoint: a folder or a name on the Hub"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--video", metavar="FILE", help="any container that FFmpeg reads")
    source.add_argument(
        "--image", action="append", metavar="FILE", help="a picture; several are like a video"
    )
    if memory:
        source.add_argument("--memory", metavar="FILE", help="what watch --save wrote")
    parser.add_argument("--frames", type=count, help="so many, evenly spaced (with --fps: most)")
    parser.add_argument("--fps", type=float, help="frames a second (default: 1, at most 128)")
    parser.add_argument(
        "--ratio", type=ratio, help="visual tokens a kept token: 8, or 2,4,8 to draw from"
    )
    add_device_arguments(parser)


def _answer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=count, default=256)
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")


# -- commands ------------------------------------------------------------------------------------


def _ask(options: argparse.Namespace) -> None:
    session = _Session(options, options.questions)
    for question in options.questions:
        session.answer(question)


def _chat(options: argparse.Namespace) -> None:
    session = _Session(options)
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
        except EOFError:
            return
        if not question:
            if prompt:
                return
            continue
        try:
            session.answer(question)
        except ValueError as error:  # of this question; the next may be fine
            complain(one_line(error), 2)


def _watch(options: argparse.Namespace) -> None:
    target = Path(options.save)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise ValueError(f"--save {target}: no such folder, or a folder itself")
    session = _Session(options)
    session.memory.save(target)
    about = {**session.about, "saved": str(target), "file_bytes": target.stat().st_size}
    if options.json:
        print(json.dumps(about))
    else:
        print(
            f"{target}: {about['frames']} frames, {about['visual_tokens']} visual tokens, "
            f"{about['kept_tokens']} kept, {about['file_bytes'] / 2**20:.1f} MiB"
        )


def _plan(options: argparse.Namespace) -> None:
    from ..decoder.configuration import VideoXLConfig
    from ..inputs.processing import VideoXLProcessor
    from .plan import device_memory, plan_video, released_config

    device, dtype = placement(options)
    if options.model is None:
        config, name = released_config(), "Video-XL-7B (the released geometry)"
    else:
        VideoXLProcessor.read_config(options.model)  # its errors are short
        config, name = VideoXLConfig.from_pretrained(options.model), options.model
    plan = plan_video(config, options.frames, options.ratio, dtype=dtype, device=device)
    free = device_memory(device)
    if options.json:
        print(
            json.dumps({"model": name, "device": str(device), "free_bytes": free, **plan.to_dict()})
        )
        return
    gib = 2.0**30
    raw = plan.raw_dense_flops + plan.raw_attention_flops
    language = plan.dense_flops + plan.attention_flops
    fits = "fits" if plan.total_bytes < free else "does not fit"
    print(f"model     {name}, {plan.parameters / 1e9:.2f} G parameters, {plan.dtype}, on {device}")
    print(
        f"video     {plan.frames} frames, {plan.visual_tokens} visual tokens, one in "
        f"{plan.ratio} kept: {plan.kept_tokens} with the prompt"
    )
    print("memory")
    print(f"  weights                {plan.weight_bytes / gib:9.2f} GiB")
    print(
        f"  kept K and V           {plan.cache_bytes / gib:9.2f} GiB   "
        f"(every token kept: {plan.raw_cache_bytes / gib:.2f} GiB)"
    )
    print(f"  activations, about     {plan.step_bytes / gib:9.2f} GiB")
    print(
        f"  together               {plan.total_bytes / gib:9.2f} GiB   "
        f"{fits}: {free / gib:.1f} GiB are free"
    )
    print("arithmetic")
    print(f"  vision                 {plan.vision_flops / 1e12:9.1f} TFLOP")
    print(
        f"  language model         {language / 1e12:9.1f} TFLOP, "
        f"{100 * plan.attention_flops / language:.0f} % of it attention "
        f"(every token kept: {raw / 1e12:.1f})"
    )
    print(
        f"  a question             {plan.question_flops / 1e12:9.1f} TFLOP, "
        "64 tokens and 256 of answer"
    )


class _Session:
    """A loaded model and one video in its memory.

    What costs nothing is looked at first: a wrong file or question is said before gigabytes of
    weights are read.
    """

    def __init__(self, options: argparse.Namespace, questions: Sequence[str] = ()) -> None:
        from ..inputs.processing import VideoXLProcessor

        quiet()
        self.options = options
        device, dtype = placement(options)
        self.processor: VideoXLProcessor = VideoXLProcessor.from_pretrained(options.model)
        for question in questions:
            self.processor.suffix_ids(question)
        self.processor.prefix_ids()
        source = self._open()
        begin = time.perf_counter()
        self.model = _load(options.model, device, dtype)
        self.model.processor = self.processor
        loaded = time.perf_counter()
        self.memory = self._remember(source)
        self.about: dict[str, Any] = {
            "model": options.model,
            "source": options.video or options.image or options.memory,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "frames": self.memory.visual_tokens[0] // self.model.tokens_per_frame,
            "visual_tokens": self.memory.visual_tokens[0],
            "kept_tokens": self.memory.kept_tokens[0],
            "memory_bytes": self.memory.bytes,
            "load_seconds": round(loaded - begin, 3),
            "watch_seconds": round(time.perf_counter() - loaded, 3),
        }

    def _open(self) -> dict[str, Any]:
        """Arguments of `watch`; empty for a memory."""
        from ..inputs.images import open_image
        from ..video.reader import open_video

        options = self.options
        if getattr(options, "memory", None):
            for name in ("frames", "fps", "ratio"):
                if getattr(options, name) is not None:
                    raise ValueError(f"--{name}: the memory has been made already")
            with open(options.memory, "rb"):
                return {}
        if options.video:
            return {
                "video": open_video(
                    options.video, options.frames, options.fps, size=self.processor.size
                )
            }
        if options.frames is not None or options.fps is not None:
            raise ValueError("--frames, --fps: for --video only")
        if len(options.image) > 1:
            return {"pixel_values": self.processor.images_to_pixels(options.image)}
        picture = open_image(options.image[0])
        pixels = self.processor.image_to_pixels(picture)
        return {"pixel_values": pixels, "image_sizes": picture.size}

    def _remember(self, source: dict[str, Any]) -> VideoMemory:
        from ..streaming.memory import VideoMemory

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
        damaged = getattr(source.get("video"), "damaged", 0)
        if damaged:
            print(
                f"vxl: warning: {damaged} frames could not be decoded; the one before "
                "stands for each",
                file=sys.stderr,
            )
        return memory

    def answer(self, question: str) -> None:
        """Prints the answer, word by word as it comes, or as JSON."""
        from transformers import TextStreamer

        options = self.options
        tail = self.processor.suffix_ids(question)[0]
        streamer = None
        if not options.json:
            streamer = TextStreamer(
                self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
            )
        begin = time.perf_counter()
        ids = self.memory.ask(
            tail,
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
                "answer": self.processor.decode(ids),
                "new_tokens": len(ids),
                "answer_seconds": round(seconds, 3),
            }
            print(json.dumps({**self.about, **answer}), flush=True)


def _load(path: str, device: torch.device, dtype: torch.dtype) -> VideoXLForConditionalGeneration:
    from .. import VideoXLForConditionalGeneration

    return VideoXLForConditionalGeneration.from_pretrained(path, dtype=dtype).to(device)
