"""`vxl eval memory`: peak memory and seconds over frames, next to what `vxl plan` predicts."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vxl_cli.common import clock, placement, quiet
from vxl_cli.estimate import estimate_video
from vxl_cli.progress import Progress
from vxl_model import VideoXLConfig, VideoXLForConditionalGeneration

from .arguments import check_ratio
from .machine import describe_machine
from .report import Report

__all__ = ["Point", "measure", "run_memory"]

GIB = 2.0**30
_BATCH = 16  # frames made at a time, as a decoder delivers them
_QUESTION = "What happens in the video?"


@dataclass(frozen=True)
class Point:
    """One video of `frames` frames: bytes and seconds.

    Attributes:
        peak_bytes: the most that the device held at a time; on a CPU, what the process held more
            than before the model was loaded.
        planned_bytes: the prediction.
    """

    frames: int
    ratio: int
    visual_tokens: int
    cached_tokens: int
    peak_bytes: int
    planned_bytes: int
    watch_seconds: float
    answer_seconds: float


class PeakMemory:
    """The most memory that was held since `reset`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        _give_back()
        self._base = 0 if device.type == "cuda" else _resident("VmRSS")

    def reset(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _give_back()
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident("VmHWM") - self._base


def _give_back() -> None:
    """Returns freed memory to the system. What malloc keeps would count as held before a run, and a
    run that fills it again would seem to need less."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


def _resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    raise ValueError(f"device: got cpu without /proc/self/status ({name}), expected Linux or a GPU")


def measure(
    model: VideoXLForConditionalGeneration,
    memory: PeakMemory,
    frames: int,
    ratio: int,
    progress: Any = None,
) -> Point:
    """Watches a video of noise and asks one question about it."""
    size = model.processor.size
    memory.reset()
    begin = clock(model.device)
    watched = model.watch(
        _noise(frames, size),
        ratio=ratio,
        tokens=frames * model.tokens_per_frame,
        progress=progress,
    )
    seen = clock(model.device)
    watched.ask(_QUESTION, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    done = clock(model.device)
    # What was asked for, not what fits: the prediction has room for the same question.
    plan = estimate_video(
        model.config, frames, ratio, dtype=model.dtype, device=model.device, question=64, answer=16
    )
    return Point(
        frames,
        ratio,
        watched.visual_tokens[0],
        watched.cached_tokens[0],
        memory.read(),
        plan.total_bytes,
        round(seen - begin, 3),
        round(done - seen, 3),
    )


def _noise(frames: int, size: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for begin in range(0, frames, _BATCH):
        count = min(_BATCH, frames - begin)
        shape = (count, size, size, 3)
        yield torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def run_memory(options: argparse.Namespace) -> None:
    """The command; raises ValueError for input that cannot be used."""
    quiet()
    device, dtype = placement(options)
    check_ratio(VideoXLConfig.from_pretrained(options.model), options.ratio)
    report = Report(options.output, "memory", [options.model])
    memory = PeakMemory(device)
    model = VideoXLForConditionalGeneration.from_pretrained(options.model, dtype=dtype)
    model = model.to(device).eval()
    # The first pass loads libraries and kernels. Their memory does not belong to a video.
    measure(model, memory, min(options.frames), options.ratio)
    points = []
    for frames in sorted(set(options.frames)):
        bar = Progress(f"{frames} frames", "frames")
        try:
            points.append(measure(model, memory, frames, options.ratio, bar))
        finally:
            bar.close()
    about = {"model": options.model, "machine": describe_machine(device), "dtype": str(dtype)}
    record = {**about, "points": [asdict(point) for point in points]}
    lines = table(points)
    if not report.write(record, lines, lambda figure: _draw(figure, points)):
        print("vxl: no picture: matplotlib is not installed", file=sys.stderr)
    print("\n".join(lines))


def table(points: Sequence[Point]) -> list[str]:
    lines = [
        "| Frames | Visual tokens | Cached | Peak | Planned | Watching | Answering |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in points:
        lines.append(
            f"| {point.frames} | {point.visual_tokens} | {point.cached_tokens} "
            f"| {point.peak_bytes / GIB:.2f} GiB | {point.planned_bytes / GIB:.2f} GiB "
            f"| {point.watch_seconds:.1f} s | {point.answer_seconds:.2f} s |"
        )
    return lines


def _draw(figure: Any, points: Sequence[Point]) -> None:
    """Memory and seconds over frames."""
    figure.set_size_inches(8, 3.2)
    left, right = figure.subplots(1, 2)
    frames = [point.frames for point in points]
    left.plot(frames, [p.peak_bytes / GIB for p in points], "o-", label="measured")
    left.plot(frames, [p.planned_bytes / GIB for p in points], "x--", label="planned")
    left.set_ylabel("peak memory, GiB")
    left.set_ylim(bottom=0)
    left.legend()
    right.plot(frames, [p.watch_seconds for p in points], "o-")
    right.set_ylabel("seconds of watching")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("frames")
