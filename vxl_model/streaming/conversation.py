"""Several turns about one video: each is read once and stays in the memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import fail

__all__ = ["Conversation", "answer_options", "returned_batch"]


def answer_options(processor: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate` for an answer in words: it ends at the processor's stop ids, and
    `stop_strings` find its tokenizer."""
    defaults: dict[str, Any] = {}
    if processor.stop_ids:
        defaults = {"eos_token_id": processor.stop_ids, "pad_token_id": processor.stop_ids[0]}
    if options.get("stop_strings") is not None:
        defaults["tokenizer"] = processor.tokenizer
    return defaults | options


def returned_batch(out: Any) -> Any:
    """The cache of what `generate` returned. It has one of two names, by the release of
    transformers."""
    caches = (getattr(out, name, None) for name in ("cache", "past_key_values"))
    return next(x for x in caches if x is not None)


class Asked(Protocol):
    """What a conversation asks of a memory."""

    model: Any

    @property
    def cached_tokens(self) -> list[int]:
        """Tokens of each video that are cached."""

    def __len__(self) -> int: ...

    def ask(self, question: Any, max_new_tokens: int = 256, **options: Any) -> Any:
        """Answers ids `(1, tokens)`."""

    def continued(self, batch: Any) -> Any:
        """A memory of the sequences that `generate` returned."""


class Conversation:
    """Questions that see the questions and answers before them: `memory.conversation()` makes it.

    Attributes:
        memory: the video and all turns so far. The memory that the conversation started from
            stays as it is.
        turns: pairs of question and answer, as they were given and returned.
    """

    def __init__(self, memory: Asked) -> None:
        if len(memory) != 1:
            fail("conversation", f"a memory of {len(memory)} videos", "one video: memory[i]")
        self.memory = memory
        self.turns: list[tuple[Any, Any]] = []
        self._unread: list[int] = []  # ids of the last answer that the memory has not read

    def ask(
        self, question: str | Tensor | Sequence[int], max_new_tokens: int = 256, **options: Any
    ) -> Any:
        """The next turn.

        Args:
            question: text, or the ids `(tokens,)` of everything between the last answer and the
                next one.
            options: of `generate`, for one answer: `do_sample`, `streamer`, ...

        Returns:
            The answer, as text or as ids `(new,)`. If it raises, the conversation is as before.

        Raises:
            ValueError: text that `memory.ask` refuses, beams, or several answers.
        """
        for name in ("num_beams", "num_return_sequences"):
            if options.get(name, 1) != 1:
                fail(name, options[name], "1 in a conversation")
        text = isinstance(question, str)
        device = self.memory.model.device
        if text:
            processor = self.memory.model.processor
            options = answer_options(processor, options)
            ids = processor.turn_ids(question) if self.turns else processor.suffix_ids(question)
            stop = set(processor.stop_ids)
            unread = [i for i in self._unread if i not in stop]  # the turn's text closes it
        else:
            ids, unread = torch.as_tensor(question), self._unread
            if ids.dim() != 1 or not len(ids):
                fail("question", f"ids of shape {tuple(ids.shape)}", "text, or (tokens,)")
        ids = torch.cat([torch.tensor([unread], dtype=torch.long), ids.cpu().reshape(1, -1)], 1)
        before = self.memory.cached_tokens[0]
        options["return_dict_in_generate"] = True
        out = self.memory.ask(ids.to(device), max_new_tokens, **options)
        batch = returned_batch(out)
        new = out.sequences[0]
        read = batch.get_seq_length() - before - ids.shape[1]
        self.memory, self._unread = self.memory.continued(batch), new[read:].tolist()
        answer = processor.decode(new) if text else new
        self.turns.append((question, answer))
        return answer
