"""Videos that have been watched: what a model kept of them, to be asked any number of times.

Threads: any number of them may use one memory. What a memory holds is never changed in place:
`append` works on a fork and puts it in place when it is complete.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from ..errors import fail
from . import memory_file
from .batch import StreamBatch
from .conversation import Conversation, answer_options, returned_batch
from .dense_cache import append_cache, cache_rows, dense_cache
from .encoder import StreamEncoder
from .questions import (
    first_stops,
    given,
    groups_that_go_together,
    id_rows,
    is_list_of_questions,
    padded_rows,
)
from .state import VideoState

__all__ = ["Owner", "VideoMemory"]


class Owner(Protocol):
    """What a memory asks of the model that made it."""

    @property
    def device(self) -> torch.device: ...

    @property
    def processor(self) -> Any:
        """Text to ids and back. A ValueError where there is none."""

    def encoder(self) -> StreamEncoder:
        """Runs videos through the decoder."""

    def append_video(
        self, state: VideoState, frames: Any, visual_features: Any, pixel_values: Any
    ) -> None:
        """Encodes one of the three at the end of a state."""

    def generate(self, inputs: Tensor, **options: Any) -> Any:
        """`inputs (batch, tokens)` and what follows them, after the video of `memory`."""


class VideoMemory:
    """What is kept of one video, or of several as a batch: `model.watch(...)` makes it.

    It costs the K and V of the prefix and of the VSTs. Questions and forks share them.

    `len(memory)` is the number of videos, `memory[i]` is one of them. Copies made with `copy` are
    forks. A memory is not pickled but written to a file with `save`.

    Attributes:
        model: the model that made it.
        batch: the sequences.
    """

    def __init__(self, model: Owner, batch: StreamBatch) -> None:
        self.model, self.batch = model, batch
        self._appending, self._flushing = threading.Lock(), threading.Lock()

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, index: int | slice) -> VideoMemory:
        """One video, or those of a slice."""
        places = range(len(self))[index]
        chosen = list(places) if isinstance(places, range) else [places]
        if chosen == list(range(len(self))):
            return self
        states = [self.batch.states[i] for i in chosen]
        return VideoMemory(self.model, StreamBatch(states))

    def __iter__(self) -> Iterator[VideoMemory]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"VideoMemory({len(self)} video{'s' * (len(self) != 1)}, visual tokens "
            f"{self.visual_tokens}, cached tokens {self.cached_tokens}, "
            f"{self.bytes / 2**20:.1f} MiB)"
        )

    def __copy__(self) -> VideoMemory:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> VideoMemory:
        return self.fork()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a VideoMemory cannot be pickled: save(path) writes it to a file")

    # -- what is in it -----------------------------------------------------------------

    @property
    def visual_tokens(self) -> list[int]:
        """Raw visual tokens of each video."""
        return [state.visual_tokens for state in self.batch.states]

    @property
    def cached_tokens(self) -> list[int]:
        """Cached tokens of each video: prefix, VSTs, text read since."""
        return [self._cached_tokens(state) for state in self.batch.states]

    @property
    def vst_counts(self) -> list[list[int]]:
        """VSTs of every step of each video, as the published code lists them: 0 for the prefix
        and for text, one entry for each window. A last window that is not full counts."""
        encoder = self.model.encoder()
        return [encoder.final_vst_counts(state) for state in self.batch.states]

    @property
    def bytes(self) -> int:
        """Bytes of the cached K and V. Shared ones count for each holder."""
        total = 0
        for state in self.batch.states:
            cache = state.sequence.place[0]
            total += cache.page_bytes // cache.page_size * self._cached_tokens(state)
        return total

    def keys_values(self, layer: int, index: int = 0) -> tuple[Tensor, Tensor]:
        """Copies of K and V of a layer, `(tokens, kv_heads, head_dim)` each. K is rotated to
        its final position."""
        sequence = self._flushed().states[index].sequence
        cache, seq = sequence.place
        return cache.gather(seq, layer)

    # -- asking ------------------------------------------------------------------------

    def ask(
        self,
        question: str | Tensor | Sequence[Any],
        max_new_tokens: int = 256,
        *,
        answer_prefix: str = "",
        **options: Any,
    ) -> Any:
        """Answers a question, or several at once. The memory stays as it is.

        Args:
            question: text (the checkpoint has to have a tokenizer), or the ids of everything
                after the video, `(tokens,)` or `(batch, tokens)`. A list of texts or of ids
                `(tokens,)` of any lengths: as many as there are videos, or any number for one
                video. They are decoded together, each until its own end. Each answer is the one
                that a call with this question only returns. (With `do_sample` it is not: draws
                of all questions come from one sequence of random numbers.)
            answer_prefix: what the answer to a text begins with, for instance "Best option: (".
                The model goes on from there.
            options: of `generate`: `do_sample`, `num_beams`, `streamer`, ...

        Returns:
            For text the answer without its prefix, or a list of answers for several videos or
            with `num_return_sequences`. For ids the new ids, `(new,)` or `(batch, new)`. With
            `return_dict_in_generate` what `generate` returns, its `sequences` the new ids. For a
            list of questions a list of what each would give.

        Raises:
            ValueError: the ids hold -200 or do not fit the number of videos, or have an
                `answer_prefix`. The text is empty or holds a control token. A list of questions
                with a `streamer` or `return_dict_in_generate`.
        """
        if is_list_of_questions(question):
            return self._ask_each(list(question), max_new_tokens, answer_prefix, options)
        if isinstance(question, str):
            processor = self.model.processor
            begun = (answer_prefix,) if answer_prefix else ()
            ids = torch.as_tensor(processor.suffix_ids(question, *begun))
            options = answer_options(processor, options)
            new = self.ask(ids.reshape(1, -1), max_new_tokens, **options)
            if not isinstance(new, Tensor):
                return new
            answers = [processor.decode(row) for row in new]
            return answers[0] if len(answers) == 1 else answers
        if answer_prefix:
            fail("answer_prefix", repr(answer_prefix), "none with ids: append its ids to them")
        ids = torch.as_tensor(question, device=self.model.device)
        if ids.dim() == 1 and len(self) == 1:
            out = self.ask(ids[None], max_new_tokens, **options)
            return out[0] if isinstance(out, Tensor) and len(out) == 1 else out
        ids = ids.expand(len(self), -1) if ids.dim() == 1 or len(ids) == 1 else ids
        out = self.model.generate(ids, memory=self, max_new_tokens=max_new_tokens, **options)
        if isinstance(out, Tensor):
            return out[:, ids.shape[1] :]
        out.sequences = out.sequences[:, ids.shape[1] :]
        return out

    def conversation(self) -> Conversation:
        """Several turns about the video, of which each is read once."""
        return Conversation(self)

    def continued(self, batch: StreamBatch) -> VideoMemory:
        """A memory of sequences that a pass of the same model has returned: those of this memory
        and the text that was read and generated after them."""
        return VideoMemory(self.model, batch)

    def forks(self, rows: int) -> StreamBatch:
        """Sequences for `rows` rows of text after the video. One video is forked for every row.

        Raises:
            ValueError: a memory of several videos, but not of `rows`.
        """
        if len(self) not in (1, rows):
            fail("memory", f"{len(self)} videos", f"1 or {rows} as input_ids")
        return self._flushed().forks(rows)

    # -- a plain decoder -----------------------------------------------------------------

    def to_cache(self, rows: int = 1) -> Any:
        """Copies of K and V as transformers' `DynamicCache`, for a plain decoder of the same
        weights (for a Video-XL on Qwen2, a `Qwen2ForCausalLM`).

        Args:
            rows: of the batch, for each video.

        Raises:
            ValueError: videos of several lengths, or `rows` is not positive.
        """
        if not isinstance(rows, int) or rows < 1:
            fail("rows", repr(rows), "at least 1")
        return dense_cache(self._flushed(), rows)

    def generate_inputs(self, question: Tensor | Sequence[int], rows: int = 1) -> dict[str, Any]:
        """Arguments of a plain decoder's `generate` that asks this memory.

        Args:
            question: ids of everything after the video, `(tokens,)`.
            rows: of the batch, for each video.

        Returns:
            `input_ids (batch, cached + tokens)`, its `attention_mask` and `past_key_values`, which
            is `to_cache(rows)`. `generate` wants an id for each cached token, and none is looked
            at. Here it is the first id of the question. Beams and `num_return_sequences` want
            `past_key_values.batch_repeat_interleave(n)` first.
        """
        ids = torch.as_tensor(question, device=self.model.device)
        if ids.dim() != 1 or not len(ids):
            fail("question", f"shape {tuple(ids.shape)}", "ids (tokens,), at least one")
        cache = self.to_cache(rows)
        cached = ids[:1].expand(cache.get_seq_length())
        ids = torch.cat([cached, ids]).expand(len(self) * rows, -1)
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}

    def from_cache(self, cache: Any) -> VideoMemory:
        """A memory that has read what a plain decoder added to the cache of `to_cache`, such as a
        question and its answer. This memory stays as it is.

        Args:
            cache: `(batch, ...)` with a row for each video, or any number of rows for one video.
                After `generate` it holds all tokens but the last one.

        Raises:
            ValueError: it does not begin with what this memory holds.
        """
        batch = self.forks(cache_rows(cache))
        with torch.no_grad():
            append_cache(batch, cache)
        return VideoMemory(self.model, batch)

    # -- going on ----------------------------------------------------------------------

    def append(
        self,
        frames: Any = None,
        *,
        visual_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> VideoMemory:
        """Goes on watching. Give one of the three. They are not kept: a buffer may be used again.

        Args:
            frames: uint8 `(frames, height, width, 3)`.
            visual_features: `(tokens, hidden)`, already projected.
            pixel_values: `(frames, 3, size, size)`, normalised.

        Returns:
            The memory itself. A last window that is not full waits for more frames, but questions
            see it.

        Raises:
            ValueError: not exactly one of the three, other shapes, or a memory that has read text
                after the video. The memory is as before then.
        """
        if len(self) != 1:
            fail("append", f"a memory of {len(self)} videos", "one video")
        with self._appending:
            if self.batch.states[0].finished:
                fail(
                    "append",
                    "a memory whose video has ended",
                    "one from watch() or one of its forks",
                )
            state = self.batch.states[0].fork()
            self.model.append_video(state, frames, visual_features, pixel_values)
            self.batch = StreamBatch([state])
        return self

    def fork(self) -> VideoMemory:
        """An independent memory that shares what there is so far. Copies nothing."""
        return VideoMemory(self.model, self.batch.forks(len(self)))

    # -- files -------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], final: bool = False) -> None:
        """Writes one video's memory to a file.

        Args:
            final: encode a last window that is not full, so that the file holds the K and V of
                the whole video, as other programs need them. `append` refuses such a memory. By
                default the window's visual tokens are kept to go on with.

        Raises:
            ValueError: a memory of several videos.
            OSError: the file can't be written.
        """
        if len(self) != 1:
            fail("save", f"a memory of {len(self)} videos", "one video: memory[i]")
        state = self.batch.states[0]
        if final:
            state = self._flushed().states[0].fork()
            state.finished = True
        memory_file.save_state(path, state, self.model.encoder().decoder)

    @staticmethod
    def load(path: str | os.PathLike[str], model: Owner) -> VideoMemory:
        """Reads what `save` wrote, for the same model, on the device where it is now.

        Raises:
            ValueError: the file is damaged, is not a memory, or was made by another model.
            OSError: the file can't be read.
        """
        return VideoMemory(model, StreamBatch([memory_file.load_state(path, model.encoder())]))

    # -- private -----------------------------------------------------------------------

    def _ask_each(
        self, questions: list[Any], max_new_tokens: int, answer_prefix: str, options: dict[str, Any]
    ) -> list[Any]:
        for name in ("streamer", "return_dict_in_generate"):
            if options.get(name):
                fail(name, "a list of questions", "one question, or ids (batch, tokens)")
        if len(self) not in (1, len(questions)):
            fail("question", f"{len(questions)} questions", f"{len(self)}, one for each video")
        in_words = isinstance(questions[0], str)
        if any(isinstance(x, str) != in_words for x in questions):
            fail("question", "texts and ids in one list", "texts or ids")
        processor: Any = self.model.processor if in_words else None
        if in_words:
            begun = (answer_prefix,) if answer_prefix else ()
            questions = [processor.suffix_ids(x, *begun).reshape(-1) for x in questions]
            options = answer_options(processor, options)
        elif answer_prefix:
            fail("answer_prefix", repr(answer_prefix), "none with ids: append its ids to them")
        rows = id_rows(questions, self.model.device)
        config = getattr(self.model, "generation_config", None)
        answers: list[Any] = [None] * len(rows)
        for group in groups_that_go_together(rows, options, config):
            states = [self.batch.states[i if len(self) > 1 else 0] for i in group]
            memory = VideoMemory(self.model, StreamBatch(states[: 1 if len(self) == 1 else None]))
            found = memory._decode_together([rows[i] for i in group], max_new_tokens, options)
            for i, new in zip(group, found, strict=True):
                said = [processor.decode(x) for x in new] if in_words else new
                answers[i] = said[0] if len(said) == 1 else said
        return answers

    def _decode_together(
        self, rows: list[Tensor], max_new_tokens: int, options: dict[str, Any]
    ) -> list[list[Tensor]]:
        """The new ids of each row, `num_return_sequences` of them."""
        ids, mask = padded_rows(rows)
        call = {**options, "attention_mask": mask, "return_dict_in_generate": True}
        out = self.model.generate(ids, memory=self, max_new_tokens=max_new_tokens, **call)
        new = out.sequences[:, ids.shape[1] :]
        each = len(new) // len(rows)
        config = getattr(self.model, "generation_config", None)
        if given("num_beams", options, config) in (None, 1):
            # A sequence has read its answer but for the last id, and no padding.
            states = self._flushed().states * (len(rows) if len(self) == 1 else 1)
            begun = [
                state.sequence.length + len(row) for state, row in zip(states, rows, strict=True)
            ]
            read = [state.sequence.length for state in returned_batch(out).states]
            stops = [1 + length - begun[i // each] for i, length in enumerate(read)]
        else:
            stops = first_stops(new, given("eos_token_id", options, config))
        cut = [row[:stop] for row, stop in zip(new, stops, strict=True)]
        return [cut[i : i + each] for i in range(0, len(cut), each)]

    def _flushed(self) -> StreamBatch:
        with self._flushing, torch.no_grad():  # one thread encodes a last window, the others wait
            return self.batch.flushed(self.model.encoder())

    def _cached_tokens(self, state: VideoState) -> int:
        counts = self.model.encoder().final_vst_counts(state)
        return state.sequence.length + sum(counts) - sum(state.vst_counts)
