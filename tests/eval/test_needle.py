"""`vxl eval needle`: what a grid shares, and that its cells are those of single runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.clips import picture
from PIL import Image

from vxl_eval.cli import main
from vxl_eval.needle import (
    Needle,
    accuracy,
    contains,
    encode_haystack,
    encode_needle,
    hide,
    needle_places,
    run_grid,
)
from vxl_eval.needle_run import drawn_needles, read_needles, table
from vxl_eval.needle_samples import write_samples

LENGTHS, DEPTHS, WORDS = [5, 9], [0, 0.5, 1], 4


@pytest.fixture(scope="module")
def needles():
    pictures = [Image.fromarray(picture(number, 80, 60)) for number in (77, 200)]
    return [Needle(shown, f"What is shown, {i}?", "x") for i, shown in enumerate(pictures)]


@pytest.fixture(scope="module")
def cells(model, haystack, needles):
    options = {"ratio": 4, "max_new_tokens": WORDS}
    return run_grid(model, haystack.features, needles, LENGTHS, DEPTHS, **options)


@pytest.fixture(scope="module")
def haystack(model, place):
    return encode_haystack(model, place / "movie.mp4", max(LENGTHS))


def test_every_cell_is_a_single_run(model, haystack, needles, cells):
    asked = {(c.length, c.depth, c.needle): c for c in cells if not c.control}
    assert len(asked) == len(LENGTHS) * len(DEPTHS) * len(needles)
    alone = [encode_needle(model, needle) for needle in needles]
    for (length, depth, index), cell in asked.items():
        assert cell.place == needle_places(length, [depth])[0]
        video = hide(haystack.features, alone[index], cell.place, length)
        assert len(video) == length * model.tokens_per_frame
        memory = model.watch(visual_features=video, ratio=4)
        answer = memory.ask(needles[index].question, WORDS, do_sample=False)
        assert cell.answer == answer
    answers = {cell.answer for cell in asked.values()}
    assert len(answers) > 2  # needles and places show in the answers


def test_controls_have_no_needle_or_another_one(model, haystack, needles, cells):
    none = {(c.length, c.needle): c.answer for c in cells if c.control == "no needle"}
    for (length, index), answer in none.items():
        video = haystack.features[:length].flatten(0, 1)
        memory = model.watch(visual_features=video, ratio=4)
        assert answer == memory.ask(needles[index].question, WORDS, do_sample=False)
    other = encode_needle(model, needles[0])
    outside = [c for c in cells if c.control == "needle outside" and c.needle == 1]
    assert outside
    for cell in outside:
        video = hide(haystack.features, other, cell.place, cell.length)
        memory = model.watch(visual_features=video, ratio=4)
        assert cell.answer == memory.ask(needles[1].question, WORDS, do_sample=False)


def test_frames_are_encoded_once(model, haystack, needles, monkeypatch):
    """Counted in the tower: the haystack's frames, and one frame for each needle."""
    seen = []
    tower = type(model.model.vision_tower)
    inner = tower._features

    def counted(self, pixels):
        seen.append(len(pixels))
        return inner(self, pixels)

    monkeypatch.setattr(tower, "_features", counted)
    run_grid(model, haystack.features, needles, [5], [0, 1], max_new_tokens=1)
    assert sum(seen) == len(needles)


def test_the_features_are_those_of_watching_the_file(model, place, haystack):
    """To rounding, since the tower's batches are others."""
    watched = model.watch(place / "movie.mp4", frames=max(LENGTHS), ratio=4)
    given = model.watch(visual_features=haystack.features.flatten(0, 1), ratio=4)
    torch.testing.assert_close(watched.keys_values(1), given.keys_values(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [
        ("The word is Tulip.", "tulip", True),
        ("tulips", "tulip", False),
        ("a RED, fox", "red fox", True),
        ("red and fox", "red fox", False),
        ("", "tulip", False),
    ],
)
def test_words_are_found_whole(answer, expected, found):
    assert contains(answer, expected) is found


def test_accuracy_is_a_mean_over_needles(model, haystack, needles):
    options = {"controls": False, "max_new_tokens": 1}
    cells = run_grid(model, haystack.features, needles, [5], [0, 1], **options)
    assert {cell.control for cell in cells} == {""}
    half = [type(c)(**{**c.to_dict(), "found": c.needle == 0}) for c in cells]
    assert accuracy(half) == {(5, 0): 0.5, (5, 1): 0.5}
    assert table(half, [5], [0, 1])[-1] == "| 5 | 50.0 % | 50.0 % | 50.0 % |"


def test_the_command(place, tmp_path, capsys, needles):
    for i, needle in enumerate(needles):
        needle.picture.save(tmp_path / f"{i}.png")
    records = [
        {"picture": f"{i}.png", "question": n.question, "answer": n.answer}
        for i, n in enumerate(needles)
    ]
    (tmp_path / "needles.json").write_text(json.dumps(records))
    asked = ["needle", "--model", place / "model", "--haystack", place / "movie.mp4"]
    asked += ["--needles", tmp_path / "needles.json", "--lengths", "5,9", "--depths", "3"]
    asked += ["--output", tmp_path / "out", "--ratio", "4", "--check"]
    asked += ["--max-new-tokens", 2]
    assert main(list(map(str, asked))) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert report["frames_encoded"] == 9
    assert report["checked"] == report["same"] == 2 * 3 * 2
    assert len([c for c in report["cells"] if not c["control"]]) == 2 * 3 * 2
    assert (tmp_path / "out" / "needle.md").read_text() == shown
    assert (tmp_path / "out" / "needle.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["needle.png", "needle.json", "needle.md"])
def test_no_report_over_an_input(place, tmp_path, capsys, needles, name):
    """The picture of a needle, or the list of needles, in the folder of the report."""
    given = {"picture": "picture.png", "list": "list.json", "haystack": "haystack.mp4"}
    given[{".png": "picture", ".json": "list", ".md": "haystack"}[Path(name).suffix]] = name
    needles[0].picture.save(tmp_path / given["picture"])
    record = {"picture": given["picture"], "question": "What?", "answer": "word"}
    (tmp_path / given["list"]).write_text(json.dumps([record]))
    shutil.copy(place / "movie.mp4", tmp_path / given["haystack"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    asked = ["needle", "--model", place / "model", "--haystack", tmp_path / given["haystack"]]
    asked += ["--needles", tmp_path / given["list"], "--lengths", "5", "--depths", "1"]
    asked += ["--output", tmp_path, "--ratio", "4", "--max-new-tokens", 2]
    assert main(list(map(str, asked))) == 2
    assert f"--output: got '{tmp_path / name}', which is an input" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_needles_as_samples_for_training(place, needles, tmp_path, model):
    from vxl_train.data.samples import VisualShape, read_samples

    made = write_samples(place / "movie.mp4", needles, LENGTHS, DEPTHS, tmp_path / "made")
    shape = VisualShape(288, 144, (4,))
    samples, bad = read_samples([made], model.processor, shape)
    assert not len(bad)
    assert len(samples) == len(LENGTHS) * len(DEPTHS) * len(needles)
    for sample in samples:
        _, length, depth, index = sample.id.split("-")
        shown = [Path(file).name for file in sample.files]
        assert len(shown) == int(length)
        [place_of] = needle_places(int(length), [float(depth)])
        assert shown[place_of] == f"needle-{index}.png"
        rest = shown[:place_of] + shown[place_of + 1 :]
        assert rest == [f"frame-{i:06}.png" for i in range(int(length) - 1)]
        assert sample.turns[1] == ("assistant", "x")
    with pytest.raises(ValueError, match="an empty folder"):
        write_samples(place / "movie.mp4", needles, LENGTHS, DEPTHS, tmp_path / "made")


def test_what_cannot_be(model, place, haystack, needles, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"got 40 frames of .*, expected 41"):
        encode_haystack(model, place / "movie.mp4", 41)
    for arguments, name in [
        (([], LENGTHS, DEPTHS), "needles: got none"),
        ((needles, [1], DEPTHS), "lengths: got"),
        ((needles, LENGTHS, [2]), "depths: got"),
        ((needles, [99], DEPTHS), "haystack: got"),
    ]:
        with pytest.raises(ValueError, match=name):
            run_grid(model, haystack.features, *arguments)
    (tmp_path / "bad.json").write_text('[{"picture": "a.png"}]')
    with pytest.raises(ValueError, match="--needles"):
        read_needles(tmp_path / "bad.json")
    asked = ["needle", "--model", str(place / "model"), "--haystack", "nowhere.mp4"]
    assert main(asked) == 2
    assert "no such file" in capsys.readouterr().err


def test_drawn_needles_ask_for_what_is_on_them():
    drawn = drawn_needles()
    assert len({needle.answer for needle in drawn}) == len({n.question for n in drawn}) == 4
    assert not any(contains(needle.question, needle.answer) for needle in drawn)
