"""The visual encoder against the upstream implementation's numbers and its own contract."""

import pytest
import torch
from helpers.paths import CHECKPOINT
from safetensors.torch import load_file
from torch import nn

transformers = pytest.importorskip("transformers")

from vxl_model.decoder.vision_tower import VisionTower, encode_frames, pool_2x2, project_and_pool

TOLERANCE = 2e-5


def relative(x, truth):
    return float((x - truth).abs().max() / truth.abs().max())


def strip(weights, prefix):
    return {n.removeprefix(prefix): x for n, x in weights.items() if n.startswith(prefix)}


def tiny_config(**changes):
    config = transformers.CLIPVisionConfig.from_json_file(CHECKPOINT / "vision_config.json")
    return transformers.CLIPVisionConfig(**{**config.to_dict(), **changes})


@pytest.fixture(scope="module")
def golden():
    return load_file(CHECKPOINT / "expected.safetensors")


@pytest.fixture(scope="module")
def published():
    """Tower and projector with the checkpoint's weights, loaded by the released names."""
    weights = load_file(CHECKPOINT / "model.safetensors")
    tower = VisionTower(tiny_config()).eval()
    tower.load_state_dict(strip(weights, "model.vision_tower."), strict=True)
    projector = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
    projector.load_state_dict(strip(weights, "model.mm_projector."), strict=True)
    return tower, projector


def test_published_names(published):
    weights = strip(load_file(CHECKPOINT / "model.safetensors"), "model.vision_tower.")
    state = published[0].state_dict()
    assert set(state) == set(weights)
    assert all(torch.equal(state[n], weights[n]) for n in weights)


@torch.no_grad()
def test_video_features(published, golden):
    tower, projector = published
    pixels = golden["pixel_values"].float()
    tokens = torch.cat(list(encode_frames(pixels, tower, projector)))
    assert tokens.shape == (720, 64)
    assert relative(tokens, golden["video_features"]) < TOLERANCE
    # As upstream: projector first, then the pool.
    assert relative(pool_2x2(projector(tower(pixels))).flatten(0, 1), tokens) < TOLERANCE


@torch.no_grad()
def test_image_features(published, golden):
    """The tile of the whole picture, the first of the batch, is not used if there are other
    tiles."""
    tower, projector = published
    tokens = project_and_pool(tower(golden["image_pixel_values"].float()[1:]), projector)
    assert relative(tokens.flatten(0, 1), golden["image_features"]) < TOLERANCE


@torch.no_grad()
def test_another_layer_would_be_noticed(golden):
    weights = load_file(CHECKPOINT / "model.safetensors")
    pixels = golden["pixel_values"][:1].float()
    projector = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
    projector.load_state_dict(strip(weights, "model.mm_projector."))
    for wrong in (-1, -3, 1):
        tower = VisionTower(tiny_config(), select_layer=wrong).eval()
        tower.load_state_dict(strip(weights, "model.vision_tower."))
        tokens = project_and_pool(tower(pixels), projector).flatten(0, 1)
        assert relative(tokens, golden["video_features"][:144]) > 100 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("select", [-1, -2, 0, 2, -4])
def test_is_clips_hidden_state(select):
    config = tiny_config(image_size=28)
    tower = VisionTower(config, select_layer=select).eval()
    clip = transformers.CLIPVisionModel(config).eval()
    parts = getattr(clip, "vision_model", clip)
    parts.load_state_dict(strip(tower.state_dict(), "vision_tower.vision_model."), strict=False)
    pixels = torch.randn(3, 3, 28, 28)
    truth = clip(pixels, output_hidden_states=True).hidden_states[select][:, 1:]
    torch.testing.assert_close(tower(pixels), truth)


@torch.no_grad()
def test_later_layers_are_not_run():
    tower = VisionTower(tiny_config(image_size=28)).eval()
    ran = []
    for i, layer in enumerate(tower.vision_tower.vision_model.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    tower(torch.randn(1, 3, 28, 28))
    assert ran == [0, 1]


@torch.no_grad()
def test_frame_batches(published, golden):
    """A frame's features do not depend on its batch. A video is read no further than needed."""
    tower, projector = published
    pixels = golden["pixel_values"].float()
    whole = tower(pixels)
    tower.frame_batch = 2
    try:
        assert relative(tower(pixels), whole) < TOLERANCE
        reads = []

        def stream():
            for frame in pixels.split(3):
                reads.append(len(frame))
                yield frame

        batches = encode_frames(stream(), tower, projector)
        first = next(batches)
        assert first.shape == (2 * 144, 64)
        assert reads == [3]
        rest = list(batches)
        assert [len(x) // 144 for x in rest] == [1, 2]
        tokens = torch.cat([first, *rest])
        assert relative(tokens, golden["video_features"]) < TOLERANCE
    finally:
        tower.frame_batch = 16


def test_gradients_reach_the_patches():
    tower = VisionTower(tiny_config(image_size=28))
    tower.frame_batch = 2
    tower(torch.randn(3, 3, 28, 28)).square().sum().backward()
    clip = tower.vision_tower.vision_model
    assert clip.embeddings.patch_embedding.weight.grad.abs().max() > 0
    assert clip.embeddings.position_embedding.weight.grad.abs().max() > 0
    assert clip.encoder.layers[2].mlp.fc1.weight.grad is None


def test_half_precision():
    tower = VisionTower(tiny_config(image_size=28)).to(torch.bfloat16)
    assert tower(torch.randn(1, 3, 28, 28)).dtype == torch.bfloat16


def test_pool():
    features = torch.arange(16.0).reshape(1, 16, 1)
    assert pool_2x2(features).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    odd = torch.arange(25.0).reshape(1, 25, 1)
    assert pool_2x2(odd).flatten().tolist() == [3.0, 5.0, 13.0, 15.0]
    with pytest.raises(ValueError, match="side"):
        pool_2x2(torch.zeros(1, 15, 2))


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.zeros(2, 3, 27, 28), "pixel_values"),
        (torch.zeros(3, 28, 28), "pixel_values"),
        (torch.zeros(2, 28, 28, 3), "pixel_values"),
        (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), "frames_to_pixels"),
    ],
)
def test_refusals(pixels, words):
    with pytest.raises(ValueError, match=words):
        VisionTower(tiny_config(image_size=28))(pixels)


def test_layer_that_is_not_there():
    with pytest.raises(ValueError, match="select_layer: got -5"):
        VisionTower(tiny_config(image_size=28), select_layer=-5)


def test_zero_frames():
    tower = VisionTower(tiny_config(image_size=28))
    assert tower(torch.zeros(0, 3, 28, 28)).shape == (0, 4, 32)
