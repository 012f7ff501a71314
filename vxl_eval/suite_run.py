"""`vxl eval --suite`: runs lmms-eval on the tasks of a suite and writes one table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vxl_cli.common import placement, quiet

from .answers import read_answers
from .arguments import check_ratio, fail
from .machine import describe_machine
from .report import Report
from .scores import read_samples, score
from .suite import Suite, Task, plan_lines, read_suite, task_seconds

__all__ = ["Line", "read_line", "run_suite", "table"]


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        ours: the score, lmms-eval's own.
        difference: from the paper's; None where the paper has none.
        samples: how many questions were asked.
        seconds: of watching and answering, of all processes and runs together.
        parts: percentages of parts of the task and their numbers of answers.
    """

    task: str
    name: str
    paper: float | None
    ours: float
    difference: float | None
    samples: int
    seconds: float
    machine: str
    parts: dict[str, tuple[float, int]] = field(default_factory=dict)


def run_suite(options: argparse.Namespace) -> None:
    """The command; raises ValueError or OSError for input that cannot be used."""
    suite = read_suite(options.suite)
    chosen = options.tasks or [task.task for task in suite.tasks]
    unknown = sorted({*chosen} - {task.task for task in suite.tasks})
    if unknown:
        fail("--tasks", ", ".join(unknown), ", ".join(task.task for task in suite.tasks))
    tasks = [task for task in suite.tasks if task.task in chosen]
    if not options.dry_run and importlib.util.find_spec("lmms_eval") is None:
        raise ValueError("lmms-eval is not installed; pip install lmms-eval 'filelock<4'")
    from vxl_model import VideoXLConfig
    from vxl_model.inputs.processing import VideoXLProcessor

    VideoXLProcessor.read_config(options.model)  # its errors are one line
    quiet()
    check_ratio(VideoXLConfig.from_pretrained(options.model), options.ratio)
    for line in plan_lines(tasks, _least_seconds(tasks, options), options.limit):
        print(f"vxl: {line}", file=sys.stderr)
    if options.dry_run:
        return
    report = Report(options.output, "report", [options.model, options.suite])
    machine = describe_machine(placement(options)[0])
    if options.processes > 1:
        machine = f"{options.processes} processes on {machine}"
    lines = []
    for task in tasks:
        folder = report.folder / task.task
        _evaluate(task, folder, options)
        lines.append(read_line(task, folder, machine))
        write_report(suite, lines, options, report)
    print("\n".join(table(lines)))


def _least_seconds(tasks: Sequence[Task], options: argparse.Namespace) -> list[float | None]:
    """By the arithmetic of `vxl plan` and the rate of a matrix product on this machine."""
    from vxl_cli.plan import product_rate
    from vxl_model import VideoXLConfig

    device, dtype = placement(options)
    config = VideoXLConfig.from_pretrained(options.model)
    ratio = options.ratio if isinstance(options.ratio, int) else max(config.beacon_ratio)
    rate = product_rate(device, dtype) * options.processes
    return [
        task_seconds(config, _shown(task, options), ratio, device, dtype, rate)
        if task.videos
        else None
        for task in tasks
    ]


def _shown(task: Task, options: argparse.Namespace) -> Task:
    """The task with the frames that the command asks for."""
    if options.frames is None:
        return task
    return Task(**{**asdict(task), "frames": options.frames})


def model_arguments(task: Task, folder: Path, options: argparse.Namespace) -> str:
    """`--model_args` of lmms-eval."""
    task = _shown(task, options)
    values: dict[str, Any] = {"pretrained": options.model, "answers": folder / "answers"}
    values |= {"frames": task.frames, "fps": options.fps, "dtype": options.dtype}
    values["repeat_frames"] = task.repeat_frames and options.fps is None
    values["answer_prefix"] = task.answer_prefix or None
    values["on_error"] = options.on_error
    if options.ratio is not None:
        ratios = options.ratio if isinstance(options.ratio, list) else [options.ratio]
        values["ratio"] = ":".join(map(str, ratios))
    given = {name: str(value) for name, value in values.items() if value is not None}
    for name, value in given.items():
        if "," in value or "=" in value:
            fail(name, repr(value), "text without , and =")
    return ",".join(f"{name}={value}" for name, value in given.items())


def _evaluate(task: Task, folder: Path, options: argparse.Namespace) -> None:
    """Runs lmms-eval in a process of its own, or in several. Answers that are there already are
    not asked again."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m"]
    if options.processes > 1:
        # accelerate's own launcher starts one process where there is no GPU.
        command += ["torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={options.processes}", "-m"]
    command += ["lmms_eval", "--model", "vxl", "--tasks", task.task, "--batch_size", "1"]
    command += ["--model_args", model_arguments(task, folder, options)]
    command += ["--output_path", str(folder / "harness"), "--log_samples"]
    if options.device is not None:
        command += ["--device", str(options.device)]
    if options.limit is not None:
        command += ["--limit", str(options.limit)]
    if task.include is not None:
        command += ["--include_path", task.include]
    cpu = placement(options)[0].type == "cpu"
    environment = {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if cpu else {})}
    done = subprocess.run(command, stdout=sys.stderr, env=environment, check=False)
    if done.returncode < 0:
        raise KeyboardInterrupt
    if done.returncode:
        raise RuntimeError(
            f"{task.task}: lmms-eval ended with {done.returncode}; what was answered is kept, the "
            "same command goes on"
        )


def read_line(task: Task, folder: Path, machine: str) -> Line:
    """The line of a task that has run, from the files that lmms-eval and the model wrote."""
    results_file = _newest(folder / "harness", "*_results.json")
    results = json.loads(results_file.read_text())
    stamp = results_file.name.removesuffix("_results.json")
    subtasks = [name for name in results["n-samples"] if name in results["results"]]
    values = [_metric(results["results"][name]) for name in subtasks]
    ours = sum(values) / len(values)
    parts: dict[str, tuple[float, int]] = {}
    asked = 0
    for name, value in zip(subtasks, values, strict=True):
        file = _newest(folder / "harness", f"{stamp}_samples_{name}.jsonl")
        asked += sum(1 for line in file.open(encoding="utf-8") if line.strip())
        if task.kind is None:
            continue
        again = score(task.kind, *read_samples(file))
        if abs(again.value - value) > 1e-9:
            raise RuntimeError(f"{name}: lmms-eval scores {value}, its answers give {again.value}")
        own = again.parts or {name: (again.value, again.samples)}
        parts |= own if len(subtasks) == 1 else {name: (again.value, again.samples)}
    records = read_answers(folder / "answers")
    seconds = sum(record["watch_seconds"] + record["answer_seconds"] for record in records)
    difference = None if task.paper is None else ours - task.paper
    about = (task.task, task.name, task.paper, ours, difference)
    return Line(*about, asked, round(seconds, 1), machine, parts)


def _newest(folder: Path, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise RuntimeError(f"{folder}: lmms-eval wrote no {pattern}")
    return found[-1]


def _metric(results: dict[str, Any]) -> float:
    """The one number of a task's results."""
    numbers = {
        name: value
        for name, value in results.items()
        if isinstance(value, (int, float)) and "stderr" not in name and name.endswith(",none")
    }
    if len(numbers) != 1:
        raise RuntimeError(f"results: got {', '.join(numbers) or 'none'}, expected one metric")
    return float(next(iter(numbers.values())))


def write_report(
    suite: Suite, lines: Sequence[Line], options: argparse.Namespace, report: Report
) -> None:
    about = {"suite": suite.name, "source": suite.source, "model": options.model}
    about |= {"frames": options.frames, "fps": options.fps, "ratio": options.ratio}
    about["limit"] = options.limit
    record = {**about, "lines": [asdict(line) for line in lines]}
    report.write(record, table(lines), lambda figure: _draw(figure, lines))


def table(lines: Sequence[Line]) -> list[str]:
    rows = [
        "| Task | Paper | Ours | Difference | Samples | Seconds | Machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        paper = "" if line.paper is None else f"{line.paper:.1f}"
        difference = "" if line.difference is None else f"{line.difference:+.1f}"
        rows.append(
            f"| {line.name} | {paper} | {line.ours:.1f} | {difference} | {line.samples} "
            f"| {line.seconds:.0f} | {line.machine} |"
        )
    return rows


def _draw(figure: Any, lines: Sequence[Line]) -> None:
    """Bars of the paper's numbers and ours."""
    figure.set_size_inches(2 + 1.6 * len(lines), 3.4)
    axes = figure.add_subplot()
    places = range(len(lines))
    bars = axes.bar([x - 0.2 for x in places], [line.paper or 0 for line in lines], 0.4)
    axes.bar_label(bars, [("" if x.paper is None else f"{x.paper:.1f}") for x in lines])
    ours = axes.bar([x + 0.2 for x in places], [line.ours for line in lines], 0.4)
    axes.bar_label(ours, [f"{line.ours:.1f}" for line in lines])
    axes.legend([bars, ours], ["paper", "ours"])
    axes.set_xticks(list(places), [line.name for line in lines], fontsize=8)
    axes.set_ylabel("score, %")
    axes.set_ylim(0, 100)
