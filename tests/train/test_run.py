"""The recipe: what learns, what is saved, losses that do not depend on the parts of a step, and the
command line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from helpers.training_place import CHECKPOINT, make_place, samples, settings, talk

from vxl_cli.main import main as vxl
from vxl_kernels import _ext
from vxl_model import VideoXLForConditionalGeneration
from vxl_train.cli import main
from vxl_train.data.samples import BadSampleError
from vxl_train.run import train
from vxl_train.settings import TrainSettings
from vxl_train.trainer import last_checkpoint, read_log, set_trainable_parameters

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


# -- settings and command line ---------------------------------------------------------------------


def test_settings_from_a_file(tmp_path):
    text = "learning_rate: 1e-5\nratio: [2, 8]\nframes: 16\nwarmup_steps: 0.1\nuse_cpu: true\n"
    (tmp_path / "c.yaml").write_text(text)
    read = TrainSettings.read(tmp_path / "c.yaml", "finetune", on_bad_sample="stop")
    assert (read.ratio, read.frames, read.on_bad_sample) == ([2, 8], 16, "stop")
    arguments = read.training_arguments(str(tmp_path))
    assert arguments.learning_rate == 1e-5
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.get_warmup_steps(200) == 20
    assert arguments.report_to == []
    (tmp_path / "c.json").write_text('{"frames": 3}')
    assert TrainSettings.read(tmp_path / "c.json", "align").frames == 3


def test_shipped_settings(tmp_path):
    from vxl_train.cli import CONFIGS

    for stage in ("align", "finetune"):
        read = TrainSettings.read(CONFIGS / f"{stage}.yaml", stage, use_cpu=True)
        assert read.training_arguments(str(tmp_path)).get_warmup_steps(1000) == 30


@pytest.fixture
def command(place, capsys, monkeypatch):
    monkeypatch.chdir(place)

    def call(*arguments):
        code = main(["run", *map(str, arguments)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"data": "train_log.jsonl"}, "data: got run/train_log.jsonl, which the run in run would"),
        ({"data": "checkpoint-1/data.json"}, "data: got run/checkpoint-1/data.json, which"),
        ({"data": "model/data.json"}, "data: got run/model/data.json, which the run in run would"),
        ({"config": "run.json"}, "config: got run/run.json, which the run in run would replace"),
        ({"config": ".writing/c.json"}, "config: got run/.writing/c.json, which the run in run"),
        ({"root": "checkpoint-1"}, "root: got run/checkpoint-1, which the run in run would"),
        ({"link": "bad_samples.jsonl"}, "data: got data.json, which the run in run would replace"),
        ({"media": "checkpoint-1"}, "output: run holds checkpoint-1, which no run wrote"),
    ],
)
def test_no_input_is_written(command, place, tmp_path, monkeypatch, inputs, words, resume):
    monkeypatch.chdir(tmp_path)
    quick = json.dumps({"use_cpu": True, "max_steps": 1, "dataloader_num_workers": 0})
    paths = {"data": "data.json", "config": "quick.json", "root": str(place)}
    contents = {"data": (place / "data.json").read_text(), "config": quick}
    (tmp_path / "run").mkdir()
    for name, path in inputs.items():
        if name == "link":  # the run's file is a link to an input
            (tmp_path / "run" / path).symlink_to(tmp_path / "data.json")
        elif name in ("root", "media"):
            shutil.copytree(place, tmp_path / "run" / path)
            paths["root"] = f"run/{path}" if name == "root" else paths["root"]
        else:
            paths[name] = f"run/{path}"
    for name, content in contents.items():
        (tmp_path / paths[name]).parent.mkdir(exist_ok=True)
        (tmp_path / paths[name]).write_text(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options = [x for name, path in paths.items() for x in (f"--{name}", path)]
    run = ["--stage", "finetune", "--model", place / "model", "--output", "run", *options]
    code, out, err = command(*run, *["--resume"][: int(resume)])
    assert (code, out) == (2, "")
    assert words in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_command(command, place, capsys):
    quick = {"use_cpu": True, "max_steps": 2, "dataloader_num_workers": 0}
    (place / "quick.json").write_text(json.dumps(quick))
    run = (
        "--stage",
        "finetune",
        "--model",
        "model",
        "--data",
        "data.json",
        "--config",
        "quick.json",
        "--output",
        "run",
    )
    code, out, err = command(*run)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["samples"] == "3 image, 3 images, 3 video, 3 text"
    assert lines["bad"] == "none"
    assert lines["steps"].startswith("2, of 1 samples and ")
    assert lines["model"] == "run/model"
    assert "101,376 of 161,328 parameters learn" in err
    tokens = [line["tokens"] for line in read_log("run/train_log.jsonl")]
    assert f"{sum(tokens) / 2:.0f} tokens" in lines["steps"]
    assert command("--stage", "align", *run[2:])[0] == 2  # holds a run
    code, out, err = command(*run, "--resume", "--json")
    assert code == 0
    assert "resumed from checkpoint-2" in err
    assert json.loads(out)["steps"] == 2
    ask = ["ask", "--model", "run/model", "--video", "clip.mp4", "--max-new-tokens", "2", "What?"]
    assert vxl(ask) == 0
    capsys.readouterr()
    other = json.dumps({**quick, "seed": 7})
    (place / "other.json").write_text(other)
    changed = [x if x != "quick.json" else "other.json" for x in run]
    code, out, err = command(*changed, "--resume")
    assert (code, out) == (2, "")
    assert "resume: seed was 42 and is 7" in err
    shutil.rmtree(place / "run" / "checkpoint-2")
    assert last_checkpoint(place / "run") is None


def hostile(place):
    run = {"--stage": "align", "--model": "model", "--data": "data.json", "--output": "new"}
    (place / "list.yaml").write_text("- 1\n")
    (place / "broken.yaml").write_text("a: [1\n")
    (place / "typo.yaml").write_text("learning_rat: 1\n")
    (place / "ours.yaml").write_text("disable_tqdm: false\n")
    (place / "value.yaml").write_text("frames: 0\n")
    (place / "theirs.yaml").write_text("lr_scheduler_type: zigzag\n")
    (place / "ratio.yaml").write_text("ratio: [5, 7]\n")
    (place / "window.yaml").write_text("ratio: 999\n")
    (place / "tower.yaml").write_text("train_vision_tower: true\n")
    (place / "broken.json").write_text('[{"id": 1')
    (place / "deep.json").write_text("[" * 100_000)
    refused = {
        "label_smoothing_factor": 0.1,
        "eval_strategy": "steps",
        "accelerator_config": {"split_batches": True},
        "ddp_backend": "gloo",
        "report_to": "nowhere",
        "deepspeed": "zero.json",
    }
    for key, value in refused.items():
        (place / f"{key}.json").write_text(json.dumps({key: value}))
    (place / "empty.json").write_text("[]")
    (place / "file").write_text("")
    shutil.copytree(CHECKPOINT, place / "mute", dirs_exist_ok=True)
    return {
        "stage": ({**run, "--stage": "third"}, "--stage"),
        "no data": ({**run, "--data": "none.json"}, "--data: got none.json"),
        "data is a folder": ({**run, "--data": "model"}, "--data: got model"),
        "broken data": ({**run, "--data": "broken.json"}, "broken.json: not JSON"),
        "empty data": ({**run, "--data": "empty.json"}, "no usable sample"),
        "no config": ({**run, "--config": "none.yaml"}, "--config: got none.yaml"),
        "list as config": ({**run, "--config": "list.yaml"}, "expected keys and values"),
        "broken config": ({**run, "--config": "broken.yaml"}, "config: broken.yaml"),
        "typo": ({**run, "--config": "typo.yaml"}, "did you mean learning_rate?"),
        "fixed key": ({**run, "--config": "ours.yaml"}, "the recipe sets it"),
        "our value": ({**run, "--config": "value.yaml"}, "frames: got 0"),
        "their value": ({**run, "--config": "theirs.yaml"}, "zigzag"),
        "ratios": ({**run, "--config": "ratio.yaml"}, "ratio: got [5, 7]"),
        "ratio": ({**run, "--config": "window.yaml"}, "ratio: got 999"),
        "tower": ({**run, "--config": "tower.yaml"}, "train_vision_tower: got true"),
        "no model": ({**run, "--model": "./none"}, "./none"),
        "no tokenizer": ({**run, "--model": "mute"}, "tokenizer: the checkpoint has none"),
        "no root": ({**run, "--root": "none"}, "--root: got none"),
        "output is a file": ({**run, "--output": "file"}, "output: got file"),
        "deep config": ({**run, "--config": "deep.json"}, "config: deep.json"),
        **{k: ({**run, "--config": f"{k}.json"}, k) for k in refused if k != "report_to"},
        "report_to": ({**run, "--config": "report_to.json"}, "nowhere"),
    }


HOSTILE = [
    "stage",
    "no data",
    "data is a folder",
    "broken data",
    "empty data",
    "no config",
    "list as config",
    "broken config",
    "typo",
    "fixed key",
    "our value",
    "their value",
    "ratios",
    "ratio",
    "tower",
    "no model",
    "no tokenizer",
    "no root",
    "output is a file",
    "deep config",
    "label_smoothing_factor",
    "eval_strategy",
    "accelerator_config",
    "ddp_backend",
    "deepspeed",
    "report_to",
]


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile(command, place, kind, monkeypatch):
    cases = hostile(place)
    assert set(cases) == set(HOSTILE)
    heavy = VideoXLForConditionalGeneration
    monkeypatch.setattr(heavy, "from_pretrained", None)  # refused before weights are read
    options, words = cases[kind]
    code, out, err = command(*(x for pair in options.items() for x in pair))
    assert (code, out) == (2, "")
    *_, last = err.splitlines()
    assert words in last
    assert last.startswith(("vxl: ", "python -m vxl_train run: "))
    assert "Traceback" not in err
    assert not (place / "new").exists()
