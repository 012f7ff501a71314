"""The formats of published sets, each record into a sample of this project.

A converter takes a record and `Options`, and returns a sample as `vxl_train.data` reads it, with
paths relative to the set's media. A ValueError says what is wrong with a record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FORMATS", "Options"]

Record = Mapping[str, Any]
_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Options:
    """What a format needs besides its records.

    Attributes:
        paths: NExT-QA's map from the number of a video to its path.
        subtitles: CinePile's questions come with the film's subtitles.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    subtitles: bool = True

    @classmethod
    def read(cls, paths: str | os.PathLike[str] | None, subtitles: bool) -> Options:
        """`paths` is a JSON file."""
        if paths is None:
            return cls(subtitles=subtitles)
        try:
            found = json.loads(Path(paths).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"paths: {paths}: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"paths: {paths}: got a {type(found).__name__}, expected an object")
        return cls({str(key): str(value) for key, value in found.items()}, subtitles)


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: got {value!r}, expected text")
    return value.strip()


def _whole(record: Record, key: str) -> int:
    try:
        return int(record[key])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{key}: got {record.get(key)!r}, expected an integer") from None


def llava(record: Record, options: Options) -> dict[str, Any]:
    """Bunny-695k, Bunny's LAION captions, ShareGPT-4o, VICO: what this project reads as it is.
    ShareGPT-4o names files without a folder, which `media` gives."""
    kept = ("id", "image", "video", "conversations", "width", "height", "frames", "duration")
    return {key: record[key] for key in kept if record.get(key) is not None}


def mmdu(record: Record, options: Options) -> dict[str, Any]:
    """MMDU-45k: pictures where the text says `<ImageHere>`. A sample of this project has one
    visual part, so all pictures come first and the text names them by number."""
    pictures = record.get("image")
    turns = record.get("conversations")
    if not isinstance(pictures, list) or not isinstance(turns, list):
        raise ValueError("got no lists of pictures and turns")
    count, said = 0, []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"got the turn {turn!r}, expected from and value")
        text = turn["value"]
        while "<ImageHere>" in text:
            count += 1
            text = text.replace("<ImageHere>", f"[picture {count}]", 1)
        said.append({"from": turn.get("from"), "value": text})
    if count > len(pictures):
        raise ValueError(f"got {count} places for {len(pictures)} pictures")
    known = {"id": str(record["id"])} if record.get("id") is not None else {}
    return {**known, "image": pictures, "conversations": said}


def _choice(question: str, choices: list[str], right: int) -> list[dict[str, str]]:
    if not 0 <= right < len(choices) <= len(_LETTERS):
        raise ValueError(f"got answer {right} of {len(choices)} choices")
    listed = [f"{_LETTERS[i]}. {choice}" for i, choice in enumerate(choices)]
    asked = "\n".join(["<video>", question, *listed])
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": listed[right]}]


def nextqa(record: Record, options: Options) -> dict[str, Any]:
    """NExT-QA's CSV, questions with five choices (a0 to a4 and the number of the right one) or
    open ones. `paths` maps its numbers of videos to files."""
    number = _text(record, "video")
    path = options.paths.get(number, number)
    question = _text(record, "question")
    question = question[:1].upper() + question[1:].rstrip(" ?") + "?"
    sample = {"id": f"{number}-{_text(record, 'qid')}", "video": f"{path}.mp4"}
    keys = [f"a{i}" for i in range(5)]
    if all(key in record for key in keys):
        choices = [_text(record, key) for key in keys]
        return {**sample, "conversations": _choice(question, choices, _whole(record, "answer"))}
    turns = [{"from": "human", "value": f"<video>\n{question}"}]
    turns.append({"from": "gpt", "value": _text(record, "answer")})
    return {**sample, "conversations": turns}


def cinepile(record: Record, options: Options) -> dict[str, Any]:
    """CinePile's columns. The clip of a film is the file `FILM_VIDEO.mp4`, with the name of the
    film and the clip's id on YouTube, as its downloader writes it."""
    link = _text(record, "yt_clip_link")
    name = f"{_text(record, 'movie_name')}_{link.partition('v=')[2] or link.rpartition('/')[2]}"
    choices = record.get("choices")
    if not isinstance(choices, list) or not all(isinstance(x, str) and x.strip() for x in choices):
        raise ValueError(f"choices: got {choices!r}, expected texts")
    question = _text(record, "question")
    subtitles = record.get("subtitles")
    if options.subtitles and isinstance(subtitles, str) and subtitles.strip():
        question = f"The subtitles are:\n{subtitles.strip()}\n{question}"
    right = _whole(record, "answer_key_position")
    if not 0 <= right < len(choices) or choices[right] != record.get("answer_key"):
        raise ValueError(f"answer_key: got {record.get('answer_key')!r}, not choice {right}")
    clean = "".join("_" if sign in "/\\" else sign for sign in name)
    return {"video": f"{clean}.mp4", "conversations": _choice(question, choices, right)}


FORMATS: dict[str, Callable[[Record, Options], dict[str, Any]]] = {
    "bunny": llava,
    "laion": llava,
    "sharegpt4o-image": llava,
    "sharegpt4o-video": llava,
    "vico": llava,
    "mmdu": mmdu,
    "nextqa": nextqa,
    "cinepile": cinepile,
}
