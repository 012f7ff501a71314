"""A folder to train in, with the tiny checkpoint, a tokenizer of bytes, a clip, pictures and
data."""

import json
import os

from helpers.checkpoint import write_checkpoint
from helpers.clips import picture, write_clip
from helpers.paths import ROOT, TESTS
from PIL import Image

from vxl_model import VideoXLConfig
from vxl_model.inputs.processing import VideoXLProcessor
from vxl_train.run import visual_shape
from vxl_train.settings import TrainSettings

QUICK = {
    "use_cpu": True,
    "dataloader_num_workers": 0,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "save_strategy": "no",
}


def talk(*turns):
    """Human and gpt in turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": x} for i, x in enumerate(turns)]


def samples():
    """Three samples of each kind."""
    found = []
    for i in range(3):
        video = talk("<video>\nWhat?", f"number {i}")
        found.append({"id": f"v{i}", "video": "clip.mp4", "conversations": video})
        image = talk("What is it?\n<image>", f"pic {i}", "sure?", "yes")
        name = ["one.png", "two.png"][i % 2]
        found.append({"id": f"i{i}", "image": name, "conversations": image})
        images = talk("<image><image>\nWhat?", f"two {i}")
        found.append({"id": f"m{i}", "image": ["one.png", "two.png"], "conversations": images})
        found.append({"id": f"t{i}", "conversations": talk("Hi", f"hello {i}")})
    return found


def make_place(folder):
    write_checkpoint(folder / "model")
    write_clip(folder / "clip.mp4", count=50, fps=10)
    Image.fromarray(picture(5, 200, 120)).save(folder / "one.png")
    Image.fromarray(picture(9, 120, 200)).save(folder / "two.png")
    (folder / "data.json").write_text(json.dumps(samples()))
    return folder


def settings(stage="finetune", **values):
    return TrainSettings.read(None, stage, **{**QUICK, **values})


def processor_and_shape(folder, **values):
    processor = VideoXLProcessor.from_pretrained(folder / "model")
    config = VideoXLConfig.from_pretrained(folder / "model")
    return processor, visual_shape(config, settings(**values))


def environment():
    path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
