"""A training run: prepared, recorded, resumed, reported."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from vxl_model.decoder.configuration import VideoXLConfig
from vxl_model.inputs.processing import VideoXLProcessor
from vxl_model.modeling import VideoXLForConditionalGeneration
from vxl_model.streaming.ratios import make_plan

from .data.dataset import TrainingData
from .data.samples import BadSampleError, VisualShape, read_samples
from .run_folder import (
    LOG,
    RUN,
    check_output,
    check_same_run,
    crc,
    finished,
    read_log,
    samples_crc,
    write_run,
)
from .settings import TrainSettings, decisive
from .trainer import VideoXLTrainer, choose_parameters

__all__ = ["TrainReport", "train"]


# -- a run --------------------------------------------------------------------------------------


@dataclasses.dataclass
class TrainReport:
    """What a run did.

    Attributes:
        samples: usable ones by kind: image, images, video, text.
        bad: the others by reason.
        steps: of the run; resumed_from: those that were done before.
        samples_a_step, tokens_a_step: over all processes; tokens are raw visual ones and text,
            a mean.
        loss: of the last step.
        seconds: of this process in its steps.
        learning: parameters that learn.
        result: folder of the model.
    """

    samples: dict[str, int]
    bad: dict[str, int]
    steps: int
    resumed_from: int
    samples_a_step: int
    tokens_a_step: float
    loss: float | None
    seconds: float
    learning: int
    result: str


def train(
    model: str | os.PathLike[str],
    data: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    settings: TrainSettings,
    *,
    root: str | os.PathLike[str] | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> TrainReport:
    """Trains a checkpoint on LLaVA-style data; see the module.

    Args:
        model: a checkpoint of any stage, with a tokenizer.
        data: JSON or JSONL files.
        output: folder of the run; without `resume` it must not hold another.
        root: what paths in the data are relative to; by default each file's folder.
        resume: go on from the last checkpoint in `output`, from the start if there is none and
            no result either.
        say: gets a line of text now and then.

    Raises:
        ValueError, OSError: an argument cannot be used, said before weights are read
            but for another `model` than the run's that is resumed;
            BadSampleError for a bad sample where the settings say "stop".
    """
    output = Path(output)
    checkpoint = check_output(output, resume, model)
    processor = VideoXLProcessor.from_pretrained(model)
    processor.prompt_ids()  # a checkpoint without a tokenizer is refused here
    config = VideoXLConfig.from_pretrained(model)
    shape = visual_shape(config, settings)
    args = settings.training_arguments(os.fspath(output))
    if args.n_gpu > 1:  # HF would cut a batch among them, which our inputs are not made for
        raise ValueError(
            f"got {args.n_gpu} GPUs in one process, expected 1; several GPUs: start with "
            "accelerate launch, or choose one with CUDA_VISIBLE_DEVICES"
        )
    samples, bad = read_samples(data, processor, shape, root, settings.probe_files)
    if bad and settings.on_bad_sample == "stop":
        raise BadSampleError(next(iter(bad)))
    kinds = {
        k: n
        for k in ("image", "images", "video", "text")
        if (n := sum(s.kind == k for s in samples))
    }
    say(f"data: {_counts(kinds)}; bad: {_counts(bad.by_kind())}")
    if not samples:
        raise ValueError(f"data: no usable sample in {', '.join(str(x) for x in data)}")
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    about = {
        "settings": decisive(settings),
        "data_crc32": [crc(path) for path in data],
        "samples": [len(samples), samples_crc(samples)],
        "samples_a_step": batch,
    }
    check_same_run(output / RUN, about, checkpoint)
    dataset = TrainingData(
        samples,
        processor,
        shape,
        seed=args.seed,
        max_text_tokens=settings.max_text_tokens,
        stop=settings.on_bad_sample == "stop",
    )
    net = _load(model, settings, args)
    if args.should_save:  # the process that writes run.json
        about["base_crc32"] = _weights_crc(net)
        check_same_run(output / RUN, about, checkpoint)
    count = sum(p.numel() for p in net.parameters() if p.requires_grad)
    say(
        f"{settings.stage}: {count:,} of {sum(p.numel() for p in net.parameters()):,} parameters "
        f"learn; {batch} samples a step"
    )
    if resume:
        say(f"resumed from {checkpoint.name}" if checkpoint else "nothing to resume: a new run")
    trainer = VideoXLTrainer(net, args, dataset, settings)
    if args.should_save:
        named = {"model": os.fspath(model), "data": [os.fspath(x) for x in data]}
        write_run(output / RUN, {**named, **about})
    trainer.start_bad_list(bad, resume)
    before = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
    steps = before
    if checkpoint and finished(checkpoint):  # HF's loop would do a step more
        trainer._load_from_checkpoint(os.fspath(checkpoint))
    else:
        trainer.train(resume_from_checkpoint=os.fspath(checkpoint) if checkpoint else None)
        steps = trainer.state.global_step
    trainer.gather_counts()
    log = read_log(output / LOG)
    done = [line for line in log if line["step"] > before]
    return TrainReport(
        samples=kinds,
        bad=trainer.bad.by_kind(),
        steps=steps,
        resumed_from=before,
        samples_a_step=batch,
        tokens_a_step=trainer.tokens / max(1, steps - before),
        loss=log[-1]["loss"] if log else None,
        seconds=round(sum(x["seconds"] for x in done), 1),
        learning=count,
        result=os.fspath(trainer.save_result()),
    )


def _load(
    path: str | os.PathLike[str], settings: TrainSettings, args: TrainingArguments
) -> VideoXLForConditionalGeneration:
    """The model as the stage trains it."""
    net = VideoXLForConditionalGeneration.from_pretrained(
        path, dtype=getattr(torch, settings.dtype)
    )
    choose_parameters(net, settings)
    if args.bf16 or args.fp16:
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if settings.torch_compile:
        for layer in net.model.layers:
            layer.compile_dense(settings.torch_compile_backend)
    args.use_cache = bool(net.config.use_cache)  # else the Trainer writes its own into the result
    return net


def _weights_crc(net: nn.Module) -> int:
    """Of the first row of every parameter: a checkpoint of stage align is nothing without the
    rest, and another fine-tune has the same names and shapes."""
    value = 0
    for parameter in net.parameters():
        row = parameter.detach()[:1].float().cpu().contiguous()
        value = zlib.crc32(row.numpy().tobytes(), value)
    return value


def visual_shape(config: VideoXLConfig, settings: TrainSettings) -> VisualShape:
    """What a checkpoint makes of frames, with the settings' cap and ratios.

    Raises:
        ValueError: no vision tower, or ratios that do not divide its windows.
    """
    clip = config.clip_config()
    if clip is None:
        raise ValueError("model: got one without a vision tower, expected a Video-XL checkpoint")
    plan = make_plan(config, settings.ratio)
    side: Any = clip.image_size // clip.patch_size
    shape = VisualShape(
        config.beacon_window, (side // 2) ** 2, plan.allowed, settings.frames, settings.fps
    )
    shape.check()
    return shape


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "none"
