"""Videos that have been watched: what a model kept of them, to be asked as often as you like."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vxl_kernels.cache.file_format import read_metadata

from ..decoder.attention import local
from .ratios import RatioPlan
from .stream import Stream

if TYPE_CHECKING:
    from ..modeling import VideoXLForConditionalGeneration

__all__ = ["VideoMemory"]

_FORMAT = "vxl-memory-1"
SLACK_TOKENS = 2048  # room for questions before a pool has to grow: 112 MiB of Qwen2-7B in bf16


class VideoMemory:
    """What is kept of one video, or of several as a batch: `model.watch(...)` makes it.

    It costs the K and V of the prompt and of the VSTs. Questions and forks share them.

    `len(memory)` videos; `memory[i]` is one of them.
    """

    is_compileable = False  # what HF's generate asks a cache

    def __init__(self, model: VideoXLForConditionalGeneration, streams: Iterable[Stream]) -> None:
        self.model = model
        self._streams = list(streams)

    def __len__(self) -> int:
        return len(self._streams)

    def __getitem__(self, index: int) -> VideoMemory:
        return VideoMemory(self.model, [self._streams[index]])

    def __iter__(self) -> Iterator[VideoMemory]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"VideoMemory({len(self)} video{'s' * (len(self) != 1)}, visual tokens "
            f"{self.visual_tokens}, kept tokens {self.kept_tokens}, {self.bytes / 2**20:.1f} MiB)"
        )

    # -- what is in it -----------------------------------------------------------------

    @property
    def visual_tokens(self) -> list[int]:
        """Raw visual tokens of each video."""
        return [s.visual_tokens for s in self._streams]

    @property
    def kept_tokens(self) -> list[int]:
        """Tokens of each video whose K and V are kept: prompt, VSTs, text read since."""
        sizes = [
            sum(after) - sum(s.sizes)
            for after, s in zip(self.vst_counts, self._streams, strict=True)
        ]
        return [s.sequence.length + n for s, n in zip(self._streams, sizes, strict=True)]

    @property
    def vst_counts(self) -> list[list[int]]:
        """VSTs of every step of each video, as the published code lists them: 0 for the prompt
        and for text, one entry for each window. A last window that is not full counts."""
        return [self.model.encoder().sizes_if_ended(s) for s in self._streams]

    @property
    def bytes(self) -> int:
        """Bytes of the kept K and V, were nothing shared."""
        pools = {id(s.sequence.pool): s.sequence.pool for s in self._streams}
        token = {k: p.cache.page_bytes // p.cache.page_size for k, p in pools.items()}
        return sum(
            token[id(s.sequence.pool)] * kept
            for s, kept in zip(self._streams, self.kept_tokens, strict=True)
        )

    def keys_values(self, layer: int, index: int = 0) -> tuple[Tensor, Tensor]:
        """Copies of K and V of a layer, `(tokens, kv_heads, head_dim)` each. K is rotated to
        its final position."""
        sequence = self._sealed()[index].sequence
        return sequence.pool.cache.gather(sequence.seq, layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Kept tokens of the longest sequence. For HF's generate."""
        return max(self.kept_tokens)

    # -- asking ------------------------------------------------------------------------

    def ask(
        self, question: str | Tensor | Sequence[int], max_new_tokens: int = 256, **options: Any
    ) -> Any:
        """Answers a question; the memory stays as it is.

        Args:
            question: text (the checkpoint has to have a tokenizer), or the ids of everything
                behind the video, `(tokens,)` or `(batch, tokens)`. One video takes any number
                of questions of a batch.
            options: of `generate`: `do_sample`, `num_beams`, `streamer`, ...

        Returns:
            For text the answer, a list of answers for several videos; for ids the new ids,
            `(new,)` or `(batch, new)`.

        Raises:
            ValueError: the ids hold -200 or do not fit the number of videos.
        """
        if isinstance(question, str):
            processor = self.model.processor
            ids = torch.as_tensor(processor.suffix_ids(question))
            if processor.stop_ids:
                options.setdefault("eos_token_id", processor.stop_ids)
                options.setdefault("pad_token_id", processor.stop_ids[0])
            new = self.ask(ids.reshape(1, -1), max_new_tokens, **options)
            answers = [processor.decode(row) for row in new]
            return answers[0] if len(answers) == 1 else answers
        ids = torch.as_tensor(question, device=self.model.device)
        if ids.dim() == 1 and len(self) == 1:
            return self.ask(ids[None], max_new_tokens, **options)[0]
        ids = ids.expand(len(self), -1) if ids.dim() == 1 or len(ids) == 1 else ids
        out = self.model.generate(ids, memory=self, max_new_tokens=max_new_tokens, **options)
        sequences = out if isinstance(out, Tensor) else out.sequences
        return sequences[:, ids.shape[1] :]

    # -- going on ----------------------------------------------------------------------

    def append(
        self,
        frames: Any = None,
        *,
        visual_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> VideoMemory:
        """Goes on watching. Give one of the three.

        Args:
            frames: uint8 `(frames, height, width, 3)`.
            visual_features: `(tokens, hidden)`, already projected.
            pixel_values: `(frames, 3, size, size)`, normalised.

        Returns:
            The memory itself. A last window that is not full waits for more frames; questions
            see it all the same.

        Raises:
            ValueError: not exactly one of the three, shapes, or a memory that has already read
                text behind the video.
        """
        if len(self) != 1:
            raise ValueError(f"append: got a memory of {len(self)} videos, expected one")
        self._refuse_closed("append")
        self.model._feed(self._streams[0], frames, visual_features, pixel_values)
        return self

    def fork(self) -> VideoMemory:
        """An independent memory that shares what there is so far. Copies nothing."""
        return VideoMemory(self.model, [s.fork() for s in self._streams])

    # -- files -------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one video's memory to a file, a last window that is not full included.

        Raises:
            ValueError: a memory of several videos.
            OSError: the file can't be written.
        """
        if len(self) != 1:
            raise ValueError(f"save: got a memory of {len(self)} videos, expected one: memory[i]")
        stream = self._streams[0]
        pending = torch.cat(stream.pending).cpu() if stream.pending else torch.empty(0)
        raw = pending.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        metadata = {
            "memory": _FORMAT,
            "model": model_fingerprint(self.model),
            "plan": stream.plan.state(),
            "state": json.dumps(
                {
                    "length": stream.sequence.length,
                    "sizes": stream.sizes,
                    "visual_tokens": stream.visual_tokens,
                    "closed": stream.closed,
                    "drawn": stream.drawn,
                    "pending": list(pending.shape),
                    "pending_dtype": str(pending.dtype).removeprefix("torch."),
                }
            ),
            "pending": base64.b64encode(raw).decode(),
        }
        stream.sequence.pool.cache.save(path, stream.sequence.seq, metadata)

    @staticmethod
    def load(path: str | os.PathLike[str], model: VideoXLForConditionalGeneration) -> VideoMemory:
        """Reads what `save` wrote, for the same model, on whatever device it is.

        Raises:
            ValueError: the file is no memory, is damaged, or was made by another model.
            OSError: the file can't be read.
        """
        metadata = read_metadata(path)
        if metadata.get("memory") != _FORMAT:
            raise ValueError(f"path: got {os.fspath(path)!r}, expected a file that save() wrote")
        if metadata["model"] != model_fingerprint(model):
            raise ValueError(
                f"path: got {os.fspath(path)!r}, the memory of another model (other weights, "
                "geometry or dtype)"
            )
        state = json.loads(metadata["state"])
        pool = model.encoder().pool(state["length"] + SLACK_TOKENS)
        sequence = pool.load(path)
        stream = Stream(sequence, RatioPlan.from_state(metadata["plan"]))
        stream.sizes, stream.visual_tokens = state["sizes"], state["visual_tokens"]
        stream.closed, stream.drawn = state["closed"], state["drawn"]
        raw = base64.b64decode(metadata["pending"])
        if raw:
            dtype = getattr(torch, state["pending_dtype"])
            pending = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(state["pending"])
            stream.pending = [pending.to(model.device)]
        return VideoMemory(model, [stream])

    # -- private -----------------------------------------------------------------------

    def _sealed(self) -> list[Stream]:
        with torch.no_grad():
            return [self.model.encoder().seal(s) for s in self._streams]

    def _refuse_closed(self, what: str) -> None:
        if any(s.closed for s in self._streams):
            raise ValueError(
                f"{what}: got a memory that has read text behind the video, expected one from "
                "watch() or one of its forks"
            )

    def _for_tail(self, batch: int) -> VideoMemory:
        """Forks to read a tail each; one video serves a whole batch."""
        if len(self) not in (1, batch):
            raise ValueError(f"memory: got {len(self)} videos, expected 1 or {batch} as input_ids")
        streams = self._sealed() * (batch if len(self) == 1 else 1)
        return VideoMemory(self.model, [s.fork() for s in streams])

    def _select(self, rows: Sequence[int]) -> VideoMemory:
        """The sequences of these rows, some perhaps several times. Copies nothing."""
        used: set[int] = set()
        streams = []
        for row in rows:
            streams.append(self._streams[row].fork() if row in used else self._streams[row])
            used.add(row)
        return VideoMemory(self.model, streams)


def model_fingerprint(model: VideoXLForConditionalGeneration) -> str:
    """What tells one model's memories from another's: geometry, dtype, and a digest of weights
    from every layer."""
    config = model.config
    core = model.model
    fields = [
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_width,
        config.beacon_window,
        config.published()["rope_theta"],
        str(core.beacon_embed_tokens.weight.dtype),
    ]
    digest = hashlib.sha256(json.dumps(fields).encode())
    # The first row of every parameter: 28 layers of Qwen2-7B are 9 MB.
    for _, weight in [*core.layers.named_parameters(), *core.norm.named_parameters()]:
        digest.update(_bytes(local(weight)[:1]))
    for embedding in (core.embed_tokens, core.beacon_embed_tokens):
        digest.update(_bytes(embedding.weight[:1]))
    return digest.hexdigest()


def _bytes(x: Tensor) -> bytes:
    return x.detach().float().cpu().contiguous().numpy().tobytes()
