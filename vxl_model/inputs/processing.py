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

from ..errors import fail
from ..video.resize import resize_crop
from .arguments import IMAGE_TOKEN
from .images import PictureReader, bicubic, described, fit, open_frames, open_image, pinpoints

PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "\n{question}<|im_end|>\n<|im_start|>assistant\n",
)
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
GRID = "image_grid_pinpoints"
# CLIP-ViT-L/14-336, for checkpoints that name the tower but have no preprocessor_config.json.
CLIP_SIZE = 336
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VideoXLProcessor:
    """Preprocessing and tokenizer of a checkpoint.

    Args:
        tokenizer: a transformers tokenizer. With None the methods on text raise ValueError.
        size: edge of a frame for the vision tower, in pixels.
        mean, std: of the normalisation, RGB, for values from 0 to 1.
        rescale: factor from bytes to those values.
        grid_pinpoints: sizes `(width, height)` that a picture may be resized to before it is cut
            into tiles.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        size: int = CLIP_SIZE,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        rescale: float = 1 / 255,
        grid_pinpoints: Sequence[Sequence[int]] | str = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self.mean, self.std, self.rescale = tuple(mean), tuple(std), rescale
        self.grid_pinpoints = pinpoints(grid_pinpoints, size)

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
                tokenizer.
        """
        clip = _read_json(path, "preprocessor_config.json", kwargs) or {}
        grid = clip.get(GRID)
        if grid is None:
            grid = cls.read_config(path, **kwargs).get(GRID) or ()
        settings = _clip_settings(os.fspath(path), clip)
        if tokenizer is None:
            tokenizer = _load_tokenizer(path, kwargs)
        return cls(tokenizer, grid_pinpoints=grid, **settings)

    @staticmethod
    def read_config(path: str | os.PathLike[str], **kwargs: Any) -> dict:
        """The content of a checkpoint's `config.json`; raises ValueError if there is none."""
        config = _read_json(path, "config.json", kwargs)
        if config is None:
            raise ValueError(f"{os.fspath(path)}: not a checkpoint (no config.json)")
        return config

    # -- pictures ------------------------------------------------------------------------------

    def frames_to_pixels(
        self, frames: np.ndarray | Tensor, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """uint8 frames `(n, height, width, 3)`, RGB, to normalised pixels `(n, 3, size, size)`.

        As CLIP: the short edge to `size` (bicubic, antialiased), then the middle. Frames of `size`
        are only normalised, on `device`. Arrays may have any strides.
        """
        batch = frames.cpu().numpy() if isinstance(frames, Tensor) and frames.is_cpu else frames
        if not isinstance(batch, (np.ndarray, Tensor)) or batch.ndim != 4 or batch.shape[-1] != 3:
            fail("frames", described(frames), "uint8 (n, height, width, 3)")
        if batch.dtype not in (np.uint8, torch.uint8):
            fail("frames", batch.dtype, "uint8")
        if 0 in batch.shape[1:3]:
            fail("frames", described(frames), "pictures of at least one pixel")
        if batch.shape[1:3] != (self.size, self.size):
            pictures = batch if isinstance(batch, np.ndarray) else batch.cpu().numpy()
            cut = [resize_crop(picture, self.size) for picture in pictures]
            batch = np.stack(cut) if cut else np.zeros((0, self.size, self.size, 3), np.uint8)
        if isinstance(batch, np.ndarray):
            batch = torch.from_numpy(np.require(batch, requirements=["C", "W"]))
        pixels = batch.to(device).permute(0, 3, 1, 2).float()
        # (x * rescale - mean) / std, as one product and one difference over the pixels
        std = pixels.new_tensor(self.std)[:, None, None]
        mean = pixels.new_tensor(self.mean)[:, None, None]
        return (pixels * (self.rescale / std) - mean / std).to(dtype).contiguous()

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
        picture = open_image(image)
        squares = [np.asarray(picture.resize((self.size, self.size), bicubic()))]
        if self.grid_pinpoints:
            width, height = self.best_resolution(picture.size)
            fitted = np.asarray(fit(picture, width, height))
            squares += [
                fitted[y : y + self.size, x : x + self.size]
                for y in range(0, height, self.size)
                for x in range(0, width, self.size)
            ]
        return np.stack(squares)

    def best_resolution(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The size `(width, height)` of `grid_pinpoints` that keeps most of a picture's pixels and,
        among those, wastes least. `image_size`: of the picture, (width, height)."""

        def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
            scale = min(pinpoint[0] / image_size[0], pinpoint[1] / image_size[1])
            kept = int(image_size[0] * scale) * int(image_size[1] * scale)
            kept = min(kept, image_size[0] * image_size[1])
            return kept, kept - pinpoint[0] * pinpoint[1]

        if not self.grid_pinpoints:
            fail("grid_pinpoints", "none", "sizes in the checkpoint's config")
        return max(self.grid_pinpoints, key=merit)  # the first of equals, as published

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
        for name, text in (("question", question), ("answer_prefix", answer_prefix)):
            for token in self.control_tokens():
                if token in text:
                    fail(name, f"the control token {token!r}", "plain text")
        # The prefix is tokenized alone, so that its ids do not depend on the question.
        asked = self.text_ids(PROMPT[1].replace("{question}", question))
        return torch.cat((asked, self.text_ids(answer_prefix)), dim=1) if answer_prefix else asked

    def encode_prompt(self, question: str, answer_prefix: str = "") -> Tensor:
        """`input_ids (1, P + 1 + T)` with one -200 in place of the video."""
        image = torch.tensor([[IMAGE_TOKEN]], device="cpu")
        suffix = self.suffix_ids(question, answer_prefix)
        return torch.cat((self.prefix_ids(), image, suffix), dim=1)

    def text_ids(self, text: str) -> Tensor:
        """Ids of a text as it is, `(1, T)`, without special tokens around it."""
        ids = self._tokenizer()(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([ids], dtype=torch.int64, device="cpu")

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of generated ids `(T,)` or `(1, T)`, without control tokens."""
        flat = torch.as_tensor(ids).flatten().tolist()
        return self._tokenizer().decode(flat, skip_special_tokens=True).strip()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `preprocessor_config.json` and the tokenizer, if there is one, for
        `from_pretrained`."""
        edge = {"height": self.size, "width": self.size}
        clip = {
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
            "rescale_factor": self.rescale,
            "size": {"shortest_edge": self.size},
            "crop_size": edge,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "image_processor_type": "CLIPImageProcessor",
            GRID: self.grid_pinpoints,
        }
        text = json.dumps(clip, indent=1) + "\n"
        (Path(folder) / "preprocessor_config.json").write_text(text)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

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

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer: the checkpoint has none (no tokenizer.json or tokenizer_config.json). "
                "Give one: VideoXLProcessor.from_pretrained(path, tokenizer=...)"
            )
        return self.tokenizer


def _clip_settings(path: str, clip: dict) -> dict[str, Any]:
    """The constructor's settings from a preprocessor_config.json. Raises ValueError for settings
    that this processor does not follow."""

    def edge(value: Any) -> Any:
        if isinstance(value, dict):
            edges = {value.get("shortest_edge", value.get("height")), *value.values()}
            return edges.pop() if len(edges) == 1 else value
        return value

    size, crop = (edge(clip.get(key, CLIP_SIZE)) for key in ("size", "crop_size"))
    off = [
        k
        for k in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        if not clip.get(k, True)
    ]
    wrong = [f"{k} is false" for k in off]
    if not isinstance(size, int) or size != crop:
        wrong.append(f"size {clip.get('size')} and crop_size {clip.get('crop_size')} differ")
    if clip.get("resample", 3) != 3:
        wrong.append(f"resample is {clip['resample']}, expected 3 (bicubic)")
    if wrong:
        raise ValueError(f"{path}/preprocessor_config.json: unsupported: {'; '.join(wrong)}")
    return {
        "size": size,
        "mean": clip.get("image_mean", CLIP_MEAN),
        "std": clip.get("image_std", CLIP_STD),
        "rescale": clip.get("rescale_factor", 1 / 255),
    }


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
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: got a {type(value).__name__}, expected an object")
    return value


def _load_tokenizer(path: str | os.PathLike[str], kwargs: dict) -> Any:
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in names):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, **kwargs)
