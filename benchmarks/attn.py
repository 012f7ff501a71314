"""Times vst_attention and its peers side by side: `python benchmarks/attn.py`.

One layer of Qwen2-7B's attention, one call at a time: `chunk` (a window with its VSTs),
`tail` (rows of the prompt's end) and `decode` (one row), each over a cache. The cases
`rope_append`, `threads`, `chunks`, `pages` and `bf16` have a table of their own. On a GPU
`chunk_c4` is four chunks in one call; peers make one call for each chunk. `tail_128` and
`tail_256` are more rows of a tail. `--backward` times the gradients of a sequence of four chunks
instead.

Every result is checked against float64 in the same run. A wrong result gets no time; if it is one
of ours, the exit status is 1. All providers are repeated in turns, and so is the ceiling of the
machine that bounds the case. On a CPU, the checked call of a slow provider counts too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks.attention.groups import (
    MAIN_CASES,
    MORE_CASES,
    Competitor,
    Group,
    backward_chunks,
    geometry,
    make_groups,
)
from benchmarks.common import machine as this_machine
from benchmarks.common.backward import backward_answer
from benchmarks.common.cases import DTYPES, Case, Geometry, Inputs
from benchmarks.common.options import add_output_options, check_output_options
from benchmarks.common.oracle import (
    ROWS_CHECKED,
    TOLERANCE_TEXT,
    Answer,
    attention_answer,
    rope_answer,
)
from benchmarks.common.report import (
    Ratio,
    Result,
    milliseconds,
    notes,
    ratio_table,
    save_json,
    save_plot,
    table,
)
from benchmarks.common.run import Run
from benchmarks.common.timing import Budget, Clock, interleave, spread, threads
from benchmarks.peers.registry import PROVIDERS, ROPE_APPEND, Provider

# -- options -----------------------------------------------------------------------------


def _names(
    parser: argparse.ArgumentParser, values: list[str] | None, valid: Sequence[str], what: str
) -> list[str] | None:
    """Flattens repeated and comma-separated names; None if the option was not given."""
    if values is None:
        return None
    names = [name for value in values for name in value.split(",") if name]
    unknown = [name for name in names if name not in valid]
    if unknown:
        parser.error(f"{what}: got {', '.join(unknown)}; valid are {', '.join(valid)}")
    return names


def _are_lengths(text: str) -> bool:
    return all(part.strip().isdecimal() for part in text.split(","))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", action="append", help=f"of {', '.join(MAIN_CASES + MORE_CASES)}; repeatable")
    add("--provider", action="append", help=f"of {', '.join(PROVIDERS)}; repeatable")
    add("--backward", action="store_true", help="the case backward, and no other")
    add("--all", action="store_true", help="also the providers that compile first (flex)")
    add("--cache", help="cache lengths for chunk, comma-separated, or all: 8100 too on a CPU")
    add(
        "--dtype",
        action="append",
        help=f"of {', '.join(DTYPES)}; repeatable; default fp32,bf16 on a CPU, bf16 on a GPU",
    )
    add("--order", choices=["split", "interleaved"], default="split")
    add("--chunks", type=int, default=1, help="chunks in one call of the case chunk")
    add("--alpha", type=int, default=8, help="raw tokens per VST")
    add("--device", choices=["cpu", "cuda"], help="default cuda where there is one")
    add("--threads", type=int, help="CPU threads")
    add("--repeats", type=int, help="exactly this many, whatever the budget")
    add("--budget", type=float, default=100, help="seconds to aim for (default %(default)s)")
    add("--small", action="store_true", help="tiny shapes, to see that everything runs")
    add(
        "--interpret",
        action="store_true",
        help="the Triton kernels under their interpreter: tiny shapes, checked, not timed",
    )
    add_output_options(parser, "the case chunk")
    options = parser.parse_args(arguments)
    for name in ("chunks", "alpha", "threads", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: got {value}, expected at least 1")
    if options.backward:
        options.case = [*(options.case or []), "backward"]
    options.case = _names(parser, options.case, MAIN_CASES + MORE_CASES, "--case")
    options.provider = _names(parser, options.provider, list(PROVIDERS), "--provider")
    options.dtype = _names(parser, options.dtype, list(DTYPES), "--dtype")
    if options.cache and options.cache != "all" and not _are_lengths(options.cache):
        parser.error(f"--cache: got {options.cache}, expected lengths or all")
    if options.alpha > Geometry().window:
        parser.error(f"--alpha: got {options.alpha}, expected at most {Geometry().window}")
    if options.interpret:
        if options.provider not in (None, ["triton"]) or options.device == "cuda":
            parser.error("--interpret: works only with --provider triton on a CPU")
        options.dtype = options.dtype or ["fp32"]
        if "bf16" in options.dtype:
            parser.error(
                "--interpret: got --dtype bf16, expected fp32 or fp16 (the interpreter's "
                "products of bf16 are wrong)"
            )
        options.provider, options.device, options.small = ["triton"], "cpu", True
        options.case = options.case or list(MAIN_CASES)
    drawn = not options.interpret and (options.case is None or "chunk" in options.case)
    check_output_options(
        parser, options, "" if drawn else "draws the case chunk, which is not timed here"
    )
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    both = ["fp32"] if options.backward else ["fp32", "bf16"]
    options.dtype = options.dtype or (["bf16"] if options.device == "cuda" else both)
    return options


# -- running -----------------------------------------------------------------------------------


class Runner:
    """Checks and times groups, one after the other."""

    def __init__(
        self,
        options: argparse.Namespace,
        groups: list[Group],
        after_group: Callable[[list[Result]], None],
    ) -> None:
        """after_group: is given all results so far."""
        self._options, self._after_group = options, after_group
        self._groups = groups
        dtypes = list(dict.fromkeys(c.case.dtype_name for g in groups for c in g.competitors))
        self.ceilings = this_machine.Ceilings(options.device, dtypes, options.small)
        self._clock = Clock(options.device, self.ceilings.evict)
        self._budget = Budget(options.budget, [g.weight for g in groups])

    def run(self) -> list[Result]:
        done: list[Result] = []
        for _ in range(3):  # they decide which product is 100 % of the first cases
            self.ceilings.read()
        for group in self._groups:
            self._budget.next_group(group.name)
            done += self._run_group(group)
            self._after_group(done)
        self.ceilings.read()
        self._budget.end()
        return done

    def _run_group(self, group: Group) -> list[Result]:
        inputs: dict[Case, Inputs] = {}
        answers: dict[tuple[Case, str], Answer] = {}
        results: list[Result] = []
        measure: dict[int, Callable[[], float]] = {}
        first: dict[int, float] = {}
        for i, competitor in enumerate(group.competitors):
            case, provider = competitor.case, competitor.provider
            result = Result(
                case.name,
                competitor.label,
                case.dtype_name,
                case.cache_len,
                case.batch,
                page_size=case.geometry.page_size,
                chunks=case.layout.chunks if case.layout else None,
                ours=provider.ours,
            )
            results.append(result)
            reason = provider.unsupported(case)
            if reason:
                result.note = reason
                continue
            self._budget.tell(f"{competitor.label}, prepare and check")
            if case not in inputs:
                inputs[case] = Inputs(case)
            x = inputs[case]
            answer = self._answer(answers, x, provider)
            run, first[i] = self._checked(competitor, x, answer, result)
            if run is not None:
                measure[i] = self._measurement(competitor, run, result)
        if measure and not self._options.interpret:
            self._budget.tell("repeats")
            self._time(results, group, measure, first)
        return results

    @staticmethod
    def _answer(answers: dict, x: Inputs, provider: Provider) -> Answer:
        kind = "append" if provider is ROPE_APPEND else "rope" if provider.with_rope else "plain"
        if x.case.name == "backward":
            kind = "backward"
        key = (x.case, kind)
        if key not in answers:
            make = {"append": rope_answer, "backward": backward_answer}.get(kind)
            answers[key] = make(x) if make else attention_answer(x, kind == "rope")
        return answers[key]

    @staticmethod
    def _checked(
        competitor: Competitor, x: Inputs, answer: Answer, result: Result
    ) -> tuple[Run | None, float]:
        """The run, if its first call is right, and the seconds of that call; 0 where they say
        nothing about the next. A peer that cannot run here is not a failure."""
        try:
            run = competitor.provider.prepare(x)
            with threads(competitor.threads):
                start = time.perf_counter()
                found = run.call()
                seconds = time.perf_counter() - start
                output = run.rows(found)
            del found
            if x.case.device == "cuda":  # errors of a kernel surface only here
                torch.cuda.synchronize()
            verdict = answer.judge(output)
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [""])[0]
            result.note = f"failed: {type(error).__name__}: {first_line[:150]}"
            result.ok = False if competitor.provider.ours else None
            return None, 0.0
        result.max_error, result.ok = verdict.max_error, verdict.ok
        if not verdict.ok:
            result.note = "WRONG: error beyond the tolerance, not timed"
            return None, 0.0
        # A GPU's call is queued only, and one that starts with a cold cache was not cold.
        return run, 0.0 if x.case.device == "cuda" or Runner._starts_cold(x.case) else seconds

    @staticmethod
    def _starts_cold(case: Case) -> bool:
        return case.is_decode or case.name == "rope_append"

    def _measurement(self, competitor: Competitor, run: Run, result: Result) -> Callable[[], float]:
        """Seconds of a call; the host's seconds go into the result."""
        case, clock = competitor.case, self._clock
        host: list[float] = []
        cold = self._starts_cold(case)

        def seconds() -> float:
            with threads(competitor.threads):
                value = clock.seconds(run.call, cold)
            if clock.host_seconds is not None:
                host.append(clock.host_seconds)
                result.host_ms = 1e3 * statistics.median(host)
                if not clock.queued_ahead:
                    result.note = "could not be queued ahead: ms contains the host's time"
            return value

        return seconds

    def _time(
        self, results: list[Result], group: Group, measure: dict, first: dict[int, float]
    ) -> None:
        repeats = self._options.repeats
        least, most = (repeats, repeats) if repeats else (3, 5 if self._options.small else 30)
        ceiling: list[float] = []
        any_case = group.competitors[0].case
        kind = self._ceiling_kind(any_case)

        def read_ceiling() -> float:
            ceiling.append(self.ceilings.sample(kind, any_case.dtype_name))
            return 0.0

        # A ceiling drifts with the machine, so it is measured in turn with the providers.
        turns = {**measure, -1: read_ceiling}
        left = self._budget.group_left()
        times = interleave(turns, left, least, most, None if repeats else first)
        del times[-1]
        for i, values in times.items():
            case, result = group.competitors[i].case, results[i]
            seconds = statistics.median(values)
            result.ms, result.spread, result.repeats = 1e3 * seconds, spread(values), len(values)
            rate = case.flops / seconds
            if case.name == "rope_append":
                rate = case.rope_bytes / seconds
                result.gb_per_s = rate / 1e9
            else:
                result.tflops = rate / 1e12
            if case.is_decode:
                rate = case.kv_bytes / seconds
                result.gb_per_s = rate / 1e9
            result.of_ceiling = rate / statistics.median(ceiling)
        self._add_speedups(results)

    def _ceiling_kind(self, case: Case) -> str:
        if case.name == "rope_append":
            return "copy"
        if case.is_decode:
            return "copy" if self._options.device == "cuda" else "read"
        return "product"

    @staticmethod
    def _add_speedups(results: list[Result]) -> None:
        for r in results:
            if r.ms is None:
                continue
            known = PROVIDERS.get(r.provider)
            if known is None or not r.ours or r.case not in MAIN_CASES:
                continue
            peers = [
                p.ms
                for p in results
                if p.ms is not None
                and not PROVIDERS[p.provider].ours
                and PROVIDERS[p.provider].with_rope == known.with_rope
            ]
            r.speedup = min(peers) / r.ms if peers else None


# -- showing -----------------------------------------------------------------------------------


def _time_text(r: Result) -> str:
    return f"{milliseconds(r.ms)} ms ±{100 * (r.spread or 0):.0f}%"


def make_ratios(results: list[Result], ceilings: this_machine.Ceilings) -> list[Ratio]:
    """The lines of "also measured" whose numbers exist."""
    ratios = []
    for name in MORE_CASES:
        found = [r for r in results if r.case == name]
        if not found or any(r.ms is None for r in found):
            if found:
                ratios.append(Ratio(name, "-", "-", "-", "not available, see the notes"))
            continue
        first, last = found[0], found[-1]
        cache = first.cache_len
        if name == "rope_append":
            what = f"rope_append, a chunk at cache {cache}"
            value = f"{_time_text(first)}, {first.gb_per_s:.1f} GB/s"
            against = f"copy {ceilings.median('copy') / 1e9:.1f} GB/s"
            ratio = f"{first.of_ceiling or 0:.2f}"
            ratios.append(
                Ratio(
                    what,
                    value,
                    against,
                    ratio,
                    "of copy bandwidth; in place, while a copy also fetches its target",
                )
            )
            continue
        what, meaning = {
            "threads": (f"threads, a chunk at cache {cache}", "speed-up by the second thread"),
            "chunks": (f"chunks in a call, at cache {cache}", "useful FLOP/s, 4 chunks to 1"),
            "pages": (f"pages, a chunk at cache {cache}", "speed-up of pages of 128 over 16"),
            "bf16": (f"bf16, a chunk at cache {cache}", "speed-up over fp32"),
        }[name]
        names = (last.dtype, first.dtype) if name == "bf16" else (last.provider, first.provider)
        value, against = (
            f"{label.removeprefix('vxl, ')}: {_time_text(r)}"
            for label, r in zip(names, (last, first), strict=True)
        )
        times = (last.tflops or 0) / (first.tflops or 1)
        ratios.append(Ratio(what, value, against, f"{times:.2f}x", meaning))
    return ratios


def describe(options: argparse.Namespace, g: Geometry) -> list[tuple[str, str]]:
    heads = f"{g.heads} query / {g.kv_heads} KV heads of {g.head_dim}"
    count = backward_chunks(options) if options.backward else options.chunks
    chunks = f"{count} chunk{'s' if count > 1 else ''} a call"
    window = f"window {g.window}, alpha {options.alpha}, pages of {g.page_size}"
    return [
        (
            "shape",
            f"{heads}; {window}, {chunks}, {options.order} order; {', '.join(options.dtype)}",
        ),
        ("check", f"{ROWS_CHECKED} rows a case against float64; ✓: {TOLERANCE_TEXT}"),
    ]


LEGEND = """\
ms: median; spread: half the range of the quartiles (of under 4 runs: of all). TFLOP/s: useful
ones, pairs that attend. % ceiling: of matmul, for decode and its GB/s (K and V read) of {memory}
bandwidth. speed-up: vxl over the best peer; vxl+rope (rotation, append and attention) over
published (joins and rotates the whole cache anew, repeats K and V, dense mask).
{cold}"""
COLD = {
    "cpu": "decode and rope_append start with a cold last-level cache.",
    "cuda": """\
Every call starts with a cold L2, on a GPU kept busy until the call is queued: ms is the GPU's
time alone. host ms: Python's, to queue it; without a CUDA graph a call takes the larger. % H100: of
798 TFLOP/s of bf16 product, and where GB/s are given of 3.0 TB/s.""",
}


def legend(device: str) -> str:
    return LEGEND.format(memory="copy" if device == "cuda" else "read", cold=COLD[device])


def show(lines: list[tuple[str, str]]) -> None:
    for name, text in lines:
        print(f"{name:<9} {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.interpret:  # before triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    if options.threads:
        torch.set_num_threads(options.threads)
    g = geometry(options)
    groups = make_groups(options, g)
    if not groups:
        raise SystemExit("nothing to run: no chosen provider supports a chosen case on this device")
    machine = this_machine.describe(options.device)
    show([*machine, *describe(options, g)])

    def save(results: list[Result]) -> None:
        if options.json:  # after each group: an interrupted run keeps its results
            save_json(options.json, results, **{n: t for n, t in machine if n != "command"})

    with torch.no_grad():
        runner = Runner(options, groups, save)
        results = runner.run()
    show(runner.ceilings.describe())
    main_results = [r for r in results if r.case in MAIN_CASES]
    ratios = make_ratios(results, runner.ceilings)
    if main_results:
        print(f"\n{table(main_results)}\n\n{legend(options.device)}")
    if ratios:
        print(f"\n{ratio_table(ratios)}")
    remarks = notes(results)
    if remarks:
        print("\nnotes")
        print("\n".join(f"  {line}" for line in remarks))
    if options.plot:
        title = f"{describe(options, g)[0][1]}\n{this_machine.describe(options.device)[0][1]}"
        first = [r for r in results if r.dtype == options.dtype[0]]
        save_plot(options.plot, first, title, runner.ceilings.product_name(options.dtype[0]))
    wrong = sum(r.ok is False and r.ours for r in results)
    if wrong:
        print(f"\n{wrong} of our results are wrong or failed (✗)", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
