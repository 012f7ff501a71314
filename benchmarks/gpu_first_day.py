"""The numbers that a new GPU should give, each with the range that was expected of an H100 before
one had run it: `python benchmarks/gpu_first_day.py`.

It takes about four minutes, the kernels compiled beforehand (`codegen/ahead.py`). Each measurement
is checked against float64 before it is timed. A number outside its range says where to look, which
`docs/cuda.md` explains. The ranges are arithmetic: bytes and operations over the rates of an H100,
798 TFLOP/s of bfloat16 matrix product and 3.0 TB/s of memory.

    environment   what Triton needs at its first launch, and what is installed
    chunk         attention of a window over 0 to 20,250 cached tokens; of four windows
    decode        one row, batches of 1 and 4; the merge of its parts is in it
    rows          17 to 512 rows over 20,250 tokens: no step where tiles or splits change
    eviction      decode with the cache emptied by writing: what dirty lines cost
    linear        k's projection: two products of the library against the one launch
    append        rope_append of a window
    backward      gradients of four windows
    offload       a sequence to the host and back while the GPU is busy: the bytes and the seconds
    token         a decoding step of a layer stack, eager and as a captured graph
    window        a window through a layer stack
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks.common import machine as this_machine
from benchmarks.common.backward import backward_answer
from benchmarks.common.cases import DTYPES, Case, Geometry, Inputs
from benchmarks.common.oracle import attention_answer, rope_answer
from benchmarks.common.report import H100_BYTES, H100_FLOPS, milliseconds, plain_table
from benchmarks.common.timing import Clock
from benchmarks.peers.registry import BACKWARD, PROVIDERS, ROPE_APPEND
from vxl_kernels import ChunkLayout, VstCache, _ext, vst_linear
from vxl_kernels.files import atomic_write


@dataclass
class Number:
    """One line. `low` and `high`: the range expected of an H100, in milliseconds."""

    step: str
    what: str
    low: float | None = None
    high: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    ms: float | None = None
    host_ms: float | None = None
    ok: bool | None = None
    note: str = ""
    judged: bool = True  # on an H100, at full size

    @property
    def verdict(self) -> str:
        if self.ok is False:
            return "FAILED"
        if not self.judged or self.ms is None or self.low is None or self.high is None:
            return "-"
        if self.ms > self.high:
            return f"slow, {self.ms / self.high:.1f}x the range"
        return "in range" if self.ms >= self.low else f"fast, {self.ms / self.low:.2f}x"

    def record(self) -> dict[str, Any]:
        found = asdict(self) | {"verdict": self.verdict}
        if self.ms:
            found["of_798_tflops"] = self.flops / self.ms * 1e3 / H100_FLOPS
            found["of_3_tb_per_s"] = self.bytes / self.ms * 1e3 / H100_BYTES
        return found


# Largest difference over the largest value: of one product, whose result is rounded to `dtype`, and
# of a decoding step, where each layer rounds some ten times (bf16, 4 narrow layers on a CPU: 6e-3).
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
STEP_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    """NaN where x has one, which is not below any tolerance."""
    return float((x - truth).abs().max() / truth.abs().max())


class Day:
    """The measurements. `numbers` holds those so far, and `save` is called after each."""

    def __init__(self, options: argparse.Namespace, save: Callable[[list[Number]], None]) -> None:
        self.options, self._save = options, save
        self.numbers: list[Number] = []
        geometry = Geometry.small() if options.small else Geometry()
        self.geometry = replace(geometry, page_size=16 if options.small else 128)
        self.longest = self.geometry.caches[-1]
        size = 1 << 20 if options.small else 256 << 20
        self.evict = torch.ones(size // 4, device="cuda")
        self.clock = Clock("cuda", self.evict)
        self.judged = not options.small and "H100" in torch.cuda.get_device_name()

    def add(self, number: Number) -> None:
        number.judged = self.judged
        self.numbers.append(number)
        print(line(number), flush=True)
        self._save(self.numbers)

    def case(self, name: str, cached: int, rows: int = 0, chunks: int = 0, batch: int = 1) -> Case:
        layout = ChunkLayout(self.geometry.window, 8, chunks) if chunks else None
        g, dtype = self.geometry, self.options.dtype
        return Case(name, g, cached, batch, dtype, "cuda", layout=layout, plain_rows=rows)

    def median(self, call: Callable[[], object], number: Number) -> None:
        """Fills in the times of a call."""
        repeats = 1 if self.options.small else 15
        times, host = [], []
        for _ in range(repeats):
            times.append(1e3 * self.clock.seconds(call))
            host.append(1e3 * (self.clock.host_seconds or 0.0))
        number.ms, number.host_ms = statistics.median(times), statistics.median(host)
        if not self.clock.queued_ahead:
            number.note = "not queued ahead: contains the host's time"

    def attention(self, number: Number, case: Case) -> None:
        number.flops, number.bytes = case.flops, case.kv_bytes
        if case.kind != "decode" and case.rows > 512:
            number.bytes = 0.0  # bound by the products
        x = Inputs(case)
        run = PROVIDERS["vxl"].prepare(x)
        number.ok = attention_answer(x, with_rope=False).judge(run.rows(run.call())).ok
        if number.ok:
            self.median(run.call, number)

    # -- the steps ---------------------------------------------------------------------

    def chunk(self) -> None:
        ranges = {0: (0.06, 0.09), 1620: (0.12, 0.16), 8100: (0.43, 0.55), 20250: (1.0, 1.3)}
        caches = self.geometry.caches[: 1 if self.options.small else None]
        for cached in caches:
            number = Number("chunk", f"1 window, {cached} cached", *ranges.get(cached, (None,) * 2))
            self.attention(number, self.case("chunk", cached, chunks=1))
            self.add(number)
        cached = caches[min(2, len(caches) - 1)]
        number = Number("chunk", f"4 windows, {cached} cached", 1.7, 2.1)
        self.attention(number, self.case("chunk_c4", cached, chunks=2 if self.options.small else 4))
        self.add(number)

    def decode(self) -> None:
        expected = ((1, 0.019, 0.026), (4, 0.062, 0.080))
        for batch, low, high in expected[: 1 if self.options.small else None]:
            number = Number("decode", f"1 row, batch {batch}, {self.longest} cached", low, high)
            self.attention(number, self.case("decode", self.longest, rows=1, batch=batch))
            self.add(number)

    def rows(self) -> None:
        """Before keys were split for them, 74 rows took 300 us."""
        ranges = {17: (0.03, 0.05), 64: (0.045, 0.07), 73: (0.045, 0.075), 74: (0.045, 0.08),
                  128: (0.06, 0.11), 256: (0.1, 0.19), 512: (0.18, 0.34)}  # fmt: skip
        for count in (3, 9) if self.options.small else ranges:
            number = Number(
                "rows", f"{count} rows, {self.longest} cached", *ranges.get(count, (None,) * 2)
            )
            self.attention(number, self.case("tail", self.longest, rows=count))
            self.add(number)

    def eviction(self) -> None:
        number = Number("eviction", "1 row, cache emptied by writing", 0.019, 0.038)
        writing = SimpleNamespace(sum=self.evict.zero_)  # where the clock reads
        clock, self.clock = self.clock, Clock("cuda", writing)  # type: ignore[arg-type]
        self.attention(number, self.case("decode", self.longest, rows=1))
        self.clock = clock
        self.add(number)

    def linear(self) -> None:
        hidden = 64 if self.options.small else 3584
        layout, dtype = ChunkLayout(self.geometry.window, 8), DTYPES[self.options.dtype]
        x = torch.randn(1, layout.rows, hidden, device="cuda", dtype=dtype) / hidden**0.5
        for width, ranges in ((hidden // 7, ((0.025, 0.03), (0.025, 0.05))),
                              (hidden, ((0.055, 0.07), (0.055, 0.09)))):  # fmt: skip
            weights = torch.randn(2, width, hidden, device="cuda", dtype=dtype)
            parts = zip(layout.split_rows(x.double()), weights.double(), strict=True)
            want = layout.join_rows(*(rows @ weight.T for rows, weight in parts))
            for backend, (low, high) in zip((None, "triton"), ranges, strict=True):
                name = "one launch" if backend else "two products"
                number = Number("linear", f"{hidden} to {width}, {name}", low, high)
                number.flops = 2.0 * layout.rows * hidden * width

                def call(w: torch.Tensor = weights, backend: str | None = backend) -> torch.Tensor:
                    return vst_linear(x, w[0], None, w[1], None, layout, backend=backend)

                try:
                    out = call().double()
                except ValueError as error:  # the backend cannot run this here
                    number.note = str(error).splitlines()[0][:80]
                else:
                    number.ok = relative(out, want) <= TOLERANCE[dtype]
                    if number.ok:
                        self.median(call, number)
                self.add(number)

    def append(self) -> None:
        number = Number("append", "rope_append, 1 window", 0.010, 0.016)
        case = self.case("rope_append", self.geometry.caches[1], chunks=1)
        x = Inputs(case)
        run = ROPE_APPEND.prepare(x)
        number.ok = rope_answer(x).judge(run.rows(run.call())).ok
        number.bytes = case.rope_bytes
        if number.ok:
            self.median(run.call, number)
        self.add(number)

    def backward(self) -> None:
        number = Number("backward", "gradients of 4 windows", 0.8, 1.3)
        case = self.case("backward", 0, chunks=4)
        number.flops = case.flops
        x = Inputs(case)
        run = BACKWARD["vxl"].prepare(x)
        number.ok = backward_answer(x).judge(run.rows(run.call())).ok
        if number.ok:
            self.median(run.call, number)
        self.add(number)

    def offload(self) -> None:
        g, layers = self.geometry, 2 if self.options.small else 28
        number = Number("offload", f"{layers} layers of {self.longest} tokens, and back", 45, 90)
        if _ext.extension is None:
            number.note = "the page cache needs the extension, which is not built here"
            self.add(number)
            return
        pages = 2 + self.longest // g.page_size
        options: dict[str, Any] = {"dtype": DTYPES[self.options.dtype], "device": "cuda"}
        cache = VstCache(
            layers, g.kv_heads, g.head_dim, num_pages=pages, page_size=g.page_size, **options
        )
        for pool in (cache.k_cache, cache.v_cache):
            pool.normal_()
        seq = cache.new()
        cache.reserve(seq, self.longest)
        cache.commit(seq, self.longest)
        number.bytes = 2.0 * layers * self.longest * cache.page_bytes / g.page_size / layers
        first = [x.clone() for x in self.edges(cache, seq)]
        seconds = []
        for _ in range(3):  # the first one page-locks memory
            torch.cuda.synchronize()
            began = time.perf_counter()
            torch.cuda._sleep(1 << 24)
            seq = cache.restore(cache.offload(seq))
            torch.cuda.synchronize()
            seconds.append(1e3 * (time.perf_counter() - began))
        number.ms = min(seconds)
        number.note = f"the first time {seconds[0]:.0f} ms"
        again = self.edges(cache, seq)
        number.ok = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        self.add(number)

    @staticmethod
    def edges(cache: VstCache, seq: int) -> list[torch.Tensor]:
        """K and V of the first layer, which is copied first, and of the last."""
        return [x for layer in (0, cache.num_layers - 1) for x in cache.gather(seq, layer)]

    def token(self) -> None:
        """The weights of a layer of Qwen2-7B, 466 MB, take 0.155 ms to be read. The eager step's
        logits are those of the reference up to rounding, and the graph's have their bits."""
        from benchmarks.model.token import token_calls

        layers, dtype = 2 if self.options.small else 4, DTYPES[self.options.dtype]
        calls, read = token_calls(layers, self.options.small, dtype)
        reference = calls.pop("reference")().double()
        floor = 1e3 * read / H100_BYTES
        # The host needs 0.3 to 0.4 ms a layer. A graph leaves what the weights take.
        ranges = {"eager": (floor, floor + 0.4 * layers), "graph": (floor, 1.35 * floor)}
        want = None
        for name, call in calls.items():
            number = Number("token", f"{layers} layers and vocabulary, {name}", *ranges[name])
            number.bytes = read
            try:
                out = call()
                torch.cuda.synchronize()
                if want is None:
                    want = out
                    number.ok = relative(out.double(), reference) <= STEP_TOLERANCE[dtype]
                else:
                    number.ok = torch.equal(out, want)
                times = []
                for _ in range(20 if number.ok else 0):
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    call()
                    torch.cuda.synchronize()
                    times.append(1e3 * (time.perf_counter() - began))
                number.ms = statistics.median(times) if times else None
            except Exception as error:  # the other one still tells something
                number.ok, number.note = False, _first_line(error)
            self.add(number)

    def window(self) -> None:
        """Products of 700 to 798 TFLOP/s, and attention. `prefill.py --full` has all layers."""
        from benchmarks.model.token import window_calls

        layers, dtype = 2 if self.options.small else 4, DTYPES[self.options.dtype]
        calls, flops = window_calls(layers, self.options.small, dtype)
        reference = calls["reference"]().double()
        number = Number("window", f"{layers} layers, 1 window", 1.22 * layers, 1.48 * layers)
        number.flops = flops
        out = calls["window"]()
        number.ok = relative(out.double(), reference) <= STEP_TOLERANCE[dtype]
        times = []
        for _ in range(10 if number.ok else 0):
            torch.cuda.synchronize()
            began = time.perf_counter()
            calls["window"]()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
        number.ms = statistics.median(times) if times else None
        self.add(number)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def environment(day: Day) -> None:
    """Triton compiles a launcher in C at the first launch."""
    include = Path(sysconfig.get_paths()["include"]) / "Python.h"
    libraries = ""
    if shutil.which("ldconfig"):
        done = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False)
        libraries = done.stdout
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    cuda = (
        "libcuda.so.1" in libraries
        or bool(os.environ.get("TRITON_LIBCUDA_PATH"))
        or any((Path(x) / "libcuda.so.1").exists() for x in folders if x)
    )
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    needs = {
        "a C compiler": (bool(compiler), "set CC"),
        "Python.h": (include.exists(), "install python3-dev"),
        "libcuda.so.1": (cuda, "set TRITON_LIBCUDA_PATH to its folder"),
    }
    for what, (found, remedy) in needs.items():
        day.add(Number("environment", what, ok=found, note="" if found else f"missing: {remedy}"))
    built = _ext.extension is not None
    note = "" if built else "python setup.py build_ext --inplace"
    day.add(Number("environment", "the extension", note=note, ok=built))
    if built and not _ext.has_cuda:
        day.numbers[-1].note = "without CUDA kernels: Triton rotates"


STEPS: dict[str, Callable[[Day], None]] = {
    "environment": environment,
    "chunk": Day.chunk,
    "decode": Day.decode,
    "rows": Day.rows,
    "linear": Day.linear,
    "append": Day.append,
    "offload": Day.offload,
    "token": Day.token,
    "window": Day.window,
    "eviction": Day.eviction,
    "backward": Day.backward,
}
SMOKE = ("environment", "decode", "append", "offload")


def _cells(n: Number) -> list[str]:
    found = n.record()
    expected = "-" if n.low is None else f"{milliseconds(n.low)} to {milliseconds(n.high)}"

    def share(name: str) -> str:
        return f"{100 * found[name]:.0f}" if found.get(name) else "-"

    flops = f"{n.flops / n.ms / 1e9:.0f}" if n.ms and n.flops else "-"
    return [
        n.step, n.what, milliseconds(n.ms), expected, n.verdict, flops, share("of_798_tflops"),
        share("of_3_tb_per_s"), milliseconds(n.host_ms), n.note,
    ]  # fmt: skip


def line(n: Number) -> str:
    return "  ".join(cell for cell in _cells(n) if cell not in ("", "-"))


def table(numbers: Sequence[Number]) -> str:
    header = ("step", "what", "ms", "an H100 should take", "verdict", "TFLOP/s",
              "% of 798", "% of 3.0 TB/s", "host ms", "note")  # fmt: skip
    return plain_table(header, [_cells(n) for n in numbers], left=(0, 1, 4, 9))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", action="append", choices=list(STEPS), help="repeatable")
    parser.add_argument("--smoke", action="store_true", help=f"the steps {', '.join(SMOKE)}")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that all runs")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after each number")
    options = parser.parse_args(arguments)
    options.step = options.step or list(SMOKE if options.smoke else STEPS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("this machine has no GPU that torch can use; nothing was measured", file=sys.stderr)
        return 1
    machine = dict(this_machine.describe("cuda"))
    for name, text in machine.items():
        print(f"{name:<9} {text}", flush=True)

    def save(numbers: list[Number]) -> None:
        if options.json:
            records = [n.record() | {"gpu": machine["gpu"]} for n in numbers]
            atomic_write(options.json, json.dumps(records, indent=1) + "\n", durable=False)

    day = Day(options, save)
    with torch.no_grad():
        for name in options.step:
            try:
                STEPS[name](day)
            except Exception as error:  # the other steps still tell something
                day.add(Number(name, "did not end", ok=False, note=_first_line(error)))
    print(f"\n{table(day.numbers)}")
    if not day.judged:
        print("\nThe ranges are those of an H100 at full size. Here they say nothing.")
    return int(any(n.ok is False for n in day.numbers))


if __name__ == "__main__":
    sys.exit(main())
