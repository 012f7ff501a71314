"""Mixes published sets into one file: reads them as a stream, counts what is bad, draws by seed."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vxl_kernels.files import atomic_write, check_target

from ..data.samples import BadSampleError, check_record
from .formats import FORMATS, Options
from .records import check_readable, file_records

__all__ = ["MixSummary", "PublishedSet", "make_mix", "published_samples", "read_mix"]

_MOST_BAD = 20  # bad samples that a summary shows of each set


@dataclass(frozen=True)
class PublishedSet:
    """One data set of a mix.

    Attributes:
        format: one of `FORMATS`.
        files: of annotations, relative to the root.
        media: folder of its pictures or videos, relative to the root.
        count: samples to draw; None: by `weight`.
        weight: how often each sample comes. 0.5 draws half of them, 2 writes each twice.
        paths: a JSON file that maps numbers of videos to paths (NExT-QA).
        subtitles: of films in the questions (CinePile).
        name: in ids and in the summary.
    """

    format: str
    files: tuple[str, ...]
    media: str = ""
    count: int | None = None
    weight: float = 1.0
    paths: str | None = None
    subtitles: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.format, str) or self.format not in FORMATS:
            known = ", ".join(FORMATS)
            raise ValueError(f"format: got {self.format!r}, expected {known}")
        if not isinstance(self.files, tuple) or not all(map(_is_name, self.files)):
            raise ValueError(f"files: got {self.files!r}, expected names of files")
        if not self.files:
            raise ValueError("files: got none, expected at least one")
        if not isinstance(self.media, str):
            raise ValueError(f"media: got {self.media!r}, expected the name of a folder")
        if self.paths is not None and not _is_name(self.paths):
            raise ValueError(f"paths: got {self.paths!r}, expected the name of a file")
        if not isinstance(self.subtitles, bool):
            raise ValueError(f"subtitles: got {self.subtitles!r}, expected true or false")
        if not isinstance(self.name, str):
            raise ValueError(f"name: got {self.name!r}, expected text")
        if self.count is not None and (type(self.count) is not int or self.count < 0):
            raise ValueError(f"count: got {self.count!r}, expected an integer >= 0")
        if type(self.weight) not in (int, float) or not 0 <= self.weight < 1000:
            raise ValueError(f"weight: got {self.weight!r}, expected 0 to 1000")
        if self.count is not None and self.weight != 1:
            raise ValueError(f"count: got {self.count} and a weight, expected one of the two")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


@dataclass
class SetSummary:
    """What became of a set: its usable samples, those written, and the bad ones by kind."""

    name: str
    usable: int = 0
    written: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)


@dataclass
class MixSummary:
    sets: list[SetSummary]

    @property
    def written(self) -> int:
        return sum(one.written for one in self.sets)


def read_mix(path: str | os.PathLike[str]) -> list[PublishedSet]:
    """The sets under the key `mix` of a YAML or JSON configuration."""
    from ..settings import read_config

    sets = read_config(path).get("mix")
    if not isinstance(sets, list) or not sets:
        raise ValueError(f"{os.fspath(path)}: got no mix, expected a list of sets under that key")
    known = {field.name for field in dataclasses.fields(PublishedSet)}
    made = []
    for one in sets:
        if not isinstance(one, dict) or not {"format", "files"} <= {*one} <= known:
            raise ValueError(f"mix: got {one!r}, expected format, files and {sorted(known)}")
        files = [one["files"]] if isinstance(one["files"], str) else one["files"]
        files = tuple(files) if isinstance(files, list) else files
        name = one.get("name") or one["format"]
        made.append(PublishedSet(**{**one, "files": files, "name": name}))
    names = Counter(one.name for one in made)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"mix: got {twice[0]} twice, expected a name for each set")
    return made


def published_samples(
    published: PublishedSet, root: str | os.PathLike[str], check_files: bool = True
) -> Iterator[dict[str, Any] | BadSampleError]:
    """A set's samples in order, with paths relative to `root`; for a bad one the error that says
    why.

    Raises:
        ValueError, OSError: a file of annotations cannot be read.
    """
    root = Path(root)
    paths = None if published.paths is None else root / published.paths
    options = Options.read(paths, published.subtitles)
    convert = FORMATS[published.format]
    for name in published.files:
        for number, record in enumerate(file_records(root / name)):
            place = f"{published.name}/{Path(name).name}:{number}"
            try:
                yield _sample(record, place, published, convert, options, root, check_files)
            except BadSampleError as error:
                yield error


def _sample(
    record: Any,
    place: str,
    published: PublishedSet,
    convert: Callable[..., dict[str, Any]],
    options: Options,
    root: Path,
    check_files: bool,
) -> dict[str, Any]:
    if isinstance(record, dict):
        try:
            record = convert(record, options)
        except ValueError as error:
            raise BadSampleError.of("bad sample", place, str(error)) from None
        # Ids of two sets may be the same, and a run tells its samples by them.
        record["id"] = f"{published.name}-{record.get('id', place)}"
        for key in ("image", "video"):
            value = record.get(key)
            if isinstance(value, str):
                record[key] = os.path.join(published.media, value)
            elif isinstance(value, list) and all(isinstance(x, str) for x in value):
                record[key] = [os.path.join(published.media, x) for x in value]
    sample = check_record(record, place, root)
    for file in sample.files if check_files else ():
        if not os.path.isfile(file):
            raise BadSampleError.of("missing file", sample.id, file)
    return record


def make_mix(
    sets: Sequence[PublishedSet],
    root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    seed: int = 42,
    check_files: bool = True,
    progress: Callable[[int, int | None], None] | None = None,
) -> MixSummary:
    """Writes the samples of all sets to one JSONL file, set after set.

    Each set is read twice, and of a sample no more is held than its place. The same files, seed
    and sets give the same bytes. A set's draw does not depend on the other sets.

    Args:
        root: folder of all sets. Paths in the file are relative to it.
        check_files: a picture or video that is not there makes a bad sample.

    Raises:
        ValueError, OSError: a file of annotations cannot be read, or `output` is one of them, a
            picture or a video; the seed is not an integer >= 0.
    """
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed: got {seed!r}, expected an integer >= 0")
    output = Path(output)
    names = [("files", name) for one in sets for name in one.files]
    names += [("paths", one.paths) for one in sets if one.paths is not None]
    inputs = [Path(root) / name for _, name in names]
    for (key, _), file in zip(names, inputs, strict=True):
        if os.path.realpath(file) == os.path.realpath(output):
            raise ValueError(f"--output: got {os.fspath(output)!r}, which is an input ({key})")
    check_target(output, inputs=inputs, argument="--output")
    for (key, _), file in zip(names, inputs, strict=True):
        if not file.is_file():
            raise ValueError(f"{key}: got {file}, expected a file that is there")
        if key == "files":
            check_readable(file)
    for one in sets:
        Options.read(None if one.paths is None else Path(root) / one.paths, one.subtitles)
    summary = MixSummary([])
    done = 0

    def write(file: BinaryIO) -> None:
        nonlocal done
        for published in sets:
            one = SetSummary(published.name)
            summary.sets.append(one)
            for sample in published_samples(published, root, check_files):
                if isinstance(sample, BadSampleError):
                    one.bad[sample.bad.kind] += 1
                    if len(one.messages) < _MOST_BAD:
                        one.messages.append(str(sample.bad))
                else:
                    one.usable += 1
                    if output.exists():
                        check_target(output, inputs=_media(sample, root))
            times = _times(published, one.usable, seed)
            # Files may vanish meanwhile; what was counted as usable decides, not a second look.
            usable = (
                sample
                for sample in published_samples(published, root, check_files)
                if not isinstance(sample, BadSampleError)
            )
            for copies, sample in zip(times, usable, strict=False):
                line = json.dumps(sample, ensure_ascii=True, sort_keys=True).encode() + b"\n"
                for _ in range(copies):
                    file.write(line)
                    one.written += 1
                    done += 1
                    if progress is not None:
                        progress(done, None)

    atomic_write(output, write, durable=False, inputs=inputs)
    return summary


def _media(sample: dict[str, Any], root: str | os.PathLike[str]) -> list[Path]:
    named = [sample.get(key) or [] for key in ("image", "video")]
    return [
        Path(root) / x for value in named for x in ([value] if isinstance(value, str) else value)
    ]


def _times(published: PublishedSet, usable: int, seed: int) -> list[int]:
    """How often each usable sample is written: equally often, and some drawn ones once more."""
    wanted = round(published.weight * usable) if published.count is None else published.count
    if not usable:
        return []
    whole, rest = divmod(wanted, usable)
    times = [whole] * usable
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(published.name.encode())]))
    for index in generator.permutation(usable)[:rest].tolist():
        times[index] += 1
    return times
