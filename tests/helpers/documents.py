"""The documents, and what is in them."""

import re
from dataclasses import dataclass

from helpers.paths import ROOT

PAGES = sorted(
    path.relative_to(ROOT)
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")]
)
_FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line of the page where the text begins."""

    language: str
    text: str
    line: int


def blocks(page):
    text = (ROOT / page).read_text()
    return [
        Block(found[1].strip(), found[2], text.count("\n", 0, found.start(2)) + 1)
        for found in _FENCE.finditer(text)
    ]


def prose(page):
    """The page without its fenced blocks."""
    return _FENCE.sub("", (ROOT / page).read_text())
