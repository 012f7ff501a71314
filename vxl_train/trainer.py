"""The two-stage recipe over HF's `Trainer`.

Stage "align": only the projector learns. Stage "finetune": everything does, the vision tower if
`train_vision_tower` says so. `python -m vxl_train run` is this on the command line;
`data/dataset.py` describes data files.

A run's output folder::

    run.json             what was run
    train_log.jsonl      a line a step: step, epoch, loss, grad_norm, learning_rate, tokens, seconds
                         (tokens: those of process 0 since the line before)
    eval_log.jsonl       a line an evaluation: step, eval_loss, eval_right, eval_seconds
    bad_samples.jsonl    a line a sample that could not be used: kind, id, message
    checkpoint-N/        to resume from; complete where all weights learn
    adapter/             with adapters: the trained one, as PEFT writes it
    model/               the result, in the published layout, adapters merged

A run that is killed at any moment resumes from its last checkpoint. A checkpoint is written to a
temporary folder and renamed. Sample order, ratios and replacements of bad samples depend only on
the seed and the step. On a CPU the losses of a resumed run are bitwise the same.

Source: Video-XL section 3.4 (stages, at most 128 frames, a ratio drawn per window); learning rates
are LLaVA's for the same stages.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from vxl_model.decoder.placement import local
from vxl_model.modeling import VideoXLForConditionalGeneration

from . import sharded
from .adapters import export
from .data.dataset import TrainingData, collate
from .data.order import TrainingOrder
from .data.samples import BadSample, BadSampleError, BadSamples
from .evaluation import HeldOut, evaluate
from .run_folder import (
    ADAPTER,
    BAD,
    EVAL_LOG,
    LOG,
    RESULT,
    WRITING,
    checkpoints,
    last_checkpoint,
    put_in_place,
    read_log,
    write_lines,
)
from .settings import TrainSettings

__all__ = [
    "TrainSettings",
    "VideoXLTrainer",
    "last_checkpoint",
    "read_log",
    "set_trainable_parameters",
]


# -- what learns --------------------------------------------------------------------------------


def set_trainable_parameters(
    model: VideoXLForConditionalGeneration, settings: TrainSettings
) -> None:
    """Sets requires_grad as the stage requires."""
    core = model.model
    tower = getattr(core, "vision_tower", None)
    if settings.stage == "align":
        if tower is None:
            raise ValueError("stage: got 'align' for a model without a projector")
        model.requires_grad_(False)
        core.mm_projector.requires_grad_(True)
        return
    model.requires_grad_(True)
    if tower is None:
        return
    tower.requires_grad_(settings.train_vision_tower)
    clip = tower.vision_tower.vision_model  # layers after the one that is read never run
    clip.post_layernorm.requires_grad_(False)
    for layer in clip.encoder.layers[tower.layers_run :]:
        layer.requires_grad_(False)


def _rates(name: str, settings: TrainSettings, rate: float) -> float:
    if "mm_projector." in name:
        return settings.projector_learning_rate or rate
    if "vision_tower." in name:
        return settings.vision_learning_rate or rate
    return rate


# -- the trainer --------------------------------------------------------------------------------


class VideoXLTrainer(Trainer):
    """HF's Trainer with the recipe's sample order, learning rates, and checkpoints that are
    complete or absent.

    Args:
        model: its trainable parameters require gradients.
        data: the samples.
        settings: the recipe.
        base: the checkpoint that the model was loaded from, for adapters.
        held_out: what evaluations measure.
    """

    def __init__(
        self,
        model: VideoXLForConditionalGeneration,
        args: TrainingArguments,
        data: TrainingData,
        settings: TrainSettings,
        base: str | os.PathLike[str] = "",
        held_out: HeldOut | None = None,
    ) -> None:
        self.base, self.held_out = base, held_out
        self.recipe, self.samples = settings, data
        self.bad = BadSamples()
        self.tokens = 0
        self._beside: Path | None = None
        learning = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        # Frozen weights are in the checkpoint that the run started from.
        total = sum(p.numel() for p in model.parameters())
        light = settings.peft is not None or 2 * sum(learning.values()) < total
        self._light = set(learning) if light else None
        super().__init__(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=None if held_out is None else held_out.loss or held_out.answers,
            data_collator=collate,
            callbacks=[_Epochs(self), _Log(self)],
        )
        self.remove_callback(PrinterCallback)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.fsdp_version != 2:
                raise ValueError(f"fsdp_version: got {plugin.fsdp_version}, expected 2")
            if plugin.mixed_precision_policy is not None:  # else the loss is rounded to bfloat16
                plugin.mixed_precision_policy = dataclasses.replace(
                    plugin.mixed_precision_policy, output_dtype=None
                )
        self.order = TrainingOrder(
            [sample.length for sample in data.samples],
            args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
            args.seed,
            settings.group_by_length,
        )

    # -- data --

    def _get_train_sampler(self, train_dataset: Any = None) -> TrainingOrder:
        return self.order

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            bad = batch.pop("bad")
            self._note(bad)
            if batch.pop("stop"):
                if not self.samples.stop:
                    raise ValueError(f"data: no sample that can be used; the last: {bad[-1]}")
                raise BadSampleError(bad[-1])
        return batches, tokens

    def start_bad_list(self, bad: Iterable[BadSample], resumed: bool) -> None:
        """Begins `bad_samples.jsonl` with the known bad samples, those of a resumed run
        included."""
        path = Path(self.args.output_dir) / BAD
        for line in read_log(path) if resumed else ():
            self.bad.add(BadSample(**line))
        for one in bad:
            self.bad.add(one)
        if self.args.should_save:
            write_lines(path, [x._asdict() for x in self.bad])

    def _note(self, bad: Sequence[BadSample]) -> None:
        for one in bad:
            if self.bad.add(one):
                with open(Path(self.args.output_dir) / BAD, "a") as file:
                    file.write(json.dumps(one._asdict()) + "\n")

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Converts frames to pixels on the device: uint8 frames are a quarter of the bytes."""
        frames, sizes = inputs.pop("frames"), inputs.pop("image_sizes")
        inputs = super()._prepare_inputs(inputs)
        self.tokens += int(inputs["attention_mask"].sum())
        if any(x is not None for x in frames):
            processor = self.samples.processor
            inputs["pixel_values"] = [
                None if x is None else processor.frames_to_pixels(x, self.args.device)
                for x in frames
            ]
            inputs["image_sizes"] = sizes
            shown = sum(
                len(x) - (size is not None and len(x) > 1)
                for x, size in zip(frames, sizes, strict=True)
                if x is not None
            )
            self.tokens += shown * self.samples.shape.tokens_per_frame
        inputs["loss_only"] = True
        return inputs

    # -- evaluation --

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measures what is held out, and writes a line of `eval_log.jsonl`."""
        assert self.held_out is not None
        begin = time.perf_counter()
        metrics = evaluate(self, self.held_out)
        metrics["eval_seconds"] = round(time.perf_counter() - begin, 3)
        if self.args.should_save:
            line = {"step": self.state.global_step, **metrics}
            path = Path(self.args.output_dir) / EVAL_LOG
            write_lines(path, [*(x for x in read_log(path) if x["step"] < line["step"]), line])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args,
            self.state,
            self.control,  # type: ignore[has-type]
            metrics,
        )
        return metrics

    # -- learning rates --

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:  # type: ignore[has-type]
            named: nn.Module = model if model is not None else self.model
            decayed = set(self.get_decay_parameter_names(named))
            groups: dict[tuple[float, float], list[Tensor]] = {}
            for name, parameter in named.named_parameters():
                if parameter.requires_grad:
                    rate = _rates(name, self.recipe, self.args.learning_rate)
                    decay = self.args.weight_decay if name in decayed else 0.0
                    groups.setdefault((rate, decay), []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, named)
            self.optimizer = kind(
                [{"params": p, "lr": r, "weight_decay": d} for (r, d), p in groups.items()],
                **options,
            )
        return self.optimizer

    # -- checkpoints --

    def _get_output_dir(self, trial: Any) -> str:
        return os.fspath(self._beside) if self._beside else super()._get_output_dir(trial)

    def _check_weights(self) -> None:
        """Raises ValueError if a trained weight is NaN or Inf, so that no such checkpoint is saved.
        The loss may still be finite."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(local(parameter).isfinite().all()):
                raise ValueError(
                    f"{name}: weights are not finite after step {self.state.global_step}"
                )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_weights()
        output = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(output / WRITING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._beside = output / WRITING
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._beside = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            put_in_place(output / WRITING / name, output / name)
            limit = self.args.save_total_limit
            for old in checkpoints(output)[: -limit if limit else 0]:
                gone = output / WRITING / old.name  # a half-deleted folder must not look complete
                old.rename(gone)
                shutil.rmtree(gone)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        names = self._light if self._beside is not None else None
        self._save(output_dir, sharded.gather_weights(self.model, self.args.should_save, names))

    # Under FSDP accelerate would save all weights again, and would wait forever on a CPU.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        sharded.save_optimizer(self.model, _inner(self.optimizer), output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        sharded.load_optimizer(self.model, _inner(self.optimizer), checkpoint)
        schedule = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        sharded.load_weights(self.model, resume_from_checkpoint, self._light)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self._light is not None and self._beside is not None:
            learning = self._learning_weights() if state_dict is None else state_dict
            save_file(
                {n: p.contiguous() for n, p in learning.items()}, folder / "model.safetensors"
            )
            return
        super()._save(os.fspath(folder), state_dict)
        self.samples.processor.save_pretrained(folder)

    def _learning_weights(self) -> dict[str, Tensor]:
        """What learns, whole, by name. Under FSDP every process calls it."""
        if self.is_fsdp_enabled:
            return sharded.gather_weights(self.model, self.args.should_save, self._light)
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = set(load_result.missing_keys)
        learning = {n for n, p in self.model.named_parameters() if p.requires_grad}
        if load_result.unexpected_keys or missing & learning:
            wrong = sorted(load_result.unexpected_keys) or sorted(missing & learning)
            raise ValueError(f"checkpoint: got one of another model or stage ({wrong[0]})")

    def gather_counts(self) -> None:
        """Collects tokens and bad samples of all processes."""
        if self.args.world_size > 1:
            tokens = torch.tensor(self.tokens, device=self.args.device)
            self.tokens = int(self.accelerator.reduce(tokens, "sum"))
            for one in gather_object([tuple(x) for x in self.bad]):
                self.bad.add(BadSample(*one))

    def save_result(self) -> Path:
        """Saves the trained model in the published layout; ValueError if its weights are not
        finite."""
        self._check_weights()
        output = Path(self.args.output_dir)
        if self.args.should_save:
            shutil.rmtree(output / WRITING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.recipe.peft is not None:
            return self._save_adapters()
        self.save_model(os.fspath(output / WRITING / RESULT), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (output / WRITING / RESULT / "training_args.bin").unlink(missing_ok=True)
            put_in_place(output / WRITING / RESULT, output / RESULT)
            shutil.rmtree(output / WRITING, ignore_errors=True)
        return output / RESULT

    def _save_adapters(self) -> Path:
        """The adapter, and the base with it merged in; returns the folder of the latter if it is
        wanted."""
        output, merge = Path(self.args.output_dir), self.recipe.merge
        weights = self._learning_weights()
        if self.args.should_save:
            writing = output / WRITING
            merged = writing / RESULT if merge else None
            export(self.base, self.recipe, weights, writing / ADAPTER, merged)
            if merged is not None:
                self.samples.processor.save_pretrained(merged)
            for name in (ADAPTER, RESULT)[: 1 + merge]:
                put_in_place(writing / name, output / name)
            shutil.rmtree(writing, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return output / (RESULT if merge else ADAPTER)


def _inner(optimizer: Any) -> Any:
    """torch's optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


class _Epochs(TrainerCallback):
    """Tells the sampler which epoch begins."""

    def __init__(self, trainer: VideoXLTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batches = len(kwargs["train_dataloader"])
        steps = max(1, -(-batches // args.gradient_accumulation_steps))
        self.trainer.order.set_epoch(state.global_step // steps)


class _Log(TrainerCallback):
    """Writes `train_log.jsonl`: one line for each logged step, none twice."""

    def __init__(self, trainer: VideoXLTrainer) -> None:
        self.trainer = trainer
        self.begin, self.tokens = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = time.perf_counter()
        if state.is_world_process_zero:
            path = Path(args.output_dir) / LOG
            kept = [x for x in read_log(path) if x["step"] <= state.global_step]
            write_lines(path, kept)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        if not math.isfinite(logs["loss"]):
            raise ValueError(f"loss: got {logs['loss']} in step {state.global_step}")
        norm = logs.get("grad_norm")
        if (
            norm is not None and not math.isfinite(norm) and not args.fp16
        ):  # fp16's scaler skips the step
            raise ValueError(f"grad_norm: got {norm} in step {state.global_step}")
        now, tokens = time.perf_counter(), self.trainer.tokens
        line = {
            "step": state.global_step,
            "epoch": logs.get("epoch"),
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            "tokens": tokens - self.tokens,
            "seconds": round(now - self.begin, 3),
        }
        self.begin, self.tokens = now, tokens
        with open(Path(args.output_dir) / LOG, "a") as file:
            file.write(json.dumps(line) + "\n")
