"""Training data: words and labels, refused samples and their counts, order, drawn ratios."""

import gzip
import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from helpers.clips import read_number
from helpers.training_place import make_place, processor_and_shape, samples, talk

from vxl_train.data.conversations import conversation_ids
from vxl_train.data.dataset import TrainingData, collate
from vxl_train.data.order import TrainingOrder
from vxl_train.data.samples import BadSample, BadSamples, VisualShape, read_samples


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def parts(place):
    return processor_and_shape(place)


def read(place, records, parts, name="x.json", **options):
    text = records if isinstance(records, str) else json.dumps(records)
    (place / name).write_text(text)
    return read_samples([place / name], *parts, **options)


def one(place, parts, conversations, **fields):
    fields.setdefault("id", "a")
    found, bad = read(place, [{**fields, "conversations": conversations}], parts)
    assert not list(bad)
    return found[0]


# -- words ---------------------------------------------------------------------------------------


def split(processor, ids, labels):
    """The text, and the supervised part of it."""
    text = "".join("@" if i == -200 else processor.tokenizer.decode([i]) for i in ids)
    learned = [i for i, label in zip(ids, labels, strict=True) if label != -100]
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    return text, processor.tokenizer.decode(learned)


def test_one_turn_is_what_inference_sees(place, parts):
    processor = parts[0]
    sample = one(place, parts, talk("<image>\nWhat?", " A dog. "), image="one.png")
    ids, labels = conversation_ids(sample, processor.tokenizer)
    prompt = processor.encode_prompt("What?")[0].tolist()
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [-100] * len(prompt)
    answer = processor.tokenizer("A dog.<|im_end|>", add_special_tokens=False)["input_ids"]
    assert ids[len(prompt) :] == labels[len(prompt) :] == answer


def test_turns(place, parts):
    """Only the assistant's words are supervised, each with its end token."""
    turns = talk("<image>\nWhat?", "A dog.", "Sure?", "Yes.")
    sample = one(place, parts, turns, image="one.png")
    text, learned = split(parts[0], *conversation_ids(sample, parts[0].tokenizer))
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n@\nWhat?"
        "<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>"
    )
    assert learned == "A dog.<|im_end|>Yes.<|im_end|>"


@pytest.mark.parametrize(
    ("question", "want"),
    [
        ("What?\n<image>", "@\nWhat?"),
        ("Is <image> a dog?", "@\nIs  a dog?"),
        ("<image>\n<image>\n<image>\nWhat?", "@\nWhat?"),
        ("<video>\nWhat?", "@\nWhat?"),
        ("What?", "@\nWhat?"),  # a file and no marker
    ],
)
def test_markers(place, parts, question, want):
    sample = one(place, parts, talk(question, "A"), image=["one.png", "two.png"])
    text, _ = split(parts[0], *conversation_ids(sample, parts[0].tokenizer))
    assert f"user\n{want}<|im_end|>" in text
    assert text.count("@") == 1


def test_marker_in_a_later_turn(place, parts):
    sample = one(place, parts, talk("Hi", "Yes?", "<image>\nWhat?", "A"), image="one.png")
    text, learned = split(parts[0], *conversation_ids(sample, parts[0].tokenizer))
    assert "user\nHi<|im_end|>" in text
    assert "user\n@\nWhat?<|im_end|>" in text
    assert learned == "Yes?<|im_end|>A<|im_end|>"


def test_system_turn_and_other_names(place, parts):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
    ]
    text, learned = split(parts[0], *conversation_ids(one(place, parts, turns), parts[0].tokenizer))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<")
    assert learned == "Yes<|im_end|>"


# -- bad samples ---------------------------------------------------------------------------------


def bad_records(place):
    """(record, kind, a word of the message)."""
    (place / "broken.mp4").write_bytes(b"no video" * 100)
    (place / "empty.mp4").write_bytes(b"")
    (place / "broken.png").write_bytes(b"no picture")
    good = talk("<image>", "A")
    return [
        ({"id": 1, "image": "none.png", "conversations": good}, "missing file", "none.png"),
        (
            {"id": 2, "image": ["one.png", "gone.png"], "conversations": good},
            "missing file",
            "gone.png",
        ),
        ({"id": 3, "video": "none.mp4", "conversations": good}, "missing file", "none.mp4"),
        ({"id": 4, "video": "broken.mp4", "conversations": good}, "undecodable video", "broken"),
        ({"id": 5, "video": "empty.mp4", "conversations": good}, "undecodable video", "empty"),
        ({"id": 6, "image": "broken.png", "conversations": good}, "unreadable image", "broken"),
        ({"id": 7, "conversations": talk("Hi", " ")}, "empty answer", "gpt"),
        (
            {"id": 8, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt"}]},
            "empty answer",
            "gpt",
        ),
        ({"id": 9, "conversations": talk("Hi", "A<|im_end|>")}, "control token", "<|im_end|>"),
        ({"id": 10, "conversations": talk("Hi")}, "bad sample", "in turns"),
        ({"id": 11, "conversations": talk("Hi", "A", "And?")}, "bad sample", "in turns"),
        ({"id": 12, "conversations": []}, "bad sample", "conversations"),
        ({"id": 13}, "bad sample", "conversations"),
        ({"id": 14, "conversations": talk("<image>", "A")}, "bad sample", "marker"),
        (
            {"id": 15, "image": "one.png", "video": "clip.mp4", "conversations": good},
            "bad sample",
            "one of them",
        ),
        ({"id": 16, "image": 5, "conversations": good}, "bad sample", "a path"),
        ({"id": 17, "conversations": ["Hi"]}, "bad sample", "the turn"),
        ({"id": 18, "conversations": [{"from": "cat", "value": "miau"}]}, "bad sample", "cat"),
        ({"id": 19, "conversations": talk("Hi \ud800", "A")}, "bad sample", r"\ud800"),
        ({"id": 20, "conversations": talk("Hi", "\udc80")}, "bad sample", r"\udc80"),
        (
            {"id": 21, "video": "clip.mp4", "duration": float("inf"), "conversations": good},
            "bad sample",
            "duration: got inf",
        ),
        (
            {
                "id": 22,
                "image": "one.png",
                "width": float("inf"),
                "height": 3,
                "conversations": good,
            },
            "bad sample",
            "width: got inf",
        ),
        (
            {"id": 23, "image": "one.png", "width": 0.5, "height": 3, "conversations": good},
            "bad sample",
            "width: got 0.5",
        ),
        (
            {"id": 24, "image": "one.png", "height": 10**400, "conversations": good},
            "bad sample",
            "height: got 1000",
        ),
        ({"id": 25, "image": "\ud800.png", "conversations": good}, "bad sample", "image: got"),
        ({"id": 26, "image": "a\0b.png", "conversations": good}, "bad sample", "image: got"),
        ([1, 2], "bad sample", "list"),
        ("words", "bad sample", "str"),
        (None, "bad sample", "NoneType"),
    ]


def test_bad_samples_are_counted_and_the_others_kept(place, parts):
    cases = bad_records(place)
    records = [r for r, _, _ in cases]
    found, bad = read(place, [*records[:5], *samples(), *records[5:]], parts)
    assert [x.id for x in found] == [x["id"] for x in samples()]
    by_id = {x.id: x for x in bad}
    assert len(by_id) == len(cases)
    for i, (record, kind, word) in enumerate(cases):
        place_in_file = i if i < 5 else i + len(samples())
        name = str(record["id"]) if isinstance(record, dict) else f"x.json:{place_in_file}"
        assert by_id[name].kind == kind, by_id[name]
        assert word in by_id[name].message
    assert sum(bad.by_kind().values()) == len(cases)
    assert bad.by_kind()["missing file"] == 3


def test_broken_lines(place, parts):
    lines = [json.dumps(x) for x in samples()]
    text = "\n".join([lines[0], "{broken", lines[1], "", lines[2][:20], lines[3]])
    found, bad = read(place, text, parts, "x.jsonl")
    assert [x.id for x in found] == ["v0", "i0", "t0"]
    assert [(x.kind, x.id) for x in bad] == [
        ("broken line", "x.jsonl:2"),
        ("broken line", "x.jsonl:5"),
    ]


def test_text_is_never_changed(place, parts):
    """Latin-1 and JSON that is nested too deeply lose their line. The other lines are kept."""
    sample = {"id": "1", "conversations": talk("Où est le café ?", "À côté du château.")}
    latin = json.dumps(sample, ensure_ascii=False).encode("latin-1")
    utf8 = json.dumps({**sample, "id": "2"}, ensure_ascii=False).encode()
    deep = b"[" * 100_000 + b"]" * 100_000
    (place / "x.jsonl").write_bytes(b"\n".join([latin, utf8, b" " + deep, b'{"id": "\xff"}']))
    found, bad = read_samples([place / "x.jsonl"], *parts)
    assert [x.turns[1][1] for x in found] == ["À côté du château."]
    assert [(x.kind, x.id) for x in bad] == [("broken line", f"x.jsonl:{n}") for n in (1, 3, 4)]
    words = [x.message for x in bad]
    assert "not UTF-8 (byte 0xf9" in words[0]
    assert "nested too deeply" in words[1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gzip.compress(b"[]", mtime=0), "got gzip data"),
        ('[{"id": 1}]'.encode("utf-16"), "got UTF-16 text"),
        ('["é"]'.encode("latin-1"), "not UTF-8"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_something_else(place, parts, data, words):
    (place / "x.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.json") as refused:
        read_samples([place / "x.json"], *parts)
    assert words in str(refused.value)


def test_a_byte_order_mark_is_skipped(place, parts):
    for text in (json.dumps(samples()), "\n".join(json.dumps(x) for x in samples())):
        (place / "x.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
        found, bad = read_samples([place / "x.json"], *parts)
        assert (len(found), len(bad)) == (12, 0)


def test_broken_file(place, parts):
    with pytest.raises(ValueError, match=r"x\.json: not JSON"):
        read(place, '[{"id": 1}, {', parts)


def test_repeated_ids_are_different_samples(place, parts):
    found, bad = read(place, [samples()[0], samples()[0]], parts)
    assert [x.id for x in found] == ["v0", "v0 (x.json:1)"]
    assert not list(bad)
    gone = {**samples()[0], "video": "none.mp4"}
    mute = {**samples()[0], "conversations": talk("Hi", "")}
    (place / "again").mkdir(exist_ok=True)
    for name in ("x.jsonl", "again/x.jsonl"):
        (place / name).write_text("\n".join(["{", json.dumps(gone), json.dumps(mute)] * 2))
    both = [place / "x.jsonl", place / "again" / "x.jsonl"]
    counts = read_samples(both, *parts, root=place)[1].by_kind()
    assert counts == {"broken line": 4, "empty answer": 4, "missing file": 4}


def test_root(place, parts, tmp_path):
    (tmp_path / "far.json").write_text(json.dumps(samples()))
    assert len(read_samples([tmp_path / "far.json"], *parts)[1]) == 9
    assert not len(read_samples([tmp_path / "far.json"], *parts, root=place)[1])


def test_a_bad_sample_counts_once():
    bad = BadSamples()
    assert bad.add(BadSample("too long", "a", "x"))
    assert not bad.add(BadSample("too long", "a", "y"))
    assert bad.by_kind() == {"too long": 1}


# -- what the model gets -------------------------------------------------------------------------


def data(place, parts, records=None, **options):
    found, bad = read(place, samples() if records is None else records, parts)
    assert not list(bad)
    return TrainingData(found, *parts, **options)


def test_items(place, parts):
    items = [data(place, parts)[i] for i in range(4)]
    video, image, images, text = items
    assert video["frames"].shape == (5, 336, 336, 3)  # 5 s
    assert [read_number(f) for f in video["frames"].numpy()] == [0, 10, 20, 30, 40]
    assert video["frames"].dtype == torch.uint8
    assert video["image_size"] is None
    assert len(video["ratio"].ratios) == 3  # 720 tokens in windows of 288
    assert image["image_size"] == (200, 120)
    assert len(image["frames"]) == 3  # the whole, and 2 tiles
    assert len(image["ratio"].ratios) == 1
    assert len(images["frames"]) == 2
    assert text["frames"] is text["ratio"] is None
    assert -200 not in text["input_ids"]
    batch = collate(items)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert batch["attention_mask"][row].sum() == length
        assert (batch["labels"][row, length:] == -100).all()
        assert batch["labels"][row, :length].tolist() == item["labels"]


def test_frame_cap(place, parts):
    _, shape = parts
    few = VisualShape(shape.window, shape.tokens_per_frame, shape.ratios, frames=3)
    item = data(place, (parts[0], few))[0]
    assert [read_number(f) for f in item["frames"].numpy()] == [0, 24, 49]
    many = {"id": 1, "image": ["one.png"] * 7 + ["two.png"], "conversations": talk("?", "A")}
    assert len(data(place, (parts[0], few), [many])[0]["frames"]) == 3


def test_lengths_without_decoding(place, parts, monkeypatch):
    """Lengths come from file headers, or from the sample."""
    import vxl_train.data.dataset as module

    monkeypatch.setattr(module, "open_video", None)
    monkeypatch.setattr(module, "open_image", None)
    found, _ = read(place, samples()[:4], parts)
    frames = [round(x.length / 144 / (1 + 1 / np.mean(parts[1].ratios))) for x in found]
    assert frames == [5, 2, 2, 0]
    said = [
        {**samples()[0], "duration": 40.2},
        {**samples()[0], "frames": 77},
        {**samples()[0], "duration": 4000},
        {**samples()[1], "width": 600, "height": 600},
    ]
    found, _ = read(place, said, parts, probe=False)
    frames = [round(x.length / 144 / (1 + 1 / np.mean(parts[1].ratios))) for x in found]
    assert frames == [41, 77, 128, 4]
    found, bad = read(place, [{**samples()[0], "video": "none.mp4"}], parts, probe=False)
    assert not list(bad)  # nothing was decoded


def test_ratios_are_drawn_per_window_sample_and_epoch(place, parts):
    first, second = data(place, parts), data(place, parts)
    draws = [tuple(first[e * 12 + i]["ratio"].ratios) for e in range(4) for i in (0, 4, 8)]
    assert draws == [tuple(second[e * 12 + i]["ratio"].ratios) for e in range(4) for i in (0, 4, 8)]
    assert len(set(draws)) > 6
    assert {r for draw in draws for r in draw} == {2, 4, 8}
    other = data(place, parts, seed=1)
    assert draws != [tuple(other[e * 12 + i]["ratio"].ratios) for e in range(4) for i in (0, 4, 8)]


def test_ratios_that_divide_no_window_are_refused(parts):
    with pytest.raises(ValueError, match=r"ratio: got \[5, 7\]"):
        VisualShape(288, 144, (5, 7)).check()
    VisualShape(288, 144, (5,)).check()


def test_a_sample_that_fails_is_replaced_by_the_next(place, parts):
    """It is found when it is decoded, as only its header is intact."""
    whole = (place / "clip.mp4").read_bytes()
    (place / "late.mp4").write_bytes(whole)
    records = samples()[:4]
    records[0] = {**records[0], "video": "late.mp4"}
    made = data(place, parts, records)
    begin = whole.index(b"mdat") + 4
    end = whole.index(b"moov") - 4
    (place / "late.mp4").write_bytes(whole[:begin] + bytes(end - begin) + whole[end:])
    for key in (0, 4, 0):
        item = made[key]
        assert [(x.kind, x.id) for x in item["bad"]] == [("undecodable video", "v0")]
        assert item["input_ids"] == made[1]["input_ids"]
    assert made[4]["ratio"].ratios == made[5]["ratio"].ratios
    (place / "late.mp4").unlink()
    fresh = TrainingData(made.samples, *parts, stop=True)
    assert fresh[0]["stop"]
    assert [x.kind for x in fresh[0]["bad"]] == ["missing file"]
    assert collate([fresh[1], fresh[0]])["stop"]


def test_nothing_left(place, parts):
    made = data(place, parts, max_text_tokens=5)
    item = made[3]
    assert item["stop"]
    assert len(item["bad"]) == 12
    assert {x.kind for x in item["bad"]} == {"too long"}


def test_a_text_without_ids(place, parts):
    """A tokenizer that has no ids for one sample costs that sample."""
    made = data(place, parts)
    whole = made.processor.tokenizer
    spoiled = "number 0"

    def tokenizer(text, **options):
        if spoiled in text:
            raise Exception("Missing [UNK] token")  # as tokenizers written in Rust do
        return whole(text, **options)

    made.processor.tokenizer = tokenizer
    try:
        item = made[0]
    finally:
        made.processor.tokenizer = whole
    assert [(x.kind, x.id) for x in item["bad"]] == [("unknown text", "v0")]
    assert "Missing [UNK] token" in item["bad"][0].message
    assert item["input_ids"] == made[1]["input_ids"]


# -- order ---------------------------------------------------------------------------------------


def test_order():
    lengths = np.random.default_rng(0).integers(1, 1000, 1003)
    orders = {}
    for grouped in (True, False):
        order = TrainingOrder(lengths, 8, 42, grouped)
        first = list(order)
        assert sorted(first) == list(range(1003))
        assert first == list(order)
        order.set_epoch(3)
        later = np.array(list(order)) - 3 * 1003
        assert sorted(later) == list(range(1003))
        assert list(later) != first
        orders[grouped] = lengths[first[:1000]].reshape(-1, 8)
    spread = {k: float(np.ptp(x, axis=1).mean()) for k, x in orders.items()}
    assert spread[True] < 50 < 500 < spread[False]
    assert orders[True][0].max() == lengths.max()  # the longest step first
    middle = np.abs(np.corrcoef(orders[True].mean(axis=1), np.arange(125))[0, 1])
    assert middle < 0.3  # no drift from long to short
