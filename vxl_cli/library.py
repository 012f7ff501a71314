"""`vxl watch --videos`: a library of videos into a folder of memories.

A video is watched where its memory is not in the folder yet, so an interrupted run goes on when it
is repeated. `manifest.jsonl` tells of each video where its memory is, or why it has none. With
`--ray`, the actors of a Ray cluster share the work; without it, one process does it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vxl_kernels.files import atomic_write

from .common import placement, quiet
from .progress import Progress
from .videos import find_videos

__all__ = ["LibraryOptions", "Watcher", "watch_library"]

MANIFEST = "manifest.jsonl"
_EVERY = 2.0  # seconds between two writes of the manifest


@dataclass(frozen=True)
class LibraryOptions:
    """What a worker needs to know. It travels to other machines, so it holds plain values."""

    model: str
    folder: str
    device: str
    dtype: str
    frames: int | None
    fps: float | None
    ratio: Any
    final: bool
    threads: int | None = None


class Watcher:
    """Watches one video after another with one model."""

    def __init__(self, options: LibraryOptions) -> None:
        import torch

        from vxl_model import VideoXLForConditionalGeneration
        from vxl_model.streaming.fingerprint import model_fingerprint

        quiet()
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._options = options
        made = VideoXLForConditionalGeneration.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype)
        )
        self._model = made.to(options.device).eval()
        self._fingerprint = model_fingerprint(self._model.model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's form: a batch of paths to a batch of records in JSON."""
        return {"record": [json.dumps(self.watch(str(path))) for path in batch["video"]]}

    def watch(self, video: str) -> dict[str, Any]:
        """The manifest's record of a video, whose memory is saved if it was not there."""
        options, begin = self._options, time.perf_counter()
        record: dict[str, Any] = {"video": video}
        try:
            path = self._path(video)
            if not self._is_there(path):
                memory = self._model.watch(
                    video, frames=options.frames, fps=options.fps, ratio=options.ratio
                )
                memory.save(path, final=options.final)
                record["seconds"] = round(time.perf_counter() - begin, 3)
            return {**record, **self._about(path)}
        except (ValueError, OSError, MemoryError) as error:
            return {**record, "error": " ".join(str(error).split()) or type(error).__name__}

    def _path(self, video: str) -> Path:
        """Where its memory belongs: another name for another file, model or setting."""
        options, stat = self._options, os.stat(video)
        how = [options.frames, options.fps, options.ratio, options.final, self._fingerprint]
        about = json.dumps([video, stat.st_size, stat.st_mtime_ns, *how])
        digest = hashlib.sha256(about.encode(errors="surrogateescape")).hexdigest()[:12]
        return Path(options.folder) / f"{Path(video).stem[:100]}-{digest}.vxl"

    def _is_there(self, path: Path) -> bool:
        from vxl_kernels import VstCache

        try:
            return "state" in VstCache.read_metadata(path)
        except (ValueError, OSError):
            return False

    def _about(self, path: Path) -> dict[str, Any]:
        """By the file alone, without its K and V."""
        from vxl_model.streaming.memory_file import read_counts

        visual, cached = read_counts(path, self._model.encoder())
        return {
            "memory": path.name,
            "frames": visual // self._model.tokens_per_frame,
            "visual_tokens": visual,
            "cached_tokens": cached,
            "bytes": path.stat().st_size,
        }


def watch_library(options: argparse.Namespace) -> None:
    """Runs the command. ValueError if no video could be watched."""
    videos = _listed(options.videos)
    folder = Path(options.save)
    folder.mkdir(parents=True, exist_ok=True)
    device, dtype = placement(options)
    how = LibraryOptions(
        model=os.path.abspath(options.model) if os.path.isdir(options.model) else options.model,
        folder=str(folder.absolute()),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        frames=options.frames,
        fps=options.fps,
        ratio=options.ratio,
        final=options.final,
    )
    if options.ray is None:
        watcher = Watcher(how)
        records: Iterator[dict[str, Any]] = map(watcher.watch, videos)
    else:
        records = _on_ray(videos, how, options.ray, options.workers)
    kept = _collect(records, videos, folder / MANIFEST)
    bad = [record for record in kept if "error" in record]
    about = {"videos": len(videos), "watched": sum("seconds" in r for r in kept), "bad": len(bad)}
    if options.json:
        print(json.dumps({**about, "manifest": str(folder / MANIFEST)}))
    else:
        made, found = about["watched"], len(kept) - about["watched"] - len(bad)
        print(f"{folder}: {made} watched, {found} there already, {len(bad)} bad ({MANIFEST})")
    if len(bad) == len(videos):
        raise ValueError(f"--videos: none of {len(videos)} could be watched: {bad[0]['error']}")


def _listed(given: Iterable[str]) -> list[str]:
    """Files, those of folders, and those that a `.txt` file lists, one a line, relative to where it
    is. A file that is missing is a bad video, not an error."""
    found = list[str]()
    for name in given:
        if os.path.isdir(name):
            found += map(str, find_videos([name]))
        elif Path(name).suffix.lower() == ".txt":
            text = Path(name).read_text(errors="surrogateescape")
            lines = (line.strip() for line in text.splitlines())
            folder = os.path.dirname(name)
            found += [os.path.join(folder, line) for line in lines if line and line[0] != "#"]
        else:
            found.append(name)
    if not found:
        raise ValueError("--videos: got none, expected files, folders or lists of them")
    return list(dict.fromkeys(map(os.path.abspath, found)))


def _collect(
    records: Iterable[dict[str, Any]], videos: list[str], manifest: Path
) -> list[dict[str, Any]]:
    """Writes the manifest, in the order of the videos, as records come."""
    kept: dict[str, dict[str, Any]] = {}
    bar, written = Progress("watching", "videos"), 0.0

    def write() -> list[dict[str, Any]]:
        rows = [kept[video] for video in videos if video in kept]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write(manifest, text, durable=False, inputs=videos)
        return rows

    try:
        for record in records:
            kept[record["video"]] = record
            bar(len(kept), len(videos))
            if time.monotonic() - written > _EVERY:
                write()
                written = time.monotonic()
    finally:
        bar.close()
        rows = write()
    return rows


def _on_ray(
    videos: list[str], how: LibraryOptions, address: str, workers: int | None
) -> Iterator[dict[str, Any]]:
    """Records as the actors of a cluster make them: one actor a GPU, or a group of cores. An actor
    that dies is started again, and its video with it."""
    from dataclasses import replace

    import ray

    if not ray.is_initialized():
        if address == "local":
            # Reading and collecting are tasks of their own: they starve where actors take all.
            cores = (os.cpu_count() or 1) + 4
            ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, log_to_driver=False)
    total = ray.cluster_resources()
    gpu = how.device.startswith("cuda")
    count = workers or max(1, int(total.get("GPU", 0) if gpu else total["CPU"] // 8))
    if not gpu:
        how = replace(how, threads=max(1, (os.cpu_count() or 1) // count))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = ray.data.from_items(
        [{"video": video} for video in videos], override_num_blocks=len(videos)
    )
    made = rows.map_batches(
        Watcher,
        fn_constructor_args=(how,),
        batch_size=1,
        num_gpus=1 if gpu else 0,
        num_cpus=0 if gpu else 1,
        concurrency=min(count, len(videos)),
    )
    for row in made.iter_rows():
        yield json.loads(row["record"])
