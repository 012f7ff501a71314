"""A demonstration without a download: random weights from video to answer, then a tiny trained
model.

A generated clip goes through a small random Video-XL. Its words mean nothing; its timings do.
Then the model of `examples/needle/train.py` answers questions about a video four times as long
as any of its training videos.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from examples.demo_clip import byte_tokenizer, write_demo_clip
from examples.needle.task import (
    COLOURS,
    TRAINED_FRAMES,
    answer,
    draw_needles,
    load_needle_model,
    make_video,
    question,
)
from vxl_cli.common import Parser, add_device_arguments, count, placement, quiet, ratio, run
from vxl_cli.progress import Progress
from vxl_model.inputs.processing import VideoXLProcessor
from vxl_model.video.reader import open_video

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vxl_model.modeling import VideoXLForConditionalGeneration

QUESTION = "What happens in the video?"
STAGES = (
    "make the clip",
    "make the model",
    "decode and resize (own thread)",
    "vision tower",
    "projector and pooling",
    "language model, video",
    "language model, answer",
)


def demo_model(seed: int = 0) -> VideoXLForConditionalGeneration:
    """A small model of the released structure: CLIP with 3 layers that run, Qwen2 with 4, windows
    of 10 frames, and random weights that depend only on the seed."""
    from vxl_model.decoder.configuration import VideoXLConfig
    from vxl_model.modeling import VideoXLForConditionalGeneration

    tokenizer = byte_tokenizer()
    settings: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 768,
        "vocab_size": len(tokenizer),
        "rope_theta": 1e6,
        "beacon_ratio": [8],
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "beacon_window": 1440,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": 192,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_spatial_pool_mode": "average",
        "mm_spatial_pool_stride": 2,
        "vision_config": {
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "image_size": 336,
            "patch_size": 14,
        },
    }
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = VideoXLForConditionalGeneration(VideoXLConfig(**settings)).eval()
    torch.random.set_rng_state(state)
    model.processor = VideoXLProcessor(tokenizer)
    return model


def _unreadable(tokenizer: Any) -> list[int]:
    """All ids but those of small letters and the space: random bytes are not text."""
    letters = set("abcdefghijklmnopqrstuvwxyz") | {tokenizer.tokenize(" ")[0]}
    return [i for token, i in tokenizer.get_vocab().items() if token not in letters]


def ask_needles(device: str, frames: int = 4 * TRAINED_FRAMES, seed: int = 0) -> dict[str, Any]:
    """Eight needles in a video of synthetic features, and the trained model's answers."""
    model = load_needle_model()
    torch.nn.Module.to(model, device)
    generator = torch.Generator().manual_seed(seed)
    needles = draw_needles(generator, frames, len(COLOURS))
    memory = model.watch(visual_features=make_video(frames, needles, generator).to(device))
    questions = [question(n.colour) for n in needles]
    return {
        "frames": frames,
        "trained_frames": TRAINED_FRAMES,
        "visual_tokens": memory.visual_tokens[0],
        "cached_tokens": memory.cached_tokens[0],
        "at_frame": [n.frame for n in needles],
        "questions": questions,
        "answers": [memory.ask(words, max_new_tokens=4) for words in questions],
        "truth": [answer(n) for n in needles],
    }


class ModuleTimer:
    """Seconds spent in modules, per label."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.phase = ""
        self._begun: dict[str, float] = {}

    @contextmanager
    def around(self, label: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        _finish()
        self._add(label, begin)

    def watch(self, label: str, first: torch.nn.Module, last: torch.nn.Module) -> None:
        """Counts from where `first` begins to where `last` ends."""

        def begin(*_: Any) -> None:
            _finish()
            self._begun[label] = time.perf_counter()

        def end(*_: Any) -> None:
            _finish()
            self._add(label, self._begun[label])

        first.register_forward_pre_hook(begin)
        last.register_forward_hook(end)

    def watch_run(self, decoder: Any) -> None:
        """Counts each pass through a decoder, by phase."""
        run = decoder.run

        def timed(*args: Any, **options: Any) -> Any:
            _finish()
            with self.around(f"language model, {self.phase}"):
                return run(*args, **options)

        decoder.run = timed

    def _add(self, label: str, begin: float) -> None:
        self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - begin


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_demo(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    frames: int | None = None,
    ratio: Any = None,
    max_new_tokens: int = 32,
) -> dict[str, Any]:
    """Runs the demonstration and returns what `print_demo` prints. Seconds are wall-clock. Decoding
    runs in its own thread, so the parts may add up to more than the whole."""
    whole = time.perf_counter()
    timer = ModuleTimer()
    with tempfile.TemporaryDirectory(prefix="vxl-demo-") as folder:
        with timer.around("make the clip"):
            clip = write_demo_clip(Path(folder) / "demo.mp4")
        size = clip.stat().st_size
        with timer.around("make the model"):
            model = demo_model()
            torch.nn.Module.to(model, device, dtype)
        core, projector = model.model, model.model.mm_projector
        timer.watch("vision tower", core.vision_tower, core.vision_tower)
        timer.watch("projector and pooling", projector[0], projector[-1])
        timer.watch_run(core)
        reader = open_video(clip, frames=frames)
        bar = Progress("watching")
        timer.phase = "video"
        begin = time.perf_counter()
        memory = model.watch(
            reader, input_ids=model.processor.prefix_ids(), ratio=ratio, progress=bar
        )
        _finish()
        watched = time.perf_counter() - begin
        bar.close()
        timer.phase = "answer"
        begin = time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            ids = memory.ask(
                model.processor.suffix_ids(QUESTION)[0],
                max_new_tokens=max_new_tokens,
                do_sample=True,
                top_k=0,
                suppress_tokens=_unreadable(model.processor.tokenizer),
            )
        answered = time.perf_counter() - begin
    timer.seconds["decode and resize (own thread)"] = reader.decode_seconds
    seconds = {name: timer.seconds[name] for name in STAGES}
    total = time.perf_counter() - whole
    return {
        "needles": ask_needles(device),
        "clip": f"{reader.duration:.0f} s, {reader.width} x {reader.height}, {size >> 10} KiB",
        "backend": reader.backend,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "frames": reader.num_frames,
        "visual_tokens": memory.visual_tokens[0],
        "cached_tokens": memory.cached_tokens[0],
        "memory_bytes": memory.bytes,
        "question": QUESTION,
        "answer": model.processor.decode(ids),
        "new_tokens": len(ids),
        "seconds": {
            **seconds,
            "watch": watched,
            "answer": answered,
            "total": total,
        },
    }


def print_demo(result: dict[str, Any], out: Any = None) -> None:
    out = sys.stdout if out is None else out

    def say(text: str = "") -> None:
        print(text, file=out)

    seconds = dict(result["seconds"])
    raw, cached = result["visual_tokens"], result["cached_tokens"]
    say(f"clip       {result['clip']}, decoded by {result['backend']}")
    say("model      random weights: the structure of Video-XL in small")
    say(
        f"video      {result['frames']} frames, {raw} visual tokens, {cached} cached tokens "
        f"({result['memory_bytes'] / 2**20:.1f} MiB)"
    )
    say(f"question   {result['question']}")
    say(f"answer     {result['answer']}")
    say("           These words mean nothing: the weights are random. What follows is real.")
    say()
    say(f"where the time went ({result['device']}, {result['dtype']})")
    total, watched, answered = (seconds.pop(k) for k in ("total", "watch", "answer"))
    for name, value in seconds.items():
        say(f"  {name:<32} {value:7.2f} s")
    rate = result["frames"] / watched
    say(f"  {'watching, all of it':<32} {watched:7.2f} s   {rate:.1f} frames/s")
    say(
        f"  {'answering, all of it':<32} {answered:7.2f} s   "
        f"{result['new_tokens'] / answered:.1f} tokens/s"
    )
    say(f"  {'total':<32} {total:7.2f} s")
    needles = result["needles"]
    say()
    say(f"a trained model of 3 layers, {needles['trained_frames']} frames at most in its training")
    say(
        f"video      {needles['frames']} frames of synthetic features, eight of them show a "
        "coloured animal;"
    )
    say(
        f"           {needles['visual_tokens']} visual tokens, "
        f"{needles['cached_tokens']} cached tokens"
    )
    for place, asked, said, truth in zip(
        needles["at_frame"],
        needles["questions"],
        needles["answers"],
        needles["truth"],
        strict=True,
    ):
        verdict = "right" if said == truth else f"wrong: {truth}"
        say(f"  {asked:<26} {said:<14} (frame {place + 1}: {verdict})")


def _demo(options: argparse.Namespace) -> None:
    quiet()
    device, dtype = placement(options)
    result = run_demo(
        str(device), dtype, options.frames, options.ratio, max_new_tokens=options.max_new_tokens
    )
    if options.json:
        print(json.dumps(result))
    else:
        print_demo(result)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python examples/demo.py`; returns the exit code."""
    parser = Parser(prog="demo.py", description="The whole way with random weights, no download.")
    parser.add_argument("--frames", type=count)
    parser.add_argument("--ratio", type=ratio)
    parser.add_argument("--max-new-tokens", type=count, default=32)
    add_device_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_demo)
    return run(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
