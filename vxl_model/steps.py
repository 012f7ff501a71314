"""Steps of sequences that are under way: each reads one more token, or a text of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .base_model import VideoXLModel
from .decoder.single_rows import linear_rows
from .errors import fail
from .generation import VideoXLOutput
from .settings import ExecutionSettings
from .streaming.batch import StreamBatch
from .streaming.encoder import StreamEncoder
from .streaming.memory import Owner, VideoMemory
from .streaming.step_graph import drop_graphs, step_graphs

__all__ = ["StepMixin"]


class StepMixin:
    """`decode_step` and `text_step` of `VideoXLForConditionalGeneration`."""

    model: VideoXLModel
    lm_head: nn.Linear
    settings: ExecutionSettings
    encoder: Callable[[], StreamEncoder]
    parameters: Callable[[], Iterable[Tensor]]

    @torch.no_grad()
    def decode_step(
        self,
        text: Tensor,
        batch: StreamBatch,
        hidden_states: bool = False,
        going_on: list[int] | None = None,
    ) -> VideoXLOutput:
        """One more token of every sequence: ids `(batch, 1)` or embeddings `(batch, 1, hidden)`.

        Args:
            going_on: rows of the batch; None for all. The results of the others are 0.
        """
        states: list[Tensor] | None = [] if hidden_states else None
        encoder, settings = self.encoder(), self.settings

        def step(text: Tensor, rows: Any) -> Tensor:
            hidden = self.model.run(encoder.embed(text), encoder.text_context(rows), None, states)
            assert hidden is not None
            if settings.batch_invariant:
                return linear_rows(self.lm_head, hidden, settings.backend)
            return self.lm_head(hidden)

        if not settings.decode_graphs:
            drop_graphs(self)
        live = batch.states
        if going_on is not None:
            live, text = [batch.states[i] for i in going_on], text[going_on]
        one_id = text.shape[1] == 1 and not text.is_floating_point()
        # A graph keeps the precision of its capture, and addresses of weights that autocast has
        # cast for the time being.
        graphable = settings.decode_graphs and one_id and states is None
        if graphable and not torch.is_autocast_enabled(encoder.device.type):
            graphs, how = step_graphs(self), (settings.batch_invariant, settings.backend)
            invariant = settings.batch_invariant
            logits = encoder.step(
                live, 1, lambda rows: graphs(step, text, rows, how, self.parameters, invariant)
            )
        else:
            logits = encoder.step(live, text.shape[1], lambda rows: step(text, rows))
        collected = states
        if going_on is not None:
            every = (logits, *(states or ()))
            logits, *collected = (_at_rows(x, going_on, len(batch)) for x in every)
        return VideoXLOutput(
            logits=logits,
            memory=VideoMemory(cast("Owner", self), batch),
            hidden_states=None if states is None else tuple(collected or ()),
        )

    @torch.no_grad()
    def text_step(self, texts: Sequence[Tensor], batch: StreamBatch) -> Tensor:
        """A step of a server: every sequence reads a text of its own, of any length. That is
        the last token of a running answer, or a new question.

        Short texts and single tokens go through the layers together, and each weight is read once
        for them. The result of a text is bitwise equal to that of a step with this text only, and
        the result of a single token to that of `decode_step`.

        Args:
            texts: ids `(tokens,)`, at least one, for each sequence of the batch.
            batch: the sequences, which share a cache. If it raises, they are as before.

        Returns:
            Logits of each last token, `(batch, vocabulary)`.

        Raises:
            ValueError: not one text for each sequence, or a text without a token.
            vxl_kernels.PoolExhausted: the cache has no room.
        """
        if len(texts) != len(batch):
            fail("texts", f"{len(texts)} texts", f"{len(batch)}, one for each sequence")
        for i, text in enumerate(texts):
            if text.dim() != 1 or not len(text):
                fail(f"texts[{i}]", f"shape {tuple(text.shape)}", "ids (tokens,), at least one")
        hidden = self.encoder().append_texts(batch.states, texts)[:, None]
        if self.settings.batch_invariant:
            return linear_rows(self.lm_head, hidden, self.settings.backend)[:, 0]
        return self.lm_head(hidden)[:, 0]


def _at_rows(x: Tensor, rows: list[int], batch: int) -> Tensor:
    """`(batch, ...)` with x at these rows and 0 elsewhere."""
    out = x.new_zeros(batch, *x.shape[1:])
    out[rows] = x
    return out
