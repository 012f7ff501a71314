"""`vxl plan`: prints what `estimate` counts."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from vxl_model.decoder.configuration import VideoXLConfig

from .common import placement, quiet
from .estimate import VideoEstimate, device_memory, estimate_video, released_config
from .training_memory import TrainingEstimate, estimate_training

__all__ = ["print_plans", "product_rate"]

GIB = 2.0**30
QUESTION, ANSWER = 64, 256  # tokens


def print_plans(options: argparse.Namespace) -> None:
    """The command; raises ValueError for a model, frames or ratio that cannot be."""
    from vxl_model.inputs.processing import VideoXLProcessor

    quiet()
    device, dtype = placement(options)
    here = options.free is None
    if not here and options.dtype is None:
        dtype = torch.bfloat16
    if options.model is None:
        config, name = released_config(), "Video-XL-7B (the released geometry)"
    else:
        VideoXLProcessor.read_config(options.model)  # its errors are short
        config, name = VideoXLConfig.from_pretrained(options.model), options.model
    ratios = options.ratio if isinstance(options.ratio, list) else [options.ratio]
    estimates = [
        estimate_video(
            config,
            options.frames,
            ratio,
            dtype=dtype,
            device=device,
            question=QUESTION,
            answer=ANSWER,
            quantize=options.quantize,
        )
        for ratio in ratios
    ]
    training = [_training(config, ratio, dtype, options) for ratio in ratios]
    about: dict[str, Any] = {
        "model": name,
        "device": str(device) if here else "not here",
        "free_bytes": device_memory(device) if here else options.free,
        "flops_per_second": product_rate(device, dtype) if here else None,
        "trained_positions": config.max_position_embeddings,
    }
    if options.json:
        for estimate, trained in zip(estimates, training, strict=True):
            more = {} if trained is None else {"training": trained.to_dict()}
            print(json.dumps({**about, **estimate.to_dict(), **more}))
        return
    first = estimates[0]
    print(
        f"model     {name}, {first.parameters / 1e9:.2f} G parameters, {first.dtype}"
        + (f", decoder in {options.quantize}, on " if options.quantize else ", on ")
        + (str(device) if here else f"a device with {options.free / GIB:.1f} GiB")
    )
    if len(estimates) == 1:
        _print_one(first, about)
    else:
        _print_table(estimates, about)
    for ratio, trained in zip(ratios, training, strict=True):
        if trained is not None:
            _print_training(trained, ratio, options, about["free_bytes"])


def _training(
    config: VideoXLConfig, ratio: int, dtype: torch.dtype, options: argparse.Namespace
) -> TrainingEstimate | None:
    if options.train is None:
        return None
    return estimate_training(
        config,
        options.frames,
        ratio,
        train=options.train,
        rank=options.lora_rank,
        vst=options.vst,
        quantize=options.quantize,
        dtype=dtype,
    )


def _print_training(
    estimate: TrainingEstimate, ratio: int, options: argparse.Namespace, free: int
) -> None:
    kind = f"LoRA of rank {options.lora_rank}" if options.train == "lora" else "everything"
    print(f"training  {kind}: {estimate.learning:,} weights learn, a video a step, ratio {ratio}")
    rows = (
        ("weights", estimate.weight_bytes),
        ("gradients", estimate.gradient_bytes),
        ("AdamW", estimate.optimizer_bytes),
        ("activations, about", estimate.activation_bytes),
    )
    for name, size in rows:
        print(f"  {name:<22} {size / GIB:9.2f} GiB")
    fits = "fits" if estimate.total_bytes < free else "does not fit"
    print(
        f"  total                  {estimate.total_bytes / GIB:9.2f} GiB   "
        f"{fits}: {free / GIB:.1f} GiB are free"
    )


def _print_one(estimate: VideoEstimate, about: dict[str, Any]) -> None:
    free = about["free_bytes"]
    raw = estimate.raw_dense_flops + estimate.raw_attention_flops
    language = estimate.dense_flops + estimate.attention_flops
    fits = "fits" if estimate.total_bytes < free else "does not fit"
    print(
        f"video     {estimate.frames} frames, {estimate.visual_tokens} visual tokens, "
        f"{estimate.cached_tokens} cached tokens at ratio {estimate.ratio}"
    )
    if note := _beyond(estimate, about):
        print(f"          {note}")
    print("memory")
    print(f"  weights                {estimate.weight_bytes / GIB:9.2f} GiB")
    print(
        f"  KV cache               {estimate.cache_bytes / GIB:9.2f} GiB   "
        f"(without compression: {estimate.raw_cache_bytes / GIB:.2f} GiB)"
    )
    print(f"  activations, about     {estimate.step_bytes / GIB:9.2f} GiB")
    print(
        f"  total                  {estimate.total_bytes / GIB:9.2f} GiB   "
        f"{fits}: {free / GIB:.1f} GiB are free"
    )
    print("arithmetic")
    print(
        f"  vision                 {estimate.vision_flops / 1e12:9.1f} TFLOP"
        f"{_seconds(estimate.vision_flops, about)}"
    )
    print(
        f"  language model         {language / 1e12:9.1f} TFLOP{_seconds(language, about)}, "
        f"{100 * estimate.attention_flops / language:.0f} % of it attention "
        f"(without compression: {raw / 1e12:.1f})"
    )
    print(
        f"  a question             {estimate.question_flops / 1e12:9.1f} TFLOP, "
        f"{QUESTION} tokens and {ANSWER} of answer"
    )
    if rate := about["flops_per_second"]:
        print(f"  (seconds at {rate / 1e12:.2f} TFLOP/s, what a matrix product reaches here now)")


def _print_table(estimates: list[VideoEstimate], about: dict[str, Any]) -> None:
    free = about["free_bytes"]
    print(
        f"video     {estimates[0].frames} frames, {estimates[0].visual_tokens} visual tokens; "
        f"{free / GIB:.1f} GiB are free"
    )
    print("ratio   cached  KV cache      total   fits      TFLOP  attention")
    for one in estimates:
        language = one.dense_flops + one.attention_flops
        print(
            f"{one.ratio:5} {one.cached_tokens:8} {one.cache_bytes / GIB:7.2f} G "
            f"{one.total_bytes / GIB:8.2f} G   {'yes' if one.total_bytes < free else 'no':4} "
            f"{(language + one.vision_flops) / 1e12:10.1f} "
            f"{100 * one.attention_flops / language:8.0f} %"
            f"{_seconds(language + one.vision_flops, about)}"
        )
    for one in estimates:
        if note := _beyond(one, about):
            print(f"ratio {one.ratio}: {note}")


def _beyond(estimate: VideoEstimate, about: dict[str, Any]) -> str:
    """A note where positions go beyond those of the training; else empty."""
    positions, trained = estimate.cached_tokens + QUESTION + ANSWER, about["trained_positions"]
    if positions <= trained:
        return ""
    return f"warning: {positions:,} positions, more than the {trained:,} the model was trained for"


def _seconds(flops: int, about: dict[str, Any]) -> str:
    rate = about["flops_per_second"]
    return f"  >= {flops / rate:,.0f} s" if rate else ""


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product on a device, the best of three."""
    a = torch.randn(1024, 2048, device=device).to(dtype)
    b = torch.randn(2048, 2048, device=device).to(dtype)
    best = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        (a @ b)[0, 0].item()
        best = max(best, 2 * 1024 * 2048 * 2048 / (time.perf_counter() - begin))
    return best
