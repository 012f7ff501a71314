"""Draws the pictures of the documentation: `python docs/pictures.py`.

Every count, position and mask in them is read from `ChunkLayout`. `tests/docs/test_pictures.py`
draws them again and compares.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from vxl_kernels import ChunkLayout

IMAGES = Path(__file__).with_name("images")
RAW, VST, CACHED = "#9ecae1", "#fdae6b", "#c7a6d8"
EMPTY, INK, PAPER = "#f2f2f2", "#333333", "#ffffff"


class Svg:
    """A drawing of boxes, words and arrows on white paper."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">\n'
            f"<title>{escape(title)}</title>\n"
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" '
            f'orient="auto"><path d="M0,1 L7,4 L0,7 z" fill="{INK}"/></marker></defs>\n'
        )
        self.parts: list[str] = []
        self.box(0, 0, width, height, PAPER, line=PAPER)

    def box(self, x: int, y: int, w: int, h: int, fill: str, word: str = "", line: str = INK):
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{fill}" stroke="{line}"/>'
        )
        for i, text in enumerate(lines := word.split("\n")):
            self.word(x + w // 2, y + h // 2 + 5 + 16 * i - 8 * (len(lines) - 1), text, "middle")

    def word(self, x: int, y: int, text: str, anchor: str = "start", bold: bool = False) -> None:
        weight = ' font-weight="bold"' if bold else ""
        if text:
            self.parts.append(
                f'<text x="{x}" y="{y}" fill="{INK}" text-anchor="{anchor}"{weight}>'
                f"{escape(text)}</text>"
            )

    def arrow(self, *points: tuple[int, int]) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" marker-end="url(#tip)"/>'
        )

    def __str__(self) -> str:
        return self.head + "\n".join(self.parts) + "\n</svg>\n"


def names(layout: ChunkLayout) -> list[str]:
    """x0, x1, ... for raw rows and vs0, vs1, ... for VST rows, in the layout's order."""
    found = [""] * layout.rows
    for kind, rows in (("x", layout.raw_rows()), ("vs", layout.vst_rows())):
        for i, row in enumerate(rows.tolist()):
            found[row] = f"{kind}{i}"
    return found


def window() -> Svg:
    """A window, its chunk in both orders, and what the cache keeps of it."""
    interleaved = ChunkLayout(window=6, ratio=3, order="interleaved")
    split = ChunkLayout(window=6, ratio=3)
    edge = 52
    svg = Svg(700, 330, "A window becomes a chunk; its VSTs become cached tokens")

    def strip(y: int, label: str, words: list[str], fills: list[str], notes: list[int]) -> None:
        svg.word(20, y + 22, label, bold=True)
        for i, (text, fill) in enumerate(zip(words, fills, strict=True)):
            svg.box(240 + i * edge, y, edge, 34, fill, text)
        for i, note in enumerate(notes):
            svg.word(240 + i * edge + edge // 2, y + 50, str(note), "middle")

    raw = [f"x{i}" for i in range(split.window)]
    strip(20, f"window of {split.window} raw tokens", raw, [RAW] * split.window, [])
    for y, label, layout in (
        (90, "chunk, interleaved order", interleaved),
        (175, "chunk, split order", split),
    ):
        fills = [VST if vst else RAW for vst in layout.is_vst().tolist()]
        strip(y, label, names(layout), fills, layout.positions().tolist())
        svg.word(20, y + 50, "position in the chunk")
    kept = [f"vs{i}" for i in range(split.vsts_per_chunk)]
    strip(260, "cached afterwards", kept, [CACHED] * len(kept), [])
    svg.word(20, 315, f"ratio {split.ratio}: one VST after every {split.ratio} raw tokens")
    return svg


def mask() -> Svg:
    """Who attends to whom: two chunks of one call over a cached prefix."""
    layout, cached = ChunkLayout(window=4, ratio=2, chunks=2, order="interleaved"), 2
    seen, rows = layout.materialize(cached).tolist(), names(layout)
    vst = layout.is_vst().tolist()
    entries = len(seen[0]) - layout.rows
    columns = [f"p{i}" for i in range(cached)]
    columns += [f"vs{i}" for i in range(entries - cached)] + rows
    fills = [CACHED] * entries + [VST if is_vst else RAW for is_vst in vst]
    edge, left, top = 30, 110, 70
    width = left + edge * len(columns) + 20
    svg = Svg(width, top + edge * layout.rows + 92, "Which keys each row attends to")
    svg.word(left + edge * entries - 8, 40, "cached keys", "end", bold=True)
    svg.word(left + edge * entries + 8, 40, "keys of the call's own rows", bold=True)
    svg.word(20, top - 8, "queries", bold=True)
    for j, word in enumerate(columns):
        svg.word(left + edge * j + edge // 2, top - 8, word, "middle")
    for i, word in enumerate(rows):
        y = top + edge * i
        chunk = i // layout.rows_per_chunk
        svg.word(20, y + 20, f"{word} (chunk {chunk})")
        for j, fill in enumerate(fills):
            svg.box(left + edge * j, y, edge, edge, fill if seen[i][j] else EMPTY, line="#ffffff")
    x = left + edge * entries
    svg.parts.append(
        f'<line x1="{x}" y1="24" x2="{x}" y2="{top + edge * layout.rows}" stroke="{INK}" '
        'stroke-width="2"/>'
    )
    y = top + edge * layout.rows + 16
    legend = ((CACHED, "cached token"), (RAW, "raw row"), (VST, "VST row"), (EMPTY, "not seen"))
    for i, (fill, word) in enumerate(legend):
        svg.box(left + 125 * i, y, 18, 18, fill)
        svg.word(left + 125 * i + 25, y + 14, word)
    svg.word(20, y + 44, f"p0, p1: cached prefix. Chunk 1 sees vs0 to vs{entries - cached - 1}")
    svg.word(20, y + 62, "of chunk 0, which the same call has appended to the cache.")
    return svg


def flow() -> Svg:
    """From a video file to an answer, with the released model's sizes."""
    layout, prefix, frame = ChunkLayout(window=1440, ratio=8), 14, 144
    kept = layout.vsts_per_chunk
    svg = Svg(880, 600, "Data flow from video file to answer")

    def column(x: int, w: int, steps: list[tuple[str, str]], y: int, h: int = 46) -> None:
        for i, (word, fill) in enumerate(steps):
            svg.box(x, y + i * (h + 24), w, h, fill, word)
            if i:
                svg.arrow((x + w // 2, y + i * (h + 24) - 24), (x + w // 2, y + i * (h + 24)))

    svg.word(20, 24, "vxl_model.video, vxl_model.inputs", bold=True)
    column(
        20,
        260,
        [
            ("video file", PAPER),
            ("frames, 336 x 336\nvideo/reader.py", PAPER),
            (f"vision tower: {frame} features a frame\ndecoder/vision_tower.py", RAW),
            (f"window: {layout.window} raw tokens\n{layout.window // frame} frames", RAW),
            (f"chunk: {layout.rows} rows, {kept} of them VSTs\nstreaming/encoder.py", VST),
        ],
        40,
    )
    svg.word(320, 24, "each decoder layer", bold=True)
    column(
        320,
        230,
        [
            ("norm", PAPER),
            ("vst_linear: q, k, v", RAW),
            ("rope_append: rotate q and k,\nappend VSTs to the cache", VST),
            ("vst_attention over\n[cache | own chunk]", CACHED),
            ("o_proj, norm, MLP", PAPER),
        ],
        40,
    )
    bottom = 40 + 4 * 70 + 46
    svg.arrow((280, bottom - 23), (300, bottom - 23), (300, 63), (320, 63))
    svg.word(610, 24, "VstCache: K and V of this layer", bold=True)
    sizes = [("prefix", prefix)] + [(f"window {i}", kept) for i in range(3)]
    total = 0
    for i, (word, count) in enumerate(sizes):
        text = f"{word}: entries {total} to {total + count - 1}"
        svg.box(610, 40 + 42 * i, 250, 42, CACHED, text)
        total += count
    svg.box(610, 40 + 42 * len(sizes), 250, 42, EMPTY, "room for the next window")
    svg.arrow((550, 203), (580, 203), (580, 229), (610, 229))
    svg.arrow((610, 145), (595, 145), (595, 273), (550, 273))
    svg.word(610, 290, f"K is stored rotated. The {layout.window} raw rows")
    svg.word(610, 308, "of a window are not cached.")
    svg.word(20, 430, "for each question", bold=True)
    steps = ["fork of the cache\n(shares pages)", "suffix: question,\nevery row is cached"]
    steps += ["decode: one row a step", "answer"]
    for i, word in enumerate(steps):
        svg.box(20 + 212 * i, 446, 184, 52, CACHED if i < 1 else PAPER, word)
        if i:
            svg.arrow((204 + 212 * (i - 1), 472), (20 + 212 * i, 472))
    svg.word(
        20, 528, "The suffix and the decoded tokens go through the same layers with layout=None."
    )
    svg.word(
        20, 550, "Windows follow one another; several of them may go through a layer in one call."
    )
    svg.word(20, 570, f"Sizes: Video-XL-7B, ratio {layout.ratio}, prefix of {prefix} tokens.")
    return svg


PICTURES = {"window.svg": window, "mask.svg": mask, "flow.svg": flow}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(str(draw()))
