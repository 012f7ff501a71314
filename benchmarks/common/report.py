"""Results as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.options import save_figure
from vxl_kernels.files import atomic_write

__all__ = [
    "H100_BYTES",
    "H100_FLOPS",
    "Ratio",
    "Result",
    "milliseconds",
    "notes",
    "plain_table",
    "ratio_table",
    "save_json",
    "save_plot",
    "table",
]


H100_FLOPS, H100_BYTES = 798e12, 3.0e12  # a second: bfloat16 matrix product; memory


@dataclass
class Result:
    """One provider in one case. `ok` is None where it cannot run; a wrong one has no time."""

    case: str
    provider: str
    dtype: str
    cache_len: int
    batch: int
    ms: float | None = None
    spread: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    of_ceiling: float | None = None
    speedup: float | None = None
    max_error: float | None = None
    ok: bool | None = None
    note: str = ""
    repeats: int = 0
    host_ms: float | None = None  # on a GPU: the seconds Python takes to queue the call
    page_size: int | None = None
    chunks: int | None = None
    ours: bool = False

    @property
    def of_h100(self) -> float | None:
        """Of an H100's memory where bytes count, else of its matrix product. Only on a GPU."""
        if self.host_ms is None:
            return None
        if self.gb_per_s is not None:
            return self.gb_per_s * 1e9 / H100_BYTES
        return None if self.tflops is None else self.tflops * 1e12 / H100_FLOPS


@dataclass
class Ratio:
    """A line of a table of ratios. `bar`: what the line should reach, in words; `met`: whether it
    does."""

    what: str
    value: str
    against: str
    ratio: str
    meaning: str
    bar: str = ""
    met: bool = True


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def plain_table(
    header: Sequence[str], lines: Sequence[Sequence[str]], left: Collection[int]
) -> str:
    """Columns in `left` flush left, the others right."""
    widths = [max(len(row[i]) for row in [header, *lines]) for i in range(len(header))]

    def text(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([text(header), "  ".join("-" * w for w in widths), *map(text, lines)])


_HEADER = (
    "case",
    "cache",
    "batch",
    "provider",
    "dtype",
    "ms",
    "spread",
    "runs",
    "TFLOP/s",
    "GB/s",
    "% ceiling",
    "speed-up",
    "max error",
    "match",
    "host ms",
    "% H100",
)


def milliseconds(ms: float | None) -> str:
    return _number(ms, ".3f" if ms is not None and ms < 10 else ".1f")


def _cells(r: Result) -> list[str]:
    spread = None if r.spread is None else 100 * r.spread
    share = None if r.of_ceiling is None else 100 * r.of_ceiling
    of_h100 = None if r.of_h100 is None else 100 * r.of_h100
    match = {None: "-", True: "✓", False: "✗"}[r.ok]
    return [
        r.case,
        str(r.cache_len),
        str(r.batch),
        r.provider,
        r.dtype,
        milliseconds(r.ms),
        "-" if spread is None else f"±{spread:.1f}%",
        str(r.repeats) if r.ms is not None else "-",
        _number(r.tflops, ".3f"),
        _number(r.gb_per_s, ".1f"),
        _number(share, ".0f"),
        "-" if r.speedup is None else f"{r.speedup:.2f}x",
        _number(r.max_error, ".1e"),
        match,
        milliseconds(r.host_ms),
        _number(of_h100, ".0f"),
    ]


def table(results: Sequence[Result]) -> str:
    lines: list[list[str]] = []
    group = None
    # Only runs on a GPU have the last two columns.
    width = len(_HEADER) - 2 * all(r.host_ms is None for r in results)
    for r in results:
        key = (r.case, r.cache_len, r.batch, r.dtype)
        if group is not None and key != group:
            lines.append([""] * width)
        group = key
        lines.append(_cells(r)[:width])
    return plain_table(_HEADER[:width], lines, left=(0, 3, 4))


def ratio_table(ratios: Sequence[Ratio], title: str = "also measured") -> str:
    header = [title, "value", "against", "ratio", "meaning"]
    lines = [[r.what, r.value, r.against, r.ratio, r.meaning] for r in ratios]
    if any(r.bar for r in ratios):
        header.append("bar")
        for line, r in zip(lines, ratios, strict=True):
            line.append(f"{r.bar} {'✓' if r.met else '✗ MISSED'}" if r.bar else "")
    return plain_table(header, lines, left=range(len(header)))


def notes(results: Sequence[Result]) -> list[str]:
    """Each distinct note once, with the providers and cases it belongs to."""
    about: dict[tuple[str, str], list[str]] = {}
    for r in results:
        if r.note:
            where = about.setdefault((r.provider, r.note), [])
            where.append(f"{r.case} {r.cache_len}")
    lines = []
    for (provider, note), where in about.items():
        lines.append(f"{provider} ({', '.join(dict.fromkeys(where))}): {note}")
    return lines


def save_json(path: Path, results: Sequence[Result], **run: str) -> None:
    """A list of records. of_ceiling is a part of 1, spread of ms, ms are milliseconds, max_error
    absolute; note says why something has no time. `run` is in every record: machine, versions."""

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    rows = [
        {
            "case": r.case,
            "provider": r.provider,
            "dtype": r.dtype,
            "cache_len": r.cache_len,
            "batch": r.batch,
            "ms": finite(r.ms),
            "tflops": finite(r.tflops),
            "of_ceiling": finite(r.of_ceiling),
            "speedup_vs_best_peer": finite(r.speedup),
            "max_error": finite(r.max_error),
            "ok": r.ok,
            "gb_per_s": finite(r.gb_per_s),
            "spread": finite(r.spread),
            "repeats": r.repeats,
            "host_ms": finite(r.host_ms),
            "of_h100": finite(r.of_h100),
            "page_size": r.page_size,
            "chunks": r.chunks,
            "note": r.note,
            **run,
        }
        for r in results
    ]
    atomic_write(path, json.dumps(rows, indent=1) + "\n", durable=False)


# Ours are strong, peers lighter. Markers differ, so the plot reads without colour too.
_STYLES = {
    "vxl": ("#c1121f", "o", "-", 2.4),
    "triton": ("#c1121f", "h", ":", 2.4),
    "vxl+rope": ("#e07a5f", "s", "--", 2.0),
    "sdpa_bool": ("#1d5c96", "v", "-", 1.5),
    "sdpa_float": ("#4d9de0", "^", "-", 1.5),
    "sdpa_causal": ("#0b2545", "D", "", 1.5),
    "flex": ("#3a7d44", "P", "-", 1.5),
    "flash_attn": ("#7b2cbf", "X", "-", 1.5),
    "flashinfer": ("#b07d12", "*", "-", 1.5),
    "vllm": ("#f77f00", "<", "-", 1.5),
    "published": ("#6c757d", "d", "--", 1.5),
}


def _log_label(value: float, _: object) -> str:
    """Plain numbers at 1, 2 and 5 of each decade."""
    leading = round(value / 10 ** math.floor(math.log10(value)), 6) if value > 0 else 0
    return f"{value:g}" if leading in (1, 2, 5) else ""


def save_plot(path: Path, results: Sequence[Result], title: str, ceiling: str) -> None:
    """Time and share of the ceiling of a chunk over the length of the cache.

    Raises:
        SystemExit: no chunk was timed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines: dict[str, list[Result]] = {}
    for r in results:
        if r.case == "chunk" and r.ms is not None:
            lines.setdefault(r.provider, []).append(r)
    if not lines:
        raise SystemExit("--plot draws the case 'chunk', which was not timed")
    figure, (time_axis, share_axis) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for name, rs in lines.items():
        color, marker, style, width = _STYLES.get(name, ("#888888", ".", "-", 1.5))
        look = {"color": color, "marker": marker, "linestyle": style, "linewidth": width}
        x = [r.cache_len for r in rs]
        time_axis.plot(x, [r.ms for r in rs], label=name, **look)
        share_axis.plot(x, [100 * (r.of_ceiling or 0) for r in rs], **look)
    lengths = sorted({r.cache_len for rs in lines.values() for r in rs})
    for axis in (time_axis, share_axis):
        axis.set_xlabel("cache length (tokens)")
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=30, ha="right")
        axis.grid(True, which="major", color="#dddddd")
        axis.spines[["top", "right"]].set_visible(False)
    time_axis.set_yscale("log")
    for formatter in (time_axis.yaxis.set_major_formatter, time_axis.yaxis.set_minor_formatter):
        formatter(_log_label)
    time_axis.set_ylabel("milliseconds a chunk and layer")
    time_axis.set_title("Time (lower is better)", loc="left")
    share_axis.set_ylim(0, 105)
    share_axis.axhline(100, color="black", linewidth=1)
    share_axis.set_ylabel("useful FLOP/s, % of the ceiling")
    share_axis.set_title(f"Share of {ceiling} (higher is better)", loc="left")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=min(8, len(lines)), frameon=False)
    save_figure(path, figure)
    plt.close(figure)
