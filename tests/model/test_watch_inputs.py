"""`watch` takes everything that users call a video, and says why it refuses the rest."""

import contextlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")
pytest.importorskip("av")

from helpers.clips import picture, write_clip
from helpers.model_goldens import tiny_model

from examples.demo_clip import byte_tokenizer
from vxl_model.decoder import vision_tower
from vxl_model.inputs.processing import VideoXLProcessor


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.processor = VideoXLProcessor(byte_tokenizer(128))
    return model


@pytest.fixture(scope="module")
def frames():
    return np.stack([picture(i, 80, 60) for i in range(3)])


def kept(model, video, **options):
    memory = model.watch(video, input_ids=[5], **options)
    return torch.cat([x.flatten() for x in memory.keys_values(0)])


@pytest.mark.parametrize("kind", ["folder", "PIL", "arrays", "strides", "generator"])
def test_the_same_memory_of_the_same_pictures(model, frames, tmp_path, kind):
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    video = {
        "folder": tmp_path,
        "PIL": [Image.fromarray(frame) for frame in frames],
        "arrays": list(frames),
        "strides": np.ascontiguousarray(frames[:, ::-1, ::-1])[:, ::-1, ::-1],
        "generator": (frames[i : i + 1] for i in range(3)),
    }[kind]
    assert torch.equal(kept(model, video), kept(model, frames))


def test_pixels_are_made_ready_for_a_gpu_in_the_thread_that_decodes(frames, monkeypatch):
    """In the tower's dtype and page-locked, so that the thread that computes only queues a copy.
    The GPU is played."""
    model = tiny_model(dtype="bfloat16")
    model.processor = VideoXLProcessor(byte_tokenizer(128))
    want = kept(model, frames)
    gpu, to, seen = SimpleNamespace(type="cuda"), torch.Tensor.to, []

    def played_to(x, *args, **options):
        if gpu not in args:
            return to(x, *args, **options)
        seen.append(("to", threading.current_thread().name, x.dtype, options.get("non_blocking")))
        return to(x, *(a for a in args if a is not gpu)).clone()

    def pinned(x):
        seen.append(("pin", threading.current_thread().name, x.dtype, None))
        return x.clone()

    monkeypatch.setattr(vision_tower, "execution_device", lambda module: gpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "to", played_to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    assert torch.equal(kept(model, frames), want)
    assert seen[0] == ("pin", "vxl-prefetch", torch.bfloat16, None)
    assert seen[1] == ("to", threading.current_thread().name, torch.bfloat16, True)


def test_pixels_on_a_gpu_stay_there(monkeypatch):
    """Page-locked memory is the host's."""
    model = tiny_model()
    tower, gpu = model.model.vision_tower, torch.device("cuda", 0)
    monkeypatch.setattr(vision_tower, "execution_device", lambda module: gpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with FakeTensorMode():
        pixels = torch.empty(2, 3, 8, 8, dtype=torch.bfloat16, device=gpu)
        ready = tower.prepare(pixels)
    assert (ready.device, ready.dtype) == (gpu, torch.float32)


def test_the_thread_that_decodes_works_on_the_callers_stream(model, frames, monkeypatch):
    """So it reads frames on a GPU after what the caller has queued to write them. The GPU is
    played."""
    entered, inside, prepare = [], [], model.model.vision_tower.prepare

    @contextlib.contextmanager
    def stream(one):
        entered.append((threading.current_thread().name, one))
        yield
        entered.append("left")

    def prepared(pixels):
        inside.append(entered[-1])
        return prepare(pixels)

    monkeypatch.setattr(model.model.vision_tower, "prepare", prepared)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: threading.current_thread().name)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    kept(model, [frames[:1], frames[1:]])
    here = threading.current_thread().name
    assert entered == [("vxl-prefetch", here), "left"]
    assert inside == [("vxl-prefetch", here)] * 2


def test_more_frames_than_the_file_has(model, tmp_path):
    clip = write_clip(tmp_path / "x.mp4", count=3)
    with pytest.warns(UserWarning, match=r"x\.mp4: has 3 of the 9 frames"):
        many = kept(model, clip, frames=9)
    assert torch.equal(many, kept(model, clip, frames=3))


@pytest.mark.parametrize(
    ("video", "words"),
    [
        ("https://example.com/a.mp4", "https://example.com/a.mp4: a URL; download it first"),
        ("nowhere.mp4", "nowhere.mp4: no such file"),
        ([], "images: got none"),
        (np.zeros((2, 4, 4, 3), np.float32), "frames: got float32"),
        (np.zeros((2, 4, 4), np.uint8), "image: got uint8"),
    ],
)
def test_what_is_refused(model, video, words):
    with pytest.raises(ValueError, match=words):
        model.watch(video, input_ids=[5])


def test_an_answer_with_a_given_beginning(model, frames):
    processor = model.processor
    asked = processor.suffix_ids("Which?", "Best option: (")
    assert torch.equal(
        asked[:, : processor.suffix_ids("Which?").shape[1]], processor.suffix_ids("Which?")
    )
    assert processor.decode(asked).endswith("assistant\nBest option: (")
    assert torch.equal(
        processor.encode_prompt("Which?", "Best option: (")[:, -asked.shape[1] :], asked
    )
    with pytest.raises(ValueError, match="answer_prefix: got the control token"):
        processor.suffix_ids("Which?", "<|im_end|>")
    with pytest.raises(ValueError, match="answer_prefix: got None"):
        processor.suffix_ids("Which?", None)
    memory = model.watch(frames, input_ids=[5])
    assert memory.ask(asked, max_new_tokens=2).shape[-1] == 2
