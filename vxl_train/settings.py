"""Settings of a training run: the recipe's own, and HF's TrainingArguments with its defaults."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from .adapter_settings import VST_CHOICES, adapter_config, quantization_config

__all__ = ["TrainSettings", "reproducibility_fields"]

STAGES = ("align", "finetune")

# Defaults of both stages; names are TrainingArguments'.
_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "ddp_find_unused_parameters": False,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_num_workers": 2,
    "log_level": "error",
}
_STAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    "align": {"learning_rate": 1e-3, "per_device_train_batch_size": 8},
    "finetune": {
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
    },
}
# What the recipe depends on.
_SWITCHES = (
    "train_vision_tower",
    "group_by_length",
    "packing",
    "probe_files",
    "torch_compile",
    "new_optimizer",
    "merge",
)
_FIXED: dict[str, Any] = {"remove_unused_columns": False, "disable_tqdm": True}
# TrainingArguments that the recipe does not support, and why. Their default is allowed.
_LAST_MODEL = "the result is the model of the last step"
_OWN_ORDER = "the recipe orders samples itself (group_by_length)"
_REFUSED: dict[str, str] = {
    "label_smoothing_factor": "the loss is plain cross entropy",
    "neftune_noise_alpha": "text embeddings take no noise",
    "use_liger_kernel": "the layers are this package's own",
    "load_best_model_at_end": _LAST_MODEL,
    "metric_for_best_model": _LAST_MODEL,
    "do_predict": "there is nothing to predict",
    "train_sampling_strategy": _OWN_ORDER,
    "length_column_name": _OWN_ORDER,
    "accelerator_config": _OWN_ORDER,
    "dataloader_in_order": _OWN_ORDER,
    "ignore_data_skip": "a resumed run continues with the samples that were not trained yet",
    "auto_find_batch_size": "samples a step are part of what a run is",
    "deepspeed": "FSDP is the way to shard here",
    "parallelism_config": "FSDP is the way to shard here",
    "resume_from_checkpoint": "--resume finds the checkpoint",
    "label_names": "the recipe sets it",
}
# A resumed run may change these; everything else would make it another run.
_FREE = {
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "run_name",
    "log_level",
    "on_bad_sample",
    "new_optimizer",
    "merge",
    # Evaluation changes nothing that is trained.
    "eval_data",
    "eval_answers",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "do_eval",
    # Their product, over all processes, is compared instead.
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
}


@dataclasses.dataclass
class TrainSettings:
    """What a configuration file may set, besides any of `transformers.TrainingArguments`.

    Attributes:
        stage: "align" or "finetune".
        train_vision_tower: also finetune the layers of the tower that run.
        projector_learning_rate, vision_learning_rate: default to `learning_rate`.
        frames: the most frames of a video, and the most pictures of a sample.
        fps: frames a second, unless that gives more than `frames`.
        ratio: raw tokens per VST. From a list, one is drawn for each window. Default: the
            checkpoint's.
        max_text_tokens: a sample with more text is bad.
        on_bad_sample: "skip" takes the next sample in order; "stop" ends the run.
        group_by_length: each step holds samples of similar lengths.
        packing: the samples of a batch, of any shapes, are packed into passes without padding.
            Without it each sample has a pass of its own.
        probe_files: check that all files exist, and read their headers, before the start.
        torch_compile: compile norms, MLP and residuals with `torch_compile_backend`.
        new_optimizer: a resumed run may start with a new optimizer and schedule where the
            checkpoint holds none (`save_only_model`); its losses then differ.
        peft: a configuration of PEFT, or a JSON file of one. The base is frozen then.
        vst: with `peft`, how the VSTs' projections learn: "full" or "adapters".
        merge: with `peft`, write the model with the adapter merged into it too.
        quantization: with `peft`, keys of transformers' `BitsAndBytesConfig` for frozen weights.
        eval_data: a data file, whose loss is measured during training.
        eval_answers: a data file, whose questions are answered during training; needles, for
            instance. Measured is the share of right answers.
        dtype: of the weights, "float32" or "bfloat16". Under autocast (TrainingArguments' `bf16`)
            trainable weights are float32 regardless.
        arguments: the TrainingArguments.
    """

    stage: str
    train_vision_tower: bool = False
    projector_learning_rate: float | None = None
    vision_learning_rate: float | None = None
    frames: int = 128
    fps: float = 1.0
    ratio: int | list[int] | None = None
    max_text_tokens: int = 8192
    on_bad_sample: str = "skip"
    group_by_length: bool = True
    packing: bool = True
    probe_files: bool = True
    torch_compile: bool = False
    torch_compile_backend: str = "inductor"
    new_optimizer: bool = False
    peft: dict[str, Any] | None = None
    vst: str = "full"
    merge: bool = True
    quantization: dict[str, Any] | None = None
    eval_data: str | None = None
    eval_answers: str | None = None
    dtype: str = "float32"
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, config: str | os.PathLike[str] | None, stage: str, **overrides: Any) -> Any:
        """Reads a YAML or JSON file; `overrides` that are not None take precedence.

        Raises:
            ValueError: the file is not a mapping, or a key or value is unknown; it names the key.
        """
        given = read_config(config) if config is not None else {}
        given.pop("mix", None)  # of `vxl mix`, which has made the data
        given |= {key: value for key, value in overrides.items() if value is not None}
        given["stage"] = stage
        if isinstance(given.get("peft"), str):
            place = Path(config).parent if config is not None else Path()
            given["peft"] = read_config(place / given["peft"])
        own = {f.name: f for f in dataclasses.fields(cls) if f.name != "arguments"}
        theirs = {f.name: f for f in dataclasses.fields(TrainingArguments) if f.init}
        arguments: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for key, value in given.items():
            if key in _FIXED or key == "output_dir" or (key not in own and key not in theirs):
                close = difflib.get_close_matches(key, [*own, *theirs], 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                if key in _FIXED or key == "output_dir":
                    hint = "; the recipe sets it"
                raise ValueError(f"config: got the key {key!r}, an unknown setting{hint}")
            known = own.get(key) or theirs[key]
            (settings if key in own else arguments)[key] = _number(known, value)
        made = cls(**settings, arguments=arguments)
        made.check()
        return made

    def check(self) -> None:
        """Raises ValueError for the first invalid value."""
        for name in ("frames", "max_text_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")
        for name in ("fps", "projector_learning_rate", "vision_learning_rate"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ValueError(f"{name}: got {value!r}, expected a positive number")
        for name, allowed in (
            ("stage", STAGES),
            ("on_bad_sample", ("skip", "stop")),
            ("dtype", ("float32", "bfloat16")),
            ("vst", VST_CHOICES),
        ):
            if getattr(self, name) not in allowed:
                want = " or ".join(map(repr, allowed))
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {want}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected true or false")
        for name, reason in _REFUSED.items():
            value = self.arguments.get(name)
            if value not in (None, False, _default(name)):
                raise ValueError(f"{name}: got {value!r}, expected {_default(name)!r}: {reason}")
        if "ddp_backend" in self.arguments and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"ddp_backend: got {self.arguments['ddp_backend']!r} for one process, expected it "
                "only under torchrun or accelerate launch"
            )
        if self.train_vision_tower and self.stage == "align":
            raise ValueError("train_vision_tower: got true in stage 'align', expected false there")
        self._check_evaluation()
        self._check_adapters()

    @property
    def evaluates(self) -> bool:
        return self.eval_data is not None or self.eval_answers is not None

    def _check_evaluation(self) -> None:
        for name in ("eval_data", "eval_answers"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and Path(value).is_file()):
                raise ValueError(f"{name}: got {value!r}, expected a file that is there")
        strategy = self.arguments.get("eval_strategy")
        if not self.evaluates and strategy not in (None, False, "no"):
            raise ValueError(f"eval_strategy: got {strategy!r} without eval_data or eval_answers")
        if self.eval_answers and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise ValueError("eval_answers: got it under FSDP, expected whole weights")

    def _check_adapters(self) -> None:
        for name in ("peft", "quantization"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name}: got {value!r}, expected keys and values")
        if self.peft is None:
            for name, default in (("vst", "full"), ("merge", True), ("quantization", None)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}: got {getattr(self, name)!r} without peft")
            return
        if self.stage == "align":
            raise ValueError("peft: got adapters in stage 'align', where the projector learns")
        adapter_config(self.peft, self.vst)
        if self.quantization is not None:
            quantization_config(self.quantization, self.vst)
            if self.torch_compile:
                raise ValueError("torch_compile: got true with quantization, expected false")
            if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
                raise ValueError("quantization: got it under FSDP, expected one copy a process")

    def training_arguments(self, output: str) -> TrainingArguments:
        """HF's arguments, with the recipe's defaults.

        Raises:
            ValueError: TrainingArguments refuses one.
        """
        values = {**_DEFAULTS, **_STAGE_DEFAULTS[self.stage], **self.arguments, **_FIXED}
        if self.evaluates:
            values.setdefault("eval_strategy", "steps")
            if values["eval_strategy"] == "steps":
                values.setdefault("eval_steps", values["save_steps"])
        if "bf16" not in values and "fp16" not in values:
            cuda = torch.cuda.is_available() and not values.get("use_cpu")
            values["bf16"] = cuda and torch.cuda.is_bf16_supported()
        _checkpointing(values)
        if not torch.cuda.is_available() or values.get("use_cpu"):
            values.setdefault("dataloader_pin_memory", False)
        if not values["dataloader_num_workers"]:
            values.pop("dataloader_prefetch_factor", None)
        try:
            arguments = TrainingArguments(output_dir=output, **values)
        except (TypeError, ValueError, ImportError, RuntimeError) as error:
            raise ValueError(f"config: {' '.join(str(error).split())}") from None
        _check_reporters(arguments.report_to)
        return arguments


def _check_reporters(names: list[str]) -> None:
    for name in names:
        try:
            for reporter in get_reporting_integration_callbacks([name]):
                reporter()  # raises if its package is missing
        except Exception as error:  # of any such package
            text = " ".join(str(error).split())
            raise ValueError(f"report_to: got {name!r}, which cannot be used ({text})") from None


def _checkpointing(values: dict[str, Any]) -> None:
    """Sets gradient checkpointing by the name that this release of transformers uses."""
    fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    name = "activation" if "activation_checkpointing" in fields else "gradient"
    for old in ("activation", "gradient"):
        for rest in ("_checkpointing", "_checkpointing_kwargs"):
            if old != name and old + rest in values:
                values.setdefault(name + rest, values.pop(old + rest))
                values.pop(old + rest, None)
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true":
        values[f"{name}_checkpointing"] = False  # FSDP's own checkpointing gathers once less
    elif values.get(f"{name}_checkpointing"):
        values.setdefault(f"{name}_checkpointing_kwargs", {"use_reentrant": False})


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8")
        if Path(path).suffix == ".json":
            value = json.loads(text)
        else:
            import yaml

            value = yaml.safe_load(text)
    except Exception as error:  # YAML's errors share no base with JSON's
        raise ValueError(f"config: {path}: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"config: {path}: got a {type(value).__name__}, expected keys and values")
    return value


def reproducibility_fields(settings: TrainSettings) -> dict[str, Any]:
    """What a resumed run must not change."""
    values = dataclasses.asdict(settings)
    arguments = {**_DEFAULTS, **_STAGE_DEFAULTS[settings.stage], **values.pop("arguments")}
    if settings.peft is None:  # as the runs that began before there were adapters
        for name in ("peft", "vst", "quantization"):
            del values[name]
    if settings.packing:  # as the runs that began before it was a setting
        del values["packing"]
    return {k: v for k, v in {**arguments, **values}.items() if k not in _FREE}


def _default(name: str) -> Any:
    """The default of a TrainingArguments field; None where this release has no such field."""
    found = [f.default for f in dataclasses.fields(TrainingArguments) if f.name == name]
    return found[0] if found else None


def _number(known: Any, value: Any) -> Any:
    """A number that YAML read as text, like 1e-5."""
    if isinstance(value, str) and ("float" in str(known.type) or "int" in str(known.type)):
        try:
            return float(value) if "." in value or "e" in value.lower() else int(value)
        except ValueError:
            return value
    return value
