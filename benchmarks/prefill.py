"""Times how a video becomes a memory: `python benchmarks/prefill.py`.

`encode`: windows through a few layers of Qwen2-7B's geometry, `vxl_model` against what the
published code does (same weights; cached K and logits are compared in the same run).
`questions`: many questions over one video against encoding it again for each, and in one call.
`pipeline`: what comes before the language model, a frame at a time.
`memory`: peak memory of long streams against a short one.

Random weights: the work does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks.common import machine
from benchmarks.common.cases import DTYPES
from benchmarks.common.options import add_output_options, check_output_options
from benchmarks.model.cases import encode, memory, peak_of, pipeline, questions
from benchmarks.model.report import (
    encode_text,
    memory_text,
    pipeline_text,
    questions_text,
    save_plot,
)
from benchmarks.model.token import FULL, SMALL
from vxl_kernels.files import atomic_write

CASES = {"encode": encode, "questions": questions, "pipeline": pipeline, "memory": memory}
TEXTS = {
    "encode": encode_text,
    "questions": questions_text,
    "pipeline": pipeline_text,
    "memory": memory_text,
}
# The MLP is cut to an eighth of Qwen2-7B's and the vocabulary to 4096, so that a few layers fit
# and attention weighs more than it does in full: an honest comparison is projected below.
GEOMETRY = {
    "hidden": 3584,
    "heads": 28,
    "kv_heads": 4,
    "intermediate": 2368,
    "vocab": 4096,
    "window": 1440,
}
# Long streams through two layers would take an hour at full width.
NARROW = {**GEOMETRY, "hidden": 448, "heads": 7, "kv_heads": 1, "intermediate": 2432}
FULL_LAYERS = 28


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", action="append", choices=list(CASES), help="repeatable; default all")
    add("--layers", type=int, help="default 4, for questions 2; with --full 28")
    add("--full", action="store_true", help="Qwen2-7B's MLP, vocabulary and layers (a GPU's size)")
    add("--chunks", type=int, default=10, help="windows of encode")
    add("--chunks-per-step", type=int, default=None, help="default by memory")
    add("--alpha", type=int, default=8, help="raw tokens per VST")
    add("--frames", type=int, default=128, help="of the video of questions")
    add("--questions", type=int, default=50)
    add("--new-tokens", type=int, default=8, help="of an answer")
    add("--vision-frames", type=int, default=4, help="frames through the vision tower")
    add("--memory-frames", default="128,2048", help="lengths of streams, comma-separated")
    add("--device", choices=["cpu", "cuda"], help="default cuda where there is one")
    add("--dtype", choices=list(DTYPES), help="default fp32 on a CPU, bf16 on a GPU")
    add("--threads", type=int, help="CPU threads")
    add("--small", action="store_true", help="tiny shapes, to see that everything runs")
    add_output_options(parser, "the case encode")
    add("--peak-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in (
        "layers",
        "chunks",
        "chunks_per_step",
        "alpha",
        "frames",
        "questions",
        "new_tokens",
        "threads",
        "vision_frames",
    ):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
    try:
        options.memory_frames = [int(n) for n in options.memory_frames.split(",")]
    except ValueError:
        parser.error(f"--memory-frames: got {options.memory_frames!r}, expected integers")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = DTYPES[options.dtype or ("bf16" if options.device == "cuda" else "fp32")]
    options.geometry = SMALL if options.small else FULL if options.full else GEOMETRY
    if options.full and not options.layers:
        options.layers = FULL_LAYERS
    options.case = options.case or list(CASES)
    drawn = "encode" in options.case
    check_output_options(
        parser, options, "" if drawn else "draws the case encode, which is not timed here"
    )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak_of is not None:
        options.geometry = SMALL if options.small else NARROW
        print(json.dumps(peak_of(options, options.peak_of)))
        return 0
    g = options.geometry
    for name, text in [
        *machine.describe(options.device),
        (
            "shape",
            f"{g['heads']} query / {g['kv_heads']} KV heads of {g['hidden'] // g['heads']}, "
            f"hidden {g['hidden']}, MLP {g['intermediate']}, vocabulary {g['vocab']}; "
            f"window {g['window']}, alpha {options.alpha}; {options.dtype}",
        ),
    ]:
        print(f"{name:<9} {text}", flush=True)
    results: dict[str, Any] = {}
    layers = options.layers
    with torch.no_grad():
        for case in options.case:
            options.layers = layers or (2 if case == "questions" else 4)
            results[case] = CASES[case](options)
            print(f"\n{TEXTS[case](results[case], options)}", flush=True)
    if options.json:
        atomic_write(options.json, json.dumps(results, indent=1) + "\n", durable=False)
    if options.plot:
        save_plot(options.plot, results["encode"])
    if not results.get("encode", {}).get("match", True):
        print("\nencode: the two differ (✗)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
