"""Pictures and videos to normalised pixels, as transformers' classes of preprocessors.

Source: CLIP's preprocessing and the published `process_anyres_image`. The pixels are computed
here, not by transformers' image and video backends, which need torchvision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from ..auto_class import AutoClassMixin, write_auto_file
from ..errors import fail
from ..video.resize import resize_crop
from .images import bicubic, described, fit, open_frames, open_image, pinpoints

__all__ = [
    "GRID",
    "Pixels",
    "SavedProcessor",
    "VideoXLImageProcessor",
    "VideoXLVideoProcessor",
    "clip_settings",
]

GRID = "image_grid_pinpoints"
# CLIP-ViT-L/14-336, for checkpoints that name the tower but have no preprocessor_config.json.
CLIP_SIZE = 336
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


class VideoXLImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options of a call that concern pictures."""

    image_grid_pinpoints: Any


class VideoXLVideosKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]
    """Options of a call that concern videos: `num_frames` and `fps` as `watch` takes them."""


class Pixels:
    """How bytes become pixels.

    Attributes:
        edge: of a frame for the vision tower, in pixels.
        image_mean, image_std: of the normalisation, RGB, for values from 0 to 1.
        rescale_factor: from bytes to those values.
    """

    edge: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float

    def set_pixels(
        self,
        size: int = CLIP_SIZE,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        rescale: float = 1 / 255,
    ) -> None:
        self.edge = size
        self.image_mean, self.image_std = tuple(mean), tuple(std)
        self.rescale_factor = rescale

    def described_pixels(self) -> dict[str, Any]:
        """The settings as CLIP's preprocessor_config.json has them."""
        return {
            **dict.fromkeys((*_STEPS, "do_convert_rgb"), True),
            "resample": 3,
            "rescale_factor": self.rescale_factor,
            "size": {"shortest_edge": self.edge},
            "crop_size": {"height": self.edge, "width": self.edge},
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }

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
        if batch.shape[1:3] != (self.edge, self.edge):
            pictures = batch if isinstance(batch, np.ndarray) else batch.cpu().numpy()
            cut = [resize_crop(picture, self.edge) for picture in pictures]
            batch = np.stack(cut) if cut else np.zeros((0, self.edge, self.edge, 3), np.uint8)
        if isinstance(batch, np.ndarray):
            batch = torch.from_numpy(np.require(batch, requirements=["C", "W"]))
        pixels = batch.to(device).permute(0, 3, 1, 2).float()
        # (x * rescale - mean) / std, as one product and one difference over the pixels
        std = pixels.new_tensor(self.image_std)[:, None, None]
        mean = pixels.new_tensor(self.image_mean)[:, None, None]
        return (pixels * (self.rescale_factor / std) - mean / std).to(dtype).contiguous()


class SavedProcessor(AutoClassMixin):
    """Settings in a file, with the entry of a registered auto class."""

    def auto_entry(self) -> dict[str, Any]:
        entry = self.class_auto_map()
        return {"auto_map": entry} if entry else {}

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        files = super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if self.class_auto_map():
            write_auto_file(save_directory)
        return files


class VideoXLImageProcessor(Pixels, SavedProcessor, BaseImageProcessor):
    """Pictures in tiles, each `(1 + tiles, 3, size, size)`: the whole picture first.

    Args:
        image_grid_pinpoints: sizes `(width, height)` that a picture may be resized to before it
            is cut into tiles. Without any it is not cut.
        settings: keys of CLIP's preprocessor_config.json.

    Raises:
        ValueError: settings of another preprocessing.
    """

    default_auto_class = "AutoImageProcessor"
    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012
    valid_kwargs = VideoXLImagesKwargs

    def __init__(self, image_grid_pinpoints: Any = (), **settings: Any) -> None:
        self.set_pixels(**clip_settings("VideoXLImageProcessor", settings))
        self.image_grid_pinpoints = pinpoints(image_grid_pinpoints or (), self.edge)

    def preprocess(self, images: Any, return_tensors: Any = None, **options: Any) -> BatchFeature:
        """Pictures (paths, PIL images, uint8 arrays `(height, width, 3)`), one or a list, or a
        list of such lists.

        Returns:
            `pixel_values`, a list of one tensor for each picture, and `image_sizes`, its
            `(width, height)`.
        """
        refuse_options("images", options, {GRID: [list(x) for x in self.image_grid_pinpoints]})
        pictures = [open_image(x) for x in flat(images)]
        pixels = [self.frames_to_pixels(self.tiles(x)) for x in pictures]
        return BatchFeature({"pixel_values": pixels, "image_sizes": [x.size for x in pictures]})

    def tiles(self, picture: Any) -> np.ndarray:
        """One picture as uint8 `(1 + tiles, size, size, 3)`. The first is the whole picture
        squeezed into a square. The tiles follow row by row, cut from the picture fitted into the
        best of the sizes with black around it."""
        size = self.edge
        squares = [np.asarray(picture.resize((size, size), bicubic()))]
        if self.image_grid_pinpoints:
            width, height = self.best_resolution(picture.size)
            fitted = np.asarray(fit(picture, width, height))
            squares += [
                fitted[y : y + size, x : x + size]
                for y in range(0, height, size)
                for x in range(0, width, size)
            ]
        return np.stack(squares)

    def best_resolution(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The size `(width, height)` that keeps most of a picture's pixels and, among those,
        wastes least. `image_size`: of the picture, (width, height)."""

        def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
            scale = min(pinpoint[0] / image_size[0], pinpoint[1] / image_size[1])
            kept = int(image_size[0] * scale) * int(image_size[1] * scale)
            kept = min(kept, image_size[0] * image_size[1])
            return kept, kept - pinpoint[0] * pinpoint[1]

        if not self.image_grid_pinpoints:
            fail("grid_pinpoints", "none", "sizes in the checkpoint's config")
        return max(self.image_grid_pinpoints, key=merit)  # the first of equals, as published

    def to_dict(self) -> dict[str, Any]:
        grid = [list(x) for x in self.image_grid_pinpoints]
        kind = {"image_processor_type": type(self).__name__, GRID: grid}
        return {**self.described_pixels(), **kind, **self.auto_entry()}


class VideoXLVideoProcessor(Pixels, SavedProcessor, BaseVideoProcessor):
    """Videos to frames `(frames, 3, size, size)`.

    Args:
        settings: keys of CLIP's preprocessor_config.json, `num_frames` and `fps`: how many frames
            of a file, or how many a second, where a call does not say.

    Raises:
        ValueError: settings of another preprocessing.
    """

    default_auto_class = "AutoVideoProcessor"
    model_input_names = ["pixel_values_videos"]  # noqa: RUF012
    valid_kwargs = VideoXLVideosKwargs

    def __init__(self, **settings: Any) -> None:
        self.set_pixels(**clip_settings("VideoXLVideoProcessor", settings))
        self.num_frames = settings.get("num_frames")
        self.fps = settings.get("fps")

    def preprocess(
        self,
        videos: Any,
        num_frames: int | None = None,
        fps: float | None = None,
        return_tensors: Any = None,
        **options: Any,
    ) -> BatchFeature:
        """Videos in any form that `watch` takes, one or a list.

        Args:
            num_frames: evenly spaced, of anything but batches of frames.
            fps: of a file. By default 1 frame a second, and of a video longer than 128 s 128
                frames, evenly spaced.

        Returns:
            `pixel_values_videos`, a list of one tensor for each video.
        """
        sampled = options.pop("do_sample_frames", None)
        refuse_options("videos", options, {})
        if num_frames is None and fps is None and sampled is not False:
            num_frames, fps = self.num_frames, self.fps
        pixels = [
            torch.cat(list(self.batches(video, num_frames, fps))) for video in video_list(videos)
        ]
        return BatchFeature({"pixel_values_videos": pixels})

    def batches(
        self, video: Any, frames: int | None = None, fps: float | None = None
    ) -> Iterator[Tensor]:
        """One video as batches of pixels."""
        if getattr(video, "ndim", 0) == 4 and video.shape[1] == 3 != video.shape[-1]:
            video = torch.as_tensor(video).permute(0, 2, 3, 1)  # transformers' order of frames
        for batch in open_frames(video, self.edge, frames, fps)[0]:
            yield self.frames_to_pixels(batch)

    def to_dict(self) -> dict[str, Any]:
        sampling = {"num_frames": self.num_frames, "fps": self.fps}
        sampling = {name: value for name, value in sampling.items() if value is not None}
        return {
            **self.described_pixels(),
            **sampling,
            "video_processor_type": type(self).__name__,
            **self.auto_entry(),
        }


def clip_settings(source: str, clip: dict[str, Any]) -> dict[str, Any]:
    """`Pixels.set_pixels`'s settings from the keys of a preprocessor_config.json. Raises
    ValueError, which names `source`, for settings that are not followed here."""

    def edge(value: Any) -> Any:
        if isinstance(value, dict):
            edges = {value.get("shortest_edge", value.get("height")), *value.values()}
            return edges.pop() if len(edges) == 1 else value
        return value

    size, crop = (edge(clip.get(key, CLIP_SIZE)) for key in ("size", "crop_size"))
    wrong = [f"{step} is false" for step in _STEPS if not clip.get(step, True)]
    if not isinstance(size, int) or size != crop:
        wrong.append(f"size {clip.get('size')} and crop_size {clip.get('crop_size')} differ")
    if clip.get("resample", 3) != 3:
        wrong.append(f"resample is {clip['resample']}, expected 3 (bicubic)")
    if wrong:
        raise ValueError(f"{source}: unsupported: {'; '.join(wrong)}")
    return {
        "size": size,
        "mean": clip.get("image_mean", CLIP_MEAN),
        "std": clip.get("image_std", CLIP_STD),
        "rescale": clip.get("rescale_factor", 1 / 255),
    }


def refuse_options(kind: str, options: dict[str, Any], known: dict[str, Any]) -> None:
    """Refuses options of a call that would change what is computed."""
    harmless = ("return_metadata", "video_metadata", "device", "disable_grouping")
    for name, value in options.items():
        if value is None or name in harmless or known.get(name) == value:
            continue
        fail(f"{kind}: {name}", value, "nothing: the checkpoint's preprocessing is followed")


def flat(images: Any) -> list[Any]:
    """Pictures in one list."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [x for item in images for x in flat(item)]


def video_list(videos: Any) -> list[Any]:
    """Videos in one list. A list of paths of pictures, of PIL images or of arrays of one frame
    is one video."""
    if not isinstance(videos, (list, tuple)):
        return [videos]
    found: list[Any] = []
    for item in videos:
        if isinstance(item, (list, tuple)) and item and not _picture(item[0]):
            found += item
        elif _picture(item):
            return [list(videos)]
        else:
            found.append(item)
    return found


def _picture(value: Any) -> bool:
    if isinstance(value, (str, bytes)) or hasattr(value, "__fspath__"):
        name = str(value).lower()
        return name.endswith((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"))
    return getattr(value, "ndim", 0) == 3 or hasattr(value, "getexif")
