"""A decoding step of some layers of Qwen2-7B, eager and as a captured graph, and a window."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.model.cases import TOKENS_PER_FRAME, make_model, random_window

__all__ = ["FULL", "SMALL", "token_calls", "window_calls"]

# All of Qwen2-7B's language model but its number of layers: 8.4 G parameters with 28 of them.
FULL = {
    "hidden": 3584,
    "heads": 28,
    "kv_heads": 4,
    "intermediate": 18944,
    "vocab": 152064,
    "window": 1440,
}
SMALL = {
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 96,
    "vocab": 101,
    "window": TOKENS_PER_FRAME,
}


def _options(small: bool, dtype: torch.dtype, device: str) -> argparse.Namespace:
    geometry = SMALL if small else FULL
    return argparse.Namespace(
        geometry=geometry, device=device, dtype=dtype, alpha=8, chunks_per_step=None
    )


def token_calls(
    layers: int, small: bool, dtype: torch.dtype, device: str = "cuda"
) -> tuple[dict[str, Callable[[], torch.Tensor]], int]:
    """ "eager", "graph" and "reference" (eager, its operators by the reference): a call decodes one
    more token after a window and returns its logits. And the bytes of weights that a step reads."""
    options = _options(small, dtype, device)
    model = make_model(options, layers)
    prompt = torch.arange(14, device=device)
    memory = model.watch(input_ids=prompt, visual_features=[random_window(options, 0)])
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def decoder(graphs: bool, backend: str | None = None) -> Callable[[], torch.Tensor]:
        batch = memory.forks(1)

        def call() -> torch.Tensor:
            model.settings.decode_graphs, model.settings.backend = graphs, backend
            return model.decode_step(ids, batch).logits

        return call

    weights = [x for layer in model.model.layers for n, x in layer.named_parameters()
               if "beacon" not in n]  # fmt: skip
    read = sum(x.nbytes for x in [*weights, model.lm_head.weight])
    calls = {"reference": decoder(False, "reference"), "eager": decoder(False)}
    return calls | {"graph": decoder(True)}, read


def window_calls(
    layers: int, small: bool, dtype: torch.dtype, device: str = "cuda"
) -> tuple[dict[str, Callable[[], torch.Tensor]], float]:
    """ "window" and "reference" (its operators by the reference): a call encodes one window after a
    prompt, all layers in full, and returns the last one's K. And the FLOPs of the products with
    weights."""
    options = _options(small, dtype, device)
    model = make_model(options, layers)
    model.settings.skip_last_layer_outputs = False
    prompt = torch.arange(14, device=device)
    memory = model.watch(
        input_ids=prompt, visual_features=[], tokens=8 * options.geometry["window"]
    )
    window = random_window(options, 0)

    def encoder(backend: str | None = None) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            model.settings.backend = backend
            video = memory.fork()
            video.append(visual_features=window)
            return video.keys_values(layers - 1)[0]

        return call

    weights = [x for layer in model.model.layers for n, x in layer.named_parameters()
               if x.dim() == 2 and "beacon" not in n]  # fmt: skip
    rows = len(window) + len(window) // options.alpha
    flops = 2.0 * rows * sum(x.numel() for x in weights)
    return {"reference": encoder("reference"), "window": encoder()}, flops
