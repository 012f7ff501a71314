"""The recipe with adapters: what learns, checkpoints, resuming, merging, what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

peft = pytest.importorskip("peft")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from helpers.model_goldens import relative
from helpers.training_place import QUICK, make_place, settings

from vxl_kernels import _ext
from vxl_model import VideoXLForConditionalGeneration
from vxl_train.run import train
from vxl_train.settings import TrainSettings
from vxl_train.trainer import read_log

pytestmark = pytest.mark.skipif(_ext.extension is None, reason="no compiled extension")
OWN = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
VST = [f"beacon_{name}_proj" for name in "qkv"]
IDS = torch.tensor([[5, 6, 7, -200, 9, 10]])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("adapters"))


def run(place, name, resume=False, **values):
    values = {"peft": {"r": 4}, "max_steps": 2, "learning_rate": 1e-2, **values}
    data = [place / "data.json"]
    return train(place / "model", data, place / name, settings(**values), resume=resume)


def logits(model):
    video = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        return model.eval()(input_ids=IDS, visual_features=[video], ratio=4).logits


def load(folder):
    return VideoXLForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("vst", ["full", "adapters"])
def test_a_run(place, vst):
    """The merged model is the base under the adapter. What is frozen is the base's, to the bit."""
    report = run(place, vst, vst=vst, gradient_checkpointing=True)
    assert report.steps == 2
    output = place / vst
    adapter, merged = output / "adapter", load(output / "model")
    together = peft.PeftModel.from_pretrained(load(place / "model"), adapter)
    assert relative(logits(together), logits(merged)) < 1e-5
    assert relative(logits(merged), logits(load(place / "model"))) > 1e-3
    config = json.loads((adapter / "adapter_config.json").read_text())
    whole = {"mm_projector", "beacon_embed_tokens", *(VST if vst == "full" else ())}
    assert set(config["modules_to_save"]) == whole
    assert set(config["target_modules"]) == {*OWN, *(() if vst == "full" else VST)}
    before, after = (load_file(x / "model" / "model.safetensors") for x in (place, output))
    assert before.keys() == after.keys()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {
        k
        for k in before
        if "vision_tower" not in k
        and (
            any(f".{name}.weight" in k for name in [*OWN, *VST]) or any(name in k for name in whole)
        )
    } - unread(vst)
    learning = load_file(adapter / "adapter_model.safetensors")
    assert sum(x.numel() for x in learning.values()) == report.learning
    assert not any("vision_tower" in name for name in learning)


def unread(vst):
    """The last layer's VSTs are kept as K and V, and nobody reads their own output."""
    return {f"model.layers.1.self_attn.beacon_q_proj.{x}" for x in ("weight", "bias")}


def test_it_resumes_to_the_same_adapter(place):
    """Checkpoints hold what learns and no more. The second half gives the same bits."""
    steps = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "vst": "adapters"}
    run(place, "whole", **steps)
    first = place / "whole"
    held = load_file(first / "checkpoint-2" / "model.safetensors")
    assert all("lora_" in name or "modules_to_save" in name for name in held)
    shutil.copytree(first, place / "again")
    again = place / "again"
    for gone in ("checkpoint-3", "model", "adapter"):
        shutil.rmtree(again / gone)
    assert run(place, "again", resume=True, **steps).resumed_from == 2
    losses = [[x["loss"] for x in read_log(x / "train_log.jsonl")] for x in (first, again)]
    assert losses[0] == losses[1]
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        a, b = (load_file(x / file) for x in (first, again))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match=r"resume: peft was .* and is .*'r': 8"):
        run(place, "again", resume=True, **{**steps, "peft": {"r": 8}})
    with pytest.raises(ValueError, match="resume: vst was 'adapters' and is 'full'"):
        run(place, "again", resume=True, **{**steps, "vst": "full"})


def test_without_merging(place):
    report = run(place, "alone", merge=False, max_steps=1)
    assert report.result == str(place / "alone" / "adapter")
    assert not (place / "alone" / "model").exists()
    with pytest.raises(ValueError, match=r"output: .* holds adapter; resume, or name another"):
        run(place, "alone", merge=False)


def test_the_vision_tower_gets_adapters_if_it_learns(place):
    run(place, "tower", train_vision_tower=True, max_steps=1, merge=False)
    names = load_file(place / "tower" / "adapter" / "adapter_model.safetensors")
    layers = {name.split(".layers.")[1][0] for name in names if "vision_tower" in name}
    tower = load(place / "model").model.vision_tower
    assert layers == {str(i) for i in range(tower.layers_run)}
    assert tower.layers_run < len(tower.vision_tower.vision_model.encoder.layers)


def test_a_configuration_in_a_file(place):
    lora = {"peft_type": "LORA", "r": 3, "target_modules": ["v_proj"], "lora_alpha": 5}
    (place / "adapter_config.json").write_text(json.dumps(lora))
    (place / "config.json").write_text(json.dumps({**QUICK, "peft": "adapter_config.json"}))
    assert TrainSettings.read(place / "config.json", "finetune").peft == lora
    (place / "config.yaml").write_text("peft: {r: 8, use_dora: true}\nvst: adapters\n")
    found = TrainSettings.read(place / "config.yaml", "finetune")
    assert (found.peft, found.vst) == ({"r": 8, "use_dora": True}, "adapters")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft": {"rank": 4}}, "peft: got the key 'rank', which a LoraConfig does not have"),
        ({"peft": {"r": 0}}, "peft: .*r.* should be a positive integer"),
        ({"peft": {"peft_type": "PREFIX_TUNING"}}, "peft_type: got 'PREFIX_TUNING', expected one"),
        ({"peft": {"peft_type": "MAGIC"}}, "peft_type: got 'MAGIC'"),
        ({"peft": [4]}, r"peft: got \[4\], expected keys and values"),
        ({"peft": {"r": 4}, "vst": "none"}, "vst: got 'none', expected 'full' or 'adapters'"),
        ({"vst": "adapters"}, "vst: got 'adapters' without peft"),
        ({"quantization": {"load_in_4bit": True}}, "quantization: got .* without peft"),
        ({"peft": {"r": 4}, "quantization": {"bits": 4}}, "got the key 'bits', unknown to"),
        ({"peft": {"r": 4}, "quantization": {}}, "expected load_in_4bit or load_in_8bit"),
        ({"peft": {"target_modules": ["nothing"]}}, "peft: No modules were targeted"),
    ],
)
def test_settings_that_cannot_be(place, values, message):
    with pytest.raises(ValueError, match=message):
        run(place, "refused", **{"peft": None, **values})
    assert not (place / "refused" / "run.json").exists()


def test_adapters_in_the_stage_that_aligns(place):
    with pytest.raises(ValueError, match="peft: got adapters in stage 'align'"):
        settings("align", peft={"r": 4})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vst", ["full", "adapters"])
def test_qlora(place, vst):
    """4 bit below. The result is merged into the base as it was before it was quantised."""
    pytest.importorskip("bitsandbytes")
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    run(place, f"q {vst}", vst=vst, quantization=quantization)
    merged = load(place / f"q {vst}" / "model")
    base, adapter = load(place / "model"), place / f"q {vst}" / "adapter"
    assert relative(logits(peft.PeftModel.from_pretrained(base, adapter)), logits(merged)) < 1e-5
    losses = [x["loss"] for x in read_log(place / f"q {vst}" / "train_log.jsonl")]
    plain = run(place, f"plain {vst}", vst=vst, merge=False, max_steps=1)
    assert losses[0] == pytest.approx(plain.loss, rel=0.1)
    assert losses[0] != plain.loss
