"""The groups: which competitors are timed together, and in which cases."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch

from benchmarks.common.cases import Case, Geometry
from benchmarks.common.oracle import ROWS_CHECKED
from benchmarks.peers.registry import BACKWARD, PROVIDERS, ROPE_APPEND, Provider
from vxl_kernels import ChunkLayout

__all__ = [
    "MAIN_CASES",
    "MORE_CASES",
    "Competitor",
    "Group",
    "backward_chunks",
    "geometry",
    "make_groups",
]

MAIN_CASES = ("chunk", "chunk_c4", "tail", "tail_128", "tail_256", "decode", "backward")
MORE_CASES = ("rope_append", "threads", "chunks", "pages", "bf16")
GPU_PAGE_SIZE = 128
MANY_CHUNKS, MANY_CHUNKS_CACHE = 4, 2  # of chunk_c4: the third cache length
SPEED_GUESS = 150e9  # FLOP/s of a slow provider on two cores; it only divides the budget


@dataclass(frozen=True)
class Competitor:
    """A provider as one line of a group. `threads=None` keeps the number of threads."""

    label: str
    provider: Provider
    case: Case
    threads: int | None = None


@dataclass(frozen=True)
class Group:
    """Competitors that are repeated in turns."""

    name: str
    competitors: list[Competitor]

    @property
    def weight(self) -> float:
        """Guessed seconds: the float64 answer, and for each competitor a checked call and two or
        three repeats."""
        cases = [e.case for e in self.competitors]
        answer = max(c.flops * min(1.0, ROWS_CHECKED / c.rows) for c in cases) / 4e9
        calls = sum(3 * (c.flops / SPEED_GUESS + c.kv_bytes / 1e9) for c in cases)
        return 1.0 + answer + calls


def backward_chunks(options: argparse.Namespace) -> int:
    """Chunks of a sequence in the case backward: training has all in one call."""
    return options.chunks if options.chunks > 1 else 4


def geometry(options: argparse.Namespace) -> Geometry:
    g = Geometry.small() if options.small else Geometry()
    return replace(g, page_size=GPU_PAGE_SIZE) if options.device == "cuda" else g


def main_cases(options: argparse.Namespace, g: Geometry, dtype: str) -> list[Case]:
    layout = ChunkLayout(g.window, options.alpha, options.chunks, options.order)
    common = (dtype, options.device)
    longest = g.caches[-1]
    caches = g.caches if options.device == "cuda" else g.cpu_caches
    if options.cache == "all":
        caches = g.caches
    elif options.cache:
        caches = tuple(int(n) for n in options.cache.split(","))
    cases = [Case("chunk", g, cache, 1, *common, layout=layout) for cache in caches]
    if options.device == "cuda" or "chunk_c4" in (options.case or ()):
        four = replace(layout, chunks=MANY_CHUNKS)
        cases.append(Case("chunk_c4", g, g.caches[MANY_CHUNKS_CACHE], 1, *common, layout=four))
    cases.append(Case("tail", g, longest, 1, *common, plain_rows=g.tail_rows))
    for times in (2, 4):  # rows that fill a GPU only if their keys are split
        name = f"tail_{64 * times}"
        if options.device == "cuda" or name in (options.case or ()):
            cases.append(Case(name, g, longest, 1, *common, plain_rows=times * g.tail_rows))
    for batch in g.decode_batches:
        cases.append(Case("decode", g, longest, batch, *common, plain_rows=1))
    if options.case is not None:  # its float64 answer takes 10 s, so it runs only when asked for
        all_chunks = replace(layout, chunks=backward_chunks(options))
        cases.append(Case("backward", g, 0, 1, *common, layout=all_chunks))
    return cases


def make_groups(options: argparse.Namespace, g: Geometry) -> list[Group]:
    groups = []
    for case in (case for dtype in options.dtype for case in main_cases(options, g, dtype)):
        if options.case is not None and case.name not in options.case:
            continue
        chosen = [
            p
            for p in (BACKWARD if case.name == "backward" else PROVIDERS).values()
            if case.kind in p.cases and (options.device in p.devices or options.interpret)
            if (
                p.name in options.provider
                if options.provider is not None
                else options.all or not p.only_if_asked
            )
        ]
        if options.provider is None and options.device == "cuda":
            # "vxl" makes the same launches on a GPU
            chosen = [p for p in chosen if p.name != "triton"]
        batch = f", batch {case.batch}" if case.batch > 1 else ""
        name = f"{case.name}, {case.dtype_name}, cache {case.cache_len}{batch}"
        if chosen:
            groups.append(Group(name, [Competitor(p.name, p, case) for p in chosen]))
    ours = options.provider is None or "vxl" in options.provider
    for name in MORE_CASES:
        if name in options.case if options.case is not None else ours:
            competitors = more_competitors(name, options, g)
            if competitors:
                groups.append(Group(name, competitors))
    return groups


def more_competitors(name: str, options: argparse.Namespace, g: Geometry) -> list[Competitor]:
    layout = ChunkLayout(g.window, options.alpha, 1, options.order)
    case = Case(name, g, g.caches[1], 1, options.dtype[0], options.device, layout=layout)
    vxl = PROVIDERS["vxl"]
    if name == "rope_append":
        return [Competitor("vxl", ROPE_APPEND, case)]
    if name == "threads":
        if options.device != "cpu" or torch.get_num_threads() < 2:
            return []
        return [Competitor(f"vxl, {n} thread{'s'[: n - 1]}", vxl, case, n) for n in (1, 2)]
    if name == "pages":
        if options.device != "cuda":
            return []
        sizes = (16, GPU_PAGE_SIZE)
        return [Competitor(f"vxl, pages of {n}", vxl, case.with_pages(n)) for n in sizes]
    if name == "chunks":
        four = case.with_chunks(4)
        return [Competitor("vxl, 1 chunk", vxl, case), Competitor("vxl, 4 chunks", vxl, four)]
    return [Competitor("vxl", vxl, replace(case, dtype_name=d)) for d in ("fp32", "bf16")]
