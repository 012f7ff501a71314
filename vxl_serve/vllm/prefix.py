"""A saved memory as the beginning of a request to vLLM."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vxl_kernels import VstCache
from vxl_model import VideoMemory

__all__ = ["PARAMETER", "Prefix", "publish"]

PARAMETER = "vxl"  # the key in a request's `kv_transfer_params`


@dataclass(frozen=True)
class Prefix:
    """K and V of a whole video in a file.

    Attributes:
        path: the file.
        tokens: its kept tokens.
        identity: a digest of the file's checksums. vLLM's prefix cache knows the video by it.
    """

    path: str
    tokens: int
    identity: str

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Prefix:
        """Reads the header of a file that `VideoMemory.save(path, final=True)` wrote.

        Raises:
            ValueError: the file is damaged, is not a memory, or its last window is not encoded.
            OSError: the file can't be read.
        """
        with VstCache.reader(path) as file:
            return cls(os.fspath(path), file.header.length, identity(file))

    @classmethod
    def from_request(cls, parameters: Mapping[str, Any] | None) -> Prefix | None:
        """What a request's `kv_transfer_params` say; None if they name no memory.

        Raises:
            ValueError: they are not those of `kv_transfer_params`.
        """
        found = (parameters or {}).get(PARAMETER)
        if found is None:
            return None
        fields = {"path": str, "tokens": int, "identity": str}
        if not isinstance(found, Mapping) or set(found) != set(fields):
            raise ValueError(f"{PARAMETER}: got {found!r}, expected the fields {sorted(fields)}")
        for name, kind in fields.items():
            if type(found[name]) is not kind:
                raise ValueError(
                    f"{PARAMETER}.{name}: got {found[name]!r}, expected {kind.__name__}"
                )
        if found["tokens"] < 1:
            raise ValueError(f"{PARAMETER}.tokens: got {found['tokens']}, expected at least 1")
        return cls(**found)

    @property
    def kv_transfer_params(self) -> dict[str, Any]:
        """The field of this name in a request to vLLM's server."""
        fields = {"path": self.path, "tokens": self.tokens, "identity": self.identity}
        return {PARAMETER: fields}

    def prompt(self, suffix_ids: Sequence[int] | torch.Tensor) -> dict[str, Any]:
        """A prompt for `LLM.generate`: a placeholder for every kept token, then the suffix.

        Args:
            suffix_ids: everything after the video, `(tokens,)`, at least one.
        """
        ids = torch.as_tensor(suffix_ids).flatten().tolist()
        if not ids:
            raise ValueError("suffix_ids: got none, expected at least one token after the video")
        return {"prompt_token_ids": [0] * self.tokens + ids, "cache_salt": self.identity}

    def sampling(self, **options: Any) -> Any:
        """vLLM's `SamplingParams` with these options, for `LLM.generate`."""
        from vllm import SamplingParams

        extra = {**options.pop("extra_args", {}), "kv_transfer_params": self.kv_transfer_params}
        return SamplingParams(extra_args=extra, **options)

    def completion(self, suffix_ids: Sequence[int] | torch.Tensor) -> dict[str, Any]:
        """Fields of a request to `/v1/completions`: prompt, salt and transfer parameters."""
        prompt = self.prompt(suffix_ids)
        return {
            "prompt": prompt["prompt_token_ids"],
            "cache_salt": prompt["cache_salt"],
            "kv_transfer_params": self.kv_transfer_params,
        }


def publish(memory: VideoMemory, path: str | os.PathLike[str]) -> Prefix:
    """Writes a memory, its last window encoded, where vLLM's workers can read it. `/dev/shm` is
    such a place for a memory that needs no file. The memory itself can be appended to as before.

    Raises:
        ValueError: a memory of several videos.
        OSError: the file can't be written.
    """
    memory.save(path, final=True)
    return Prefix.read(path)


def identity(file: Any) -> str:
    """The digest of an open file (`VstCache.reader`). ValueError unless it is a final memory."""
    state = json.loads(file.user.get("state", "{}"))
    if "text_model" not in file.user or not state.get("closed"):
        raise ValueError(
            "path: got a memory whose video may go on, expected one saved with final=True "
            "(vxl watch --final)"
        )
    contents = json.dumps([file.checksums, file.user], sort_keys=True)
    return hashlib.sha256(contents.encode()).hexdigest()
