"""Estimates of `vxl plan` against the needs of a real model."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from examples.demo import demo_model
from vxl_cli.estimate import count_parameters, estimate_video, released_config
from vxl_kernels import _ext
from vxl_model import VideoXLConfig

pytestmark = pytest.mark.skipif(_ext.extension is None, reason="no compiled extension")


@pytest.mark.parametrize(("ratio", "share"), [(2, 70), (4, 54), (8, 37), (16, 23)])
def test_plan_of_the_released_model(ratio, share):
    """Attention's share of the language model's arithmetic over 2,048 frames, and the bytes of the
    cache, agree with published measurements of the geometry."""
    plan = estimate_video(released_config(), 2048, ratio)
    attention = plan.attention_flops / (plan.attention_flops + plan.dense_flops)
    assert round(100 * attention) == share
    gib = 2.0**30
    assert plan.raw_cache_bytes / gib == pytest.approx(15.8, abs=0.2)
    assert plan.cache_bytes / gib == pytest.approx(15.75 / ratio, abs=0.15)
    assert plan.weight_bytes == 2 * plan.parameters
    # Qwen2-7B 7.616 G, VST projections 28 * 3584 * 4608 + 28 * 4608 + 3584, projector, CLIP-L
    assert plan.parameters == pytest.approx(7.616e9 + 0.462e9 + 0.0165e9 + 0.3035e9, rel=1e-3)


def test_plan_is_what_watch_takes():
    """Parameters, tokens, the pool's bytes and FLOPs are those of a model that ran, FLOPs as
    counted by torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = demo_model()
    frames, ratio = 24, 8
    plan = estimate_video(model.config, frames, ratio, dtype=torch.float32, prefix=14)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.parameters == count_parameters(model.config)
    pixels = torch.zeros(frames, 3, 336, 336)
    prefix = torch.zeros(14, dtype=torch.long)
    # The counter knows plain products only. So CLIP's attention is computed by plain products, and
    # this package's attention is left out on both sides.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        memory = model.watch(pixel_values=pixels, input_ids=prefix, ratio=ratio)
    assert memory.visual_tokens == [plan.visual_tokens]
    assert memory.cached_tokens == [plan.cached_tokens]
    pool = memory.batch.states[0].sequence.cache.pages
    assert abs(pool.bytes - plan.cache_bytes) <= 2 * pool.page_bytes
    counted = counter.get_total_flops()
    assert counted == pytest.approx(plan.vision_flops + plan.dense_flops, rel=0.01)


def test_plan_command(run):
    code, out, err = run("plan", "--frames", 900, "--ratio", 8, "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    assert "129600 visual tokens" in out
    assert "KV cache" in out
    code, out, _ = run("plan", "--frames", 900, "--ratio", 8, "--model", "model", "--json")
    plan = json.loads(out)
    assert code == 0
    config = VideoXLConfig.from_pretrained("model")
    assert plan["parameters"] == count_parameters(config)
    assert plan["total_bytes"] == plan["weight_bytes"] + plan["cache_bytes"] + plan["step_bytes"]


def test_ratios_side_by_side(run):
    code, out, err = run("plan", "--frames", 2048, "--ratio", "2,8,16", "--free", "24G")
    assert (code, err) == (0, "")
    assert "on a device with 24.0 GiB" in out
    assert "ratio 2: warning: 147,790 positions, more than the 32,768" in out
    rows = [line.split() for line in out.splitlines() if line.strip()[:2] in ("2 ", "8 ", "16")]
    assert [row[0] for row in rows] == ["2", "8", "16"]
    assert "s" not in rows[0]  # nothing is timed for a device that is not here
    code, out, _ = run("plan", "--frames", 2048, "--ratio", "8,16", "--free", "80GiB", "--json")
    assert [json.loads(line)["free_bytes"] for line in out.splitlines()] == [80 * 2**30] * 2
    for wrong in ("80X", "-1G", "nan", "G"):
        code, out, err = run("plan", "--frames", 9, "--ratio", 8, f"--free={wrong}")
        assert (code, out) == (2, "")
        assert "--free" in err


# -- quantised weights and training -------------------------------------------------------------


@pytest.mark.parametrize(("bits", "share"), [("8bit", 0.5), ("4bit", 0.5 * 0.5625)])
def test_quantised_weights(bits, share):
    """Of the decoder's linear modules, 6.99 G of 8.40 G parameters; the rest is bfloat16."""
    config = released_config()
    whole, small = (
        estimate_video(config, 64, 8, quantize=quantize).weight_bytes for quantize in (None, bits)
    )
    hidden, kv, mlp = 3584, 512, 18944
    linear = 28 * (3 * hidden * hidden + 4 * hidden * kv + 3 * hidden * mlp)
    assert small == pytest.approx(whole - 2 * linear * (1 - share), rel=2e-3)


def test_plan_of_training_is_what_learns():
    """Counted against a model under adapters."""
    peft = pytest.importorskip("peft")
    from vxl_cli.training_memory import estimate_training
    from vxl_train.adapters import add_adapters
    from vxl_train.settings import TrainSettings

    for vst in ("full", "adapters"):
        model = demo_model()
        config, held = model.config, sum(p.numel() for p in model.parameters())
        wrapped = add_adapters(model, TrainSettings("finetune", peft={"r": 8}, vst=vst))
        assert isinstance(wrapped, peft.PeftModel)
        plan = estimate_training(config, 4, 8, train="lora", rank=8, vst=vst, dtype=torch.float32)
        learning = [p for p in model.parameters() if p.requires_grad]
        assert plan.learning == sum(p.numel() for p in learning)
        assert plan.weight_bytes == 4 * (held + plan.learning)
        optimizer = torch.optim.AdamW(learning)
        for p in learning:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        states = [x for s in optimizer.state.values() for x in s.values() if x.dim()]
        assert plan.optimizer_bytes == sum(x.numel() * 4 for x in states)


def test_plan_of_full_training():
    """Everything but the tower, in float32, and gradients and two numbers of AdamW for each."""
    from vxl_cli.training_memory import estimate_training

    config = released_config()
    plan = estimate_training(config, 128, 8)
    towerless = 7.616e9 + 0.462e9 + 0.0165e9
    assert plan.learning == pytest.approx(towerless, rel=1e-3)
    assert plan.gradient_bytes + plan.optimizer_bytes == 12 * plan.learning
    longer = estimate_training(config, 256, 8)
    assert 1.8 < longer.activation_bytes / plan.activation_bytes < 2
    with pytest.raises(ValueError, match="quantize: got '4bit' with train 'full'"):
        estimate_training(config, 128, 8, quantize="4bit")


def test_training_in_the_command(run):
    arguments = ["plan", "--frames", 128, "--ratio", "8,16", "--free", "24G", "--train", "lora"]
    code, out, err = run(*arguments, "--quantize", "4bit")
    assert (code, err) == (0, "")
    assert "bfloat16, decoder in 4bit, on a device" in out
    assert out.count("LoRA of rank 32") == 2
    code, out, _ = run(*arguments, "--json")
    found = [json.loads(line)["training"] for line in out.splitlines()]
    assert all(x["total_bytes"] > x["weight_bytes"] for x in found)
    code, _, err = run("plan", "--frames", 8, "--ratio", 8, "--train", "full", "--quantize", "8bit")
    assert code == 2
    assert "quantize: got '8bit' with train 'full'" in err
