"""VICO: training samples on the order of what a long video shows.

Source: Video-XL (arXiv 2409.14485), its section on composite data curation, "Visual Clue Order":
long videos are cut into clips of 14 s, a vision-language model describes each clip, key events
are drawn from the descriptions, and questions ask for their order in time. There GPT-4 draws the
events. Here a clue is the caption of a clip, kept if it differs from every other one
(`questions.pick_clues`). So one local model is enough, and the right answer follows from the times
of the clips alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vxl_cli.common import output_file
from vxl_cli.videos import find_videos
from vxl_kernels.files import atomic_write
from vxl_model.video.decoders.base import VideoError
from vxl_model.video.decoders.choose import open_decoder
from vxl_model.video.prefetch import prefetch

from .captioner import Captioner
from .captions import Caption, CaptionFile, cut, read_clips
from .questions import Question, ask, pick_clues
from .settings import VicoSettings

__all__ = ["VicoSummary", "make_vico"]


@dataclass
class VicoSummary:
    """The result of a run. `skipped` and `bad`: reasons by file. `dropped`: number of captions that
    did not become clues, by reason."""

    output: str
    videos: int = 0
    clips: int = 0
    captioned: int = 0
    samples: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)


def make_vico(
    videos: Sequence[str | os.PathLike[str]],
    captioner: Captioner,
    output: str | os.PathLike[str],
    settings: VicoSettings | None = None,
    *,
    on_error: str = "skip",
    progress: Callable[[int, int | None], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> VicoSummary:
    """Captions videos and writes questions on the order of what they show.

    Captions are stored in `output + ".captions"` one by one; an interrupted run continues there
    when it is repeated. They are made again if the video (path, size, modification time), the
    captioner's `identity` or the cut into pictures changed. Samples are written at the end,
    atomically.

    Args:
        videos: files, and folders that are searched recursively.
        captioner: describes the pictures of a clip.
        output: JSON lines `{"id", "video", "duration", "conversations", "vico"}` as LLaVA's.
            "video" is relative to the output's folder where it lies in it, else absolute. "vico"
            holds the form of the question, its clues with their times, the seed and the captioner.
        on_error: at an unreadable video, "skip" counts it and "stop" raises.
        progress: called with the number of clips captioned so far, and None.
        report: called with a line for every video without samples, and for lost captions.

    Raises:
        VideoError: an unreadable video, with "stop".
        ValueError: an invalid argument, raised before a video is opened; or no video gave a
            sample.
    """
    settings = settings or VicoSettings()
    report = report or (lambda line: None)
    if on_error not in ("skip", "stop"):
        raise ValueError(f"on_error: got {on_error!r}, expected 'skip' or 'stop'")
    files = find_videos(videos)
    target = check_output(output, files)
    summary = VicoSummary(str(target), len(files))
    lines: list[str] = []
    with CaptionFile(target.with_name(target.name + ".captions")) as kept:
        if kept.dropped:
            report(f"{kept.path}: {kept.dropped} unfinished or damaged lines, made again")
        for file in files:
            try:
                key = _key(file, captioner, settings)
                captions = _captions(file, key, captioner, kept, settings, summary, progress)
            except VideoError as error:
                if on_error == "stop":
                    raise
                summary.bad[str(file)] = str(error)
                report(str(error))
                continue
            questions, reason = _questions(file, captions, settings, summary)
            if reason:
                summary.skipped[str(file)] = reason
                report(f"{file}: skipped: {reason}")
            lines += _lines(file, target, kept.duration(key), questions, captioner.name, settings)
    summary.samples = len(lines)
    if not lines:
        raise ValueError(
            f"videos: none of {len(files)} gave a sample ({len(summary.bad)} unreadable, "
            f"{len(summary.skipped)} skipped); {target} is not written"
        )
    atomic_write(target, "".join(line + "\n" for line in lines), durable=True, inputs=files)
    return summary


def check_output(output: str | os.PathLike[str], inputs: Sequence[Path]) -> Path:
    """The absolute path to write; ValueError if it cannot be written or is one of the inputs."""
    for name in (os.fspath(output), f"{os.fspath(output)}.captions"):
        output_file("output", name, inputs)
    return Path(os.path.abspath(output))


# -- one video -----------------------------------------------------------------------------------


def _captions(
    file: Path,
    key: str,
    captioner: Captioner,
    kept: CaptionFile,
    settings: VicoSettings,
    summary: VicoSummary,
    progress: Callable[[int, int | None], None] | None,
) -> list[Caption]:
    """All captions of a video; missing ones are made now. Raises VideoError."""
    clips = kept.clips(key)
    decoder = None
    if clips is None:
        decoder = open_decoder(file)
        clips = cut(decoder, settings.clip_seconds)
        kept.add_video(key, str(file), decoder.duration, clips)
    summary.clips += len(clips)
    missing = [clip for clip in clips if clip.index not in kept.captions(key)]
    if missing and len(clips) > 1:
        decoder = decoder or open_decoder(file)
        shown = read_clips(decoder, str(file), missing, settings.pictures, settings.edge)
        with contextlib.closing(prefetch(shown, ahead=1)) as ready:  # type: ignore[type-var]
            for clip, pictures, damaged in ready:
                text = "" if damaged else captioner.caption(pictures)
                if not isinstance(text, str):
                    got = type(text).__name__
                    raise TypeError(f"captioner: caption() gave a {got}, expected a str")
                kept.add(key, Caption(clip, text, damaged))
                summary.captioned += not damaged
                if progress:
                    progress(summary.captioned, None)
    return [kept.captions(key)[clip.index] for clip in clips if clip.index in kept.captions(key)]


def _key(file: Path, captioner: Captioner, settings: VicoSettings) -> str:
    """A digest of everything that the captions of a video depend on."""
    try:
        stat = file.stat()
    except OSError as error:
        raise VideoError(f"{file}: {error.strerror or error}") from None
    how = [captioner.identity, settings.clip_seconds, settings.pictures, settings.edge]
    about = json.dumps([str(file), stat.st_size, stat.st_mtime_ns, *how])
    return hashlib.sha256(about.encode()).hexdigest()[:32]


def _questions(
    file: Path, captions: list[Caption], settings: VicoSettings, summary: VicoSummary
) -> tuple[list[Question], str]:
    """The questions on a video, or why there are none."""
    if len(captions) < 2:
        return [], f"shorter than two clips of {settings.clip_seconds:g} s"
    clues, dropped = pick_clues(captions)
    summary.dropped += dropped
    if len(clues) < 2:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        return [], f"{len(clues)} distinct clues in {len(captions)} clips ({why})"
    return ask(clues, file.name, settings.seed, settings.samples, settings.clues), ""


def _lines(
    file: Path,
    target: Path,
    duration: float,
    questions: list[Question],
    captioner: str,
    settings: VicoSettings,
) -> list[str]:
    """A video's samples as JSON lines."""
    inside = file.is_relative_to(target.parent)
    video = file.relative_to(target.parent).as_posix() if inside else str(file)
    name = hashlib.sha256(video.encode(errors="surrogateescape")).hexdigest()[:12]
    samples: list[dict[str, Any]] = [
        {
            "id": f"vico-{name}-{i}",
            "video": video,
            "duration": duration,
            "conversations": [
                {"from": "human", "value": f"<video>\n{question.question}"},
                {"from": "gpt", "value": question.answer},
            ],
            "vico": {
                "form": question.form,
                "clues": [asdict(clue) for clue in question.clues],
                "seed": settings.seed,
                "captioner": captioner,
                "clip_seconds": settings.clip_seconds,
                "pictures": settings.pictures,
            },
        }
        for i, question in enumerate(questions)
    ]
    return [json.dumps(sample) for sample in samples]
