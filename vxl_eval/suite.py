"""A suite: tasks of lmms-eval with the numbers that others published for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import fail
from .scores import KINDS

if TYPE_CHECKING:
    import torch

    from vxl_model import VideoXLConfig

__all__ = ["Suite", "Task", "download_size", "plan_lines", "read_suite", "task_seconds"]

SUITES = Path(__file__).with_name("suites")


@dataclass(frozen=True)
class Task:
    """One line of a table.

    Attributes:
        task: its name in lmms-eval, a task or a group.
        name: as the table says it.
        kind: of `vxl_eval.scores`, which checks the score; None: lmms-eval's number alone.
        paper: the published number, None if there is none.
        frames, repeat_frames: what is shown of a video.
        answer_prefix: what each answer begins with.
        samples, videos: how many the whole task has; 0 if unknown.
        dataset: its name on the Hub.
        gigabytes: about what a download takes; None if unknown.
        include: a folder with the task, for tasks that lmms-eval does not bring.
    """

    task: str
    name: str
    kind: str | None = None
    paper: float | None = None
    frames: int | None = None
    repeat_frames: bool = False
    answer_prefix: str = ""
    samples: int = 0
    videos: int = 0
    dataset: str | None = None
    gigabytes: float | None = None
    include: str | None = None


@dataclass(frozen=True)
class Suite:
    """Tasks, and where their published numbers come from."""

    name: str
    source: str
    tasks: tuple[Task, ...]


def read_suite(name: str) -> Suite:
    """A suite of this package by its name, or a YAML file of one."""
    import yaml

    file = Path(name) if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in SUITES.glob("*.yaml")))
        fail("--suite", repr(name), f"{known}, or a YAML file")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        tasks = tuple(Task(**{"name": record["task"], **record}) for record in data["tasks"])
        suite = Suite(file.stem, data.get("source", ""), tasks)
    except Exception as error:  # YAML's own, text that is no UTF-8, depth, wrong records
        fail("--suite", f"{file} ({' '.join(str(error).split())})", "source and a list of tasks")
    for task in tasks:
        if task.kind is not None and task.kind not in KINDS:
            fail("--suite", f"kind {task.kind!r}", ", ".join(KINDS))
    return suite


def download_size(task: Task) -> tuple[float | None, str]:
    """Gigabytes of a task's data set, and how that is known."""
    if task.dataset is None:
        return 0.0, "here"
    try:
        from huggingface_hub import HfApi

        info = HfApi().dataset_info(task.dataset, files_metadata=True, timeout=10)
        return sum(file.size or 0 for file in info.siblings or ()) / 1e9, "says the Hub"
    except Exception as error:  # no network, no access, no such client: all the same here
        reason = type(error).__name__
        return task.gigabytes, f"noted in the suite, the Hub did not answer: {reason}"


def task_seconds(
    config: VideoXLConfig,
    task: Task,
    ratio: int,
    device: torch.device,
    dtype: torch.dtype,
    rate: float,
) -> float:
    """Least seconds of a task on one device that computes `rate` FLOP/s, decoding of videos
    aside: each video is watched once, each question is read and answered with 16 tokens."""
    from vxl_cli.estimate import estimate_video

    plan = estimate_video(
        config, task.frames or 128, ratio, dtype=dtype, device=device, question=128, answer=16
    )
    video = plan.vision_flops + plan.dense_flops + plan.attention_flops
    return (task.videos * video + task.samples * plan.question_flops) / rate


def plan_lines(
    tasks: Sequence[Task], seconds: Sequence[float | None], limit: int | None
) -> list[str]:
    """What a run will need, a line a task, to be said before it starts."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    lines = [f"what is missing is downloaded to HF_HOME, {home}"]
    seen: set[Any] = set()
    for task, least in zip(tasks, seconds, strict=True):
        if task.dataset in seen and task.dataset is not None:
            size = "the same data"
        else:
            gigabytes, how = download_size(task)
            known = "unknown size" if gigabytes is None else f"{gigabytes:.0f} GB"
            size = f"{task.dataset or 'local files'}, {known} ({how})"
        seen.add(task.dataset)
        count = f"{task.samples or 'an unknown number of'} questions"
        if limit is not None:
            count = f"at most {limit} questions of each task"
        took = "" if least is None or limit is not None else f", at least {least / 3600:.1f} hours"
        lines.append(f"{task.name}: {count}{took}; {size}")
    return lines
