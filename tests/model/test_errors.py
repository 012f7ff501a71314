"""Bad inputs give one ValueError that names the argument, and leave a memory unchanged."""

import pytest
import torch
from helpers.model_goldens import small_model, tiny_expected, tiny_model
from transformers import DynamicCache

from vxl_model import WindowRatios

H = 64
X = torch.ones(1, 100, H)
IDS = torch.tensor([[3, -200, 9]])
PIXELS = torch.zeros(2, 3, 336, 336)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(ratio=4)


@pytest.fixture(scope="module")
def memory(model):
    return model.watch(input_ids=[3], visual_features=X[0])


def ids(*values):
    return torch.tensor([values])


FORWARD = {
    "ids of one dimension": ("input_ids", (IDS[0],), {"visual_features": X}),
    "no tensor": ("input_ids", ([[3, -200, 9]],), {"visual_features": X}),
    "float ids": ("input_ids", (IDS.float(),), {"visual_features": X}),
    "no ids": ("input_ids", (IDS[:, :0],), {}),
    "id too large": ("input_ids", (ids(101),), {}),
    "negative id": ("input_ids", (ids(3, -1, 4),), {}),
    "two placeholders": ("input_ids", (ids(3, -200, -200, 9),), {"visual_features": X}),
    "nothing after the video": ("input_ids", (ids(3, -200),), {"visual_features": X}),
    "placeholder without video": ("input_ids", (IDS,), {}),
    "video without placeholder": ("input_ids", (ids(3, 4),), {"visual_features": X}),
    "other width": ("visual_features", (IDS,), {"visual_features": X[..., :5]}),
    "one dimension": ("visual_features", (IDS,), {"visual_features": X[0, 0]}),
    "integers": ("visual_features", (IDS,), {"visual_features": X.int()}),
    "no tokens": ("visual_features", (IDS,), {"visual_features": X[:, :0]}),
    "a string": ("visual_features", (IDS,), {"visual_features": "video.mp4"}),
    "two videos, one row": ("visual_features", (IDS,), {"visual_features": [X[0], X[0]]}),
    "both kinds": ("pixel_values", (IDS,), {"visual_features": X, "pixel_values": PIXELS}),
    "no tower": ("pixel_values", (IDS,), {"pixel_values": PIXELS}),
    "sizes without pixels": ("image_sizes", (IDS,), {"visual_features": X, "image_sizes": (3, 4)}),
    "ratio 0": ("ratio", (IDS,), {"visual_features": X, "ratio": 0}),
    "negative ratio": ("ratio", (IDS,), {"visual_features": X, "ratio": -4}),
    "half a ratio": ("ratio", (IDS,), {"visual_features": X, "ratio": 4.5}),
    "ratio True": ("ratio", (IDS,), {"visual_features": X, "ratio": True}),
    "ratio as text": ("ratio", (IDS,), {"visual_features": X, "ratio": "8"}),
    "no ratios": ("ratio", (IDS,), {"visual_features": X, "ratio": []}),
    "ratio over window": ("ratio", (IDS,), {"visual_features": X, "ratio": 49}),
    "none divides": ("ratio", (IDS,), {"visual_features": X[:, :5], "ratio": [2, 3]}),
    "too few ratios": ("ratio", (IDS,), {"visual_features": X, "ratio": WindowRatios([4])}),
    "mask of other shape": (
        "attention_mask",
        (IDS,),
        {"visual_features": X, "attention_mask": torch.ones(1, 2)},
    ),
    "mask with a hole": ("attention_mask", (ids(1, 2, 3),), {"attention_mask": ids(1, 0, 1)}),
    "mask of nothing": ("attention_mask", (ids(1, 2),), {"attention_mask": ids(0, 0)}),
    "labels of other shape": ("labels", (IDS,), {"visual_features": X, "labels": IDS[:, 1:]}),
    "label too large": ("labels", (IDS,), {"visual_features": X, "labels": ids(-100, -100, 101)}),
}


@pytest.mark.parametrize("case", FORWARD)
def test_forward_refuses(model, memory, case):
    name, args, kwargs = FORWARD[case]
    before = memory.keys_values(1)
    with pytest.raises(ValueError, match=rf"^{name}: got") as error:
        model(*args, **kwargs)
    assert "expected" in str(error.value)
    for a, b in zip(before, memory.keys_values(1), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "pixels",
    [PIXELS[0], PIXELS[:, :1], PIXELS[..., :5], PIXELS.byte(), PIXELS[:0], [PIXELS, PIXELS]],
    ids=["3-D", "channels", "size", "bytes", "no frames", "two videos"],
)
def test_pixels_refused(tiny, pixels):
    with pytest.raises(ValueError, match=r"^pixel_values: got"):
        tiny(IDS, pixel_values=pixels)


@pytest.mark.parametrize("sizes", [[(3, 4), (5, 6)], []])
def test_image_sizes_refused(tiny, sizes):
    with pytest.raises(ValueError, match=r"^image_sizes: got"):
        tiny(IDS, pixel_values=PIXELS, image_sizes=sizes)


def test_memories_refused(model, memory, tiny):
    for kwargs, name in (
        ({"visual_features": X}, "memory"),
        ({"labels": ids(9, 9)}, "memory"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: got"):
            model(ids(9, 10), memory=memory, **kwargs)
    with pytest.raises(ValueError, match=r"^input_ids: got"):
        model(IDS, memory=memory)
    with pytest.raises(ValueError, match=r"^input_ids: got"):
        memory.ask(IDS)
    with pytest.raises(ValueError, match="memory of another model"):
        tiny(ids(9, 10), memory=memory)
    two = model(IDS.repeat(2, 1), visual_features=[X[0], X[0]]).memory
    with pytest.raises(ValueError, match=r"^memory: got 2 videos"):
        model(ids(9, 10).repeat(3, 1), memory=two)
    for call in (lambda: two.append(visual_features=X[0]), lambda: two.save("nowhere")):
        with pytest.raises(ValueError, match="2 videos, expected one"):
            call()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"visual_features": X[0], "pixel_values": PIXELS},
        {"visual_features": X[0, :, :5]},
        {"visual_features": X[0], "input_ids": [101]},
        {"visual_features": X[0], "input_ids": [3, -200, 4]},
        {"visual_features": X[0], "input_ids": [-5]},
        {"visual_features": X[0]},  # its prompt needs a tokenizer
        {"visual_features": X[0], "input_ids": [3], "ratio": 0},
        {"video": torch.zeros(2, 4, 4, 3), "input_ids": [3]},
        {"video": torch.zeros(2, 4, 4, 3, dtype=torch.uint8), "frames": 3, "input_ids": [3]},
    ],
)
def test_watch_refuses(model, kwargs):
    with pytest.raises(ValueError, match="got"):
        model.watch(**kwargs)


def test_append_refuses(model):
    memory = model.watch(input_ids=[3], visual_features=X[0, :60])
    for kwargs in (
        {},
        {"visual_features": X[0], "pixel_values": PIXELS},
        {"visual_features": X[0, :, :5]},
        {"visual_features": X[0].int()},
        {"frames": torch.zeros(2, 4, 4, 3)},
    ):
        with pytest.raises(ValueError, match="got"):
            memory.append(**kwargs)
        assert memory.visual_tokens == [60]


def test_generate_refuses(model, memory):
    options = {"visual_features": X, "max_new_tokens": 2}
    for kwargs, name in (
        ({"past_key_values": memory}, "past_key_values"),
        ({"cache": memory}, "cache"),
        ({"inputs_embeds": X}, "inputs_embeds"),
        ({"prompt_lookup_num_tokens": 2}, "generate"),
        ({"visual_feature": X}, "visual_feature"),  # a typo
    ):
        with pytest.raises(ValueError, match=name):
            model.generate(IDS, **options, **kwargs)
    right = torch.tensor([[3, -200, 9, 0], [3, -200, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with pytest.raises(ValueError, match="padding at the end of row 0"):
        model.generate(right, visual_features=[X[0], X[0]], attention_mask=mask, max_new_tokens=2)


def test_the_cache_is_one_object(model, memory):
    """The cache may come under either of HF's names, or under both."""
    out = model(IDS, visual_features=X)
    other = model(IDS, visual_features=X)
    for kwargs, words in (
        (
            {"past_key_values": out.cache, "cache": other.cache},
            "past_key_values and cache: got two",
        ),
        ({"past_key_values": "video"}, "past_key_values: got str"),
        ({"cache": DynamicCache()}, "cache: got DynamicCache"),
        ({"cache": memory}, "cache: got a VideoMemory, expected .* memory="),
    ):
        for refuses in (model, model.prepare_inputs_for_generation):
            with pytest.raises(ValueError, match=words):
                refuses(IDS[:, -1:], **kwargs)
    same = model(IDS[:, -1:], past_key_values=out.cache, cache=out.cache)
    assert torch.equal(same.logits, model(IDS[:, -1:], cache=other.cache).logits)


def test_settings_refused(model):
    for name, value, words in (
        ("chunks_per_step", 0, "chunks_per_step: got 0"),
        ("chunks_per_step", 1.5, "chunks_per_step: got 1.5"),
        ("order", "sideways", "order: got 'sideways'"),
        ("backend", "abacus", "backend: got 'abacus'"),
        ("page_size", 3, "page_size"),
    ):
        good = getattr(model.settings, name)
        setattr(model.settings, name, value)
        try:
            with pytest.raises(ValueError, match=words):
                model(IDS, visual_features=X)
        finally:
            setattr(model.settings, name, good)
    model(IDS, visual_features=X)


def test_several_devices_are_refused(model):
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    try:
        with pytest.raises(ValueError, match="device_map"):
            model(IDS, visual_features=X)
    finally:
        del model.hf_device_map


def test_an_image_alone_is_used(tiny):
    """The small whole picture is dropped only when there are tiles."""
    pixels = tiny_expected()["image_pixel_values"][:1]
    out = tiny(IDS, pixel_values=pixels, image_sizes=[(300, 300)])
    assert out.memory.vst_counts == [[0, 36, 0]]
