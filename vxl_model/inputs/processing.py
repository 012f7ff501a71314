"""Frames, pictures and questions to the tensors that a checkpoint expects.

Source: the checkpoint's `preprocessor_config.json` (CLIP's), the published `process_anyres_image`
and the prompt of the released model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..auto_class import write_auto_file
from ..errors import fail
from ..json_files import check_json_files, read_json_object
from .arguments import IMAGE_TOKEN, encoded
from .images import PictureReader, open_frames, open_image
from .preprocessing import (
    CLIP_MEAN,
    CLIP_SIZE,
    CLIP_STD,
    GRID,
    SavedProcessor,
    VideoXLImageProcessor,
    VideoXLVideoProcessor,
    clip_settings,
)
from .prompts import CHAT_TEMPLATE, PROMPT, STOP_TOKENS, TURN, CallOptions, VisualRows

# A folder with one of these has a tokenizer.
_MAKE_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
_TOKENIZER_FILES = (*_MAKE_TOKENIZER, "special_tokens_map.json", "added_tokens.json")
# Megabytes: read a second time only to say what is wrong with them.
_LARGE = ("tokenizer.json", "vocab.json")
_HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
PROCESSOR_FILE, TEMPLATE_FILE = "processor_config.json", "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
PREPROCESSOR_FILE = "preprocessor_config.json"


_PARTS_TEXT = PreTrainedTokenizerBase
_PARTS: dict[str, Any] = {
    "tokenizer": _PARTS_TEXT,
    "image_processor": VideoXLImageProcessor,
    "video_processor": VideoXLVideoProcessor,
}


class VideoXLProcessor(SavedProcessor, ProcessorMixin):
    """Preprocessing and tokenizer of a checkpoint.

    Args:
        tokenizer: a transformers tokenizer. With None the methods on text raise ValueError.
        image_processor, video_processor: pictures and videos to pixels, alike. By default made
            of the arguments that follow.
        chat_template: of `apply_chat_template`, by default the released model's.
        image_token, video_token: what marks a picture and a video in a text.
        size: edge of a frame for the vision tower, in pixels.
        mean, std: of the normalisation, RGB, for values from 0 to 1.
        rescale: factor from bytes to those values.
        grid_pinpoints: sizes `(width, height)` that a picture may be resized to before it is cut
            into tiles.
    """

    default_auto_class = "AutoProcessor"
    # Of lists with an entry for each text, which cannot be one tensor.
    skip_tensor_conversion = ("pixel_values", "pixel_values_videos", "image_sizes")

    def __init__(
        self,
        tokenizer: Any = None,
        image_processor: VideoXLImageProcessor | None = None,
        video_processor: VideoXLVideoProcessor | None = None,
        *,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        size: int = CLIP_SIZE,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        rescale: float = 1 / 255,
        grid_pinpoints: Sequence[Sequence[int]] | str = (),
    ) -> None:
        pixels = {"image_mean": mean, "image_std": std, "rescale_factor": rescale}
        pixels |= {"size": size, "crop_size": size}
        image_processor = image_processor or VideoXLImageProcessor(grid_pinpoints, **pixels)
        if video_processor is None:
            video_processor = VideoXLVideoProcessor(**image_processor.described_pixels())
        self.image_token, self.video_token = image_token, video_token
        template = CHAT_TEMPLATE if chat_template is None else chat_template
        super().__init__(tokenizer, image_processor, video_processor, chat_template=template)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """The class that a part has to have. A processor may have no tokenizer."""
        wanted = _PARTS[argument_name]
        if not isinstance(argument, wanted) and not (argument is None and wanted is _PARTS_TEXT):
            got = type(argument).__name__
            raise TypeError(f"{argument_name}: got a {got}, expected a {wanted.__name__}")
        return wanted

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], tokenizer: Any = None, **kwargs: Any
    ) -> VideoXLProcessor:
        """Reads the inputs' settings of a checkpoint, or those that `save_pretrained` wrote.

        Args:
            path: a folder or a name on the Hub.
            tokenizer: None loads the checkpoint's own with transformers' AutoTokenizer, if it has
                one.
            kwargs: `revision`, `cache_dir`, `local_files_only` ... for the Hub's client and the
                tokenizer, and the constructor's own arguments.
        """
        own = ("chat_template", "image_token", "video_token")
        given = {name: kwargs.pop(name) for name in own if name in kwargs}
        given |= {n: kwargs.pop(n) for n in ("image_processor", "video_processor") if n in kwargs}
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
        saved = _read_json(path, PROCESSOR_FILE, hub) or {}
        clip = saved.get("image_processor") or _read_json(path, PREPROCESSOR_FILE, hub) or {}
        grid = clip.get(GRID)
        if grid is None:
            grid = cls.read_config(path, **hub).get(GRID) or ()
        clip_settings(f"{os.fspath(path)}/{PREPROCESSOR_FILE}", clip)
        images = VideoXLImageProcessor(**{**clip, GRID: grid})
        videos = VideoXLVideoProcessor(**(saved.get("video_processor") or clip))
        template = None
        if saved:  # one template, or several by their names
            template = cls.get_processor_dict(path, **hub)[0].get("chat_template")
        if tokenizer is None:
            tokenizer = _load_tokenizer(path, kwargs)
        settings = {name: saved[name] for name in own[1:] if name in saved}
        settings |= {"image_processor": images, "video_processor": videos}
        return cls(tokenizer, **{"chat_template": template, **settings, **given})

    @staticmethod
    def read_config(path: str | os.PathLike[str], **kwargs: Any) -> dict:
        """The content of a checkpoint's `config.json`; raises ValueError if there is none."""
        config = _read_json(path, "config.json", kwargs)
        if config is None:
            raise ValueError(f"{os.fspath(path)}: not a checkpoint (no config.json)")
        return config

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Writes the settings, the chat template and the tokenizer, if there is one, for
        `from_pretrained` and `AutoProcessor`. Returns the files' names but the tokenizer's."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            super().save_pretrained(folder, push_to_hub=push_to_hub, **kwargs)
        else:
            self._save_templates(folder)
            self.to_json_file(folder / PROCESSOR_FILE)
            if self.class_auto_map():
                write_auto_file(folder)
        # For what reads CLIP's file: tools of the published model, and earlier releases.
        clip = {**self.image_processor.to_dict(), "processor_class": type(self).__name__}
        (folder / PREPROCESSOR_FILE).write_text(json.dumps(clip, indent=1) + "\n")
        names = (PROCESSOR_FILE, TEMPLATE_FILE, PREPROCESSOR_FILE)
        return [os.fspath(folder / name) for name in names]

    def _save_templates(self, folder: Path) -> None:
        """As transformers does: the default one in a file, others in a folder."""
        templates = self.chat_template
        if not isinstance(templates, dict):
            templates = {"default": templates}
        for name, text in templates.items():
            file = folder / (TEMPLATE_FILE if name == "default" else f"{TEMPLATES}/{name}.jinja")
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self.auto_entry()}

    # -- settings ------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Edge of a frame, in pixels."""
        return self.image_processor.edge

    @property
    def mean(self) -> tuple[float, ...]:
        return self.image_processor.image_mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.image_processor.image_std

    @property
    def rescale(self) -> float:
        return self.image_processor.rescale_factor

    @property
    def grid_pinpoints(self) -> tuple[tuple[int, int], ...]:
        return self.image_processor.image_grid_pinpoints

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything that a call may return."""
        return [
            "input_ids",
            "attention_mask",
            *self.image_processor.model_input_names,
            *self.video_processor.model_input_names,
        ]

    # -- text and visual input together --------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """The arguments of `forward` and `generate` for texts and what they show.

        Args:
            images: pictures for the `<image>`s of the texts, in one list or in one for each text.
                One picture is cut into tiles. Several in a row are read like a video's frames.
            text: one or several. A text has one visual part.
            videos: videos for the `<video>`s, in any form that `watch` takes.
            kwargs: `num_frames` and `fps` of video files; `return_tensors`, `padding` (at the
                left, by default where there are several texts), `truncation`, `max_length`,
                `add_special_tokens` (False by default).

        Returns:
            `input_ids` with one -200 for each visual part, `attention_mask`; `pixel_values`,
            `image_sizes`, `pixel_values_videos`: one entry for each text, None where it has none.

        Raises:
            ValueError: the placeholders do not fit the visual input, or there are several visual
                parts in one text.
        """
        options = CallOptions.of(kwargs)
        if text is None:
            return self._visual_alone(images, videos, options)
        texts = [text] if isinstance(text, str) else text
        listed = isinstance(texts, (list, tuple)) and len(texts) > 0
        if not listed or not all(isinstance(x, str) for x in texts):
            fail("text", type(text).__name__, "a text, or a list of texts")
        given = VisualRows(texts, self.image_token, self.video_token)
        data = self._padded_ids(given, options)
        data |= given.fill(images, videos, self.image_processor, self.video_processor, options)
        return BatchFeature(data)

    def _visual_alone(self, images: Any, videos: Any, options: CallOptions) -> BatchFeature:
        if images is None and videos is None:
            fail("processor", "nothing", "text, images or videos")
        data: dict[str, Any] = {}
        if images is not None:
            data |= self.image_processor(images, **options.images)
        if videos is not None:
            data |= self.video_processor(videos, **options.videos)
        return BatchFeature(data)

    def _padded_ids(self, given: VisualRows, options: CallOptions) -> dict[str, Any]:
        """input_ids and attention_mask. Each side of a visual part is tokenized alone, so that
        the ids before it do not depend on the question."""
        tokenizer = self._tokenizer()
        options.add_defaults(tokenizer.init_kwargs)
        rows = []
        for parts in given.parts:
            ids = [encoded(tokenizer, x, **options.tokenizing) if x else [] for x in parts]
            row = ids[0] if len(ids) == 1 else [*ids[0], IMAGE_TOKEN, *ids[1]]
            rows.append(options.truncated(row, IMAGE_TOKEN))
        padding = options.padding_of(rows)
        if padding["padding"] and tokenizer.pad_token_id is None:
            width = max(map(len, rows))
            if padding["padding"] == "max_length":
                width = max(width, padding["max_length"] or 0)
            fill = self.stop_ids[0] if self.stop_ids else 0
            left = padding["padding_side"] == "left"
            masks = [[1] * len(row) for row in rows]
            for values, filled in ((rows, fill), (masks, 0)):
                for i, row in enumerate(values):
                    more = [filled] * (width - len(row))
                    values[i] = [*more, *row] if left else [*row, *more]
            data = {"input_ids": rows, "attention_mask": masks}
        else:
            data = dict(tokenizer.pad({"input_ids": rows}, **padding))
        return options.as_tensors(data)

    # -- pictures ------------------------------------------------------------------------------

    def frames_to_pixels(
        self, frames: np.ndarray | Tensor, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """uint8 frames `(n, height, width, 3)`, RGB, to normalised pixels `(n, 3, size, size)`.

        As CLIP: the short edge to `size` (bicubic, antialiased), then the middle. Frames of `size`
        are only normalised, on `device`. Arrays may have any strides.
        """
        return self.image_processor.frames_to_pixels(frames, device, dtype)

    def video_frames(
        self, video: Any, frames: int | None = None, fps: float | None = None
    ) -> Iterator[np.ndarray | Tensor]:
        """Batches of uint8 frames `(n, height, width, 3)` of whatever `open_frames` takes as a
        video: a file, a folder of pictures, a list of pictures, frames in memory."""
        return iter(open_frames(video, self.size, frames, fps)[0])

    def video_pixels(
        self,
        video: Any,
        frames: int | None = None,
        fps: float | None = None,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Tensor]:
        """The same as normalised pixels: batches `(n, 3, size, size)`."""
        for batch in self.video_frames(video, frames, fps):
            yield self.frames_to_pixels(batch, device, dtype)

    def images_to_pixels(self, images: str | os.PathLike[str] | Iterable[Any]) -> Tensor:
        """Several pictures, or a folder of them, as a video: `(n, 3, size, size)`, one a frame."""
        return self.frames_to_pixels(self.images_to_frames(images))

    def images_to_frames(self, images: str | os.PathLike[str] | Iterable[Any]) -> np.ndarray:
        """The same before normalising: uint8 `(n, size, size, 3)`."""
        pictures = images if isinstance(images, (str, os.PathLike)) else list(images)
        return np.concatenate(list(PictureReader(pictures, self.size)))

    def image_to_pixels(self, image: Any, overview: bool = True) -> Tensor:
        """One picture in tiles ("anyres"): `(1 + tiles, 3, size, size)`.

        The first is the whole picture squeezed into a square. The tiles follow row by row, cut from
        the picture fitted into the best of `grid_pinpoints` with black around it.

        Args:
            image: a path, a PIL image, or uint8 `(height, width, 3)`.
            overview: False leaves out the whole picture where there are tiles. The model does not
                use it either, and `watch(pixel_values=...)` without `image_sizes` expects so.
        """
        frames = self.image_to_frames(image)
        return self.frames_to_pixels(frames if overview or len(frames) == 1 else frames[1:])

    def image_to_frames(self, image: Any) -> np.ndarray:
        """The same before normalising: uint8 `(1 + tiles, size, size, 3)`."""
        return self.image_processor.tiles(open_image(image))

    def best_resolution(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """`VideoXLImageProcessor.best_resolution`."""
        return self.image_processor.best_resolution(image_size)

    # -- words ---------------------------------------------------------------------------------

    def prefix_ids(self) -> Tensor:
        """Ids before the video, `(1, P)`."""
        return self.text_ids(PROMPT[0])

    def suffix_ids(self, question: str, answer_prefix: str = "") -> Tensor:
        """Ids after the video, `(1, T)`: the question and the start of the answer.

        `answer_prefix` is what the answer begins with, for instance "Best option: (". The model
        goes on from there.
        """
        if not isinstance(question, str) or not question.strip():
            fail("question", repr(question), "text")
        if not isinstance(answer_prefix, str):
            fail("answer_prefix", repr(answer_prefix), "text")
        self._refuse_control("question", question)
        self._refuse_control("answer_prefix", answer_prefix)
        # The prefix is tokenized alone, so that its ids do not depend on the question.
        asked = self.text_ids(PROMPT[1].replace("{question}", question))
        return torch.cat((asked, self.text_ids(answer_prefix)), dim=1) if answer_prefix else asked

    def turn_ids(self, question: str) -> Tensor:
        """Ids between an answer and the next one, `(1, T)`: what closes the answer, and a further
        question."""
        if not isinstance(question, str) or not question.strip():
            fail("question", repr(question), "text")
        self._refuse_control("question", question)
        return self.text_ids(TURN.replace("{question}", question))

    def encode_prompt(self, question: str, answer_prefix: str = "") -> Tensor:
        """`input_ids (1, P + 1 + T)` with one -200 in place of the video."""
        image = torch.tensor([[IMAGE_TOKEN]], device="cpu")
        suffix = self.suffix_ids(question, answer_prefix)
        return torch.cat((self.prefix_ids(), image, suffix), dim=1)

    def text_ids(self, text: str) -> Tensor:
        """Ids of a text as it is, `(1, T)`, without special tokens around it."""
        ids = encoded(self._tokenizer(), text, add_special_tokens=False)
        return torch.tensor([ids], dtype=torch.int64, device="cpu")

    def decode(
        self, ids: Tensor | Sequence[int], skip_special_tokens: bool = True, **options: Any
    ) -> str:
        """The text of ids `(T,)` or `(1, T)`, by default without control tokens. -200 has none."""
        flat = [i for i in torch.as_tensor(ids).flatten().tolist() if i != IMAGE_TOKEN]
        options["skip_special_tokens"] = skip_special_tokens
        return self._tokenizer().decode(flat, **options).strip()

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row, **options) for row in ids]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """The texts of what `generate` returned, for pipelines."""
        return self.batch_decode(
            generated_outputs, skip_special_tokens=skip_special_tokens, **options
        )

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer."""
        tokenizer = self._tokenizer()
        vocabulary = tokenizer.get_vocab()
        ids = [vocabulary[token] for token in STOP_TOKENS if token in vocabulary]
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
            ids.append(tokenizer.eos_token_id)
        return ids

    def control_tokens(self) -> set[str]:
        """Tokens that structure the prompt and must not occur in a text."""
        tokenizer = self._tokenizer()
        added = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        return {*tokenizer.all_special_tokens, *added}

    def _refuse_control(self, name: str, text: str) -> None:
        for token in self.control_tokens():
            if token in text:
                fail(name, f"the control token {token!r}", "plain text")

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer: the checkpoint has none (no tokenizer.json or tokenizer_config.json). "
                "Give one: VideoXLProcessor.from_pretrained(path, tokenizer=...)"
            )
        return self.tokenizer


def _read_json(path: str | os.PathLike[str], name: str, kwargs: dict) -> dict | None:
    """A JSON file of a checkpoint; None if it has no such file."""
    text = os.fspath(path)
    file = Path(text) / name
    if not Path(text).is_dir():
        if Path(text).exists() or not re.fullmatch(r"[\w-]+(\.[\w-]+)*/[\w.-]+", text):
            raise ValueError(f"{text}: not a folder or a name on the Hub (owner/name)")
        from transformers.utils import cached_file

        try:
            file = Path(cached_file(text, name, **kwargs) or "")
        except OSError as error:
            if name == "config.json":
                raise ValueError(f"{text}: {str(error).strip().splitlines()[0]}") from None
            return None
    return read_json_object(file) if os.path.lexists(file) else None


def _load_tokenizer(path: str | os.PathLike[str], kwargs: dict) -> Any:
    local = Path(path).is_dir()
    if local and not any(os.path.lexists(Path(path) / name) for name in _MAKE_TOKENIZER):
        return None
    from transformers import AutoTokenizer

    if not local:
        return AutoTokenizer.from_pretrained(path, **kwargs)
    check_json_files(path, [name for name in _TOKENIZER_FILES if name not in _LARGE])
    try:
        return AutoTokenizer.from_pretrained(path, **kwargs)
    except Exception as error:  # of any library
        check_json_files(path, _LARGE)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{os.fspath(path)}: a tokenizer that cannot be loaded ({reason})"
        ) from error
