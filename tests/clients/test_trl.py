"""TRL's SFTTrainer as it comes, on samples with a video."""

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("av")
image = pytest.importorskip("PIL.Image")
from datasets import Dataset
from helpers.checkpoint import write_checkpoint
from helpers.clips import write_clip
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

import vxl_model  # noqa: F401 (registers Video-XL)

OPTIONS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_length": None,
    "remove_unused_columns": False,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_checkpoint(folder / "model")
    write_clip(folder / "a.mp4", count=20, fps=5)
    return folder


def load(place, dtype=torch.float32):
    """A model and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(place / "model", dtype=dtype)
    return model, AutoProcessor.from_pretrained(place / "model")


def videos(place):
    """Two samples of a video. Their texts are not of one length."""
    clip = {"type": "video", "path": str(place / "a.mp4")}
    return [
        [
            {"role": "user", "content": [clip, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        for question, answer in (("What?", "A dog."), ("And then?", "It goes home."))
    ]


def collate_videos(processor):
    """What a program with videos writes: the chat template does all of it."""

    def collate(samples):
        batch = processor.apply_chat_template(
            [sample["messages"] for sample in samples],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_frames": 4, "padding": True, "padding_side": "right"},
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {**batch, "labels": labels.masked_fill(labels == -200, -100)}

    return collate


def losses(trainer):
    return [x["loss"] for x in trainer.state.log_history if "loss" in x]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_videos(place, tmp_path, dtype):
    """Three steps in which the loss falls. The first is the model's own loss of the batch."""
    model, processor = load(place, dtype)
    samples = Dataset.from_list([{"messages": x} for x in videos(place)])
    collate = collate_videos(processor)
    with torch.no_grad():
        want = model(**collate(samples)).loss.item()
    skip = {"skip_prepare_dataset": True}
    config = SFTConfig(
        tmp_path, **{**OPTIONS, "bf16": dtype == torch.bfloat16}, dataset_kwargs=skip
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=samples,
        eval_dataset=samples,
        processing_class=processor,
        data_collator=collate,
    )
    trainer.train()
    found = losses(trainer)
    assert len(found) == 3
    assert found[0] == pytest.approx(want, rel=2e-2 if dtype == torch.bfloat16 else 1e-4)
    assert found[2] < found[1] < found[0]
    measured = trainer.evaluate()
    assert measured["eval_loss"] < found[2]
    assert 0 < measured["eval_mean_token_accuracy"] <= 1


def frames(place):
    """The same as the pictures of a row, which TRL's own collator takes."""
    shades = [image.new("RGB", (60, 80), (9 * i, 40, 200)) for i in range(3)]
    answer = [{"role": "assistant", "content": "A dog."}]
    asked = [{"role": "user", "content": "What?"}]
    return {"messages": [asked + answer], "prompt": [asked], "completion": [answer]}, [shades]


@pytest.mark.parametrize("names", [["messages"], ["prompt", "completion"]])
def test_its_own_collator(place, tmp_path, names):
    model, processor = load(place)
    texts, shades = frames(place)
    data = Dataset.from_dict({**{name: 2 * texts[name] for name in names}, "images": 2 * shades})
    options = {**OPTIONS, "remove_unused_columns": True}
    trainer = SFTTrainer(
        model, SFTConfig(tmp_path, **options), train_dataset=data, processing_class=processor
    )
    trainer.train()
    found = losses(trainer)
    assert found[2] < found[1] < found[0]


def test_lora(place, tmp_path):
    """Adapters alone learn. The tower keeps its weights."""
    peft = pytest.importorskip("peft")
    model, processor = load(place)
    adapter = peft.LoraConfig(r=4, target_modules=r".*model\.layers.*_proj", task_type="CAUSAL_LM")
    skip = {"skip_prepare_dataset": True}
    trainer = SFTTrainer(
        model,
        SFTConfig(tmp_path, **OPTIONS, dataset_kwargs=skip),
        train_dataset=Dataset.from_list([{"messages": x} for x in videos(place)]),
        processing_class=processor,
        data_collator=collate_videos(processor),
        peft_config=adapter,
    )
    trainer.train()
    found = losses(trainer)
    assert found[2] < found[1] < found[0]
    moved = [n for n, w in trainer.model.named_parameters() if "lora_B" in n and w.any()]
    assert any("beacon_k_proj" in name for name in moved)
    assert any(".q_proj" in name for name in moved)
