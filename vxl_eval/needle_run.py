"""`vxl eval needle`: reads the needles, runs the grid, writes JSON, Markdown and a heat map."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vxl_cli.common import placement, quiet
from vxl_cli.progress import Progress

from .arguments import check_ratio, fail
from .machine import describe_machine
from .needle import Cell, Needle, accuracy, encode_haystack, run_alone, run_grid
from .needle_samples import open_haystack, write_samples
from .report import Report

__all__ = ["drawn_needles", "read_needles", "run_needle", "table"]

_WORDS = ("tulip", "anchor", "violin", "lantern")
_QUESTION = "One frame of the video shows a white card. What is the secret word on it?"
_COLOURS = ("red", "blue", "green", "purple")


def drawn_needles() -> list[Needle]:
    """Cards that this package draws, each with a word on a coloured ground of its own."""
    from PIL import Image, ImageDraw, ImageFont

    needles = []
    for word, colour in zip(_WORDS, _COLOURS, strict=True):
        card = Image.new("RGB", (336, 336), colour)
        draw = ImageDraw.Draw(card)
        draw.rectangle((24, 96, 312, 240), fill="white")
        font = ImageFont.load_default(36)
        draw.text((168, 132), "secret word:", fill="black", font=font, anchor="mm")
        draw.text((168, 192), word, fill="black", font=ImageFont.load_default(56), anchor="mm")
        question = f"{_QUESTION[:-1]}, the card on a {colour} ground?"
        needles.append(Needle(card, question, word))
    return needles


def read_needles(path: str | Path) -> list[Needle]:
    """Needles of a JSON file, a list of objects with "picture" (a path next to the file),
    "question" and "answer"."""
    path = Path(path)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        fail("--needles", path, f"JSON ({error})")
    keys = {"picture", "question", "answer"}
    if not isinstance(records, list) or not records:
        fail("--needles", path, "a list of needles")
    from vxl_model.inputs.images import open_image

    needles = []
    for record in records:
        texts = list(record.values()) if isinstance(record, dict) and {*record} == keys else [""]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            fail("--needles", record, "an object with picture, question and answer, all texts")
        picture = path.parent / record["picture"]
        if not picture.is_file():
            fail("--needles", picture, "a picture that is there")
        try:
            open_image(picture)
        except (ValueError, OSError) as error:
            fail("--needles", f"{picture} ({error})", "a picture")
        needles.append(Needle(picture, record["question"], record["answer"]))
    return needles


def run_needle(options: argparse.Namespace) -> None:
    """The command; raises ValueError or OSError for input that cannot be used."""
    lengths, depths = options.lengths, options.depths
    needles = read_needles(options.needles) if options.needles else drawn_needles()
    if options.samples is not None:
        videos = (options.haystack, needles, lengths, depths, options.samples, options.fps)
        print(write_samples(*videos))
        return
    from vxl_model import VideoXLConfig, VideoXLForConditionalGeneration

    quiet()
    check_ratio(VideoXLConfig.from_pretrained(options.model), options.ratio)
    if not os.path.isdir(options.haystack):
        open_haystack(options.haystack, max(lengths), options.fps)
    read = [options.model, options.haystack, options.needles]
    read += [needle.picture for needle in needles if isinstance(needle.picture, Path)]
    report = Report(options.output, "needle", read)
    device, dtype = placement(options)
    model = VideoXLForConditionalGeneration.from_pretrained(options.model, dtype=dtype)
    model = model.to(device).eval()
    bar = Progress("encoding", "frames")
    try:
        haystack = encode_haystack(model, options.haystack, max(lengths), options.fps, bar)
    finally:
        bar.close()
    begin, bar = time.perf_counter(), Progress("looking", "videos")
    try:
        cells = run_grid(
            model,
            haystack.features,
            needles,
            lengths,
            depths,
            ratio=options.ratio,
            max_new_tokens=options.max_new_tokens,
            controls=not options.no_controls,
            progress=bar,
        )
    finally:
        bar.close()
    about = {
        "model": options.model,
        "haystack": options.haystack,
        "machine": describe_machine(device),
        "dtype": str(dtype).removeprefix("torch."),
        "ratio": options.ratio,
        "fps": options.fps,
        "lengths": sorted(set(lengths)),
        "depths": list(depths),
        "needles": [{"question": n.question, "answer": n.answer} for n in needles],
        "frames_encoded": len(haystack),
        "encode_seconds": round(haystack.seconds, 3),
        "grid_seconds": round(time.perf_counter() - begin, 3),
    }
    if options.check:
        about |= check_cells(model, cells, needles, options)
    record = {**about, "cells": [cell.to_dict() for cell in cells]}
    lines = table(cells, lengths, depths)
    if not report.write(record, lines, lambda figure: _draw(figure, cells, lengths, depths)):
        print("vxl: no picture: matplotlib is not installed", file=sys.stderr)
    print("\n".join(lines))


def check_cells(
    model: Any, cells: Sequence[Cell], needles: Sequence[Needle], options: argparse.Namespace
) -> dict[str, Any]:
    """Runs every cell but the controls by itself, from the file on: how many answers are the same,
    and how long that took."""
    begin, same = time.perf_counter(), 0
    asked = [cell for cell in cells if not cell.control]
    bar = Progress("checking", "videos")
    try:
        for done, cell in enumerate(asked, 1):
            answer = run_alone(
                model,
                options.haystack,
                max(options.lengths),
                needles[cell.needle],
                cell,
                fps=options.fps,
                ratio=options.ratio,
                max_new_tokens=options.max_new_tokens,
            )
            same += answer == cell.answer
            bar(done, len(asked))
    finally:
        bar.close()
    seconds = round(time.perf_counter() - begin, 3)
    return {"checked": len(asked), "same": same, "alone_seconds": seconds}


def table(cells: Sequence[Cell], lengths: Sequence[int], depths: Sequence[float]) -> list[str]:
    """Accuracy in Markdown, with the controls."""
    found = accuracy(cells)
    controls = sorted({cell.control for cell in cells} - {""})
    lines = [
        "| Frames | " + " | ".join(f"depth {depth:.3g}" for depth in depths) + " | all |"
        + "".join(f" {name} |" for name in controls),
        "|---|" + "---|" * (len(depths) + 1 + len(controls)),
    ]  # fmt: skip
    for length in sorted(set(lengths)):
        row = [found[length, depth] for depth in depths]
        row.append(sum(row) / len(row))
        for name in controls:
            row.append(accuracy(cells, name)[length, None])
        lines.append(f"| {length} | " + " | ".join(f"{100 * x:.1f} %" for x in row) + " |")
    return lines


def _draw(
    figure: Any, cells: Sequence[Cell], lengths: Sequence[int], depths: Sequence[float]
) -> None:
    """The heat map, depth down and length across."""
    found, lengths = accuracy(cells), sorted(set(lengths))
    figure.set_size_inches(1.6 + 0.9 * len(lengths), 1.2 + 0.4 * len(depths))
    axes = figure.add_subplot()
    values = [[100 * found[length, depth] for length in lengths] for depth in depths]
    image: Any = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            ink = "black" if value > 60 else "white"
            axes.text(x, y, f"{value:.0f}", color=ink, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.3g} %" for depth in depths])
    axes.set_xlabel("frames of the video")
    axes.set_ylabel("depth of the needle")
    figure.colorbar(image, label="needles found, %")
