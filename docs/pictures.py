"""Draws the pictures of the documentation: `python docs/pictures.py`.

Every count, position and mask in them is read from `ChunkLayout`. `tests/docs/test_pages.py`
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

    def group(self, x: int, y: int, w: int, h: int, heading: str) -> None:
        """A dashed frame with a heading, for boxes that belong together."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="none" stroke="{INK}" '
            'stroke-dasharray="4 3"/>'
        )
        self.word(x + 12, y + 19, heading, bold=True)

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
    columns += [f"c{i}" for i in range(entries - cached)] + rows
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
    last = entries - cached - 1
    svg.word(
        20,
        y + 44,
        f"p0, p1: cached prefix. c0, c{last}: cached keys of the VSTs vs0, vs{last} of chunk 0.",
    )
    svg.word(
        20,
        y + 62,
        "The call appends them before it computes attention. Only chunk 1 attends to them.",
    )
    return svg


def flow() -> Svg:
    """From a video file to an answer, with the released model's sizes."""
    layout, prefix, frame = ChunkLayout(window=1440, ratio=8), 14, 144
    kept = layout.vsts_per_chunk
    svg = Svg(960, 780, "Data flow from video file to answer")

    # A column of groups. Each is a frame with the folder of its boxes as heading.
    x, width, y, tall, below = 20, 280, 16, 42, 18
    groups: list[tuple[str, list[tuple[str, str]]]] = [
        ("vxl_model/video", [("video file", PAPER), ("frames, 336 x 336\nreader.py", PAPER)]),
        ("vxl_model/inputs", [("pixels, normalised\npreprocessing.py", PAPER)]),
        (
            "vxl_model/decoder",
            [
                (f"vision tower: {4 * frame} vectors per frame\nvision_tower.py", PAPER),
                (f"projector and 2 x 2 pooling:\n{frame} features per frame", RAW),
            ],
        ),
        (
            "vxl_model/streaming",
            [
                (f"window: {layout.window // frame} frames,\n{layout.window} raw tokens", RAW),
            ],
        ),
    ]
    last = None
    for heading, steps in groups:
        boxes = len(steps) + (heading == groups[-1][0])  # the chunk is drawn below
        svg.group(x, y, width, 28 + boxes * (tall + below), heading)
        y += 30
        for word, fill in steps:
            svg.box(x + 12, y, width - 24, tall, fill, word)
            if last is not None:
                svg.arrow((230, last), (230, y))
            last = y + tall
            y += tall + below
        y += 12
    # A chunk is its raw rows and its VSTs, in their colours.
    right, chunk = x + width - 12, y - 12
    part = (width - 24) * kept // layout.rows
    svg.box(
        x + 12,
        chunk,
        width - 24 - part,
        tall,
        RAW,
        f"chunk: {layout.window} raw rows,\n{kept} VSTs (encoder.py)",
    )
    svg.box(right - part, chunk, part, tall, VST)
    svg.arrow((230, last), (230, chunk))

    # A decoder layer. The two residuals run on its left.
    x, width, y = 340, 270, 16
    middle = x + 30 + (width - 42) // 2
    svg.group(x, y, width, 506, "vxl_model/decoder, 28 layers")
    y += 56
    tops: list[int] = []
    layer = [
        "norm",
        "vst_linear: q, k, v",
        "rope_append: rotate q and k,\nappend VSTs to the cache",
    ]
    layer += ["vst_attention over\n[cache | own chunk]", "o_proj", "+", "norm", "MLP", "+"]
    for word in layer:
        h = 42 if "\n" in word else 30
        svg.arrow((middle, y - below), (middle, y))
        if word == "+":
            svg.box(middle - 15, y, 30, h, PAPER, word)
        else:
            svg.box(x + 30, y, width - 42, h, PAPER, word)
        tops.append(y)
        y += h + below
    svg.arrow((middle, y - below), (middle, y))
    svg.word(middle, y + 14, "to the next layer", "middle")
    svg.arrow((right, chunk + 21), (318, chunk + 21), (318, 46), (middle, 46), (middle, 72))
    for begin, end in ((tops[0] - 15, tops[5] + 15), (tops[6] - 9, tops[8] + 15)):
        svg.arrow((middle, begin), (x + 15, begin), (x + 15, end), (middle - 15, end))

    # The cache of one layer.
    x, y = 680, 44
    svg.group(x - 16, 16, 276, 296, "VstCache: K and V of this layer")
    sizes = [("prefix", prefix)] + [(f"VSTs of window {i}", kept) for i in range(3)]
    total = 0
    for word, count in sizes:
        svg.box(x, y, 244, 38, CACHED, f"{word}: {total} to {total + count - 1}")
        total += count
        y += 38
    svg.box(x, y, 244, 38, EMPTY, "room for the next window")
    svg.word(x, y + 58, "K is stored with its final rotation.")
    svg.word(x, y + 76, f"The {layout.window} raw tokens of a window")
    svg.word(x, y + 94, "are not cached.")
    svg.arrow((598, tops[2] + 21), (634, tops[2] + 21), (634, y + 19), (x, y + 19))
    svg.arrow((x, y - 57), (650, y - 57), (650, tops[3] + 21), (598, tops[3] + 21))

    svg.word(664, 356, "Colours", bold=True)
    legend = [(RAW, "raw visual tokens"), (VST, "VSTs"), (CACHED, "cached keys and values")]
    legend += [(EMPTY, "free pages"), (PAPER, "an operation, or other data")]
    for i, (fill, word) in enumerate(legend):
        svg.box(664, 368 + 25 * i, 18, 18, fill)
        svg.word(692, 382 + 25 * i, word)
    svg.word(664, 514, "+  adds the line on the left (residual)")

    y = 606
    svg.group(20, y, 920, 94, "For each question")
    steps = ["fork of the cache\n(shares pages)", "suffix: the question,\nevery row is cached"]
    steps += ["decode: one row per step,\nit is cached too", "answer"]
    for i, word in enumerate(steps):
        svg.box(36 + 228 * i, y + 30, 200, 48, CACHED if i < 1 else PAPER, word)
        if i:
            svg.arrow((36 + 228 * i - 28, y + 54), (36 + 228 * i, y + 54))
    svg.word(20, 724, "Suffix and generated tokens go through the same layers as ordinary text.")
    svg.word(20, 744, "Windows follow one another. Several can go through a layer in one call.")
    svg.word(
        20, 764, f"Sizes: Video-XL-7B at ratio {layout.ratio}, with a prefix of {prefix} tokens."
    )
    return svg


PICTURES = {"window.svg": window, "mask.svg": mask, "flow.svg": flow}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(str(draw()))
