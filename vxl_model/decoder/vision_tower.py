"""The visual encoder: CLIP's vision tower up to the layer that is read, projector, pooling.

Source: Video-XL, section 3.1; the published `CLIPVisionTower`, `encode_images` and
`get_2dPool`. Parameters have the names of the released checkpoint,
`vision_tower.vision_model.*`, whatever transformers calls CLIP's parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from .placement import execution_device, onloaded

# Frames per pass: 16 frames of CLIP-L fill the matrix units of a GPU (9,232 rows) and take
# 0.15 GB of activations in fp32.
FRAME_BATCH = 16


class _ClipParts(nn.Module):
    """CLIP's parts under the published names, `vision_model.*`.

    The model object itself is not kept. Whether its names contain `vision_model.` depends on the
    release of transformers, which also renames the keys of such a submodule at load and save.
    """

    vision_model: Any

    def __init__(self, clip: Any) -> None:
        super().__init__()
        parts = getattr(clip, "vision_model", clip)
        self.vision_model = nn.Module()
        for name in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm"):
            setattr(self.vision_model, name, getattr(parts, name))
        # CLIP's list of positions is not a weight and is not read here. On the meta device it would
        # have no values.
        self.vision_model.embeddings._buffers.pop("position_ids", None)


class VisionTower(nn.Module):
    """CLIP's vision tower, read at one of its hidden states.

    Args:
        vision_config: shape of the tower.
        select_layer: index into CLIP's `hidden_states` (0 is the embedding). Layers after it
            are kept, so that a checkpoint survives a round trip, but never run.
    """

    def __init__(self, vision_config: CLIPVisionConfig, select_layer: int = -2) -> None:
        super().__init__()
        states = vision_config.num_hidden_layers + 1
        if not -states <= select_layer < states:
            raise ValueError(
                f"select_layer: got {select_layer}, expected {-states} to {states - 1}: the tower "
                f"has {vision_config.num_hidden_layers} layers"
            )
        self.vision_tower = _ClipParts(CLIPVisionModel(vision_config))
        self.config = vision_config
        self.layers_run = select_layer % states
        self.frame_batch = FRAME_BATCH

    @property
    def side(self) -> int:
        """Patches along an edge of a frame."""
        patch: Any = self.config.patch_size
        size: Any = self.config.image_size
        return size // patch

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values (frames, 3, size, size)`, normalised, any float dtype, to the features
        `(frames, patches, hidden)` of the selected hidden state without the class token, in
        the tower's dtype. Runs `frame_batch` frames at a time."""
        size = self.config.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values: got shape {tuple(pixel_values.shape)}, "
                f"expected (frames, 3, {size}, {size})"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values: got {pixel_values.dtype}, expected normalised floats "
                "(VideoXLProcessor.frames_to_pixels)"
            )
        if len(pixel_values) == 0:
            weight = self.vision_tower.vision_model.pre_layrnorm.weight
            return weight.new_zeros(0, self.side**2, self.hidden_size)
        batches = [self._features(batch) for batch in pixel_values.split(self.frame_batch)]
        if len(batches) == 1:
            return batches[0]
        return torch.cat(batches)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Pixels in the tower's dtype, page-locked if they are on the host and the tower computes
        on a GPU: the work that a thread can do beside a pass of the tower."""
        patch = self.vision_tower.vision_model.embeddings.patch_embedding
        pixels, device = pixels.to(patch.weight.dtype), execution_device(patch)
        if device.type != "cuda" or not pixels.is_cpu:
            return pixels
        with torch.cuda.device(device):  # a thread's own current device is the first one
            return pixels.pin_memory()

    def upload(self, pixels: Tensor) -> Tensor:
        """Pixels of `prepare` where the tower computes. The host does not wait: nobody else has
        them, and the allocator keeps page-locked memory until it has been read."""
        device = execution_device(self.vision_tower.vision_model.embeddings.patch_embedding)
        return pixels.to(device, non_blocking=device.type == "cuda")

    def _features(self, pixels: Tensor) -> Tensor:
        clip = self.vision_tower.vision_model
        embeddings = clip.embeddings
        patch = embeddings.patch_embedding
        patches = patch(pixels.to(execution_device(patch), patch.weight.dtype))
        with onloaded(embeddings):
            classes = embeddings.class_embedding.to(patch.weight.dtype).expand(len(pixels), 1, -1)
            hidden = torch.cat((classes, patches.flatten(2).transpose(1, 2)), dim=1)
        with onloaded(embeddings.position_embedding):
            hidden = hidden + embeddings.position_embedding.weight
        hidden = clip.pre_layrnorm(hidden)
        for layer in clip.encoder.layers[: self.layers_run]:
            hidden = layer(hidden, attention_mask=None)
        return hidden[:, 1:]


def pool_2x2(features: Tensor) -> Tensor:
    """Average of each 2x2 block of patches, in row order.

    `features (frames, side * side, hidden)` to `(frames, (side // 2) ** 2, hidden)`. An odd
    last row and column are dropped, as in the published `get_2dPool`.
    """
    if features.dim() != 3 or math.isqrt(features.shape[1]) ** 2 != features.shape[1]:
        raise ValueError(
            f"features: got shape {tuple(features.shape)}, expected (frames, side * side, hidden)"
        )
    frames, patches, hidden = features.shape
    side = math.isqrt(patches)
    grid = features.reshape(frames, side, side, hidden).permute(0, 3, 1, 2)
    return F.avg_pool2d(grid, 2).permute(0, 2, 3, 1).reshape(frames, (side // 2) ** 2, hidden)


def project_and_pool(features: Tensor, projector: nn.Module) -> Tensor:
    """`mm_projector`, then 2x2 pooling: `(frames, side * side, mm_hidden)` to
    `(frames, (side // 2) ** 2, hidden)`.

    A mean commutes with the projector's last Linear, so pooling goes before it. That product
    then has a quarter of the rows, and the result is the same up to rounding.
    """
    if isinstance(projector, nn.Sequential) and isinstance(projector[-1], nn.Linear):
        return projector[-1](pool_2x2(projector[:-1](features)))
    return pool_2x2(projector(features))


def encode_frames(
    pixel_values: Tensor | Iterable[Tensor], tower: VisionTower, projector: nn.Module
) -> Iterator[Tensor]:
    """Visual tokens of a video, `tower.frame_batch` frames at a time: yields `(frames * tokens,
    hidden)`, frames in order.

    `pixel_values` is `(frames, 3, size, size)` or an iterable of such tensors. It is read no
    further than needed, so a video is never held as a whole.
    """
    for pixels in [pixel_values] if isinstance(pixel_values, Tensor) else pixel_values:
        for batch in pixels.split(tower.frame_batch):
            yield project_and_pool(tower(batch), projector).flatten(0, 1)
