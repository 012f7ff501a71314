"""A run's output folder: what is in it, written so that a kill leaves the old or the new, and
whether a run that is resumed is the one that was begun."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vxl_kernels.files import atomic_write

from .data.samples import Sample
from .sharded import OPTIMIZER

__all__ = [
    "ADAPTER",
    "BAD",
    "EVAL_LOG",
    "LOG",
    "RESULT",
    "RUN",
    "WRITING",
    "check_inputs",
    "check_output",
    "check_resumable",
    "check_same_run",
    "checkpoints",
    "crc",
    "finished",
    "last_checkpoint",
    "lock_folder",
    "put_in_place",
    "read_log",
    "samples_crc",
    "write_lines",
    "write_run",
]

ADAPTER = "adapter"
EVAL_LOG = "eval_log.jsonl"
LOG, BAD, RUN, RESULT, WRITING = (
    "train_log.jsonl",
    "bad_samples.jsonl",
    "run.json",
    "model",
    ".writing",
)


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a `train_log.jsonl`; a last one that was not finished is left out."""
    lines = []
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except (ValueError, RecursionError):
                break
    return lines


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Writes one JSON object a line, atomically."""
    atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines), durable=True)


def write_run(path: Path, record: dict[str, Any]) -> None:
    """Writes `run.json`, atomically."""
    atomic_write(path, json.dumps(record, indent=1) + "\n", durable=True)


def put_in_place(written: Path, place: Path) -> None:
    """Renames a finished folder, its files safely on the disk before."""
    for path in [*(p for p in written.rglob("*") if p.is_file()), written]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if place.exists():
        shutil.rmtree(place)
    written.rename(place)
    handle = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(output: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = []
    for path in output.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and (path / "trainer_state.json").is_file():
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def last_checkpoint(output: str | os.PathLike[str]) -> Path | None:
    """The newest finished checkpoint of a run; None if there is none."""
    found = checkpoints(Path(output))
    return found[-1] if found else None


def check_inputs(output: Path, **inputs: str | os.PathLike[str] | Sequence[Any]) -> None:
    """ValueError where a run in `output` would replace a file or folder that it reads.

    Args:
        inputs: a path or several, by the name that the error tells. Names that are not files, such
            as those of the Hub, are passed over.
    """
    folders = [output / RESULT, output / WRITING, *output.glob("checkpoint-*")]
    written = (output / name for name in (LOG, EVAL_LOG, BAD, RUN))
    files = [path for path in written if path.exists()]
    for name, given in inputs.items():
        for path in [given] if isinstance(given, (str, os.PathLike)) else given:
            source = Path(path).resolve()
            lost = any(source.is_relative_to(folder.resolve()) for folder in folders)
            if source.exists() and (lost or any(file.samefile(source) for file in files)):
                raise ValueError(f"{name}: got {path}, which the run in {output} would replace")


def check_output(output: Path, resume: bool, **inputs: Any) -> Path | None:
    """The checkpoint to go on from.

    Args:
        inputs: as in `check_inputs`.

    Raises:
        ValueError: a run's result, an input or a folder that no run wrote would be lost.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: got {output}, a file, expected a folder")
    check_inputs(output, **inputs)
    own = checkpoints(output)
    for path in output.glob("checkpoint-*"):
        if path.name.removeprefix("checkpoint-").isdigit() and path not in own:
            raise ValueError(f"output: {output} holds {path.name}, which no run wrote")
    results = [output / name for name in (ADAPTER, RESULT)]
    if resume:
        checkpoint = last_checkpoint(output)
        there = [path.name for path in results if path.exists()]
        if checkpoint is None and there:
            raise ValueError(
                f"resume: {output} holds {there[-1]} and no checkpoint, expected one to go on "
                "from; name another folder"
            )
        return checkpoint
    held = [*checkpoints(output), *(path for path in results if path.exists())]
    if held:
        raise ValueError(f"output: {output} holds {held[-1].name}; resume, or name another folder")
    return None


@contextmanager
def lock_folder(output: Path) -> Iterator[None]:
    """Holds the folder of a run, which is made if missing; a killed process releases it.

    Raises:
        ValueError: another process holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    handle = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output: {output} is in use by another run") from None
        yield
    finally:
        os.close(handle)


def check_resumable(checkpoint: Path) -> None:
    """ValueError for a checkpoint without optimizer state, as `save_only_model` leaves it."""
    if not any(
        (checkpoint / name).exists() for name in ("optimizer.pt", "optimizer.bin", OPTIMIZER)
    ):
        raise ValueError(
            f"resume: {checkpoint} holds no optimizer state, so the run would go on to other "
            "losses; new_optimizer: true allows that"
        )


def check_same_run(path: Path, record: dict[str, Any], checkpoint: Path | None) -> None:
    """Raises ValueError if a resumed run differs from the one that was begun.

    Args:
        path: its run.json.
        record: the fields to compare: "settings" and any others.
        checkpoint: None for a new run, which is not compared.
    """
    if checkpoint is None or not path.is_file():
        return
    try:
        before = json.loads(path.read_text())
        was = {**before["settings"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"resume: {path}: damaged, or not written by a run") from None
    now = json.loads(json.dumps(record))
    keys = {**was, **now["settings"]}
    changed = [(k, was.get(k), now["settings"].get(k)) for k in sorted(keys)]
    changed += [(key, before.get(key), now[key]) for key in now if key != "settings"]
    for key, old, new in changed:
        if old != new:
            raise ValueError(f"resume: {key} was {old!r} and is {new!r}, expected the same run")


def finished(checkpoint: Path) -> bool:
    """Whether a checkpoint is the last of its run."""
    path = checkpoint / "trainer_state.json"
    try:
        state = json.loads(path.read_text())
        return state["global_step"] >= state["max_steps"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"resume: {path}: damaged, or not written by a run") from None


def crc(path: str | os.PathLike[str]) -> int:
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value


def samples_crc(samples: Sequence[Sample]) -> int:
    """Checksum of the used samples, in order, and of the lengths they are grouped by."""
    value = 0
    for sample in samples:
        value = zlib.crc32(json.dumps([sample.id, sample.length]).encode(), value)
    return value
