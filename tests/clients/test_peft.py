"""Adapters of PEFT on every projection: in inference, over memories, in training."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from helpers.model_goldens import relative, tiny_model
from transformers import Trainer, TrainingArguments

from vxl_model import apply_vst_to_qwen2
from vxl_model.decoder.qwen2 import TextConfig, TextForCausalLM

IDS = torch.tensor([[5, 6, 7, -200, 9, 10]])
LABELS = IDS.masked_fill(IDS < 0, -100)
ASK = torch.tensor([9, 10, 11])
OWN = ["q_proj", "k_proj", "v_proj"]
VST = [f"beacon_{name}" for name in OWN]
REST = ["o_proj", "gate_proj", "up_proj", "down_proj"]
# The last layer's VSTs are kept as K and V, and nobody reads their own output.
UNREAD = "layers.1.self_attn.beacon_q_proj"


@pytest.fixture
def video():
    torch.manual_seed(0)
    return torch.randn(100, 64) * 0.1


def adapted(seed=1, **config):
    """A model with adapters whose deltas are not 0."""
    torch.manual_seed(seed)
    config = {"r": 4, "target_modules": OWN + VST + REST, "exclude_modules": TOWER, **config}
    model = peft.get_peft_model(tiny_model(ratio=4), peft.LoraConfig(**config)).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


TOWER = r".*vision_tower.*"


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("targets", [OWN, VST, OWN + VST + REST, "all-linear"])
def test_unmerged_equals_merged(video, targets, kind):
    """In float32, by logits relative to the largest; and the adapters change them by far more."""
    options = {"use_dora": kind == "dora", "use_rslora": kind == "rslora"}
    model = adapted(target_modules=targets, **options)
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        got, want = (m(input_ids=IDS, visual_features=[video]).logits for m in (model, merged))
        base = tiny_model(ratio=4)(IDS, visual_features=[video]).logits
    assert relative(got, want) < 1e-5
    assert relative(want, base) > 1e-3
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=IDS, visual_features=[video]).logits, base)


def test_memories_and_batches(video):
    model = adapted()
    merged = copy.deepcopy(model).merge_and_unload()
    said = []
    for one in (model, merged):
        memory = one.watch(input_ids=[5, 6], visual_features=video)
        fork = memory.fork()
        memory.append(visual_features=video[:30])
        said.append([x.ask(ASK, max_new_tokens=6).tolist() for x in (memory, fork)])
        batch = torch.cat([IDS, IDS])
        more = {"visual_features": [video, video[:40]], "max_new_tokens": 6, "do_sample": False}
        said[-1].append(one.generate(input_ids=batch, **more).tolist())
        beams = one.generate(input_ids=batch, **more, num_beams=2)
        said[-1].append(beams.tolist())
    assert said[0] == said[1]


def test_a_memory_belongs_to_its_adapter(video, tmp_path):
    model = adapted()
    model.watch(input_ids=[5], visual_features=video).save(tmp_path / "memory")
    want = model.load_memory(tmp_path / "memory").ask(ASK, max_new_tokens=4)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny_model(ratio=4), tmp_path / "adapter").eval()
    assert torch.equal(again.load_memory(tmp_path / "memory").ask(ASK, max_new_tokens=4), want)
    for other in (tiny_model(ratio=4), adapted(seed=2)):
        with pytest.raises(ValueError, match="the memory of another model"):
            other.load_memory(tmp_path / "memory")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapter_learns(video, checkpointing):
    model = adapted().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=IDS, visual_features=[video], labels=LABELS).loss.backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 2 * len(OWN + VST + REST)
    for name, weight in learning.items():
        assert weight.grad is not None, name
        assert bool(weight.grad.any()) is (UNREAD not in name), name
    model.zero_grad()
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    for name, weight in learning.items():
        assert weight.grad is not None, name
        assert bool(weight.grad.any()) is ("beacon" not in name), name


def test_gradients_are_those_of_the_merged_weight(video):
    """With W + s B A in place of W, dB = s dW A^T and dA = s B^T dW."""
    model = adapted()
    merged = copy.deepcopy(model).merge_and_unload().train().requires_grad_(True)
    model.train()
    for one in (model, merged):
        one(input_ids=IDS, visual_features=[video], labels=LABELS).loss.backward()
    for name in OWN + VST:
        layer = getattr(model.base_model.model.model.layers[0].self_attn, name)
        whole = getattr(merged.model.layers[0].self_attn, name).weight.grad
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scale = layer.scaling["default"]
        assert relative(b.grad, scale * whole @ a.detach().T) < 1e-4, name
        assert relative(a.grad, scale * b.detach().T @ whole) < 1e-4, name


def test_vsts_in_full_beside_adapters(video):
    """`modules_to_save` holds whole copies, which learn; the base stays."""
    saved = [*VST, "beacon_embed_tokens"]
    model = adapted(target_modules=OWN + REST, modules_to_save=saved).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    before = model(input_ids=IDS, visual_features=[video], labels=LABELS).loss
    before.backward()
    attention = model.base_model.model.model.layers[0].self_attn
    for name in VST:
        assert getattr(attention, name).modules_to_save["default"].weight.grad.any(), name
    embedding = model.base_model.model.model.beacon_embed_tokens
    assert embedding.modules_to_save["default"].weight.grad.any()
    optimizer.step()
    model.eval()
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        got, want = (m(input_ids=IDS, visual_features=[video]).logits for m in (model, merged))
    assert relative(got, want) < 1e-5
    weight = merged.model.layers[0].self_attn.beacon_q_proj.weight
    assert not torch.equal(weight, tiny_model().model.layers[0].self_attn.beacon_q_proj.weight)


def test_an_adapter_of_the_vst_embedding(video):
    model = adapted(target_modules=["beacon_embed_tokens"])
    merged = copy.deepcopy(model).merge_and_unload()
    for name, weight in model.named_parameters():
        if "lora_embedding" in name:
            torch.nn.init.normal_(weight)
    with torch.no_grad():
        got, was = (m(input_ids=IDS, visual_features=[video]).logits for m in (model, merged))
        want = copy.deepcopy(model).merge_and_unload()(IDS, visual_features=[video]).logits
    assert relative(got, want) < 1e-5
    assert relative(got, was) > 1e-3


def test_transformers_trainer(video, tmp_path):
    """All adapters move, and the saved adapter gives the trained model."""
    row = {"input_ids": IDS[0], "labels": LABELS[0], "visual_features": video}

    def collate(rows):
        batch = {k: torch.stack([r[k] for r in rows]) for k in ("input_ids", "labels")}
        return {**batch, "visual_features": [r["visual_features"] for r in rows]}

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=OWN + VST + REST, exclude_modules=TOWER)
    model = peft.get_peft_model(tiny_model(ratio=4), config)
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=3,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=[row] * 6, data_collator=collate)
    trainer.train()
    for name, weight in model.named_parameters():
        if "lora_B" in name and UNREAD not in name:
            assert weight.any(), name
    trainer.save_model(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny_model(ratio=4), tmp_path / "adapter").eval()
    with torch.no_grad():
        got, want = (
            m.eval()(input_ids=IDS, visual_features=[video]).logits for m in (again, model)
        )
    assert torch.equal(got, want)


def test_apply_refuses_adapters():
    """Neither dropped nor taken for the model's own weights."""
    config = TextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
    )
    for targets in (["q_proj"], ["down_proj"], ["embed_tokens"]):
        plain = TextForCausalLM(config).eval()
        lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        wrapped = peft.get_peft_model(plain, lora)
        with pytest.raises(ValueError, match="model: got PeftModel"):
            apply_vst_to_qwen2(wrapped)
        with pytest.raises(ValueError, match=f"an adapter of PEFT at model.*{targets[0]}"):
            apply_vst_to_qwen2(plain)
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            want = plain(ids).logits
            watching = apply_vst_to_qwen2(wrapped.merge_and_unload(), beacon_window=16)
            assert relative(watching(ids).logits, want) < 1e-5
