"""What `prefill.py` measures."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import vxl_model.decoder.attention
import vxl_model.decoder.context
import vxl_model.decoder.layers
from benchmarks.common.cases import DTYPES
from benchmarks.common.machine import Ceilings
from benchmarks.peers.upstream_model import PublishedModel
from vxl_model import VideoXLConfig, VideoXLForConditionalGeneration

__all__ = ["PARTS", "encode", "make_model", "memory", "peak_of", "pipeline", "questions"]

PARTS = ("projections", "append", "attention", "MLP")
TOLERANCE = 1e-4  # relative; float32 sums over thousands of keys in different orders
TOKENS_PER_FRAME = 144


def make_model(options: argparse.Namespace, layers: int) -> Any:
    """A model with random weights whose residuals stay near 1, as in a trained model."""
    torch.manual_seed(0)
    g = options.geometry
    config = VideoXLConfig(
        hidden_size=g["hidden"],
        intermediate_size=g["intermediate"],
        num_hidden_layers=layers,
        num_attention_heads=g["heads"],
        num_key_value_heads=g["kv_heads"],
        vocab_size=g["vocab"],
        beacon_window=g["window"],
        beacon_ratio=options.alpha,
        eos_token_id=None,
        rope_theta=1e6,
        head_dim=g["hidden"] // g["heads"],
    )
    with torch.device("meta"):
        model = VideoXLForConditionalGeneration(config)
    # dtype first: a float32 Qwen2-7B and its copy would not fit
    model.to(options.dtype).to_empty(device=options.device).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.fill_(1.0)
        else:
            weight.normal_(std=0.6 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.1)
    model.settings.chunks_per_step = options.chunks_per_step
    return model


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def _projection_flops(out: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.shape[-1] * out.numel()


def _linear_flops(out: Tensor, module: Any, x: Tensor) -> int:
    return _projection_flops(out, x)


def _mlp_flops(out: Tensor, module: Any, x: Tensor) -> int:
    return 3 * 2 * x.numel() * module.gate_proj.out_features


def _attention_flops(out: Tensor, *args: Any, **_: Any) -> int:
    lengths, layout = args[6:8]
    heads, head_dim = out.shape[2:]
    return sum(layout.flops(heads, head_dim, cached) for cached in lengths.tolist())


class Stopwatch:
    """Seconds and FLOPs of the parts of a pass, by wrapping the functions that compute them."""

    # Where a function is looked up, its name, the part, FLOPs by result and arguments.
    _FUNCTIONS: tuple[tuple[Any, str, str, Callable[..., int]], ...] = (
        (vxl_model.decoder.attention, "project_rows", "projections", _projection_flops),
        (vxl_model.decoder.layers, "linear", "projections", _linear_flops),
        (vxl_model.decoder.context, "rope_append", "append", lambda *_, **__: 0),
        (vxl_model.decoder.context, "vst_attention", "attention", _attention_flops),
        (vxl_model.decoder.layers, "mlp", "MLP", _mlp_flops),
    )

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.flops: dict[str, int] = {}

    def _wrap(
        self, part: str, call: Callable[..., Any], flops: Callable[..., int]
    ) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize(self.device)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            synchronize(self.device)
            self.seconds[part] += time.perf_counter() - start
            self.flops[part] += flops(result, *args, **kwargs)
            return result

        return timed

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Times the parts from 0 on. AssertionError for a part that nothing called: the model then
        reaches it by another name than the one wrapped here."""
        self.seconds, self.flops = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0)
        with ExitStack() as stack:
            for module, name, part, flops in self._FUNCTIONS:
                wrapped = self._wrap(part, getattr(module, name), flops)
                stack.enter_context(mock.patch.object(module, name, wrapped))
            yield
        untimed = [part for part, seconds in self.seconds.items() if not seconds]
        assert not untimed, f"never called: {', '.join(untimed)}"


def relative(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).float().abs().max() / truth.float().abs().max())


def random_window(options: argparse.Namespace, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    g = options.geometry
    features = torch.randn(g["window"], g["hidden"], generator=generator)
    return features.to(options.device, options.dtype)


# -- encode -------------------------------------------------------------------------------


def encode(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every window for each competitor. Windows are encoded in turns, so drift of the
    machine affects all alike."""
    model = make_model(options, options.layers)
    prompt = torch.arange(14, device=options.device) % options.geometry["vocab"]
    watch = Stopwatch(options.device)
    published = PublishedModel(model)
    published.read(prompt)
    ours = {True: _memory(model, prompt), False: _memory(model, prompt)}
    competitors = {
        "vxl": lambda x: _append(model, ours[True], x, shortcut=True),
        "vxl, last layer in full": lambda x: _append(model, ours[False], x, shortcut=False),
        "published": lambda x: published.watch(x, options.alpha),
    }
    names = list(competitors)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    parts: list[dict[str, float]] = []
    flops: list[dict[str, int]] = []
    dtype = next(name for name, value in DTYPES.items() if value == options.dtype)
    ceilings = Ceilings(options.device, [dtype], options.small)
    ceilings.read()
    # The stopwatch waits for the device before and after each part. On a GPU that shows the host's
    # time, which is hidden otherwise, so parts have windows of their own there.
    apart = options.device == "cuda"
    for name in names:  # the first call allocates pages and loads code
        if name == "published":
            PublishedModel(model).watch(
                random_window(options, 0)[: options.alpha * 8], options.alpha
            )
    _append(model, _memory(model, prompt), random_window(options, 0), shortcut=False)
    for chunk in range(options.chunks):
        window = random_window(options, chunk)
        names = names[1:] + names[:1]
        ceilings.sample("product", dtype)
        for name in names:
            watched = name == "vxl" and not apart
            with watch.timing() if watched else ExitStack():
                synchronize(options.device)
                start = time.perf_counter()
                competitors[name](window)
                synchronize(options.device)
                seconds[name].append(time.perf_counter() - start)
            if watched:
                rest = seconds[name][-1] - sum(watch.seconds.values())
                parts.append({**watch.seconds, "norms, residuals": rest})
                flops.append(watch.flops)
    if apart:
        parts, flops = _parts(options, model, watch, ours[True].fork())
    tail = torch.arange(20, device=options.device) % options.geometry["vocab"]
    want = published.read(tail)
    errors = {"tail logits": relative(model(tail[None], memory=ours[True]).logits[0], want)}
    last = options.layers - 1
    mine = ours[True].keys_values(last)[0]
    errors["kept K"] = relative(mine, published.rotated_keys(last)[: len(mine)])
    return {
        "seconds": seconds,
        "parts": parts,
        "flops": flops,
        "product": ceilings.median(ceilings.product_name(dtype)),
        "product_name": ceilings.product_name(dtype),
        "errors": errors,
        "match": max(errors.values()) < TOLERANCE or options.dtype != torch.float32,
    }


def _parts(
    options: argparse.Namespace, model: Any, watch: Stopwatch, video: Any
) -> tuple[list[dict[str, float]], list[dict[str, int]]]:
    """Seconds and FLOPs of the parts of three more windows."""
    parts, flops = [], []
    for chunk in range(3):
        with watch.timing():
            synchronize(options.device)
            start = time.perf_counter()
            _append(model, video, random_window(options, chunk), shortcut=True)
            synchronize(options.device)
            rest = time.perf_counter() - start - sum(watch.seconds.values())
        parts.append({**watch.seconds, "norms, residuals": rest})
        flops.append(watch.flops)
    return parts, flops


def _memory(model: Any, prompt: Tensor) -> Any:
    return model.watch(input_ids=prompt, visual_features=[], tokens=20 * 1440)


def _append(model: Any, memory: Any, window: Tensor, shortcut: bool) -> None:
    model.settings.skip_last_layer_outputs = shortcut
    memory.append(visual_features=window)
    model.settings.skip_last_layer_outputs = True


# -- questions ----------------------------------------------------------------------------


def questions(options: argparse.Namespace) -> dict[str, Any]:
    """One video, many questions: against encoding it again for each, and all in one call against
    one after the other."""
    model = make_model(options, options.layers)
    windows = -(-options.frames * TOKENS_PER_FRAME // options.geometry["window"])
    tokens = options.frames * TOKENS_PER_FRAME
    features = torch.cat([random_window(options, i) for i in range(windows)])[:tokens]
    prompt = torch.arange(14) % options.geometry["vocab"]
    start = time.perf_counter()
    memory = model.watch(input_ids=prompt, visual_features=features)
    synchronize(options.device)
    watched = time.perf_counter() - start
    cache = memory.batch.states[0].sequence.cache.pages
    used = cache.num_pages - cache.free_pages
    generator = torch.Generator().manual_seed(1)
    new = {"max_new_tokens": options.new_tokens, "eos_token_id": None}
    memory.ask(torch.arange(20), **new)  # the first one compiles and loads kernels
    asked, tails, answers = [], [], []
    for _ in range(options.questions):
        tail = torch.randint(0, options.geometry["vocab"], (20,), generator=generator)
        start = time.perf_counter()
        answers.append(memory.ask(tail, **new))
        synchronize(options.device)
        asked.append(time.perf_counter() - start)
        tails.append(tail)
    peak = cache.stats()["peak_used_pages"]
    start = time.perf_counter()
    together = memory.ask(tails, **new)
    synchronize(options.device)
    together_s = time.perf_counter() - start
    same = all(torch.equal(a, b) for a, b in zip(answers, together, strict=True))
    every = sum(asked)
    once = watched + every
    again = options.questions * watched + every
    return {
        "frames": options.frames,
        "questions": options.questions,
        "watch_s": watched,
        "question_s": every / options.questions,
        "speedup": again / once,
        "pages_video": used,
        "pages_after": peak,
        "together_s": together_s,
        "together_speedup": every / together_s,
        "same_answers": same,
    }


# -- memory -------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory above the model's for videos of several lengths, each in its own process."""
    rows = []
    for frames in options.memory_frames:
        command = [sys.executable, str(Path(__file__).parents[1] / "prefill.py")]
        command += ["--peak-of", str(frames), "--alpha", str(options.alpha)]
        command += ["--small"] if options.small else []
        command += ["--device", options.device]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    first = rows[0]
    for row in rows:
        allowed = first["peak_mib"] + row["kept_mib"] - first["kept_mib"]
        row["of_allowed"] = row["peak_mib"] / allowed
    return {"rows": rows}


def peak_of(options: argparse.Namespace, frames: int) -> dict[str, float]:
    """Peak MiB above what the process holds before the video begins."""
    model = make_model(options, 2)
    tokens = frames * TOKENS_PER_FRAME
    window = options.geometry["window"]

    def stream() -> Iterator[Tensor]:
        for start in range(0, tokens, window):
            yield random_window(options, start)[: tokens - start]

    prompt = torch.arange(14) % options.geometry["vocab"]
    # A first video of one window loads code and warms the allocator.
    model.watch(input_ids=prompt, visual_features=[random_window(options, 0)])
    before = _peak_bytes(options.device, reset=True)
    watched = model.watch(input_ids=prompt, visual_features=stream(), tokens=tokens)
    peak = _peak_bytes(options.device, reset=False) - before
    mib = 1 << 20
    return {"frames": frames, "peak_mib": peak / mib, "kept_mib": watched.bytes / mib}


def _peak_bytes(device: str, reset: bool) -> int:
    if device != "cpu":
        module = torch.get_device_module(device)
        if reset:
            module.reset_peak_memory_stats()
            return module.memory_allocated()
        return module.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    name = "VmRSS" if reset else "VmHWM"
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith(name))
    return int(line.split()[1]) * 1024


# -- decode, vision, projector ------------------------------------------------------------


def pipeline(options: argparse.Namespace) -> dict[str, float]:
    """Seconds a frame of what comes before the language model: decoding a clip made on the
    spot, preprocessing, CLIP-ViT-L/14-336 and the projector with random weights."""
    from transformers import CLIPVisionConfig

    from vxl_model.decoder.vision_tower import VisionTower, project_and_pool

    shape: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    if options.small:
        shape |= {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        }
    tower = VisionTower(CLIPVisionConfig(**shape)).to(options.device, options.dtype).eval()
    hidden = options.geometry["hidden"]
    projector = torch.nn.Sequential(
        torch.nn.Linear(shape["hidden_size"], hidden),
        torch.nn.GELU(),
        torch.nn.Linear(hidden, hidden),
    ).to(options.device, options.dtype)
    frames = options.vision_frames
    pixels = torch.randn(frames, 3, 336, 336, device=options.device, dtype=options.dtype)
    seconds: dict[str, float] = {}
    seconds |= _decode_seconds(options)
    for _ in range(2):  # the second run counts
        start = time.perf_counter()
        features = tower(pixels)
        synchronize(options.device)
        middle = time.perf_counter()
        project_and_pool(features, projector)
        synchronize(options.device)
        seconds["vision"] = (middle - start) / frames
        seconds["projector"] = (time.perf_counter() - middle) / frames
    return seconds


def _decode_seconds(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of decoding with resizing, and of normalising; empty without a decoder."""
    try:
        from examples.demo_clip import write_demo_clip
        from vxl_model.inputs.processing import VideoXLProcessor
        from vxl_model.video.reader import open_video
    except ImportError:
        return {}
    size = (320, 180) if options.small else (1920, 1080)
    with tempfile.TemporaryDirectory() as folder:
        try:
            clip = write_demo_clip(Path(folder) / "clip.mp4", seconds=8, fps=25, size=size)
        except ImportError:
            return {}
        start = time.perf_counter()
        batches = list(open_video(clip))
        decoded = time.perf_counter() - start
    frames = sum(len(batch) for batch in batches)
    processor = VideoXLProcessor()
    start = time.perf_counter()
    for batch in batches:
        processor.frames_to_pixels(batch)
    normalised = time.perf_counter() - start
    return {"decode": decoded / frames, "preprocess": normalised / frames}
