"""The needle model that sees: its cards, what of it learns, and how commands read it."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("av")

from helpers.clips import write_clip

from examples.needle import pictures
from examples.needle.task import ANIMALS, COLOURS, load_needle_model
from vxl_eval.needle_run import read_needles


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("pictures") / "clip.mp4", count=20, fps=10)


@pytest.fixture
def shown(clip):
    return pictures.Pictures(pictures.seeing_model(), [clip])


def test_the_decoder_is_the_shipped_one(shown):
    weights = shown.model.state_dict()
    for name, weight in load_needle_model().state_dict().items():
        assert torch.equal(weights[name], weight)
    assert shown.model.tokens_per_frame == 16
    assert [len(video) for video in shown.videos] == [20]


def test_every_card_is_another_one(shown):
    cards = shown.cards.flatten(0, 1).flatten(1)
    assert len(cards) == len(ANIMALS) * len(COLOURS)
    distances = torch.cdist(cards, cards) + 1e3 * torch.eye(len(cards))
    assert distances.min() > 1


def test_short_videos_are_shown_to_and_fro(shown):
    video = shown.draw(50, torch.Generator().manual_seed(0))
    assert len(video) == 50
    for frame in video:
        assert (shown.videos[0] == frame).flatten(1).all(1).any()


def test_the_projector_learns_alone_and_the_tower_never(shown, tmp_path):
    before = {name: weight.clone() for name, weight in shown.model.state_dict().items()}
    losses = pictures.align(shown, 60, say=str)
    assert losses[-1] < losses[0] / 4
    changed = {n for n, w in shown.model.state_dict().items() if not torch.equal(w, before[n])}
    assert changed
    assert all("mm_projector" in name for name in changed)
    pictures.train(shown, 2, tokens=512, folder=tmp_path / "model", say=str)
    changed = {n for n, w in shown.model.state_dict().items() if not torch.equal(w, before[n])}
    assert not any("vision_tower" in name for name in changed)
    assert any("beacon" in name for name in changed)
    saved = type(shown.model).from_pretrained(tmp_path / "model")
    for name, weight in saved.state_dict().items():
        assert torch.equal(weight, shown.model.state_dict()[name])
    assert saved.processor.size == pictures.EDGE


def test_needles_for_the_command(tmp_path):
    pictures.write_needles(tmp_path, 2)
    needles = read_needles(tmp_path / "needles.json")
    assert len(needles) == 2 * len(COLOURS)
    assert len({needle.picture.name for needle in needles}) == len(needles)
    for needle in needles:
        colour, animal = needle.picture.stem.split("-")
        assert needle.question == f"Which animal is {colour}?"
        assert needle.answer == animal
