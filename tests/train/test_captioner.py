"""Captions by transformers' models, offline, and the command line around them."""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

from helpers.captioner import WORDS, save_llava
from helpers.clips import write_clip

from tests.train.test_vico import check_sample
from vxl_train.cli import main
from vxl_train.vico.captioner import TransformersCaptioner

PROMPT = "what violin happens"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models of three kinds and videos of 128 s."""
    place = tmp_path_factory.mktemp("captioner")
    save_llava(place / "chat")
    save_llava(place / "plain", template=None)
    save_blip(place / "blip")
    (place / "videos").mkdir()
    write_clip(place / "videos" / "a.mp4", count=256, fps=2, gop=8)
    write_clip(place / "videos" / "short.mp4", count=30, fps=2)
    (place / "videos" / "noise.mkv").write_bytes(b"no video" * 100)
    return place


def save_blip(folder):
    """BLIP, which captions a picture without a prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
        PreTrainedTokenizerFast,
    )

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    edge = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessorPil(size=edge), tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
    }
    config = BlipConfig(
        text_config={
            **small,
            "vocab_size": len(vocabulary),
            "encoder_hidden_size": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "sep_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    BlipForConditionalGeneration(config).eval().save_pretrained(folder)


def pictures(seed, count=3):
    draw = np.random.default_rng(seed)
    return [Image.fromarray(draw.integers(0, 255, (40, 60, 3), np.uint8)) for _ in range(count)]


def by_hand(folder, shown):
    """The words of greedy decoding, one forward pass per word."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    images = "<image> " * len(shown)
    text = f"user {images}{PROMPT} assistant"
    if processor.chat_template is None:
        text = images.replace(" ", "") + f"\n{PROMPT}"
    inputs = processor(images=[shown], text=[text], return_tensors="pt")
    ids, start = inputs.pop("input_ids"), inputs["attention_mask"].shape[1]
    inputs.pop("attention_mask")
    for _ in range(6):
        logits = model(input_ids=ids, **inputs).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
        if ids[0, -1] == model.generation_config.eos_token_id:
            break
    return processor.decode(ids[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_captions_are_greedy_words(place, kind):
    captioner = TransformersCaptioner(str(place / kind), prompt=PROMPT, max_new_tokens=6)
    assert captioner.model is None  # weights are read with the first caption
    said = [captioner.caption(pictures(seed)) for seed in range(4)]
    assert said == [by_hand(place / kind, pictures(seed)) for seed in range(4)]
    assert len({*said}) > 1  # the pictures matter
    assert captioner.caption(pictures(0)) == said[0]
    assert captioner.caption(pictures(0, 1)) == by_hand(place / kind, pictures(0, 1))


def test_model_without_a_prompt(place):
    """It captions the picture in the middle."""
    captioner = TransformersCaptioner(str(place / "blip"), max_new_tokens=6)
    shown = pictures(0) + pictures(1) + pictures(2)
    said = captioner.caption(shown)
    assert said
    assert {*said.split()} <= {*WORDS, "[UNK]"}
    assert captioner.caption([shown[4]]) == said
    assert len({captioner.caption([picture]) for picture in shown}) > 1


def test_bfloat16(place):
    captioner = TransformersCaptioner(
        str(place / "chat"), max_new_tokens=4, dtype=torch.bfloat16, prompt=PROMPT
    )
    assert isinstance(captioner.caption(pictures(0)), str)
    assert {p.dtype for p in captioner.model.parameters()} == {torch.bfloat16}


def test_broken_weights(place, tmp_path):
    shutil.copytree(place / "chat", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"none")
    captioner = TransformersCaptioner(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=f"captioner {tmp_path}/model: "):
        captioner.caption(pictures(0))


def test_identity(place, tmp_path):
    """The identity changes with everything that could change the words, and with nothing else."""
    folder = tmp_path / "model"
    shutil.copytree(place / "chat", folder)

    def identity(**kwargs):
        return TransformersCaptioner(str(folder), **kwargs).identity

    plain = identity()
    assert identity() == plain == identity(device="cpu")
    others = {
        identity(prompt=PROMPT),
        identity(max_new_tokens=9),
        identity(dtype=torch.bfloat16),
        TransformersCaptioner(str(place / "chat")).identity,
    }
    (folder / "model.safetensors").touch()
    others.add(identity())
    assert len(others - {plain}) == 5


# -- command line ----------------------------------------------------------------------------------


@pytest.fixture
def run(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("videos", "chat", "blip"):
        (tmp_path / name).symlink_to(place / name)

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


VICO = ("vico", "--videos", "videos", "--captioner", "chat", "--output", "out.jsonl")
SHORT = ("--max-new-tokens", 8, "--prompt", PROMPT)


def test_command(run, tmp_path, monkeypatch):
    code, out, err = run(*VICO, *SHORT)
    assert code == 0
    assert out.startswith("out.jsonl: ")
    assert "samples of 3 videos, 10 clips (9 captioned now); 1 videos skipped, 1 unreadable" in out
    assert err.count("\n") == 2
    assert "noise.mkv: not a video" in err
    assert "short.mp4: skipped: shorter than two clips of 14 s" in err
    first = (tmp_path / "out.jsonl").read_bytes()
    samples = [json.loads(line) for line in first.splitlines()]
    assert 1 <= len(samples) <= 4
    for sample in samples:
        check_sample(sample)
        assert sample["vico"]["captioner"] == "chat"

    # All captions are known now, so no weights are read.
    monkeypatch.setattr(TransformersCaptioner, "_load", None)
    code, out, err = run(*VICO, *SHORT, "--json")
    summary = json.loads(out)
    assert (code, summary["captioned"], summary["samples"]) == (0, 0, len(samples))
    assert (len(summary["bad"]), len(summary["skipped"])) == (1, 1)
    assert (tmp_path / "out.jsonl").read_bytes() == first
    assert run(*VICO, *SHORT, "--seed", 1)[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() != first


HOSTILE = {
    "no videos": (("vico", "--captioner", "chat", "--output", "o"), "--videos"),
    "no captioner": (("vico", "--videos", "videos", "--output", "o"), "--captioner"),
    "no output": (("vico", "--videos", "videos", "--captioner", "chat"), "--output"),
    "missing video": ((*VICO, "--videos", "none.mp4"), "videos: none.mp4: no such file"),
    "missing folder": ((*VICO, "--videos", "none/"), "videos: none/: no such file"),
    "folder without": ((*VICO, "--videos", "chat"), "videos: chat: a folder without video files"),
    "output nowhere": ((*VICO, "--output", "no/where"), "output: got no/where, no such folder"),
    "output a folder": ((*VICO, "--output", "chat"), "output: got chat: Is a directory"),
    "output a video": ((*VICO, "--output", "videos/a.mp4"), "which is an input"),
    "missing model": ((*VICO, "--captioner", "./none"), "captioner ./none: "),
    "empty model": ((*VICO, "--captioner", "videos"), "captioner videos: "),
    "video as model": ((*VICO, "--captioner", "videos/a.mp4"), "captioner videos/a.mp4: "),
    "text model": ((*VICO, "--captioner", "qwen2"), "got a 'qwen2' model, expected an image-text"),
    "no processor": ((*VICO, "--captioner", "bare"), "captioner bare: "),
    "no weights": ((*VICO, "--captioner", "light"), "captioner light: no weights there"),
    "clues": ((*VICO, "--clues", 1), "clues: got 1, expected 2 to 26"),
    "samples": ((*VICO, "--samples", 0), "--samples"),
    "clip": ((*VICO, "--clip-seconds", 0), "clip_seconds: got 0.0"),
    "clip no number": ((*VICO, "--clip-seconds", "x"), "--clip-seconds"),
    "pictures": ((*VICO, "--pictures", -1), "--pictures"),
    "seed": ((*VICO, "--seed", "x"), "--seed"),
    "prompt": ((*VICO, "--prompt", " "), "prompt: got ' '"),
    "on error": ((*VICO, "--on-error", "cry"), "--on-error"),
    "device": ((*VICO, "--device", "toaster"), "--device"),
    "stop": ((*VICO, "--on-error", "stop", "--videos", "videos/noise.mkv"), "noise.mkv"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile(run, place, tmp_path, kind, monkeypatch):
    (tmp_path / "qwen2").mkdir()
    (tmp_path / "qwen2" / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "bare").mkdir()
    shutil.copy(place / "chat" / "config.json", tmp_path / "bare")
    shutil.copytree(place / "chat", tmp_path / "light", ignore=lambda *_: ["model.safetensors"])
    monkeypatch.setattr(TransformersCaptioner, "_load", None)  # nothing heavy has started
    if kind != "stop":
        monkeypatch.setattr("vxl_train.vico.build.open_decoder", None)
    arguments, words = HOSTILE[kind]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err
    assert not [file for file in tmp_path.iterdir() if file.name in ("o", "out.jsonl")]


def test_no_sample_is_an_error(run):
    code, out, err = run(*VICO, *SHORT, "--videos", "videos/short.mp4")
    assert (code, out) == (2, "")
    assert "short.mp4: skipped" in err
    assert "videos: none of 1 gave a sample" in err
