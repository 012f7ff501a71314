"""The recipe: what learns, what is saved, and losses that do not depend on the parts of a step."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from helpers.paths import CHECKPOINT
from helpers.training_place import make_place, samples, settings, talk

from vxl_kernels import _ext
from vxl_model import VideoXLForConditionalGeneration, training_forward
from vxl_train.data.samples import BadSampleError
from vxl_train.run import train
from vxl_train.trainer import read_log, set_trainable_parameters

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(_ext.extension is None, reason="no compiled extension"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("run"))


@pytest.fixture
def go(place, tmp_path):
    """Trains. Returns the report, the losses and the weights."""
    count = iter(range(100))

    def call(stage="finetune", data="data.json", **values):
        output = tmp_path / f"out{next(count)}"
        report = train(place / "model", [place / data], output, settings(stage, **values))
        losses = [line["loss"] for line in read_log(output / "train_log.jsonl")]
        return report, losses, load_file(output / "model" / "model.safetensors")

    return call


def changed(weights):
    before = load_file(CHECKPOINT / "model.safetensors")
    assert weights.keys() == before.keys()
    return {name for name, x in weights.items() if not torch.equal(x, before[name])}


# -- stages --------------------------------------------------------------------------------------


def test_align_moves_the_projector_alone(go, tmp_path):
    report, _, weights = go(
        "align", save_strategy="steps", save_steps=1, max_steps=6, save_total_limit=2
    )
    assert changed(weights) == {
        f"model.mm_projector.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")
    }
    assert report.learning == 32 * 64 + 64 + 64 * 64 + 64
    assert report.samples == {"image": 3, "images": 3, "video": 3, "text": 3}
    output = tmp_path / "out0"
    kept = sorted(path.name for path in output.glob("checkpoint-*"))
    assert kept == ["checkpoint-5", "checkpoint-6"]
    # Frozen weights are not written at every save.
    assert set(load_file(output / "checkpoint-6" / "model.safetensors")) == changed(weights)
    assert not (output / ".writing").exists()


def test_align_resumes(place, tmp_path):
    """Resumes from checkpoints that hold only the projector."""
    data, output = [place / "data.json"], tmp_path / "out"
    chosen = settings("align", save_strategy="steps", save_steps=2, max_steps=5)
    train(place / "model", data, output, chosen)
    log, weights = read_log(output / "train_log.jsonl"), output / "model" / "model.safetensors"
    want = load_file(weights)
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoint-5")
    said = []
    report = train(place / "model", data, output, chosen, resume=True, log=said.append)
    assert "resumed from checkpoint-4" in said
    assert (report.resumed_from, report.steps) == (4, 5)
    assert [x["loss"] for x in read_log(output / "train_log.jsonl")] == [x["loss"] for x in log]
    assert all(torch.equal(x, want[k]) for k, x in load_file(weights).items())
    # Killed while the result was written: nothing is trained again.
    shutil.rmtree(output / "model")
    report = train(place / "model", data, output, chosen, resume=True)
    assert (report.resumed_from, report.steps) == (5, 5)
    assert all(torch.equal(x, want[k]) for k, x in load_file(weights).items())
    finetune = settings(save_strategy="steps", save_steps=2, max_steps=5)
    with pytest.raises(ValueError, match=r"resume: .* expected the same run"):
        train(place / "model", data, output, finetune, resume=True)


def test_a_loss_that_is_not_finite_ends_the_run(go, monkeypatch):
    from vxl_model import training_forward

    real = training_forward.token_loss
    monkeypatch.setattr(training_forward, "token_loss", lambda *args: real(*args) * float("nan"))
    with pytest.raises(ValueError, match="loss: got nan in step 1"):
        go()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "grad_norm: got nan in step 1"),
        ({"logging_steps": 5}, "weights are not finite after step 1"),
        ({"logging_steps": 5, "save_strategy": "no"}, "weights are not finite after step 1"),
    ],
)
def test_a_gradient_that_is_not_finite_is_not_saved(go, monkeypatch, tmp_path, values, words):
    from vxl_model import training_forward

    real = training_forward.token_loss

    def spoiled(*args):
        loss = real(*args)
        loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    monkeypatch.setattr(training_forward, "token_loss", spoiled)
    with pytest.raises(ValueError, match=words):
        go(**{"save_strategy": "steps", "save_steps": 1, "max_steps": 1, **values})
    assert not [*tmp_path.glob("out0/checkpoint-*"), *tmp_path.glob("out0/model")]


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_it_learns(go, place, stage):
    """The model learns one sample by heart, with new ratios every time."""
    (place / "one.json").write_text(json.dumps([samples()[1]]))
    _, losses, _ = go(
        stage,
        "one.json",
        max_steps=-1,
        num_train_epochs=10,
        learning_rate=2e-2,
        per_device_train_batch_size=1,
    )
    assert losses[-1] < (0.9 if stage == "align" else 0.5) * losses[0]


def test_finetune_moves_everything_but_the_tower(go, tmp_path):
    _, losses, weights = go(max_steps=4)
    names = changed(weights)
    assert len(losses) == 4
    assert not any("vision_tower" in name for name in names)
    learn = {name for name in weights if "vision_tower" not in name}
    # Nothing reads the results of queries of the last layer's VSTs.
    assert learn - names == {
        f"model.layers.1.self_attn.beacon_q_proj.{k}" for k in ("weight", "bias")
    }
    # The result is a checkpoint in the released layout, with its tokenizer.
    published = json.loads((CHECKPOINT / "config.json").read_text())
    written = json.loads((tmp_path / "out0" / "model" / "config.json").read_text())
    version = {"transformers_version"}
    assert {k: v for k, v in written.items() if k not in version} == {
        k: v for k, v in published.items() if k not in version
    }
    model = VideoXLForConditionalGeneration.from_pretrained(tmp_path / "out0" / "model")
    assert model.loading_info["missing_keys"] == set()
    assert model.processor.stop_ids


def test_the_tower_learns_where_it_is_run(go):
    _, _, weights = go(train_vision_tower=True, vision_learning_rate=1e-4, max_steps=2)
    tower = {name for name in changed(weights) if "vision_tower" in name}
    assert any("encoder.layers.1." in name for name in tower)
    assert not any("encoder.layers.2." in name or "post_layernorm" in name for name in tower)


def test_learning_rates(place, tmp_path):
    from vxl_train.trainer import VideoXLTrainer

    chosen = settings(
        train_vision_tower=True,
        vision_learning_rate=1e-4,
        projector_learning_rate=2e-4,
        weight_decay=0.1,
    )
    model = VideoXLForConditionalGeneration.from_pretrained(place / "model")
    set_trainable_parameters(model, chosen)
    made = type("Data", (), {"samples": []})()
    arguments = chosen.training_arguments(str(tmp_path))
    optimizer = VideoXLTrainer(model, arguments, made, chosen).create_optimizer()
    found = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    core = model.model
    assert found[core.mm_projector[0].weight] == (2e-4, 0.1)
    assert found[core.mm_projector[0].bias] == (2e-4, 0.0)
    tower = core.vision_tower.vision_tower.vision_model
    assert found[tower.encoder.layers[0].mlp.fc1.weight] == (1e-4, 0.1)
    assert found[core.layers[0].self_attn.beacon_k_proj.weight] == (1e-3, 0.1)
    assert found[core.norm.weight] == (1e-3, 0.0)
    assert len(found) == sum(p.requires_grad for p in model.parameters())


# -- the same numbers, however a step is done ------------------------------------------------------


def close(a, b):
    """Sums are in another order for three steps of Adam. The difference is a few roundings of
    float32, on losses near 5 and on weights that moved by steps of 1e-3."""
    assert max(abs(x - y) for x, y in zip(a[1], b[1], strict=True)) < 1e-5
    assert max(float((a[2][k] - b[2][k]).abs().max()) for k in a[2]) < 2e-5


def test_gradient_checkpointing_gives_the_same_bits(go):
    plain, again = go(), go(gradient_checkpointing=True)
    assert plain[1] == again[1]
    assert all(torch.equal(plain[2][k], again[2][k]) for k in plain[2])


def test_accumulated_steps_are_one_step(go):
    """The mean is over the tokens of the whole step, whatever their number in a part."""
    close(go(), go(per_device_train_batch_size=1, gradient_accumulation_steps=2))


def test_workers_change_nothing(go):
    plain, workers = go(max_steps=2), go(max_steps=2, dataloader_num_workers=2)
    assert plain[1] == workers[1]


def test_samples_are_packed(go, monkeypatch):
    """A batch of four kinds of samples is one pass, whose losses are those of a pass each."""
    counts = []
    run = training_forward._run_pack

    def counted(encoder, sequences, *rest):
        counts.append(len(sequences))
        return run(encoder, sequences, *rest)

    monkeypatch.setattr(training_forward, "_run_pack", counted)
    monkeypatch.setattr(training_forward, "_PACK_ROWS", 10_000)
    batch = {"per_device_train_batch_size": 4, "max_steps": 1}
    packed, alone = go(**batch), go(**batch, packing=False)
    assert counts == [4, 1, 1, 1, 1]
    close(alone, packed)
    with pytest.raises(ValueError, match="packing: got 'yes', expected true or false"):
        settings(packing="yes")


def test_compiled(go):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = go(
        torch_compile=True, torch_compile_backend="aot_eager", gradient_checkpointing=True
    )
    counters = torch._dynamo.utils.counters
    # For all layers and lengths: the norm, and the rest before and after there are gradients; one
    # of them once more for passes of several sequences.
    assert counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]
    close(go(), compiled)


def test_bf16(go):
    plain, half = go(), go(bf16=True)
    for a, b in zip(plain[1], half[1], strict=True):
        assert a != b
        assert abs(a - b) < 0.03 * a  # bfloat16 has 8 bits
    _, losses, weights = go("align", bf16=True, dtype="bfloat16")
    assert weights["model.mm_projector.0.weight"].dtype == torch.float32
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    for a, b in zip(go("align")[1], losses, strict=True):
        assert abs(a - b) < 0.03 * a


# -- bad samples -----------------------------------------------------------------------------------


@pytest.fixture
def spoiled(place):
    """One bad sample that is found at the start, one when it is decoded."""
    (place / "late.mp4").write_bytes((place / "clip.mp4").read_bytes())
    records = [
        {"id": "gone", "image": "gone.png", "conversations": talk("<image>", "A")},
        {"id": "long", "conversations": talk("Hi" * 400, "A")},
        *samples(),
    ]
    (place / "spoiled.json").write_text(json.dumps(records))
    return "spoiled.json"


def test_skip(go, spoiled, tmp_path):
    report, losses, _ = go(data=spoiled, max_text_tokens=500, max_steps=-1, num_train_epochs=2)
    assert report.bad == {"missing file": 1, "too long": 1}
    assert report.steps == len(losses) == 14  # 13 samples, two per step, two epochs
    lines = [json.loads(x) for x in (tmp_path / "out0/bad_samples.jsonl").read_text().splitlines()]
    assert [(x["kind"], x["id"]) for x in lines] == [("missing file", "gone"), ("too long", "long")]


def test_stop(go, place, spoiled):
    records = json.loads((place / spoiled).read_text())[1:]
    late = "late.json"
    (place / late).write_text(json.dumps([records[1], records[0]]))  # one that can be used
    with pytest.raises(BadSampleError, match=r"sample gone: missing file"):
        go(data=spoiled, on_bad_sample="stop")
    with pytest.raises(BadSampleError, match=r"sample \w+: too long"):
        go(max_text_tokens=5, on_bad_sample="stop", dataloader_num_workers=1)
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    with pytest.raises(BadSampleError, match=r"sample long: too long"):
        go("finetune", late, max_text_tokens=500, on_bad_sample="stop", **one)
    with pytest.raises(ValueError, match=r"no sample that can be used"):
        go(max_text_tokens=5)
