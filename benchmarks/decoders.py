"""Times a plain decoder of transformers with other attention: `python benchmarks/decoders.py`.

`sdpa`: transformers' own attention, keys and values in its DynamicCache. `vxl`: these kernels over
the same cache. `paged`: these kernels over pages. One model and one prompt for all three, in turns.
Their logits are compared before anything is timed; if they differ, the exit status is 1.

Random weights in Qwen2-0.5B's geometry, with few layers: the work does not depend on their
values.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import machine
from benchmarks.common.cases import DTYPES
from benchmarks.common.options import add_output_options, check_output_options
from benchmarks.common.timing import Clock, interleave, spread
from vxl_kernels.files import atomic_write
from vxl_kernels.integrations.transformers import PagedCache, register

PROVIDERS = ("sdpa", "vxl", "paged")
GEOMETRY = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
SMALL = {
    **GEOMETRY,
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
}
_BATCH = 4  # of a padded batch; its rows have all, 7/8, 6/8 and 5/8 of the tokens
_STEPS = 8  # decoding steps of one measurement
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 5e-3}
# By which name a model takes its cache: the second since transformers 5.24.
_ARGUMENTS = inspect.signature(Qwen2ForCausalLM.forward).parameters
_CACHE = "past_key_values" if "past_key_values" in _ARGUMENTS else "cache"


@dataclass(frozen=True)
class Case:
    """`prefill`: a prompt of `tokens`. `decode`: one token a step after it, in `rows` rows."""

    kind: str
    tokens: int
    rows: int = 1


CASES = {
    "prefill-1024": Case("prefill", 1024),
    "prefill-4096": Case("prefill", 4096),
    "decode-1024": Case("decode", 1024),
    "decode-4096": Case("decode", 4096),
    "decode-padded": Case("decode", 1024, _BATCH),
}


@dataclass
class Line:
    """Tokens a second of one provider in one case.

    Attributes:
        spread: half the range of the quartiles, as a part of the median.
        max_error: of the logits against those of `sdpa`, relative to the largest.
    """

    case: str
    dtype: str
    provider: str
    tokens_per_s: float
    spread: float
    repeats: int
    max_error: float
    ok: bool


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", action="append", choices=list(CASES), help="repeatable; default all")
    add("--dtype", choices=list(DTYPES), action="append", help="repeatable; default fp32 and bf16")
    add("--layers", type=int, default=4, help="default %(default)s")
    add("--seconds", type=float, default=8.0, help="of one case (default %(default)s)")
    add("--device", choices=["cpu", "cuda"], help="default cuda where there is one")
    add("--threads", type=int, help="CPU threads")
    add("--small", action="store_true", help="tiny shapes, to see that everything runs")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    for name in ("layers", "threads", "seconds"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name}: got {value}, expected more than 0")
    options.case = options.case or list(CASES)
    options.dtype = options.dtype or ["fp32", "bf16"]
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_output_options(parser, options)
    return options


class Prompt:
    """A decoder and a prompt, and what it holds of the prompt for each provider."""

    def __init__(self, model: Any, case: Case) -> None:
        self.model, self.case = model, case
        shape = (case.rows, case.tokens + _STEPS)
        self.ids = torch.randint(3, model.config.vocab_size, shape).to(model.device)
        self.mask = torch.ones_like(self.ids)
        for row in range(case.rows):
            self.mask[row, : row * case.tokens // 8] = 0
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.caches: dict[str, Any] = {}

    def select(self, provider: str) -> None:
        """The model computes with this provider from now on."""
        self.model.set_attn_implementation("sdpa" if provider == "sdpa" else "vxl")

    def empty(self, provider: str) -> Any:
        """A cache without tokens."""
        if provider != "paged":
            return DynamicCache(config=self.model.config)
        return PagedCache.for_model(self.model, self.ids.shape[1], self.case.rows)

    def forward(self, cache: Any, start: int, stop: int) -> torch.Tensor:
        """Logits of the last of the columns `start` to `stop`, whose rows join the cache."""
        mask = None if bool(self.mask.all()) else self.mask[:, :stop]
        given = {_CACHE: cache, "position_ids": self.positions[:, start:stop]}
        ids = self.ids[:, start:stop]
        return self.model(
            ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **given
        ).logits

    def prefill(self, provider: str) -> torch.Tensor:
        self.select(provider)
        self.caches[provider] = cache = self.empty(provider)
        return self.forward(cache, 0, self.case.tokens)

    def decode(self, provider: str) -> torch.Tensor:
        """`_STEPS` tokens after the prompt, and back."""
        cache, first = self.caches[provider], self.case.tokens
        for start in range(first, first + _STEPS):
            logits = self.forward(cache, start, start + 1)
        cache.crop(-_STEPS)
        return logits

    def seconds(self, provider: str, clock: Clock) -> float:
        """Of a prefill or of `_STEPS` steps; what comes before is not timed."""
        self.select(provider)
        if self.case.kind == "decode":
            return clock.seconds(partial(self.decode, provider))
        return clock.seconds(partial(self.forward, self.empty(provider), 0, self.case.tokens))


def measure(model: Any, name: str, case: Case, clock: Clock, seconds: float) -> list[Line]:
    """All providers in turns, after their logits were compared."""
    prompt, logits = Prompt(model, case), dict[str, torch.Tensor]()
    for provider in PROVIDERS:
        logits[provider] = prompt.prefill(provider)
        if case.kind == "decode":
            logits[provider] = prompt.decode(provider)
    truth = logits["sdpa"].float()
    errors = [float((x.float() - truth).abs().max() / truth.abs().max()) for x in logits.values()]
    calls: dict[int, Callable[[], float]] = {
        i: partial(prompt.seconds, x, clock) for i, x in enumerate(PROVIDERS)
    }
    times = interleave(calls, seconds, 3, 60)
    tokens = case.tokens if case.kind == "prefill" else _STEPS * case.rows
    dtype = next(k for k, v in DTYPES.items() if v == model.dtype)
    return [
        Line(
            name,
            dtype,
            provider,
            tokens / statistics.median(times[i]),
            spread(times[i]),
            len(times[i]),
            errors[i],
            errors[i] <= _TOLERANCE[model.dtype],
        )
        for i, provider in enumerate(PROVIDERS)
    ]


def text(lines: Sequence[Line]) -> str:
    """One line for the providers of a case."""
    cells = [f"{lines[0].case:<14} {lines[0].dtype}"]
    for line in lines:
        wrong = "" if line.ok else "✗"
        cells.append(f"{line.tokens_per_s:8.0f} ±{100 * line.spread:2.0f}%{wrong}")
    ratio = lines[-1].tokens_per_s / lines[0].tokens_per_s
    return "  ".join([*cells, f"paged / sdpa {ratio:.2f}"])


def decoder(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = SMALL if options.small else GEOMETRY
    config = Qwen2Config(**sizes, num_hidden_layers=options.layers)
    return Qwen2ForCausalLM(config).to(options.device, dtype).eval()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    register()
    for name, value in machine.describe(options.device):
        print(f"{name:<9} {value}", flush=True)
    print(f"{'':<14} tokens/s  {'   '.join(f'{x:>11}' for x in PROVIDERS)}", flush=True)
    found: list[Line] = []
    clock = Clock(options.device, torch.ones(1 << 20, device=options.device))
    with torch.no_grad():
        for dtype in options.dtype:
            model = decoder(options, DTYPES[dtype])
            for name in options.case:
                case = CASES[name]
                if options.small:
                    case = Case(case.kind, case.tokens // 16, case.rows)
                found += measure(
                    model, name, case, clock, 0.2 if options.small else options.seconds
                )
                print(text(found[-len(PROVIDERS) :]), flush=True)
    if options.json:
        atomic_write(
            options.json, json.dumps([asdict(x) for x in found], indent=1) + "\n", durable=False
        )
    wrong = [f"{x.provider} in {x.case}, {x.dtype}" for x in found if not x.ok]
    if wrong:
        print(f"logits differ from sdpa's: {'; '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
