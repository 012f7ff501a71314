"""Checkpoints: reading and writing the released layout, shards, `.bin`, a plain Qwen2, Auto
classes."""

import json
import re
import shutil

import pytest
import torch
from helpers.model_goldens import TINY, TOLERANCE, input_ids, relative, tiny_expected, tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vxl_model import VideoXLConfig, VideoXLForConditionalGeneration, apply_vst_to_qwen2

pytestmark = pytest.mark.core


def read(path):
    return json.loads(path.read_text())


def copy_tiny(folder, tensors=None, **config):
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "vision_config.json", "generation_config.json"):
        shutil.copy(TINY / name, folder / name)
    if config:
        changed = {**read(folder / "config.json"), **config}
        (folder / "config.json").write_text(json.dumps(changed))
    tensors = load_file(TINY / "model.safetensors") if tensors is None else tensors
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def same_weights(path, truth=TINY):
    a, b = load_file(path / "model.safetensors"), load_file(truth / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_round_trip_is_exact(tmp_path):
    model = tiny_model()
    assert not any(model.loading_info.values())
    model.save_pretrained(tmp_path)
    same_weights(tmp_path)
    for name in ("config.json", "vision_config.json"):
        assert read(tmp_path / name) == read(TINY / name)
    again = VideoXLForConditionalGeneration.from_pretrained(tmp_path)
    assert again.generation_config.eos_token_id == 127
    again.save_pretrained(tmp_path / "twice")
    same_weights(tmp_path / "twice")
    assert read(tmp_path / "twice" / "config.json") == read(TINY / "config.json")


def test_a_changed_configuration_is_written(tmp_path):
    model = tiny_model()
    model.config.beacon_ratio = [16]
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    written, before = read(tmp_path / "config.json"), read(TINY / "config.json")
    differ = {k for k in written.keys() | before.keys() if written.get(k) != before.get(k)}
    assert differ == {"beacon_ratio", "torch_dtype"}


def test_shards_and_dtype(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model = VideoXLForConditionalGeneration.from_pretrained(tmp_path, device_map="cpu", ratio=4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = tiny_expected()
    logits = model(input_ids(expected), pixel_values=expected["pixel_values"]).logits
    # bf16 weights and activations through two layers; angles stay float32
    assert relative(logits[0].float(), expected["video_logits"]) < 0.05
    assert model.model.inv_freq().dtype == torch.float32


def test_bin_goes_through_weights_only(tmp_path):
    copy_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model = VideoXLForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    with pytest.raises(ValueError, match="weights_only"):
        VideoXLForConditionalGeneration.from_pretrained(tmp_path, weights_only=False)

    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("code from a checkpoint ran",))

    torch.save({**tensors, "evil": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        VideoXLForConditionalGeneration.from_pretrained(tmp_path)


def test_missing_and_unexpected_keys_are_reported(tmp_path):
    tensors = load_file(TINY / "model.safetensors")
    extra = {**tensors, "model.image_newline": torch.zeros(64)}
    copy_tiny(tmp_path, extra)
    model, info = VideoXLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert set(info["unexpected_keys"]) == {"model.image_newline"}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    copy_tiny(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        VideoXLForConditionalGeneration.from_pretrained(tmp_path)
    assert model.loading_info is info


@pytest.mark.parametrize(
    "lost", ["layers.1.self_attn.beacon_k_proj.weight", "beacon_embed_tokens.weight"]
)
def test_a_checkpoint_that_lost_some_vst_weights_is_refused(tmp_path, lost):
    tensors = load_file(TINY / "model.safetensors")
    del tensors[f"model.{lost}"]
    folder = copy_tiny(tmp_path / "lost", tensors)
    with pytest.raises(ValueError, match=rf"checkpoint: got .*lost' without model\.{lost}"):
        VideoXLForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_file_is_named(tmp_path, sharded, damage):
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB" if sharded else "1GB")
    *_, last = sorted(tmp_path.glob("*.safetensors"))
    data = last.read_bytes()
    wrong = {"cut": data[: len(data) // 2], "header": b"x" * 64 + data[64:], "empty": b""}[damage]
    last.write_bytes(wrong)
    with pytest.raises(ValueError, match=rf"checkpoint: .*{last.name} is damaged or incomplete"):
        VideoXLForConditionalGeneration.from_pretrained(tmp_path)


NO_OBJECT = {
    "empty": b"",
    "cut": b'{"a": [1, ',
    "latin1": b'{"a": "caf\xe9"}',
    "list": b"[]",
    "null": b"null",
    "deep": b'{"a":' * 100_000,
}


def damage_json(file, kind):
    """A folder, a link to nothing, or one of NO_OBJECT takes the place of the file."""
    file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "lost link":
        file.symlink_to("nowhere")
    else:
        file.write_bytes(NO_OBJECT[kind])


@pytest.mark.parametrize("kind", [*NO_OBJECT, "folder", "lost link"])
def test_a_damaged_json_file_is_named(tmp_path, kind):
    """Those that transformers would ignore too."""
    index = "model.safetensors.index.json"
    for name in ("config.json", "vision_config.json", "generation_config.json", index):
        folder = copy_tiny(tmp_path / name)
        if name == index:
            (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        damage_json(folder / name, kind)
        with pytest.raises(ValueError, match=re.escape(f"{folder / name}: ")):
            VideoXLForConditionalGeneration.from_pretrained(folder)
        if name in ("config.json", "vision_config.json"):
            with pytest.raises(ValueError, match=re.escape(f"{folder / name}: ")):
                VideoXLConfig.from_pretrained(folder)


def test_an_index_without_files(tmp_path):
    folder = copy_tiny(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: got no weight_map"):
        VideoXLForConditionalGeneration.from_pretrained(folder)


def test_a_configuration_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"configuration: .*'hidden_size' expected int"):
        VideoXLConfig.from_pretrained(copy_tiny(tmp_path / "text", hidden_size="many"))
    wide = copy_tiny(tmp_path / "wide", intermediate_size=72)
    with pytest.raises(ValueError, match=r"checkpoint: got .*wide' with weights of other shapes"):
        VideoXLForConditionalGeneration.from_pretrained(wide)


def test_a_checkpoint_without_vst_weights(tmp_path):
    tensors = load_file(TINY / "model.safetensors")
    copy_tiny(tmp_path, {k: v for k, v in tensors.items() if "beacon" not in k})
    model = VideoXLForConditionalGeneration.from_pretrained(tmp_path)
    check_vst_start(model)


def check_vst_start(model):
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            own = getattr(layer.self_attn, name)
            vst = getattr(layer.self_attn, f"beacon_{name}")
            assert torch.equal(own.weight, vst.weight)
            assert torch.equal(own.bias, vst.bias)
    eos = model.config.eos_token_id
    vst = model.model.beacon_embed_tokens.weight
    assert torch.equal(vst[0], model.model.embed_tokens.weight[eos])


def qwen2(**options):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=7,
        initializer_range=0.3,
        **options,
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(bias, std=0.3)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_qwen2_checkpoint(tmp_path, tied):
    plain = qwen2(tie_word_embeddings=tied)
    plain.save_pretrained(tmp_path)
    model = VideoXLForConditionalGeneration.from_pretrained(tmp_path)
    check_vst_start(model)
    check_text(model, plain)
    model.save_pretrained(tmp_path / "vst")
    assert read(tmp_path / "vst" / "config.json")["architectures"] == ["LlavaQwenForCausalLM"]
    again = VideoXLForConditionalGeneration.from_pretrained(tmp_path / "vst")
    check_text(again, plain)


def check_text(model, plain):
    ids = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = plain(ids).logits
        assert relative(model(ids).logits, want) < TOLERANCE
    model.train()
    assert relative(model(ids).logits.detach(), want) < TOLERANCE
    model.eval()
    new = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert (
        new.tolist()
        == plain.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None).tolist()
    )


@pytest.mark.parametrize("tied", [False, True])
def test_apply_vst_to_qwen2(tied):
    plain = qwen2(tie_word_embeddings=tied)
    model = apply_vst_to_qwen2(plain, beacon_window=48, beacon_ratio=4)
    assert isinstance(model, VideoXLForConditionalGeneration)
    assert not model.training
    check_vst_start(model)
    check_text(model, plain)  # which is still a Qwen2
    assert type(plain) is Qwen2ForCausalLM
    shared = {id(p) for p in plain.parameters()}
    apart = {name for name, p in model.named_parameters() if id(p) not in shared}
    assert len(shared) == len(list(model.parameters())) - len(apart)
    assert all("beacon" in name for name in apart)
    assert not any(p.is_meta for p in model.parameters())
    memory = model.watch(input_ids=[1, 2], visual_features=torch.randn(100, 64))
    assert memory.vst_counts == [[0, 12, 12, 1]]
    for other in (model, plain.model):
        with pytest.raises(
            ValueError, match=f"model: got {type(other).__name__}, expected Qwen2For"
        ):
            apply_vst_to_qwen2(other)


def test_auto_classes():
    assert type(AutoConfig.from_pretrained(TINY)) is VideoXLConfig
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto.from_pretrained(TINY)) is VideoXLForConditionalGeneration


def test_the_released_shape_is_known():
    """The released checkpoint only names its tower."""
    config = VideoXLConfig(mm_vision_tower="openai/clip-vit-large-patch14-336")
    clip = config.clip_config()
    assert (clip.hidden_size, clip.num_hidden_layers, clip.image_size) == (1024, 24, 336)
    with pytest.raises(ValueError, match="google/siglip"):
        VideoXLConfig(mm_vision_tower="google/siglip").clip_config()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beacon_attn": "step-expansion"}, "beacon_attn"),
        ({"beacon_param": ["q"]}, "beacon_param"),
        ({"beacon_pos": "append"}, "beacon_pos"),
        ({"beacon_stride": 144}, "beacon_stride"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
        ({"mm_spatial_pool_mode": "max"}, "mm_spatial_pool_mode"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope"),
        ({"model_type": "llama"}, "llama"),
        ({"num_hidden_layers": 3}, "layers.2"),
    ],
)
def test_other_models_are_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        VideoXLForConditionalGeneration.from_pretrained(copy_tiny(tmp_path, **change))


def test_a_file_that_nothing_reads_may_be_damaged(tmp_path):
    folder = copy_tiny(tmp_path)
    (folder / "pytorch_model.bin.index.json").write_text("{")
    assert VideoXLForConditionalGeneration.from_pretrained(folder)


def test_weights_from_memory():
    given = VideoXLForConditionalGeneration.from_pretrained(TINY)
    made = VideoXLForConditionalGeneration.from_pretrained(
        None, config=given.config, state_dict=given.state_dict()
    )
    want = given.state_dict()
    assert all(torch.equal(x, want[name]) for name, x in made.state_dict().items())
