"""Quantised weights on all linear modules, those of q, k and v and of the VSTs included."""

import copy
import logging

import numpy as np
import pytest
import torch
from helpers.paths import CHECKPOINT

transformers = pytest.importorskip("transformers")

from vxl_model import VideoXLConfig, VideoXLForConditionalGeneration, apply_vst_to_qwen2
from vxl_model.decoder.qwen2 import TextConfig, TextForCausalLM
from vxl_model.inputs.processing import VideoXLProcessor

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
GEOMETRY = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
IDS = torch.tensor([[5, 6, 7, -200, 8, 9, 10]])
ASK = torch.tensor([8, 9, 10])
TEXT = torch.randint(3, 128, (1, 200), generator=torch.Generator().manual_seed(0))
NAMES = [f"{prefix}{name}_proj" for prefix in ("", "beacon_") for name in "qkv"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A Video-XL and a stock Qwen2 of one size, with weights that keep activations near 1."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    video = VideoXLForConditionalGeneration(
        VideoXLConfig(**GEOMETRY, beacon_window=288, beacon_ratio=[8])
    )
    text = TextForCausalLM(TextConfig(**GEOMETRY))
    for model, name in ((video, "video"), (text, "text")):
        for weight in model.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        model.save_pretrained(folder / name)
    return folder


def bitsandbytes(bits):
    def quantise(kind, place, **more):
        pytest.importorskip("bitsandbytes")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **more)
        return kind.from_pretrained(place, quantization_config=config, device_map="cpu")

    return quantise


def torchao(kind, place):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = kind.from_pretrained(place)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def quanto(kind, place):
    module = pytest.importorskip("optimum.quanto")
    model = kind.from_pretrained(place)
    module.quantize(model, weights=module.qint8)
    module.freeze(model)
    return model


WAYS = {
    "bitsandbytes 4 bit": bitsandbytes(4),
    "bitsandbytes 8 bit": bitsandbytes(8),
    "torchao int8": torchao,
    "quanto int8": quanto,
}
every_way = pytest.mark.parametrize("way", WAYS)


def features(tokens=700):
    return torch.randn(tokens, 128, generator=torch.Generator().manual_seed(1))


def error(got, want):
    return float((got - want).norm() / want.norm())


@torch.no_grad()
def logits(model):
    if isinstance(model, TextForCausalLM):
        return model(TEXT).logits
    return model(IDS, visual_features=[features()]).logits


@every_way
def test_it_costs_what_it_costs_a_qwen2(places, way):
    """The relative error of the logits is at most 1.5 times a stock Qwen2's of that size."""
    lost = {}
    for kind, name in ((TextForCausalLM, "text"), (VideoXLForConditionalGeneration, "video")):
        quantised = WAYS[way](kind, places / name)
        lost[name] = error(logits(quantised), logits(kind.from_pretrained(places / name)))
    attention = quantised.model.layers[0].self_attn
    for name in NAMES:
        module = getattr(attention, name)
        assert type(module) is not torch.nn.Linear or type(module.weight) is not torch.nn.Parameter
    print(way, lost)
    assert 0 < lost["video"] <= 1.5 * lost["text"]


@every_way
def test_memories(places, way, tmp_path):
    """Asked in any order, forked, in a file, and one of other weights is refused."""
    model = WAYS[way](VideoXLForConditionalGeneration, places / "video")
    memory = model.watch(input_ids=[5, 6], visual_features=features())
    said = memory.ask(ASK, max_new_tokens=5)
    memory.save(tmp_path / "memory")
    again = WAYS[way](VideoXLForConditionalGeneration, places / "video")
    assert torch.equal(again.load_memory(tmp_path / "memory").ask(ASK, max_new_tokens=5), said)
    assert torch.equal(memory.fork().ask(ASK, max_new_tokens=5), said)
    plain = VideoXLForConditionalGeneration.from_pretrained(places / "video")
    with pytest.raises(ValueError, match="the memory of another model"):
        plain.load_memory(tmp_path / "memory")
    two = {"visual_features": [features(), features(300)], "max_new_tokens": 4, "do_sample": False}
    both = model.generate(torch.cat([IDS, IDS]), **two)
    for row, x in zip(both, two.pop("visual_features"), strict=True):
        alone = model.generate(IDS, visual_features=[x], max_new_tokens=4, do_sample=False)
        assert torch.equal(row, alone[0])


@every_way
def test_a_quantised_qwen2_starts_to_watch(places, way):
    """Its VSTs start as copies of what the quantised projections compute."""
    plain = WAYS[way](TextForCausalLM, places / "text")
    model = apply_vst_to_qwen2(plain, beacon_window=288, beacon_ratio=8)
    x = torch.randn(4, 128)
    for layer in model.model.layers:
        for name in "qkv":
            own, vst = (getattr(layer.self_attn, f"{p}{name}_proj") for p in ("", "beacon_"))
            assert type(vst) is torch.nn.Linear
            assert error(vst(x), own(x)) < 0.02  # 8 bit products round their input too
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_qwen2_checkpoint_is_quantised_as_it_loads(places, bits):
    """VST projections that are quantised too are copies of the modules; others hold their own."""
    load = WAYS[f"bitsandbytes {bits} bit"]
    kept = ["lm_head", *NAMES[3:]]
    for skipped in ([], kept):
        more = {"llm_int8_skip_modules": skipped} if skipped else {}
        model = load(VideoXLForConditionalGeneration, places / "text", **more)
        x = torch.randn(4, 128)
        for layer in model.model.layers:
            for name in "qkv":
                own, vst = (getattr(layer.self_attn, f"{p}{name}_proj") for p in ("", "beacon_"))
                assert (type(vst) is torch.nn.Linear) is bool(skipped)
                assert error(vst(x), own(x)) <= (0.02 if skipped else 0)


def test_qlora(places):
    """4 bit below, adapters above: they learn, the base stays."""
    peft = pytest.importorskip("peft")
    model = WAYS["bitsandbytes 4 bit"](VideoXLForConditionalGeneration, places / "video")
    model = peft.prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    rest = ["o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=NAMES + rest)
    model = peft.get_peft_model(model, config).train()
    before = copy.deepcopy(
        model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    )
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(learning.values(), 1e-2)
    labels, losses = IDS.masked_fill(IDS < 0, -100), []
    for _ in range(4):
        loss = model(input_ids=IDS, visual_features=[features()], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, weight in learning.items():
        assert weight.grad is not None, name
        if "lora_B" in name and "layers.1.self_attn.beacon_q_proj" not in name:
            assert weight.any(), name
    after = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(after, before)


def test_four_bits_where_rows_are_not_whole_blocks():
    """bitsandbytes alone fails on such layers, on a CPU with AVX512_BF16."""
    model = bitsandbytes(4)(VideoXLForConditionalGeneration, CHECKPOINT)
    assert any(x.in_features % 64 for x in model.modules() if type(x).__name__ == "Linear4bit")
    frames = np.random.default_rng(0).integers(0, 256, (3, 336, 336, 3), np.uint8)
    model.processor = VideoXLProcessor.from_pretrained(CHECKPOINT)
    assert len(model.watch(frames, input_ids=[5]).ask(ASK, max_new_tokens=3)) == 3
