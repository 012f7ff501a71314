"""Evaluation during training: what it measures, and that it changes nothing."""

import json

import pytest
import torch
from helpers.training_place import make_place, samples, settings, talk
from safetensors.torch import load_file

from vxl_kernels import _ext
from vxl_model import VideoXLForConditionalGeneration
from vxl_train.cli import main
from vxl_train.data.dataset import TrainingData, collate
from vxl_train.data.samples import read_samples
from vxl_train.evaluation import is_right
from vxl_train.plot import plot_log
from vxl_train.run import train, visual_shape
from vxl_train.trainer import read_log

pytestmark = pytest.mark.skipif(_ext.extension is None, reason="no compiled extension")
STEPS = {"max_steps": 2, "save_strategy": "no"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("evaluation"))


def run(place, output, **values):
    chosen = settings("finetune", **{**STEPS, **values})
    train(place / "model", [place / "data.json"], output, chosen)
    losses = [line["loss"] for line in read_log(output / "train_log.jsonl")]
    return losses, load_file(output / "model" / "model.safetensors"), chosen


def test_a_run_is_the_same_with_evaluations(place, tmp_path):
    data = str(place / "few.json")
    (place / "few.json").write_text(json.dumps(samples()[:4]))
    alone = run(place, tmp_path / "one")
    more = {"eval_data": data, "eval_answers": data, "eval_strategy": "steps", "eval_steps": 1}
    watched = run(place, tmp_path / "two", **more)
    assert alone[0] == watched[0]
    for name, weight in alone[1].items():
        assert weight.equal(watched[1][name])
    lines = read_log(tmp_path / "two" / "eval_log.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert len({line["eval_loss"] for line in lines}) == 2
    assert not (tmp_path / "one" / "eval_log.jsonl").exists()


def test_the_loss_is_a_mean_over_tokens(place, tmp_path):
    """Against the saved model, sample by sample. Samples have answers of several lengths."""
    data = [place / "data.json"]
    more = {"eval_data": str(data[0]), "eval_strategy": "steps", "eval_steps": 2}
    *_, chosen = run(place, tmp_path / "run", **more)
    [line] = read_log(tmp_path / "run" / "eval_log.jsonl")
    model = VideoXLForConditionalGeneration.from_pretrained(tmp_path / "run" / "model").eval()
    shape = visual_shape(model.config, chosen)
    found, _ = read_samples(data, model.processor, shape)
    held = TrainingData(found, model.processor, shape, seed=chosen.arguments.get("seed", 42))
    total = count = 0
    for index in range(len(found)):
        batch = collate([held[index]])
        [frames], [size] = batch["frames"], batch["image_sizes"]
        shown = {}
        if frames is not None:
            pixels = model.processor.frames_to_pixels(frames)
            shown = {"pixel_values": [pixels], "image_sizes": [size]}
        with torch.no_grad():
            loss = model(batch["input_ids"], labels=batch["labels"], ratio=batch["ratio"], **shown)
        tokens = int((batch["labels"] != -100).sum())
        total, count = total + loss.loss.item() * tokens, count + tokens
    assert line["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_right_answers_are_counted(place, tmp_path):
    """What the model says itself is right, anything else is wrong. Without a step that changes
    it, the model of the run is the model of the checkpoint."""
    model = VideoXLForConditionalGeneration.from_pretrained(place / "model").eval()
    video = model.watch(place / "clip.mp4", ratio=2)
    seen = video.ask("What is it?", 9, do_sample=False)
    assert seen.strip()
    records = [{"conversations": talk("What is it?", "nothing")}]
    for answer in (seen, "no"):
        said = talk("<video>\nWhat is it?", answer)
        records.append({"video": "clip.mp4", "conversations": said})
    (place / "needles.json").write_text(json.dumps(records))
    more = {"eval_answers": str(place / "needles.json"), "eval_on_start": True, "ratio": 2}
    run(place, tmp_path / "run", **more, eval_strategy="steps", eval_steps=9)
    line = read_log(tmp_path / "run" / "eval_log.jsonl")[0]
    assert line["step"] == 0
    assert line["eval_right"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [("Red fox.", "red fox", True), ("fox", "red fox", False), ("a b", "ab", False)],
)
def test_words_decide(answer, expected, right):
    assert is_right(answer, expected) is right


def test_the_command_draws_its_log(place, tmp_path):
    config = {"max_steps": 2, "save_strategy": "no", "use_cpu": True, "eval_steps": 1}
    config["dataloader_num_workers"] = 0
    (tmp_path / "c.json").write_text(json.dumps(config))
    output = tmp_path / "run"
    asked = ["run", "--stage", "align", "--model", place / "model", "--data", place / "data.json"]
    (place / "few.json").write_text(json.dumps(samples()[:2]))
    asked += ["--eval-data", place / "few.json", "--config", tmp_path / "c.json", "--plot"]
    assert main(list(map(str, [*asked, "--output", output]))) == 0
    assert (output / "train_log.png").stat().st_size > 10_000
    assert [line["step"] for line in read_log(output / "eval_log.jsonl")] == [1, 2]
    with pytest.raises(ValueError, match="no logged step"):
        plot_log(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_strategy": "steps"}, "without eval_data"),
        ({"eval_data": "nowhere.json"}, "eval_data: got 'nowhere.json'"),
        ({"load_best_model_at_end": True}, "the model of the last step"),
    ],
)
def test_what_cannot_be_evaluated(values, message):
    with pytest.raises(ValueError, match=message):
        settings("finetune", **values)
