"""What the documents say about the project: paths, links, pictures, examples, words."""

import re
import runpy
import subprocess
import sys

import pytest
from helpers.documents import PAGES, blocks, prose
from helpers.paths import ROOT

BUILT = {".venv", "build"}  # not in a checkout
TOP = {path.name for path in ROOT.iterdir()} - BUILT


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    text = prose(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = []
    for target in targets:
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def anchors(file):
    headings = re.findall(r"^#+ (.*)$", prose(file), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_paths_exist(page):
    """Backticks around a path of the project: `vxl_kernels/api.py`, `csrc/cpu`."""
    missing = [
        word
        for word in re.findall(r"`([^`\s]+)`", prose(page))
        if word.split("/")[0] in TOP and "/" in word and not list(ROOT.glob(word.rstrip("/")))
    ]
    assert not missing


def test_pictures_are_drawn_from_the_layout():
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    for name, draw in drawn["PICTURES"].items():
        assert (drawn["IMAGES"] / name).read_text() == str(draw()), "run python docs/pictures.py"


def test_pictures_show_the_mask():
    """A coloured cell for every pair that attends, an empty one for every other."""
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    layout = drawn["ChunkLayout"](window=4, ratio=2, chunks=2, order="interleaved")
    cells = re.findall(r'width="30" height="30" fill="(#\w+)"', str(drawn["mask"]()))
    seen = [fill != drawn["EMPTY"] for fill in cells]
    assert seen == layout.materialize(2).flatten().tolist()


def test_readme_shows_the_example():
    example = (ROOT / "examples" / "kernels_10_lines.py").read_text().split('"""', 2)[2].strip()
    assert example in [b.text.strip() for b in blocks("README.md") if b.language == "python"]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_behind_is_a_place(page):
    """Documents say "after" or "past" instead."""
    assert not re.search(r"\bbehind\b", (ROOT / page).read_text(), re.I)


def test_supported_versions():
    """The table of `limits.md` gives the lower bounds of pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text()
    bounds = {"python": re.search(r'requires-python = ">=(.+)"', project)[1]}
    bounds |= dict(re.findall(r'"([\w-]+)>=([\d.]+)', project))
    text = prose("docs/limits.md").split("| Dependency |")[1]
    table = re.findall(r"^\| (\w+) \| (\d\S*)", text, re.M)
    names = {"pyav": "av", "pytorch": "torch"}
    assert len(table) == 5
    for name, version in table:
        assert bounds[names.get(name.lower(), name.lower())] == version


def test_design_is_short():
    assert len((ROOT / "DESIGN.md").read_text().splitlines()) <= 80


def test_ask_a_video(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("av")
    from helpers.clips import write_clip
    from helpers.paths import CHECKPOINT

    from examples.demo_clip import byte_tokenizer

    for file in CHECKPOINT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    byte_tokenizer(128).save_pretrained(tmp_path)
    write_clip(tmp_path / "video.mp4", count=20, fps=10)
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "examples" / "ask_a_video.py",
            tmp_path,
            tmp_path / "video.mp4",
            "A?",
            "B?",
        ],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
