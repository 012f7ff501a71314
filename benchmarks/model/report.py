"""Results of `prefill.py` as tables and as a picture."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common.options import save_figure
from benchmarks.common.report import H100_FLOPS, plain_table
from benchmarks.model.cases import PARTS, TOKENS_PER_FRAME

__all__ = ["encode_text", "memory_text", "pipeline_text", "questions_text", "save_plot"]

_QWEN2_7B = {"layers": 28, "intermediate": 18944, "vocab": 152064}
_FRAMES_PER_WINDOW = 10
_LEFT = (0,)


def encode_text(result: dict[str, Any], options: argparse.Namespace) -> str:
    seconds, parts = result["seconds"], result["parts"]
    chunks = range(len(seconds["vxl"]))
    header = ["encode, seconds", *(str(i + 1) for i in chunks), "all", "last / first", "speed-up"]
    total = sum(seconds["published"])
    lines = []
    for name, values in seconds.items():
        ratio = values[-1] / values[0]
        lines.append(
            [
                name,
                *(f"{x:.2f}" for x in values),
                f"{sum(values):.1f}",
                f"{ratio:.2f}",
                f"{total / sum(values):.2f}x",
            ]
        )
    errors = ", ".join(f"{name} {value:.1e}" for name, value in result["errors"].items())
    mark = "✓" if result["match"] else "✗"
    # On a GPU parts have windows of their own, fewer than those that are timed whole.
    gpu = options.device == "cuda"
    split = ["vxl's parts", *(str(i + 1) for i in range(len(parts))), "all", "of sum"]
    split += ["TFLOP/s", "% product", *(["% H100"] if gpu else [])]
    whole = sum(sum(p.values()) for p in parts)
    rows = []
    for name in (*PARTS, "norms, residuals", "sum"):
        values = [sum(p.values()) if name == "sum" else p[name] for p in parts]
        flops = [sum(f.values()) if name == "sum" else f.get(name, 0) for f in result["flops"]]
        rate = sum(flops) / sum(values)
        shares = [rate / 1e12, 100 * rate / result["product"]]
        shares += [100 * rate / H100_FLOPS] if gpu else []
        rows.append(
            [
                name,
                *(f"{x:.2f}" for x in values),
                f"{sum(values):.1f}",
                f"{100 * sum(values) / whole:.0f}%",
                *(
                    f"{x:{form}}" if rate else "-"
                    for x, form in zip(shares, (".3f", ".0f", ".0f"), strict=False)
                ),
            ]
        )
    text = [
        f"{options.layers} layers; windows in turns; columns are windows",
        plain_table(header, lines, _LEFT),
        f"vxl to published, largest relative difference: {errors} {mark}",
        "",
        plain_table(split, rows, _LEFT),
        f"% product: of {result['product'] / 1e12:.3f} TFLOP/s, {result['product_name']}"
        + (f"; % H100: of {H100_FLOPS / 1e12:.0f} TFLOP/s" if gpu else ""),
    ]
    whole_model = options.geometry["intermediate"] == _QWEN2_7B["intermediate"]
    if not (whole_model and options.layers == _QWEN2_7B["layers"]):
        text += ["", _projection(result, options)]
    return "\n".join(text)


def _projection(result: dict[str, Any], options: argparse.Namespace) -> str:
    """Seconds for all of Qwen2-7B's layers, from those measured: the MLP by its width, the rest
    by the number of layers."""
    layers, full = options.layers, _QWEN2_7B["layers"]
    wider = _QWEN2_7B["intermediate"] / options.geometry["intermediate"]
    seconds = result["seconds"]
    parts = result["parts"]
    mlp = sum(p["MLP"] for p in parts) * len(seconds["vxl"]) / len(parts)
    # vxl runs all layers but the last, of which it projects K and V of the VSTs: nothing.
    ours = (sum(seconds["vxl"]) + mlp * (wider - 1)) * (full - 1) / max(1, layers - 1)
    # The published method's MLP takes as long a layer as ours; its logits are not projected.
    theirs = (sum(seconds["published"]) + mlp / max(1, layers - 1) * layers * (wider - 1)) * (
        full / layers
    )
    per_window = len(seconds["vxl"])
    return (
        f"projected to {full} layers with MLP {_QWEN2_7B['intermediate']}: vxl "
        f"{ours / per_window:.1f} s a window of {_FRAMES_PER_WINDOW} frames, published "
        f"{theirs / per_window:.1f} s ({theirs / ours:.2f}x; its vocabulary still "
        f"{options.geometry['vocab']} instead of {_QWEN2_7B['vocab']})"
    )


def questions_text(result: dict[str, Any], options: argparse.Namespace) -> str:
    after, video = result["pages_after"], result["pages_video"]
    return (
        f"questions: {result['questions']} over one video of {result['frames']} frames, "
        f"{options.layers} layers\n"
        f"  watching once {result['watch_s']:.1f} s, a question (20 tokens, {options.new_tokens} "
        f"new) {result['question_s'] * 1e3:.0f} ms\n"
        f"  {result['speedup']:.1f}x faster than encoding again for each question (that many times "
        f"the one encoding measured)\n"
        f"  all questions in one call {result['together_s']:.2f} s, "
        f"{result['together_speedup']:.1f}x faster than one after the other, "
        f"{'the same answers' if result['same_answers'] else 'OTHER ANSWERS'}\n"
        f"  pages of the cache: {video} for the video, at most {after} while answering"
    )


def pipeline_text(result: dict[str, Any], options: argparse.Namespace) -> str:
    lines = [
        [name, f"{1e3 * value:.1f}", f"{1 / value:.1f}"] for name, value in result.items() if value
    ]
    text = plain_table(["before the language model", "ms a frame", "frames/s"], lines, _LEFT)
    if "decode" not in result:
        text += "\ndecode: no decoder is installed (pip install av)"
    return text


def memory_text(result: dict[str, Any], options: argparse.Namespace) -> str:
    header = ["peak memory", "tokens", "MiB above the model", "kept K and V, MiB", "of allowed"]
    lines = [
        [
            f"{r['frames']} frames",
            f"{r['frames'] * TOKENS_PER_FRAME:,}",
            f"{r['peak_mib']:.1f}",
            f"{r['kept_mib']:.1f}",
            f"{r['of_allowed']:.2f}",
        ]
        for r in result["rows"]
    ]
    return (
        plain_table(header, lines, _LEFT)
        + "\nallowed: the first stream's peak and what more K and V are kept"
    )


def save_plot(path: Path, result: dict[str, Any]) -> None:
    """Plots the time over the windows, and the parts of vxl's time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = {
        "vxl": ("#c1121f", "o", "-"),
        "vxl, last layer in full": ("#e07a5f", "s", "--"),
        "published": ("#6c757d", "d", "--"),
    }
    figure, (time_axis, part_axis) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, values in result["seconds"].items():
        color, marker, line = styles[name]
        x = range(1, len(values) + 1)
        time_axis.plot(x, values, label=name, color=color, marker=marker, linestyle=line)
    time_axis.set_ylim(bottom=0)
    time_axis.set_ylabel("seconds a window")
    time_axis.set_title("Time (lower is better)", loc="left")
    time_axis.legend(frameon=False)
    names = [*PARTS, "norms, residuals"]
    stacks = [[p[name] for p in result["parts"]] for name in names]
    colors = ["#1d5c96", "#b07d12", "#c1121f", "#3a7d44", "#adb5bd"]
    x = range(1, len(result["parts"]) + 1)
    part_axis.stackplot(x, stacks, labels=names, colors=colors)
    part_axis.set_title(
        f"vxl's parts (median {statistics.median(result['seconds']['vxl']):.2f} s)", loc="left"
    )
    part_axis.legend(frameon=False, loc="lower right")
    for axis in (time_axis, part_axis):
        axis.set_xlabel("window")
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)
    plt.close(figure)
