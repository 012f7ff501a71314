"""Times the engine that answers many clients: `python benchmarks/serve.py`.

`clients`: many clients at once against one at a time, questions about several videos, through a
few layers of Qwen2-7B's geometry. Ids are compared with those of `memory.ask`.
`second`: the first token of a first question, for which a video is watched, and of a second one.

Random weights: the work does not depend on their values.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks.common import machine
from benchmarks.common.cases import DTYPES
from benchmarks.common.options import add_output_options, check_output_options
from benchmarks.model.cases import make_model
from examples.demo import demo_model
from vxl_kernels.files import atomic_write
from vxl_serve.engine import Engine
from vxl_serve.questions import Question
from vxl_serve.sampling import Sampling

GEOMETRY = {
    "hidden": 3584,
    "heads": 28,
    "kv_heads": 4,
    "intermediate": 18944,
    "vocab": 4096,
    "window": 1440,
}
SMALL = {
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 96,
    "vocab": 128,
    "window": 48,
}


class _Words:
    """A processor's tokenizer for a model that has none."""

    tokenizer: _Words

    def __init__(self) -> None:
        self.tokenizer = self

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


def clients(options: argparse.Namespace) -> dict[str, Any]:
    """Answers a minute of one client after another and of all at once."""
    model = make_model(options, options.layers)
    model.processor = _Words()
    engine = Engine(model, options.cache_tokens, most_running=options.clients)
    generator = torch.Generator().manual_seed(0)
    hidden, vocabulary = options.geometry["hidden"], options.geometry["vocab"]
    memories = []
    for _ in range(options.videos):
        features = torch.randn(options.visual_tokens, hidden, generator=generator)
        memories.append(
            model.watch(visual_features=features.to(model.dtype), input_ids=[1, 2, 3], ratio=8)
        )
    lengths = torch.randint(12, 40, (options.clients,), generator=generator).tolist()
    asked = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
    sampling = Sampling(max_tokens=options.new)

    async def one(i: int) -> tuple[list[int], float]:
        begin, first, ids = time.perf_counter(), 0.0, list[int]()
        memory = memories[i % len(memories)]
        async for event in engine.ask(Question(asked[i], sampling, lambda: memory)):
            first = first or time.perf_counter() - begin
            ids.append(event.chosen.token)
        return ids, first

    async def alone(count: int) -> list[tuple[list[int], float]]:
        return [await one(i) for i in range(count)]

    async def together() -> list[tuple[list[int], float]]:
        return await asyncio.gather(*map(one, range(options.clients)))

    asyncio.run(alone(1))
    alone_seconds, single = _timed(lambda: asyncio.run(alone(options.alone)))
    at_once_seconds, many = _timed(lambda: asyncio.run(together()))
    engine.close()
    wanted = [
        memories[i % len(memories)].ask(asked[i], options.new, do_sample=False).tolist()
        for i in range(options.alone)
    ]
    rates = options.alone / alone_seconds * 60, options.clients / at_once_seconds * 60
    return {
        "clients": options.clients,
        "answers_per_minute_alone": rates[0],
        "answers_per_minute_at_once": rates[1],
        "ratio": rates[1] / rates[0],
        "first_token_alone": statistics.median(first for _, first in single),
        "first_token_at_once": statistics.median(first for _, first in many),
        "longest_first_token": max(first for _, first in many),
        "match": wanted == [ids for ids, _ in many[: options.alone]] == [ids for ids, _ in single],
    }


def second(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first token of a first question, watching included, and of a second one."""
    model = demo_model().to(options.device, options.dtype)
    engine = Engine(model, 16384)
    generator = torch.Generator().manual_seed(0)
    shape = (options.frames, 336, 336, 3)
    frames = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    memories = []

    def watch() -> Any:
        memories.append(model.watch(frames, ratio=8))

    async def first_token(words: str, before: Callable[[], Any] | None = None) -> float:
        ids = model.processor.suffix_ids(words)[0].tolist()
        begin = time.perf_counter()
        if before is not None:
            await asyncio.wrap_future(engine.call(before, long=True))
        async for _ in engine.ask(Question(ids, Sampling(max_tokens=1), lambda: memories[0])):
            break
        return time.perf_counter() - begin

    async def run() -> tuple[float, float]:
        return await first_token("What happens?", watch), await first_token("And after that?")

    first, later = asyncio.run(run())
    engine.close()
    return {"frames": options.frames, "first": first, "second": later, "share": later / first}


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


CASES = {"clients": clients, "second": second}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="(default: all)")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--alone", type=int, default=4, help="questions of the slow way")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--visual-tokens", type=int, default=1440)
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a tiny geometry, to see that it runs")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    check_output_options(parser, options)
    options.geometry, options.alpha = (SMALL if options.small else GEOMETRY), 8
    options.dtype, options.chunks_per_step = DTYPES[options.dtype], None
    rows = options.visual_tokens // 8 + 256
    options.cache_tokens = (options.videos + options.clients) * (rows + options.new)
    for name, text in machine.describe(options.device):
        print(f"{name:10}{text}")
    results: dict[str, Any] = {}
    for name in options.case or CASES:
        results[name] = CASES[name](options)
        print(f"\n{name}")
        for key, value in results[name].items():
            print(f"  {key:28}{value:.3f}" if isinstance(value, float) else f"  {key:28}{value}")
    if options.json:
        atomic_write(options.json, json.dumps(results, indent=1) + "\n", durable=False)
    return 0 if results.get("clients", {}).get("match", True) else 1


if __name__ == "__main__":
    sys.exit(main())
