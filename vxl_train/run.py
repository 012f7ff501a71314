"""A training run: its arguments checked, its folder locked, its model trained and reported."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from vxl_model.decoder.configuration import VideoXLConfig
from vxl_model.inputs.processing import VideoXLProcessor
from vxl_model.modeling import VideoXLForConditionalGeneration
from vxl_model.streaming.fingerprint import first_row_bytes
from vxl_model.streaming.ratios import make_plan

from .adapter_settings import quantization_config
from .adapters import add_adapters
from .data.dataset import TrainingData
from .data.samples import SAMPLE_KINDS, BadSampleError, BadSamples, VisualShape, read_samples
from .evaluation import HeldOut
from .run_folder import (
    LOG,
    RUN,
    check_output,
    check_resumable,
    check_same_run,
    crc,
    finished,
    lock_folder,
    read_log,
    samples_crc,
    write_run,
)
from .settings import TrainSettings, reproducibility_fields
from .trainer import VideoXLTrainer, set_trainable_parameters

__all__ = ["TrainReport", "train"]


@dataclasses.dataclass
class TrainReport:
    """What a run did.

    Attributes:
        samples: number of usable samples by kind: image, images, video, text.
        bad: number of unusable samples by reason.
        steps: steps of the whole run.
        resumed_from: the step that this process resumed from; 0 for a new run.
        samples_a_step: over all processes.
        tokens_a_step: mean over steps, over all processes; raw visual tokens and text.
        loss: of the last step.
        seconds: time that this process spent in its steps.
        learning: number of parameters that learn.
        result: folder of the trained model.
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
    log: Callable[[str], None] = lambda line: None,
) -> TrainReport:
    """Trains a checkpoint on LLaVA-style data; `trainer.py` describes the recipe and the folder.

    Args:
        model: a checkpoint of any stage, with a tokenizer.
        data: JSON or JSONL files.
        output: folder of the run; without `resume` it must not hold another run.
        root: what paths in the data are relative to; by default each file's folder.
        resume: go on from the last checkpoint in `output`, or start anew if `output` holds neither
            a checkpoint nor a result.
        log: receives a line of text at each stage of the run.

    Raises:
        ValueError, OSError: invalid arguments, or `output` is in use. Raised before weights are
            loaded, except when `model` differs from that of the resumed run.
            BadSampleError for a bad sample where the settings say "stop".
    """
    prepared = _prepare(model, data, Path(output), settings, root, resume, log)
    inputs = {"model": model, "data": data, "root": root or ()}
    with lock_folder(prepared.output) if prepared.args.should_save else nullcontext():
        prepared.check(resume, settings, **inputs)
        return _run(prepared, model, data, settings, resume, log)


@dataclasses.dataclass
class _Prepared:
    """A run whose arguments have been checked. No weights are loaded yet.

    Attributes:
        checkpoint: what to resume from, set by `check`. None for a new run.
        bad: samples that cannot be used.
        kinds: usable samples by kind.
        record: what `run.json` holds and a resumed run must match.
        held_out: what evaluations measure.
    """

    output: Path
    checkpoint: Path | None
    args: TrainingArguments
    data: TrainingData
    bad: BadSamples
    kinds: dict[str, int]
    record: dict[str, Any]
    held_out: HeldOut

    def check(self, resume: bool, settings: TrainSettings, **inputs: Any) -> None:
        """ValueError where `output` holds another run or an input, or a checkpoint that cannot be
        resumed. `inputs`: as in `check_output`."""
        self.checkpoint = check_output(self.output, resume, **inputs)
        check_same_run(self.output / RUN, self.record, self.checkpoint)
        if self.checkpoint and not settings.new_optimizer:
            check_resumable(self.checkpoint)

    @property
    def samples_a_step(self) -> int:
        return self.record["samples_a_step"]


def _prepare(
    model: str | os.PathLike[str],
    data: Sequence[str | os.PathLike[str]],
    output: Path,
    settings: TrainSettings,
    root: str | os.PathLike[str] | None,
    resume: bool,
    log: Callable[[str], None],
) -> _Prepared:
    check_output(output, resume, model=model, data=data, root=root or ())
    processor = VideoXLProcessor.from_pretrained(model)
    processor.prefix_ids()  # a checkpoint without a tokenizer is refused here
    shape = visual_shape(VideoXLConfig.from_pretrained(model), settings)
    args = settings.training_arguments(os.fspath(output))
    if args.n_gpu > 1:  # HF would split a batch among them, which our inputs do not allow
        raise ValueError(
            f"got {args.n_gpu} GPUs in one process, expected 1; several GPUs: start with "
            "accelerate launch, or choose one with CUDA_VISIBLE_DEVICES"
        )
    samples, bad = read_samples(data, processor, shape, root, settings.probe_files)
    stop = settings.on_bad_sample == "stop"
    if bad and stop:
        raise BadSampleError(next(iter(bad)))
    counts = Counter(sample.kind for sample in samples)
    kinds = {kind: counts[kind] for kind in SAMPLE_KINDS if counts[kind]}
    log(f"data: {_counts(kinds)}; bad: {_counts(bad.by_kind())}")
    if not samples:
        raise ValueError(f"data: no usable sample in {', '.join(str(x) for x in data)}")
    record = {
        "settings": reproducibility_fields(settings),
        "data_crc32": [crc(path) for path in data],
        "samples": [len(samples), samples_crc(samples)],
        "samples_a_step": args.train_batch_size
        * args.world_size
        * args.gradient_accumulation_steps,
    }
    options: dict[str, Any] = {"seed": args.seed, "max_text_tokens": settings.max_text_tokens}

    def held_out(path: str | None, name: str) -> TrainingData | None:
        if path is None:
            return None
        found, wrong = read_samples([path], processor, shape, root, settings.probe_files)
        log(f"{name}: {len(found)} samples; bad: {_counts(wrong.by_kind())}")
        if not found:
            raise ValueError(f"{name}: no usable sample in {path}")
        return TrainingData(found, processor, shape, **options)

    held = HeldOut(
        held_out(settings.eval_data, "eval_data"), held_out(settings.eval_answers, "eval_answers")
    )
    dataset = TrainingData(samples, processor, shape, **options, stop=stop)
    return _Prepared(output, None, args, dataset, bad, kinds, record, held)


def _run(
    prepared: _Prepared,
    model: str | os.PathLike[str],
    data: Sequence[str | os.PathLike[str]],
    settings: TrainSettings,
    resume: bool,
    log: Callable[[str], None],
) -> TrainReport:
    output, checkpoint, args = prepared.output, prepared.checkpoint, prepared.args
    net = _load(model, settings, args)
    if args.should_save:  # the process that writes run.json
        prepared.record["base_crc32"] = _weights_crc(net)
        check_same_run(output / RUN, prepared.record, checkpoint)
    _make_trainable(net, settings, args)
    learning = sum(p.numel() for p in net.parameters() if p.requires_grad)
    log(
        f"{settings.stage}: {learning:,} of {sum(p.numel() for p in net.parameters()):,} "
        f"parameters learn; {prepared.samples_a_step} samples a step"
    )
    if resume:
        log(f"resumed from {checkpoint.name}" if checkpoint else "nothing to resume: a new run")
    held_out = prepared.held_out if settings.evaluates else None
    trainer = VideoXLTrainer(net, args, prepared.data, settings, model, held_out)
    if args.should_save:
        names = {"model": os.fspath(model), "data": [os.fspath(x) for x in data]}
        write_run(output / RUN, {**names, **prepared.record})
    trainer.start_bad_list(prepared.bad, resume)
    resumed_from = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
    steps = resumed_from
    if checkpoint and finished(checkpoint):  # HF's loop would do a step more
        trainer._load_from_checkpoint(os.fspath(checkpoint))
    else:
        trainer.train(resume_from_checkpoint=os.fspath(checkpoint) if checkpoint else None)
        steps = trainer.state.global_step
    trainer.gather_counts()
    lines = read_log(output / LOG)
    return TrainReport(
        samples=prepared.kinds,
        bad=trainer.bad.by_kind(),
        steps=steps,
        resumed_from=resumed_from,
        samples_a_step=prepared.samples_a_step,
        tokens_a_step=trainer.tokens / max(1, steps - resumed_from),
        loss=lines[-1]["loss"] if lines else None,
        seconds=round(sum(x["seconds"] for x in lines if x["step"] > resumed_from), 1),
        learning=learning,
        result=os.fspath(trainer.save_result()),
    )


def _load(
    path: str | os.PathLike[str], settings: TrainSettings, args: TrainingArguments
) -> VideoXLForConditionalGeneration:
    """The model that the run starts from."""
    more: dict[str, Any] = {}
    if settings.quantization is not None:
        config = quantization_config(settings.quantization, settings.vst)
        more = {"quantization_config": config, "device_map": {"": args.device}}
    net = VideoXLForConditionalGeneration.from_pretrained(
        path, dtype=getattr(torch, settings.dtype), **more
    )
    net.settings.packing = settings.packing
    args.use_cache = bool(net.config.use_cache)  # else the Trainer writes its own into the result
    return net


def _make_trainable(
    net: VideoXLForConditionalGeneration, settings: TrainSettings, args: TrainingArguments
) -> None:
    """What learns, adapters or the model's own weights, requires gradients."""
    if settings.peft is None:
        set_trainable_parameters(net, settings)
    else:
        add_adapters(net, settings, args.seed)
        net._hf_peft_config_loaded = True  # the Trainer takes no quantised model without adapters
    if args.bf16 or args.fp16:
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if settings.torch_compile:
        layers: Any = net.model.layers
        for layer in layers:
            layer.compile_dense(settings.torch_compile_backend)


def _weights_crc(net: nn.Module) -> int:
    """Of the first row of every parameter: a checkpoint of stage align is nothing without the
    rest, and another fine-tune has the same names and shapes."""
    value = 0
    for parameter in net.parameters():
        value = zlib.crc32(first_row_bytes(parameter), value)
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
