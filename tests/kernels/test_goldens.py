"""The upstream implementation's numbers, by this package's operators.

tests/goldens/*.safetensors hold weights, inputs, logits and cached K/V of the upstream code on
small random models. The metadata key `case` is the geometry.
"""

import json

import numpy as np
import pytest
import torch
from helpers.paths import GOLDENS as FOLDER
from helpers.upstream_decoder import Decoder
from safetensors import safe_open

from vxl_kernels import reference

GOLDENS = sorted(FOLDER.glob("*.safetensors"))
TOLERANCE = 2e-5  # relative, what an independent implementation reached in float32


def load(path):
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        return case, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def window_ratios(case):
    """Ratio of each window: the fixed one, or upstream's draw from a list."""
    full, rest = divmod(case["num_image_tokens"], case["window"])
    windows = [case["window"]] * full + [rest] * (rest > 0)
    if isinstance(case["ratio"], int):
        return [case["ratio"]] * len(windows)
    draw = np.random.default_rng(42)
    return [int(draw.choice([r for r in case["ratio"] if r <= n and n % r == 0])) for n in windows]


def relative(x, truth):
    return float((x - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
@pytest.mark.parametrize(
    ("chunks", "order", "backend"),
    [
        (1, "split", "cpu"),
        (3, "split", "cpu"),
        (2, "interleaved", "cpu"),
        (3, "split", "reference"),
        (1, "interleaved", "reference"),
    ],
)
def test_golden(path, chunks, order, backend):
    case, tensors = load(path)
    weights = {n.removeprefix("weight."): x for n, x in tensors.items() if n.startswith("weight.")}
    ratios = window_ratios(case)
    assert case["beacon_sizes"] == [
        0,
        *[
            min(case["window"], case["num_image_tokens"] - i * case["window"]) // r
            for i, r in enumerate(ratios)
        ],
        0,
    ]
    model = Decoder(case, weights, capacity=600, backend=backend)
    model.run(model.embed(tensors["pre_ids"]))
    model.watch(tensors["image_features"], ratios, chunks, order)
    logits = model.logits(tensors["post_ids"])
    assert relative(logits, tensors["logits"]) < TOLERANCE

    kept = torch.arange(int(model.cache_seqlens))
    for layer in range(case["layers"]):
        for name, cache in (("key", model.k_cache), ("value", model.v_cache)):
            # Upstream's cache keeps K unrotated. Ours keeps it rotated to its final position.
            parts = [tensors[f"{kind}_{name}.{layer}"] for kind in ("sink", "vst", "raw")]
            golden = torch.cat(parts, dim=1).transpose(0, 1)
            if name == "key":
                golden = reference.rotate(golden, kept, model.inv_freq)
            assert relative(cache[layer, 0, kept], golden) < TOLERANCE

    step = logits[-1:]
    for expected_id, expected in zip(
        tensors["generated_ids"], tensors["generated_logits"], strict=True
    ):
        assert int(step[-1].argmax()) == int(expected_id)
        step = model.logits(expected_id[None])
        assert relative(step[0], expected) < TOLERANCE


def test_all_goldens_are_here():
    assert len(GOLDENS) == 5
