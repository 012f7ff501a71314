"""The data set: instruction data in LLaVA's JSON, decoded and tokenized for the model.

A file is a JSON list of samples, or JSONL with a sample a line::

    {"id": "7", "video": "clips/7.mp4",
     "conversations": [{"from": "human", "value": "<video>\\nWhat happens?"},
                       {"from": "gpt", "value": "A dog jumps."}]}

- `image` is a path or a list of paths, `video` a path; without either the sample is text alone.
  Paths are relative to the file's folder, or to the root that is given. One picture is cut into
  tiles; several pictures are treated as the frames of a video, as in the released model.
- `conversations` alternates "human" and "gpt" ("user" and "assistant" are accepted too).
  One "system" turn may come first. `<image>` and `<video>` are removed from human turns. A sample
  has one visual part; it goes to the front of the first turn with a marker, or of the first turn.
  Only the assistant's words and the `<|im_end|>` after them are supervised.
- `width`, `height` (pictures), `frames` and `duration` (seconds, videos) are optional; with
  them, lengths are estimated without opening the file.

A sample that cannot be used becomes a `BadSample` of one of `KINDS`; the others are kept.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vxl_model.inputs.arguments import IGNORE_INDEX
from vxl_model.inputs.images import ImageError, open_image
from vxl_model.inputs.processing import VideoXLProcessor
from vxl_model.streaming.ratios import RatioPlan, WindowRatios
from vxl_model.video.decoders.base import VideoError
from vxl_model.video.reader import open_video

from .conversations import conversation_ids
from .samples import BadSample, BadSampleError, Sample, VisualShape

__all__ = ["TrainingData", "collate"]


# -- the data set -------------------------------------------------------------------------------


class TrainingData(Dataset):
    """Samples as the model trains on them, decoded on access.

    Key `epoch * len(samples) + index` is a sample in an epoch. Everything drawn depends only on
    seed, epoch and index, so a resumed run sees what the first run would have seen. A sample that
    cannot be decoded is replaced by the next one that can.

    Args:
        samples: from `read_samples`.
        processor: of the checkpoint, with a tokenizer.
        shape: what the model makes of frames.
        seed: of the ratios.
        max_text_tokens: longer texts are bad samples ("too long").
        stop: a bad sample ends the run.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: VideoXLProcessor,
        shape: VisualShape,
        *,
        seed: int = 42,
        max_text_tokens: int = 8192,
        stop: bool = False,
    ) -> None:
        self.samples, self.processor, self.shape = list(samples), processor, shape
        self.seed, self.max_text_tokens, self.stop = seed, max_text_tokens, stop
        self._bad: dict[int, BadSample] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int) -> dict[str, Any]:
        """`input_ids`, `labels` (lists), `frames` uint8 `(n, size, size, 3)` or None,
        `image_size`, `ratio`, and `bad`, the bad samples that it replaces."""
        epoch, start = divmod(key, len(self.samples))
        bad: list[BadSample] = []
        for step in range(len(self.samples)):
            index = (start + step) % len(self.samples)
            if index not in self._bad:
                try:
                    return {**self._read(index, epoch), "bad": bad, "stop": False}
                except BadSampleError as error:
                    self._bad[index] = error.bad
            bad.append(self._bad[index])
            if self.stop:
                break
        return {"bad": bad, "stop": True}

    def _read(self, index: int, epoch: int) -> dict[str, Any]:
        sample = self.samples[index]
        try:
            ids, labels = conversation_ids(sample, self.processor.tokenizer)
        except ValueError as error:
            raise BadSampleError(BadSample("unknown text", sample.id, str(error))) from None
        if len(ids) > self.max_text_tokens:
            text = f"{len(ids)} tokens of text, more than {self.max_text_tokens}"
            raise BadSampleError(BadSample("too long", sample.id, text))
        frames, image_size = self._frames(sample)
        ratio = None
        if frames is not None:
            shown = len(frames) - (1 if image_size is not None and len(frames) > 1 else 0)
            plan = RatioPlan(list(self.shape.ratios), [self.seed, epoch, index])
            ratio = plan.windows(shown * self.shape.tokens_per_frame, self.shape.window)
        return {
            "input_ids": ids,
            "labels": labels,
            "frames": frames,
            "image_size": image_size,
            "ratio": ratio,
        }

    def _frames(self, sample: Sample) -> tuple[Tensor | None, tuple[int, int] | None]:
        files, most = sample.files, self.shape.frames
        try:
            if sample.kind == "video":
                reader = open_video(
                    files[0], frames=most, fps=self.shape.fps, size=self.processor.size
                )
                return torch.from_numpy(np.concatenate(list(reader))), None
            if sample.kind == "images":
                if len(files) > most:
                    files = tuple(files[int(i)] for i in np.linspace(0, len(files) - 1, most))
                return torch.from_numpy(self.processor.images_to_frames(files)), None
            if sample.kind == "image":
                picture = open_image(files[0])
                return torch.from_numpy(self.processor.image_to_frames(picture)), picture.size
            return None, None
        except (VideoError, ImageError, OSError) as error:
            missing = [path for path in files if not os.path.isfile(path)]
            if missing:
                raise BadSampleError(BadSample("missing file", sample.id, missing[0])) from None
            kind = "undecodable video" if sample.kind == "video" else "unreadable image"
            raise BadSampleError(BadSample(kind, sample.id, str(error))) from None


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of `TrainingData`'s items, padded at the right."""
    bad = [x for item in items for x in item["bad"]]
    if any(item["stop"] for item in items):  # HF counts labels before the Trainer can stop
        return {"bad": bad, "stop": True, "labels": torch.full((1, 1), IGNORE_INDEX)}
    longest = max(len(item["input_ids"]) for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE_INDEX)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        ids[row, :length] = torch.tensor(item["input_ids"])
        labels[row, :length] = torch.tensor(item["labels"])
        mask[row, :length] = 1
    ratios: list[WindowRatios | None] = [item["ratio"] for item in items]
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "ratio": ratios,
        "frames": [item["frames"] for item in items],
        "image_sizes": [item["image_size"] for item in items],
        "bad": bad,
        "stop": False,
    }
