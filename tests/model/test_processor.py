"""The processor in transformers: auto classes, chat templates, pipelines, saved folders."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.checkpoint import write_checkpoint
from helpers.paths import ROOT

pytest.importorskip("av")
image = pytest.importorskip("PIL.Image")
from helpers.clips import write_clip
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from examples.demo_clip import byte_tokenizer
from vxl_model import (
    VideoXLConfig,
    VideoXLForConditionalGeneration,
    VideoXLImageProcessor,
    VideoXLModel,
    VideoXLProcessor,
    VideoXLVideoProcessor,
)

QUESTION = "What happens?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint with a tokenizer, and a clip."""
    folder = tmp_path_factory.mktemp("place")
    write_checkpoint(folder / "model")
    write_clip(folder / "a.mp4", count=20, fps=5)
    return folder


@pytest.fixture(scope="module")
def processor(place):
    return AutoProcessor.from_pretrained(place / "model")


@pytest.fixture(scope="module")
def model(place):
    return AutoModelForImageTextToText.from_pretrained(place / "model")


def messages(*items, question=QUESTION):
    return [{"role": "user", "content": [*items, {"type": "text", "text": question}]}]


def picture(width=60, height=80, shade=9):
    return image.new("RGB", (width, height), (shade, 2 * shade, 200))


def chat(processor, conversation, **options):
    return processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


def test_auto_classes(place, processor, model):
    assert type(processor) is VideoXLProcessor
    assert type(model) is VideoXLForConditionalGeneration
    assert type(AutoModelForMultimodalLM.from_pretrained(place / "model")) is type(model)


def test_a_video_in_a_chat_is_what_ask_answers(place, processor, model):
    """The template's ids are the released prompt's, and the answer is that of watch and ask."""
    clip = str(place / "a.mp4")
    inputs = chat(processor, messages({"type": "video", "path": clip}))
    assert torch.equal(inputs["input_ids"], processor.encode_prompt(QUESTION))
    assert inputs["attention_mask"].all()
    memory = model.watch(clip)
    assert memory.visual_tokens[0] == len(inputs["pixel_values_videos"][0]) * 144
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = new[:, inputs["input_ids"].shape[1] :]
    assert processor.batch_decode(new) == [memory.ask(QUESTION, max_new_tokens=6)]
    few = chat(
        processor, messages({"type": "video", "path": clip}), processor_kwargs={"num_frames": 2}
    )
    assert len(few["pixel_values_videos"][0]) == 2


def test_pictures_in_a_chat(processor, model):
    one = chat(processor, messages({"type": "image", "image": picture()}))
    assert one["image_sizes"] == [(60, 80)]
    assert torch.equal(one["pixel_values"][0], processor.image_to_pixels(picture()))
    pair = [picture(), picture(shade=40)]
    two = chat(processor, messages(*({"type": "image", "image": x} for x in pair)))
    assert "image_sizes" not in two
    assert torch.equal(two["pixel_values"][0], processor.images_to_pixels(pair))
    assert torch.equal(one["input_ids"], two["input_ids"])
    for inputs in (one, two):
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 2


def test_turns_in_a_chat(processor):
    """A system message replaces the default one, and later turns follow the video's."""
    talk = [
        *messages({"type": "video"}),
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Where?"},
    ]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    head, tail = "<|im_start|>user\n<video>\nWhat happens?<|im_end|>\n", "<|im_end|>\n"
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + head)
    assert text.endswith(
        f"<|im_start|>assistant\nA cat.{tail}<|im_start|>user\nWhere?{tail}<|im_start|>assistant\n"
    )
    own = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, *talk])
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>\n" + head)
    assert processor.text_ids(text.split("What happens?")[1].split("Where?")[0]).shape[1]


def test_a_conversation_has_the_ids_of_the_chat(place, processor, model):
    """Turn by turn the memory reads what the template makes of the whole conversation."""
    clip = str(place / "a.mp4")
    talk = model.watch(clip).conversation()
    first = talk.ask(QUESTION, max_new_tokens=3)
    talk.ask("Why?", max_new_tokens=1)
    turn = processor.turn_ids("Why?")[0].tolist()
    text = processor.apply_chat_template(
        [
            *messages({"type": "video"}),
            {"role": "assistant", "content": first},
            {"role": "user", "content": "Why?"},
        ],
        add_generation_prompt=True,
    )
    assert processor.text_ids(text.split("<video>")[1])[0].tolist()[-len(turn) :] == turn
    assert [question for question, _ in talk.turns] == [QUESTION, "Why?"]
    # Prefix, VSTs, both questions, three ids of the first answer, none of the last one.
    plain = model.watch(clip)
    read = processor.suffix_ids(QUESTION).shape[1] + 3 + len(turn)
    assert talk.memory.cached_tokens[0] == plain.cached_tokens[0] + read


def test_a_batch_is_padded_at_the_left(place, processor, model):
    texts = ["<video>\nWhat is it called?", "Who?", "<image>\nWhere?"]
    inputs = processor(
        text=texts, videos=[str(place / "a.mp4")], images=[[], [], [picture()]], return_tensors="pt"
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert ids.shape == mask.shape
    assert (mask.diff(dim=1) >= 0).all()
    assert [int((row == -200).sum()) for row in ids] == [1, 0, 1]
    assert [x is not None for x in inputs["pixel_values_videos"]] == [True, False, False]
    assert [x is not None for x in inputs["pixel_values"]] == [False, False, True]
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    alone = processor(text=texts[1], return_tensors="pt")
    want = model.generate(**alone, max_new_tokens=3, do_sample=False)[0, -3:]
    assert torch.equal(out[1, -3:], want)


def test_calls_that_do_not_fit(place, processor):
    clip = str(place / "a.mp4")
    for arguments, words in (
        ({"text": "<video> Who?"}, "videos: got 0, expected 1"),
        ({"text": "Who?", "videos": [clip]}, "videos: got 1, expected 0"),
        ({"text": "<image> Who?", "images": [picture()] * 2}, "images: got 2, expected 1"),
        ({"text": "<image> a <image> b", "images": [picture()] * 2}, "text: got 2 <image>"),
        ({"text": "<image> <video> b"}, "text: got 1 <image> and 1 <video>"),
        ({}, "processor: got nothing"),
        ({"text": 5}, "text: got int"),
        ({"text": "Who?", "paddding": True}, "paddding"),
        ({"text": "Who?", "do_rescale": False, "images": picture()}, "images: got 1, expected 0"),
        ({"images": picture(), "do_rescale": False}, "images: do_rescale: got False"),
        ({"text": ["a", "bc"], "padding": False, "return_tensors": "pt"}, "padding: got False"),
        ({"text": "<video>abc", "videos": clip, "truncation": True, "max_length": 0}, "truncation"),
    ):
        with pytest.raises(ValueError, match=words):
            processor(**arguments)


def test_what_processor_and_model_save_can_be_used_alone(place, processor, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "processor")
    for folder in tmp_path.iterdir():
        again = AutoProcessor.from_pretrained(folder)
        assert type(again) is VideoXLProcessor
        assert again.to_dict() == processor.to_dict()
        assert again.chat_template == processor.chat_template
        images = AutoImageProcessor.from_pretrained(folder)
        videos = AutoVideoProcessor.from_pretrained(folder)
        assert (type(images), type(videos)) == (VideoXLImageProcessor, VideoXLVideoProcessor)
        assert images.to_dict() == processor.image_processor.to_dict()
        assert videos.to_dict() == processor.video_processor.to_dict()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    clip = place / "a.mp4"
    assert loaded.watch(clip).ask("Who?", 3) == model.watch(clip).ask("Who?", 3)


def test_settings_of_a_saved_processor(tmp_path):
    made = VideoXLProcessor(
        byte_tokenizer(),
        size=28,
        mean=(0.1, 0.2, 0.3),
        chat_template="{{ 'x' }}",
        image_token="<i>",
    )
    made.video_processor.num_frames = 3
    made.save_pretrained(tmp_path)
    again = VideoXLProcessor.from_pretrained(tmp_path)
    assert (again.size, again.mean, again.image_token) == (28, (0.1, 0.2, 0.3), "<i>")
    assert again.chat_template == "{{ 'x' }}"
    assert again.video_processor.num_frames == 3
    VideoXLProcessor(size=28).save_pretrained(tmp_path / "without")
    assert VideoXLProcessor.from_pretrained(tmp_path / "without").size == 28


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_pipeline(place, processor, model, kind):
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": 4, "return_full_text": False}
    if kind == "chat":
        clip = str(place / "a.mp4")
        found = ask(text=messages({"type": "video", "path": clip}), **options)
        want = model.watch(clip).ask(QUESTION, max_new_tokens=4)
    else:
        found = ask(text="<image>\nWho?", images=picture(), **options)
        inputs = processor(text="<image>\nWho?", images=picture(), return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
        want = processor.decode(new)
    assert found[0]["generated_text"].strip() == want


def test_videos_in_every_form(place, processor):
    frames = np.zeros((3, 20, 30, 3), np.uint8)
    first = torch.from_numpy(frames).permute(0, 3, 1, 2)
    for videos in (
        frames,
        [frames],
        first,
        [list(frames)],
        [[image.fromarray(x) for x in frames]],
    ):
        found = processor(text="<video> Who?", videos=videos)["pixel_values_videos"]
        assert [tuple(x.shape) for x in found] == [(3, 3, 336, 336)]
        assert torch.equal(found[0], processor.frames_to_pixels(frames))
    assert len(processor(videos=str(place / "a.mp4"))["pixel_values_videos"]) == 1


CLASSES = {
    "AutoConfig": VideoXLConfig,
    "AutoModel": VideoXLModel,
    "AutoModelForImageTextToText": VideoXLForConditionalGeneration,
    "AutoProcessor": VideoXLProcessor,
}
LOADS = """
import sys, transformers
assert "vxl_model" not in sys.modules
name, folder = sys.argv[1:]
made = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
print(type(made).__name__)
"""


@pytest.mark.parametrize("name", ["AutoModelForImageTextToText", "AutoProcessor"])
def test_registered_for_an_auto_class(model, processor, tmp_path, monkeypatch, name):
    """A program that does not import vxl_model loads the folder."""
    cls = CLASSES[name]
    monkeypatch.setattr(cls, "registered_auto_class", None)
    with pytest.raises(ValueError, match="auto_class: got 'AutoNothing'"):
        cls.register_for_auto_class("AutoNothing")
    cls.register_for_auto_class(name)
    model.save_pretrained(tmp_path / "folder")
    saved = "processor_config.json" if name == "AutoProcessor" else "config.json"
    entry = json.loads((tmp_path / "folder" / saved).read_text())["auto_map"]
    assert entry[name] == f"video_xl.{cls.__name__}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", LOADS, name, str(tmp_path / "folder")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.stdout.strip() == cls.__name__, done.stderr
    if name != "AutoProcessor":
        del model.config.auto_map


def test_several_templates_are_saved(place, processor, tmp_path):
    templates = {"default": processor.chat_template, "short": "{{ messages[0]['content'] }}"}
    for name, tokenizer in (("whole", processor.tokenizer), ("alone", None)):
        made = VideoXLProcessor(tokenizer, chat_template=templates)
        made.save_pretrained(tmp_path / name)
        assert VideoXLProcessor.from_pretrained(tmp_path / name).chat_template == templates
    (tmp_path / "whole" / "chat_template.jinja").unlink()
    shutil.rmtree(tmp_path / "whole" / "additional_chat_templates")
    (tmp_path / "whole" / "chat_template.json").write_text('{"chat_template": "old"}')
    assert VideoXLProcessor.from_pretrained(tmp_path / "whole").chat_template == "old"


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"a": "caf\xe9"}', b'{"a":' * 100_000, None],
    ids=["empty", "list", "latin1", "deep", "lost link"],
)
def test_a_damaged_json_file_is_named(place, tmp_path, content):
    """None: a link to nothing."""
    for name in (
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ):
        folder = tmp_path / name
        shutil.copytree(place / "model", folder)
        (folder / name).unlink(missing_ok=True)
        if content is None:
            (folder / name).symlink_to("nowhere")
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{folder / name}: ")):
            VideoXLProcessor.from_pretrained(folder)


def test_a_tokenizer_that_is_none_is_named(place, tmp_path):
    shutil.copytree(place / "model", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: a tokenizer that cannot be")):
        VideoXLProcessor.from_pretrained(tmp_path)


def test_defaults_of_the_tokenizer(processor):
    tokenizer = byte_tokenizer(128)
    tokenizer.init_kwargs |= {"padding": "max_length", "max_length": 30}
    made = VideoXLProcessor(tokenizer)
    assert len(made(text="What?")["input_ids"][0]) == 30
    assert len(made(text="What?", padding=False)["input_ids"][0]) == 5


def test_frames_of_an_array(processor):
    frames = np.random.default_rng(0).integers(0, 255, (9, 48, 64, 3), dtype=np.uint8)
    whole = processor.video_processor(frames)["pixel_values_videos"][0]
    for given in (frames, torch.from_numpy(frames).permute(0, 3, 1, 2)):
        few = processor.video_processor(given, num_frames=3)["pixel_values_videos"][0]
        assert torch.equal(few, whole[[0, 4, 8]])
    with pytest.raises(ValueError, match="frames: got 3, expected None for batches"):
        processor.video_processor(iter([frames]), num_frames=3)
