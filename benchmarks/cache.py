"""Times the VST cache against plain memory and files: `python benchmarks/cache.py`.

Append, gather, fork, copy-on-write, save and load, the bookkeeping of a step, and what pages
cost the attention. Every line is a ratio of two things that are measured in turns in this run.
Every result is checked before it is timed; a wrong one ends the run with exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks.common import machine
from benchmarks.common.cases import DTYPES, Geometry
from benchmarks.common.options import add_output_options, check_output_options
from benchmarks.common.report import Ratio, ratio_table
from benchmarks.common.timing import Clock, interleave, spread
from vxl_kernels import CacheBatch, ChunkLayout, VstCache, rope_append, vst_attention
from vxl_kernels.files import atomic_write
from vxl_kernels.testing import inverse_frequencies

Times = dict[str, list[float]]
_SECONDS = 5.0  # for the repeats of one line


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--line", action="append", choices=list(LINES), help="only these lines; repeatable")
    add("--dtype", choices=list(DTYPES), default="bf16", help="of the pages (default %(default)s)")
    add("--device", choices=["cpu", "cuda"], help="default cuda where there is one")
    add("--tokens", type=int, default=20_000, help="kept by the video (default %(default)s)")
    add("--layers", type=int, default=8, help="in the pool (default %(default)s)")
    add("--page-size", type=int, default=128, help="rows of a page (default %(default)s)")
    add("--directory", type=Path, help="for save and load (default: the system's temporary one)")
    add("--small", action="store_true", help="tiny shapes, to see that everything runs")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.small:
        options.tokens, options.layers, options.page_size = 300, 2, 16
    for name in ("tokens", "layers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, expected at least 1")
    check_output_options(parser, options)
    return options


class Bench:
    """The pool, the video in it, and the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.g = Geometry.small() if options.small else Geometry()
        self.dtype, self.device = DTYPES[options.dtype], options.device
        self.tokens = options.tokens
        # Larger than the last-level cache; it is read before a cold call.
        evict = torch.ones((1 << 20 if options.small else 1 << 26), device=self.device)
        self.clock = Clock(self.device, evict)

    def cache(self, layers: int, tokens: int, page_size: int | None = None) -> VstCache:
        """A pool of random numbers that holds `tokens` rows and some spare pages."""
        size = page_size or self.options.page_size
        cache = VstCache(
            layers,
            self.g.kv_heads,
            self.g.head_dim,
            num_pages=-(-tokens // size) + 8,
            page_size=size,
            dtype=self.dtype,
            device=self.device,
        )
        for pages in (cache.k_cache, cache.v_cache):
            pages.copy_(torch.randn(pages.shape[1:], device=self.device).to(self.dtype))
        return cache

    def video(self, cache: VstCache, tokens: int | None = None) -> int:
        seq = cache.new()
        tokens = self.tokens if tokens is None else tokens
        cache.reserve(seq, tokens)
        cache.commit(seq, tokens)
        return seq

    def times(self, cold: bool = False, **calls: Callable[[], object]) -> Times:
        """Seconds of each call, in turns."""
        for call in calls.values():
            call()
        names = list(calls)
        measure: dict[int, Callable[[], float]] = {
            i: partial(self.clock.seconds, calls[n], cold) for i, n in enumerate(names)
        }
        found = interleave(measure, 0.2 if self.options.small else _SECONDS, 3, 200)
        return {names[i]: values for i, values in found.items()}


def _check(right: bool, what: str) -> None:
    if not right:
        raise SystemExit(f"{what}: wrong result, nothing is reported")


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _rate(values: list[float], size: int) -> str:
    return f"{size / _median(values) / 1e9:.1f} GB/s ±{100 * spread(values):.0f}%"


def _bandwidth(
    what: str, times: Times, size: int, against_size: int, meaning: str, bar: float = 0.0
) -> Ratio:
    """`ours` against `plain`, both in bytes moved per second; `bar`: the least ratio."""
    ours, plain = size / _median(times["ours"]), against_size / _median(times["plain"])
    return Ratio(
        what,
        _rate(times["ours"], size),
        _rate(times["plain"], against_size),
        f"{ours / plain:.2f}",
        meaning,
        f">= {bar}" if bar else "",
        ours / plain >= bar,
    )


# -- lines -----------------------------------------------------------------------------------


def append(b: Bench) -> list[Ratio]:
    """Rows of text into pages: rotation of q and k included."""
    rows, g = b.g.window, b.g
    cache = b.cache(1, 2 * rows)
    batch = cache.batch(cache.new(), max_tokens=rows)
    batch.reserve(rows)
    q = torch.randn(1, rows, g.heads, g.head_dim, device=b.device).to(b.dtype)
    k, v = (torch.randn_like(q[:, :, : g.kv_heads]).contiguous() for _ in range(2))
    inv_freq = inverse_frequencies(g.head_dim).to(b.device)
    kept = v.clone()

    def ours() -> None:
        rope_append(q, k, v, *batch.layer(0), None, inv_freq, inplace=True)

    ours()
    batch.commit(rows)
    _check(torch.equal(cache.gather(batch.seqs[0], 0)[1], kept[0]), "append")
    cache.truncate(batch.seqs[0], 0)
    batch.reserve(rows)
    size = (2 * q.nbytes + 2 * k.nbytes) + (v.nbytes + 2 * k.nbytes)  # read and written
    source = torch.ones(size // 2, dtype=torch.uint8, device=b.device)
    target = torch.empty_like(source)
    times = b.times(cold=True, ours=ours, plain=lambda: target.copy_(source))
    return [_bandwidth("append of a window of rows", times, size, size, "of copy", 0.6)]


def gather(b: Bench) -> list[Ratio]:
    cache = b.cache(1, b.tokens)
    seq = b.video(cache)
    k, _ = cache.gather(seq, 0)
    pages = torch.from_numpy(cache._manager.block_table(seq)).long()
    _check(torch.equal(k, cache.k_cache[0].cpu()[pages].flatten(0, 1)[: b.tokens].to(k)), "gather")
    twin = torch.stack([k, k])
    times = b.times(cold=True, ours=lambda: cache.gather(seq, 0), plain=twin.clone)
    size = 2 * twin.nbytes
    return [_bandwidth("gather of a layer", times, size, size, "of a copy to fresh memory")]


def fork(b: Bench) -> list[Ratio]:
    """Forks share pages; the first append of a fork copies one page of each layer."""
    cache = b.cache(b.options.layers, b.tokens)
    seq = b.video(cache, b.tokens - b.tokens % cache.page_size + cache.page_size // 2)
    free = cache.free_pages

    def ours() -> None:
        cache.free(cache.fork(seq))

    def plain() -> None:
        cache.free(cache.new())

    ours()
    _check(cache.free_pages == free, "fork")
    times = b.times(ours=ours, plain=plain)
    microseconds = 1e6 * _median(times["ours"])
    base = 1e6 * _median(times["plain"])
    fork_line = Ratio(
        f"fork and free, {b.tokens} tokens",
        f"{microseconds:.1f} us",
        f"empty one {base:.1f} us",
        "-",
        "",
        "<= 50 us",
        microseconds <= 50,
    )

    def diverge() -> None:
        child = cache.fork(seq)
        cache.reserve(child, 1)
        cache.free(child)

    half = cache.page_bytes // 2
    source = torch.ones(half, dtype=torch.uint8, device=b.device)
    target = torch.empty_like(source)
    times = b.times(cold=True, ours=diverge, plain=lambda: target.copy_(source))
    line = _bandwidth(
        "fork that appends (page copy)", times, 2 * half, 2 * half, "of copying half a page a layer"
    )
    return [fork_line, line]


def files(b: Bench) -> list[Ratio]:
    """Both writes go to a new file, end with an fsync and replace the old file, which is safe in a
    crash. Both reads start from the disk."""
    cache = b.cache(b.options.layers, 2 * b.tokens)
    seq = b.video(cache)
    with tempfile.TemporaryDirectory(dir=b.options.directory) as directory:
        path, plain_path = Path(directory) / "video", Path(directory) / "plain"
        cache.save(path, seq)
        loaded = cache.load(path)
        same = [
            torch.equal(x, y)
            for i in range(cache.num_layers)
            for x, y in zip(cache.gather(seq, i), cache.gather(loaded, i), strict=True)
        ]
        _check(all(same), "save and load")
        cache.free(loaded)
        size = path.stat().st_size
        payload = path.read_bytes()
        room, unfinished = bytearray(size), Path(directory) / "unfinished"

        def plain_write() -> None:
            with open(unfinished, "wb", buffering=0) as file:
                file.write(payload)
                os.fsync(file.fileno())
            os.replace(unfinished, plain_path)

        def load() -> None:
            _forget(path)
            cache.free(cache.load(path))

        def plain_read() -> None:
            _forget(plain_path)
            with open(plain_path, "rb", buffering=0) as file:
                file.readinto(room)

        writes = b.times(ours=lambda: cache.save(path, seq), plain=plain_write)
        reads = b.times(ours=load, plain=plain_read)
    what = f"of {size / 2**20:.0f} MiB"
    return [
        _bandwidth(f"save {what}", writes, size, size, "of write, fsync and rename", 0.7),
        _bandwidth(f"load {what}, not in the page cache", reads, size, size, "of read", 0.7),
    ]


def _forget(path: Path) -> None:
    """Drops a file from the system's page cache."""
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequences(b: Bench) -> list[Ratio]:
    """Ten thousand questions over one video, a step of all of them."""
    count = 50 if b.options.small else 10_000
    cache = VstCache(1, 1, 16, num_pages=16 * count, page_size=16, device=b.device)
    video = b.video(cache, 1000)

    def open_and_close() -> None:
        seqs = [cache.fork(video) for _ in range(count)]
        for seq in seqs:
            cache.free(seq)

    seqs = [cache.fork(video) for _ in range(count)]
    batch = cache.batch(seqs)

    def step() -> None:
        batch.reserve(1)
        batch.commit(1)

    step()
    used = cache.num_pages - cache.free_pages
    _check(used == 1000 // 16 + 1 + count, "sequences")
    for seq in seqs[:3]:
        _check(cache.length(seq) == 1001, "sequences")
    stepping = b.times(step=step)["step"]
    for seq in seqs:
        cache.free(seq)
    opening = b.times(open=open_and_close)["open"]
    return [
        Ratio(
            f"{count} sequences in a pool",
            f"{1e6 * _median(opening) / count:.2f} us",
            f"step of all {1e3 * _median(stepping):.2f} ms",
            "-",
            "to fork and free one of them; reserve and commit of all",
        )
    ]


def step(b: Bench) -> list[Ratio]:
    """Bookkeeping of a decode step against the attention of one layer, and against a plain
    cache that only counts."""
    lines = []
    for count in (1, 4):
        cache = b.cache(1, (b.tokens + 4096) * count)
        batch = cache.batch([b.video(cache) for _ in range(count)], max_tokens=b.tokens + 4096)
        lens = batch.cache_seqlens.clone()

        def managed(batch: CacheBatch = batch) -> None:
            if int(batch._lengths[0]) >= b.tokens + 4000:
                for seq in batch.seqs:
                    batch.cache.truncate(seq, b.tokens)
            batch.reserve(1)
            batch.commit(1)

        def plain(lens: torch.Tensor = lens) -> None:
            lens.add_(1)

        attend = partial(vst_attention, *_rows(b, count, 1), *batch.layer(0))
        times = b.times(ours=managed, plain=plain, attention=attend)
        ours, base, one_layer = (1e6 * _median(times[n]) for n in ("ours", "plain", "attention"))
        lines.append(
            Ratio(
                f"a decode step's bookkeeping, batch {count}",
                f"{ours:.1f} us",
                f"plain cache {base:.1f} us",
                f"{(ours - base) / (28 * one_layer):.5f}",
                "extra, as a part of the attention of 28 layers",
            )
        )
    return lines


def _rows(b: Bench, batch: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = b.g
    q, k, v = (
        torch.randn(batch, rows, h, g.head_dim, device=b.device).to(b.dtype)
        for h in (g.heads, g.kv_heads, g.kv_heads)
    )
    return q, k, v


def _scattered(b: Bench, length: int) -> tuple[VstCache, int]:
    """A sequence whose pages alternate with those of another."""
    cache = b.cache(1, 2 * length)
    seq, other = cache.new(), cache.new()
    while cache.length(seq) < length:
        rows = min(cache.page_size, length - cache.length(seq))
        for each in (seq, other):
            cache.reserve(each, rows)
            cache.commit(each, rows)
    return cache, seq


def _contiguous(b: Bench, paged: VstCache, seq: int) -> tuple[VstCache, int]:
    """The same rows in one page."""
    length = paged.length(seq)
    cache = b.cache(1, length, page_size=1 << (length - 1).bit_length())
    twin = b.video(cache, length)
    page = int(cache.batch(twin).block_table[0, 0])
    cache.k_cache[0, page, :length], cache.v_cache[0, page, :length] = paged.gather(seq, 0)
    return cache, twin


def pages(b: Bench) -> list[Ratio]:
    """vst_attention over scattered pages against one page a sequence."""
    chunk = ChunkLayout(b.g.window, 8)
    lines = []
    for name, layout, length in (("a chunk", chunk, b.g.caches[-2]), ("decode", None, b.tokens)):
        paged, seq = _scattered(b, length)
        plain, twin = _contiguous(b, paged, seq)
        inputs = _rows(b, 1, chunk.rows if layout else 1)
        ours, base = (
            partial(vst_attention, *inputs, *cache.batch(s).layer(0), layout)
            for cache, s in ((paged, seq), (plain, twin))
        )
        _check(torch.equal(ours(), base()), f"pages, {name}")
        times = b.times(cold=layout is None, ours=ours, plain=base)
        milliseconds = {n: 1e3 * _median(t) for n, t in times.items()}
        lines.append(
            Ratio(
                f"vst_attention of {name} at cache {length}",
                f"{milliseconds['ours']:.2f} ms ±{100 * spread(times['ours']):.0f}%",
                f"contiguous {milliseconds['plain']:.2f} ms",
                f"{milliseconds['ours'] / milliseconds['plain']:.3f}",
                f"time over pages of {paged.page_size}",
                "<= 1.03",
                milliseconds["ours"] <= 1.03 * milliseconds["plain"],
            )
        )
    return lines


LINES: dict[str, Callable[[Bench], list[Ratio]]] = {
    "append": append,
    "gather": gather,
    "fork": fork,
    "files": files,
    "sequences": sequences,
    "step": step,
    "pages": pages,
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    bench = Bench(options)
    g = bench.g
    shape = (
        f"{g.kv_heads} KV heads of {g.head_dim}, {options.dtype}, pages of {options.page_size}, "
        f"{options.tokens} tokens, {options.layers} layers"
    )
    for name, text in [*machine.describe(options.device), ("shape", shape)]:
        print(f"{name:<9} {text}", flush=True)
    found: list[Ratio] = []
    with torch.no_grad():
        for name in options.line or LINES:
            print(f"... {name}", file=sys.stderr, flush=True)
            found += LINES[name](bench)
    print(f"\n{ratio_table(found, 'cache')}")
    missed = [r.what for r in found if not r.met]
    if missed:
        print(f"\n{len(missed)} bars missed in this run: {'; '.join(missed)}")
    if options.json:
        atomic_write(
            options.json, json.dumps([asdict(r) for r in found], indent=1) + "\n", durable=False
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
