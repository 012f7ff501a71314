"""Times ragged calls: `python benchmarks/ragged.py`.

One layer of Qwen2-7B's attention.

`forks`: one decode step of 32 questions over one video of 20,000 cached tokens, each with 40 tokens
of its own. All read the video's pages together. Beside it the same step one question after the
other.

`step`: what a step of a server may hold, a window of one video, the texts of three requests and a
decode row of twenty others, in one launch. Beside it the sum of its parts, each measured alone.

Every sequence must have the bits of a call of its own. Otherwise the exit status is 1.
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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks.common import machine as this_machine
from benchmarks.common.cases import DTYPES, Geometry
from benchmarks.common.options import add_output_options, check_output_options
from benchmarks.common.timing import Clock, interleave, spread
from vxl_kernels import ChunkLayout, VarlenLayout, vst_attention, vst_attention_varlen
from vxl_kernels.files import atomic_write

CASES = ("forks", "step")
PAGE_SIZE = 128


@dataclass
class Line:
    """One measured call."""

    case: str
    dtype: str
    what: str
    ms: float
    spread: float
    tflops: float
    of_ceiling: float
    same_bits: bool | None = None


class Call:
    """A ragged call on random data, and its sequences alone."""

    def __init__(
        self,
        g: Geometry,
        dtype: str,
        sequences: list[ChunkLayout | int],
        lens: list[int],
        shared: int,
    ) -> None:
        """shared: tokens that all sequences find in the same pages."""
        torch.manual_seed(0)
        self.layout = VarlenLayout(sequences)
        self.lens = torch.tensor(lens, dtype=torch.int32)
        common, width = shared // PAGE_SIZE, -(-max(lens) // PAGE_SIZE) + 1
        own = [-(-n // PAGE_SIZE) + 1 - common for n in lens]
        self.table = torch.zeros(len(lens), width, dtype=torch.int32)
        self.table[:, :common] = torch.arange(common, dtype=torch.int32)
        for b, pages in enumerate(own):
            first = common + sum(own[:b])
            self.table[b, common : common + pages] = torch.arange(first, first + pages)
        kind, pages = DTYPES[dtype], common + sum(own)
        self.k_cache, self.v_cache = (
            torch.randn(pages, PAGE_SIZE, g.kv_heads, g.head_dim).to(kind) for _ in range(2)
        )
        rows = self.layout.rows
        self.q, self.k, self.v = (
            torch.randn(rows, heads, g.head_dim).to(kind)
            for heads in (g.heads, g.kv_heads, g.kv_heads)
        )
        self.flops = sum(self._flops(g, i) for i in range(len(lens)))

    def _flops(self, g: Geometry, i: int) -> int:
        x, cached = self.layout.sequences[i], int(self.lens[i])
        if isinstance(x, ChunkLayout):
            return x.flops(g.heads, g.head_dim, cached)
        return 4 * g.heads * g.head_dim * (x * cached + x * (x + 1) // 2)

    def run(self) -> torch.Tensor:
        cache = self.k_cache, self.v_cache, self.table, self.lens
        return vst_attention_varlen(self.q, self.k, self.v, *cache, self.layout)

    def part(self, of: list[int]) -> Callable[[], torch.Tensor]:
        """Sequences of one layout as a call of `vst_attention`, whose tensors lie ready."""
        q, k, v = (
            torch.stack([self.layout.unpack(x)[i] for i in of]) for x in (self.q, self.k, self.v)
        )
        x = self.layout.sequences[of[0]]
        own = x if isinstance(x, ChunkLayout) else None
        cache = self.k_cache, self.v_cache, self.table[of], self.lens[of]
        return partial(vst_attention, q, k, v, *cache, own)

    def as_alone(self) -> bool:
        """Whether every sequence has the bits of a call of its own."""
        outs = self.layout.unpack(self.run())
        return all(torch.equal(out, self.part([i])()[0]) for i, out in enumerate(outs))


def forks(g: Geometry, dtype: str, small: bool) -> tuple[Call, dict[str, list[Callable]]]:
    questions, video = (4, 512) if small else (32, 20000 // PAGE_SIZE * PAGE_SIZE)
    call = Call(g, dtype, [1] * questions, [video + 40] * questions, video)
    one = [call.part([i]) for i in range(questions)]
    return call, {"together": [call.run], "one after the other": one}


def step(g: Geometry, dtype: str, small: bool) -> tuple[Call, dict[str, list[Callable]]]:
    texts, decodes = ([3, 5], 4) if small else ([17, 110, 300], 20)
    cached = 64 if small else 8100
    window = ChunkLayout(g.window, 8)
    sequences: list[ChunkLayout | int] = [window, *texts, *[1] * decodes]
    lens = [cached, *[cached // 2] * len(texts), *[cached // 3 + 97 * i for i in range(decodes)]]
    call = Call(g, dtype, sequences, lens, 0)
    parts = [call.part([i]) for i in range(1 + len(texts))]
    parts.append(call.part(list(range(1 + len(texts), len(sequences)))))
    return call, {"one launch": [call.run], "its parts alone": parts}


def measure(options: argparse.Namespace, g: Geometry, case: str, dtype: str) -> list[Line]:
    ceilings = this_machine.Ceilings("cpu", [dtype], options.small)
    ceilings.read()
    call, ways = {"forks": forks, "step": step}[case](g, dtype, options.small)
    same = call.as_alone()
    clock = Clock("cpu", ceilings.evict)
    names = [(name, i) for name, calls in ways.items() for i in range(len(calls))]
    times = {
        n: partial(clock.seconds, ways[name][i], cold=True) for n, (name, i) in enumerate(names)
    }
    rates: list[float] = []

    def ceiling() -> float:
        rates.append(ceilings.sample("product", dtype))
        return 0.0

    repeats = 2 if options.small else options.repeats
    found = interleave({**times, -1: ceiling}, 0.0, repeats, repeats)
    lines = []
    for name in ways:
        each = [found[n] for n, (which, _) in enumerate(names) if which == name]
        rounds = [sum(values) for values in zip(*each, strict=True)]
        seconds = statistics.median(rounds)
        rate = call.flops / seconds
        of_ceiling = rate / statistics.median(rates)
        lines.append(
            Line(case, dtype, name, 1e3 * seconds, spread(rounds), rate / 1e12, of_ceiling)
        )
    lines[0].same_bits = same
    return lines


def table(lines: list[Line]) -> str:
    rows = [("case", "dtype", "what", "ms", "spread", "TFLOP/s", "of ceiling", "bits as alone")]
    for x in lines:
        bits = {True: "yes", False: "NO", None: ""}[x.same_bits]
        numbers = f"{x.ms:.2f}", f"±{100 * x.spread:.0f}%", f"{x.tflops:.3f}", f"{x.of_ceiling:.2f}"
        rows.append((x.case, x.dtype, x.what, *numbers, bits))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; default all")
    parser.add_argument(
        "--dtype", action="append", choices=list(DTYPES), help="repeatable; default fp32 and bf16"
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each call (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats: got {options.repeats}, expected at least 1")
    check_output_options(parser, options)
    g = Geometry.small() if options.small else Geometry()
    described = this_machine.describe("cpu")
    for name, text in described:
        print(f"{name:<9} {text}", flush=True)
    lines: list[Line] = []
    with torch.no_grad():
        for case in options.case or CASES:
            for dtype in options.dtype or ["fp32", "bf16"]:
                lines += measure(options, g, case, dtype)
    print(f"\n{table(lines)}")
    print(
        "\nms: median, from a cold last-level cache. of ceiling: useful FLOP/s to those of the "
        "machine's\nbest matrix product of the dtype, measured in turns."
    )
    if options.json:
        records = [{**asdict(x), **dict(described)} for x in lines]
        atomic_write(options.json, json.dumps(records, indent=1).encode(), durable=False)
    return 0 if all(x.same_bits is not False for x in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
