"""Times training steps of samples of mixed shapes: `python benchmarks/packing.py`.

Forward and backward of eight samples: `packed` into one pass, `alone` in a pass each, `padded` to
the longest prefix, video and text, with the ratios of the longest video. Tokens a second count the
samples' own tokens, not those of padding. Memory of the optimizer and its step are left out.

Before anything is timed, the gradients of `packed` and `alone` are compared, each parameter's as a
vector. Both add up the same numbers in another order, so they may differ by the rounding of such a
sum, 6e-8 times the root of the rows. If float32 gradients differ by more, the exit status is 1.

Random weights in the geometry of Qwen2, with few layers: the work does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import machine
from benchmarks.common.cases import DTYPES
from benchmarks.common.options import add_output_options, check_output_options
from benchmarks.common.timing import Clock, interleave, spread
from vxl_kernels.files import atomic_write
from vxl_model import WindowRatios, apply_vst_to_qwen2
from vxl_model.streaming.ratios import RatioPlan

WAYS = ("packed", "alone", "padded")
WINDOW, FRAME = 1440, 144
RATIOS = [2, 4, 8, 12, 16]
Ratios = Sequence[WindowRatios | None]
EPSILON = 2.0**-24  # of float32
GEOMETRIES: dict[str, dict[str, int]] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "small": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


@dataclass(frozen=True)
class Shape:
    """A sample: tokens of the prefix, frames or tiles (0 for text alone), tokens of the text."""

    prefix: int
    frames: int
    text: int

    @property
    def tokens(self) -> int:
        return self.prefix + self.frames * FRAME + self.text


# Frames or tiles, and tokens of the text, of each sample. `short`: text alone and single tiles.
# `pictures`: pictures in tiles. `mixed`: text alone, pictures, several pictures and a short video.
# `videos`: up to 48 frames, five windows. The prefix has 14 tokens.
CASES = {
    name: [Shape(14, frames, text) for frames, text in sizes]
    for name, sizes in {
        "short": [(0, 60), (1, 20), (0, 110), (1, 45), (0, 35), (1, 30), (0, 80), (1, 64)],
        "pictures": [(1, 18), (4, 40), (2, 75), (6, 22), (3, 31), (4, 64), (1, 52), (5, 90)],
        "mixed": [(0, 180), (1, 40), (4, 75), (6, 22), (0, 96), (2, 64), (16, 120), (8, 30)],
        "videos": [(6, 30), (12, 60), (24, 25), (8, 44), (48, 90), (10, 21), (16, 75), (32, 50)],
    }.items()
}


@dataclass
class Line:
    """Tokens a second of one way.

    Attributes:
        rows: rows that go through the layers, VSTs included.
        spread: half the range of the quartiles, as a part of the median.
        gain: of `packed` over this way.
    """

    case: str
    geometry: str
    way: str
    rows: int
    tokens_per_s: float
    spread: float
    repeats: int
    gain: float


class Batch:
    """Samples of some shapes with random tokens, features and ratios."""

    def __init__(self, model: Any, shapes: Sequence[Shape], ratios: Ratios) -> None:
        generator = torch.Generator().manual_seed(1)
        vocabulary, hidden = model.config.vocab_size, model.config.hidden_size
        columns = max(s.prefix + 1 + s.text for s in shapes)
        self.ids = torch.zeros(len(shapes), columns, dtype=torch.int64)
        self.mask, self.labels = torch.zeros_like(self.ids), torch.full_like(self.ids, -100)
        self.features: list[torch.Tensor | None] = []
        self.ratios = list(ratios)
        for i, s in enumerate(shapes):
            length = s.prefix + s.text + (s.frames > 0)
            ids = torch.randint(1, vocabulary, (length,), generator=generator)
            self.labels[i, length - s.text : length] = ids[length - s.text :]
            if s.frames:
                ids[s.prefix] = -200
            self.ids[i, :length], self.mask[i, :length] = ids, 1
            shape = s.frames * FRAME, hidden
            video = torch.randn(shape, generator=generator).to(model.dtype) if s.frames else None
            self.features.append(video)

    def step(self, model: Any, packing: bool) -> torch.Tensor:
        """Loss; gradients are in the parameters."""
        model.settings.packing = packing
        model.zero_grad()
        loss = model(
            self.ids,
            visual_features=self.features,
            labels=self.labels,
            attention_mask=self.mask,
            ratio=self.ratios,
            loss_only=True,
        ).loss
        loss.backward()
        return loss.detach()


def drawn_ratios(shapes: Sequence[Shape]) -> Ratios:
    """A ratio for each window of each sample, drawn as a training run draws them."""
    plans = [RatioPlan(RATIOS, [42, 0, i]) for i in range(len(shapes))]
    return [
        plan.windows(s.frames * FRAME, WINDOW) if s.frames else None
        for plan, s in zip(plans, shapes, strict=True)
    ]


def rows(shapes: Sequence[Shape], ratios: Ratios) -> int:
    count = 0
    for s, own in zip(shapes, ratios, strict=True):
        visual = s.frames * FRAME
        sizes = [min(WINDOW, visual - start) for start in range(0, visual, WINDOW)]
        each = own.ratios if own is not None else ()
        count += s.tokens + sum(n // r for n, r in zip(sizes, each, strict=True))
    return count


def make_model(geometry: str, layers: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        **GEOMETRIES[geometry], vocab_size=1024, num_hidden_layers=layers, eos_token_id=0
    )
    plain = Qwen2ForCausalLM(config)
    return apply_vst_to_qwen2(plain, beacon_window=WINDOW, beacon_ratio=RATIOS).to(dtype).train()


def gradient_error(model: Any, batch: Batch) -> float:
    """The largest relative difference between a gradient of `packed` and that of `alone`."""
    batch.step(model, packing=False)
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    batch.step(model, packing=True)
    errors = [0.0]
    for name, p in model.named_parameters():
        scale = float(wanted[name].norm())
        if scale:
            errors.append(float((p.grad - wanted[name]).norm()) / scale)
    return max(errors)


def measure(options: argparse.Namespace, case: str, geometry: str) -> tuple[list[Line], float]:
    model = make_model(geometry, options.layers, DTYPES[options.dtype])
    shapes = CASES[case]
    ratios = drawn_ratios(shapes)
    batch = Batch(model, shapes, ratios)
    error = gradient_error(model, batch)
    longest = Shape(
        *(max(getattr(s, name) for s in shapes) for name in ("prefix", "frames", "text"))
    )
    most = ratios[max(range(len(shapes)), key=lambda i: shapes[i].frames)]
    padded = [longest] * len(shapes)
    same = [most] * len(shapes)
    steps: dict[int, Callable[[], Any]] = {
        0: partial(batch.step, model, True),
        1: partial(batch.step, model, False),
        2: partial(Batch(model, padded, same).step, model, True),
    }
    clock = Clock("cpu", torch.zeros(1))
    timed: dict[int, Callable[[], float]] = {
        i: partial(clock.seconds, step) for i, step in steps.items()
    }
    times = interleave(timed, options.seconds, least=2, most=50)
    tokens = sum(s.tokens for s in shapes)
    of_rows = {0: rows(shapes, ratios), 1: rows(shapes, ratios), 2: rows(padded, same)}
    packed = statistics.median(times[0])
    return [
        Line(
            case,
            geometry,
            way,
            of_rows[i],
            tokens / statistics.median(times[i]),
            spread(times[i]),
            len(times[i]),
            statistics.median(times[i]) / packed,
        )
        for i, way in enumerate(WAYS)
    ], error


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", action="append", choices=list(CASES), help="repeatable; default all")
    add("--geometry", action="append", choices=["0.5b", "7b"], help="repeatable; default 0.5b")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="default %(default)s")
    add("--layers", type=int, default=1, help="default %(default)s")
    add("--seconds", type=float, default=20.0, help="of one case (default %(default)s)")
    add("--threads", type=int, help="CPU threads")
    add("--small", action="store_true", help="a tiny geometry, to see that everything runs")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    for name in ("layers", "threads", "seconds"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name}: got {value}, expected more than 0")
    check_output_options(parser, options)
    options.case = options.case or list(CASES)
    options.geometry = ["small"] if options.small else options.geometry or ["0.5b"]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    for name, value in machine.describe("cpu"):
        print(f"{name:12} {value}")
    lines: list[Line] = []
    wrong = False
    for geometry in options.geometry:
        for case in options.case:
            found, error = measure(options, case, geometry)
            lines += found
            ok = options.dtype != "fp32" or error <= EPSILON * found[0].rows ** 0.5
            wrong |= not ok
            print(f"{case}, {geometry}: gradients differ by {error:.1e}{'' if ok else ': WRONG'}")
            for line in found:
                print(
                    f"  {line.way:7} {line.rows:6} rows {line.tokens_per_s:8.0f} tokens/s "
                    f"(spread {line.spread:.1%}, {line.repeats} repeats), packed is "
                    f"{line.gain:.2f} x"
                )
    if options.json:
        records = [asdict(line) for line in lines]
        atomic_write(options.json, json.dumps(records, indent=1).encode(), durable=False)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
