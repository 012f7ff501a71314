"""The command that trains: what it prints, and what it refuses before weights are read."""

import json
import shutil

import pytest

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from helpers.paths import CHECKPOINT
from helpers.training_place import make_place

from vxl_cli.main import main as vxl
from vxl_kernels import _ext
from vxl_model import VideoXLForConditionalGeneration
from vxl_train.cli import main
from vxl_train.trainer import last_checkpoint, read_log

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(_ext.extension is None, reason="no compiled extension"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("run"))


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
    (place / "latin1.yaml").write_bytes(b"run_name: caf\xe9\n")
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
        **{k: ({**run, "--config": f"{k}.json"}, f"{k}: got") for k in refused},
        "config in Latin-1": ({**run, "--config": "latin1.yaml"}, "config: latin1.yaml"),
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
    "config in Latin-1",
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
