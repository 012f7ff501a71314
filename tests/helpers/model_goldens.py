"""Models and numbers of the upstream implementation, for the tests of `vxl_model`."""

import json

import torch
from helpers.paths import CHECKPOINT as TINY
from helpers.paths import GOLDENS as FOLDER
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from vxl_kernels import reference
from vxl_model import VideoXLConfig, VideoXLForConditionalGeneration

GOLDENS = sorted(FOLDER.glob("*.safetensors"))
TOLERANCE = 2e-5  # relative, what an independent implementation reached in float32
IMAGE = torch.tensor([-200])


def relative(x, truth):
    """Largest difference divided by the largest number. If all are 0, the difference itself."""
    scale = float(truth.detach().abs().max())
    return float((x - truth).detach().abs().max()) / (scale or 1.0)


def load_golden(name):
    """The geometry, the tensors and the model of a golden."""
    path = FOLDER / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = VideoXLConfig(
        hidden_size=case["hidden"],
        intermediate_size=case["intermediate"],
        num_hidden_layers=case["layers"],
        num_attention_heads=case["heads"],
        num_key_value_heads=case["kv_heads"],
        vocab_size=case["vocab"],
        rms_norm_eps=case["rms_norm_eps"],
        rope_theta=case["rope_theta"],
        beacon_window=case["window"],
        beacon_ratio=case["ratio"],
    )
    model = VideoXLForConditionalGeneration(config).eval()
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    model.load_state_dict(weights, strict=True)
    return case, tensors, model


def small_model():
    """The model of a golden: ratio 4, windows of 48 tokens."""
    return load_golden("tiny_r4_w48")[2]


def wide_model(dtype=torch.float32):
    """Widths that are not a multiple of a vector, and an MLP of more values than a thread takes."""
    torch.manual_seed(0)
    config = VideoXLConfig(
        vocab_size=101, hidden_size=80, intermediate_size=1234, num_hidden_layers=2,
        num_attention_heads=5, num_key_value_heads=1, beacon_window=48, beacon_ratio=[4],
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = VideoXLForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "embed" not in name:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model.to(dtype)


def random_features(tokens, seed=1):
    """Visual features `(tokens, 64)` for `small_model`."""
    return torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed)) * 0.1


def input_ids(tensors):
    return torch.cat([tensors["pre_ids"], IMAGE, tensors["post_ids"]])[None]


def kept_of_golden(case, tensors, layer, name):
    """K or V that the upstream code caches for a whole sequence, `(tokens, kv_heads, head_dim)`. It
    keeps K unrotated. Here K is rotated to its final position."""
    parts = [tensors[f"{kind}_{name}.{layer}"] for kind in ("sink", "vst", "raw")]
    kept = torch.cat(parts, dim=1).transpose(0, 1)
    if name == "key":
        dim = case["head_dim"]
        inv_freq = 1.0 / (case["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim))
        kept = reference.rotate(kept, torch.arange(len(kept)), inv_freq)
    return kept


def tiny_model(**options):
    return VideoXLForConditionalGeneration.from_pretrained(TINY, **options)


def tiny_expected():
    return load_file(TINY / "expected.safetensors")
