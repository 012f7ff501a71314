"""Training, generation and the vision tower, on a GPU where there is one, and on the CPU."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from helpers.model_goldens import (
    random_features,
    relative,
    small_model,
    tiny_expected,
    tiny_model,
)

from vxl_kernels import _ext
from vxl_model.decoder.qwen2 import TextNorm
from vxl_model.decoder.single_rows import norm_rows

pytestmark = pytest.mark.skipif(_ext.extension is None, reason="the cache needs the extension")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def models(device):
    return small_model().to(device), small_model()


IDS = torch.tensor([[5, 6, 7, -200, 9, 10, 11]])


def test_a_training_pass(device):
    features = random_features(100)[None]
    found = []
    for model in models(device):
        where = model.device
        model.train()
        ids = IDS.to(where)
        out = model(ids, visual_features=features.to(where), labels=ids.masked_fill(ids < 0, -100))
        out.loss.backward()
        grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        found.append((out.loss.item(), grads))
    (loss, grads), (want, want_grads) = found
    assert loss == pytest.approx(want, rel=1e-4)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        assert relative(grad, want_grads[name]) < 5e-3, name


def test_evaluation_under_autocast(device):
    """Labels without gradients: q, k and v have one dtype whatever their widths."""
    model, _ = models(device)
    ids, features = IDS.to(device), random_features(40)[None].to(device)
    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
        out = model(ids, visual_features=features, labels=ids.masked_fill(ids < 0, -100))
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("graphs", [False, True])
def test_generate_and_ask(graphs, device):
    if graphs and device != "cuda":
        pytest.skip("graphs are a GPU's")
    gpu, cpu = models(device)
    features = random_features(205)
    want = cpu.generate(IDS, visual_features=features[None], max_new_tokens=12, do_sample=False)
    gpu.settings.decode_graphs = graphs
    given = features[None].to(device)
    got = gpu.generate(IDS.to(device), visual_features=given, max_new_tokens=12, do_sample=False)
    assert got.tolist() == want.tolist()
    memory = gpu.watch(input_ids=IDS[0, :3].to(device), visual_features=given[0])
    for _ in range(2):
        answer = torch.as_tensor(memory.ask(IDS[0, 4:], max_new_tokens=12))
        assert answer.reshape(-1).tolist() == want[0, IDS.shape[1] :].tolist()


def test_vision_tower_and_pooling(device):
    model, expected = tiny_model().to(device), tiny_expected()
    with torch.no_grad():
        features = torch.cat(list(model.encode_pixels(expected["pixel_values"].to(device))))
    assert relative(features.cpu(), expected["video_features"].reshape(features.shape)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 3584, 3585])
def test_a_norm_of_rows_has_the_bits_of_each_alone(width, dtype, device):
    generator = torch.Generator().manual_seed(0)
    norm = TextNorm(width).to(device, dtype)
    x = torch.randn(33, 1, width, generator=generator).to(device, dtype)
    with torch.no_grad():
        got = norm_rows(norm, x)
        alone = [norm_rows(norm, row) for row in x.split(1)]
    assert torch.equal(got, torch.cat(alone))
    torch.testing.assert_close(got, norm(x), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_a_step_of_rows_has_the_bits_of_each_alone(device):
    model, _ = models(device)
    memory = model.watch(input_ids=IDS[0, :3].to(device), visual_features=random_features(205))
    ids = torch.arange(9, 26, device=device)[:, None]
    together = model.decode_step(ids, memory.forks(len(ids))).logits
    alone = [model.decode_step(row, memory.forks(1)).logits for row in ids.split(1)]
    assert torch.equal(together, torch.cat(alone))
