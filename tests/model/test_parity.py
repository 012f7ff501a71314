"""The upstream implementation's numbers from the whole model: logits, cached K and V, generated
ids, VSTs per window, loss and gradients."""

import pytest
import torch
from helpers.model_goldens import (
    GOLDENS,
    TOLERANCE,
    input_ids,
    kept_of_golden,
    load_golden,
    relative,
    tiny_expected,
    tiny_model,
)

import vxl_kernels

pytestmark = pytest.mark.core

NAMES = [path.stem for path in GOLDENS]
TRAINED = ["tiny_r4_w48", "mixed_steprandom_w48"]
GRADIENT_TOLERANCE = 5e-5


def backend_or_skip(name):
    reasons = vxl_kernels.backends()[name]
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    return name


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    return load_golden(request.param)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("order", ["split", "interleaved"])
@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
def test_golden(golden, chunks, order, backend):
    check_golden(golden, chunks, order, backend_or_skip(backend))


def check_golden(golden, chunks, order, backend):
    case, tensors, model = golden
    model.settings.chunks_per_step, model.settings.order = chunks, order
    model.settings.backend = backend
    features = tensors["image_features"][None]
    out = model(input_ids(tensors), visual_features=features)
    assert relative(out.logits[0], tensors["logits"]) < TOLERANCE
    assert out.memory.vst_counts == [case["beacon_sizes"]]
    for layer in range(case["layers"]):
        for got, name in zip(out.memory.keys_values(layer), ("key", "value"), strict=True):
            assert relative(got, kept_of_golden(case, tensors, layer, name)) < TOLERANCE

    steps = len(tensors["generated_ids"])
    generated = model.generate(
        input_ids(tensors),
        visual_features=features,
        max_new_tokens=steps + 1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = generated.sequences[0, input_ids(tensors).shape[1] :]
    assert new[:steps].tolist() == tensors["generated_ids"].tolist()
    after = torch.cat(generated.logits)[1:]  # after feeding each generated id
    assert relative(after, tensors["generated_logits"]) < TOLERANCE


@pytest.mark.parametrize("order", ["split", "interleaved"])
def test_golden_triton(order):
    """The smallest case. Without a GPU it runs in Triton's interpreter."""
    check_golden(load_golden("tiny_r4_w48"), 2, order, backend_or_skip("triton"))


@pytest.mark.parametrize("name", NAMES)
def test_shortcut_changes_nothing(name):
    _, tensors, model = load_golden(name)
    features = tensors["image_features"][None]
    with_it = model(input_ids(tensors), visual_features=features).logits
    model.settings.skip_last_layer_outputs = False
    without = model(input_ids(tensors), visual_features=features).logits
    assert relative(with_it, without) < 1e-6


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("order", ["split", "interleaved"])
@pytest.mark.parametrize("name", TRAINED)
def test_loss_and_gradients(name, order, backend):
    _, tensors, model = load_golden(name)
    model.settings.order, model.settings.backend = order, backend
    ids = input_ids(tensors)
    labels = torch.full_like(ids, -100)
    labels[0, len(tensors["pre_ids"]) + 1 :] = tensors["post_ids"]
    features = tensors["image_features"].clone().requires_grad_()
    out = model(ids, visual_features=[features], labels=labels)
    assert relative(out.loss, tensors["train_loss"]) < TOLERANCE
    assert relative(out.logits[0].detach(), tensors["logits"]) < TOLERANCE
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients["image_features"] = features.grad
    expected = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    assert gradients.keys() == expected.keys()
    for key, truth in expected.items():
        assert relative(gradients[key], truth) < GRADIENT_TOLERANCE, key


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("order", ["split", "interleaved"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
class TestTinyCheckpoint:
    """From pixels to the answer, on a checkpoint that upstream's `save_pretrained` wrote."""

    @pytest.fixture
    def model(self, chunks, order, backend):
        model = tiny_model(ratio=4)
        model.settings.chunks_per_step, model.settings.order = chunks, order
        model.settings.backend = backend_or_skip(backend)
        return model

    def test_video(self, model):
        expected = tiny_expected()
        features = torch.cat(list(model.encode_pixels(expected["pixel_values"])))
        assert relative(features, expected["video_features"]) < TOLERANCE
        ids = input_ids(expected)
        out = model(ids, pixel_values=expected["pixel_values"])
        assert relative(out.logits[0], expected["video_logits"]) < TOLERANCE
        assert out.memory.vst_counts == [[0, 72, 72, 36, 0]]
        new = model.generate(
            ids, pixel_values=expected["pixel_values"], max_new_tokens=8, do_sample=False
        )
        assert new[0, : ids.shape[1]].tolist() == ids[0].tolist()
        assert new[0, ids.shape[1] :].tolist() == expected["video_generated_ids"].tolist()

    def test_image(self, model):
        expected = tiny_expected()
        pixels = expected["image_pixel_values"]
        out = model(input_ids(expected), pixel_values=pixels, image_sizes=[(390, 220)])
        assert relative(out.logits[0], expected["image_logits"]) < TOLERANCE
        assert out.memory.vst_counts == [[0, 72, 0]]
        features = torch.cat(list(model.encode_pixels(pixels[1:])))
        assert relative(features, expected["image_features"]) < TOLERANCE

    def test_watch_and_ask(self, model):
        expected = tiny_expected()
        memory = model.watch(input_ids=expected["pre_ids"], pixel_values=expected["pixel_values"])
        for _ in range(2):  # the first answer leaves no trace
            answer = memory.ask(expected["post_ids"], max_new_tokens=8)
            assert answer.tolist() == expected["video_generated_ids"].tolist()


def test_all_goldens_are_here():
    assert len(NAMES) == 5
