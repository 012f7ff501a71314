"""Captioners: a small interface, and its implementation by transformers' image-text models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vxl_model.inputs.processing import VideoXLProcessor

from .settings import PROMPT

__all__ = ["Captioner", "TransformersCaptioner"]


class Captioner(Protocol):
    """Describes a few pictures in words.

    Attributes:
        name: shown to people and written to the samples.
        identity: changes whenever the captions could change; stored captions of another identity
            are made again.
    """

    name: str
    identity: str

    def caption(self, pictures: Sequence[Any]) -> str:
        """One text for RGB PIL images of one clip, in order of time."""


class TransformersCaptioner:
    """Any model that transformers loads with AutoModelForImageTextToText.

    Models with a chat template get every picture and the prompt as one user message; models
    without one that know an image token get that token once a picture, then the prompt; models
    that know neither (BLIP, GIT) caption the middle picture and ignore the prompt. Decoding is
    greedy, so the same pictures give the same words.

    Configuration and processor are loaded at once, weights at the first caption. A run whose
    captions are all stored never loads weights.

    Args:
        model: a folder, or a name on the Hub.
        prompt: the question about the pictures.
        max_new_tokens: the longest caption.
        device, dtype: of the weights.

    Raises:
        ValueError: `model` is not an image-text model; the message names its type.
    """

    def __init__(
        self,
        model: str,
        *,
        prompt: str = PROMPT,
        max_new_tokens: int = 64,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not prompt.strip():
            raise ValueError(f"prompt: got {prompt!r}, expected text")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected 1 or more")
        self.name = model
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.device, self.dtype = torch.device(device), dtype
        self.processor, version = _read(model)
        self.model: Any = None
        about = [model, version, prompt, max_new_tokens, str(dtype)]
        self.identity = hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def caption(self, pictures: Sequence[Any]) -> str:
        """Greedy words for the pictures; as `Captioner.caption`."""
        if self.model is None:
            self.model = self._load()
        inputs = self._inputs(list(pictures)).to(self.device, self.dtype)
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens
            )
        return self.processor.decode(
            _new_ids(ids, inputs.get("input_ids")), skip_special_tokens=True
        ).strip()

    def _load(self) -> Any:
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText

        try:
            model = AutoModelForImageTextToText.from_pretrained(self.name, dtype=self.dtype)
        except (ValueError, OSError, SafetensorError) as error:
            raise ValueError(f"captioner {self.name}: {_first_line(error)}") from None
        return model.to(self.device).eval()

    def _inputs(self, pictures: list[Any]) -> Any:
        processor = self.processor
        if getattr(processor, "chat_template", None):
            content = [{"type": "image", "image": picture} for picture in pictures]
            message = {"role": "user", "content": [*content, {"type": "text", "text": self.prompt}]}
            return processor.apply_chat_template(
                [message],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        token = getattr(processor, "image_token", None)
        if token is None:
            return processor(images=pictures[len(pictures) // 2], return_tensors="pt")
        text = str(token) * len(pictures) + "\n" + self.prompt
        return processor(images=[pictures], text=[text], return_tensors="pt")


def _new_ids(ids: Tensor, prompt: Tensor | None) -> Tensor:
    """The generated ids: decoders repeat the prompt, encoder-decoders and BLIP-2 do not."""
    row = ids[0]
    if prompt is not None and torch.equal(row[: prompt.shape[1]], prompt[0]):
        row = row[prompt.shape[1] :]
    return row


def _read(model: str) -> tuple[Any, str]:
    """The processor of an image-text model, and its version: a commit of the Hub, or sizes and
    times of a folder's files."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        VideoXLProcessor.read_config(model)
        config = AutoConfig.from_pretrained(model)
    except (ValueError, OSError, KeyError) as error:
        what = _first_line(error).removeprefix(f"{model}: ")
        raise ValueError(f"captioner {model}: {what}") from None
    expected = "expected an image-text model (AutoModelForImageTextToText)"
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(f"captioner {model}: got a {config.model_type!r} model, {expected}")
    try:
        processor = AutoProcessor.from_pretrained(model)
    except Exception as error:  # also ImportError and AttributeError, without torchvision
        raise ValueError(f"captioner {model}: no processor ({_first_line(error)})") from None
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        raise ValueError(
            f"captioner {model}: its processor is a {type(processor).__name__}, expected one for "
            "pictures and text"
        )
    commit, folder = getattr(config, "_commit_hash", None), Path(model)
    if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise ValueError(f"captioner {model}: no weights there (*.safetensors, *.bin)")
    return processor, commit or _files(folder)


def _files(folder: Path) -> str:
    stats = sorted((p.name, p.stat()) for p in folder.glob("*") if p.is_file())
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
