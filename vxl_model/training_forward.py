"""Loss and logits of sequences whose labels are known: all windows in one pass a layer, and
differentiable. Sequences of any shapes are packed into it, without padding.

In training mode every parameter takes part in every pass, some with factor 0. Text alone would
otherwise leave VSTs, projector and tower without a gradient: FSDP's processes would wait for each
other's, and an optimizer would count its steps differently depending on where samples land.

Source: Video-XL section 3.4. The first suffix token is predicted by the last raw visual row, as
in the published code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from vxl_kernels import ChunkLayout

from .decoder.context import PackedContext, Segment
from .errors import fail
from .inputs.arguments import IGNORE_INDEX, IMAGE_TOKEN, TextRow
from .streaming.cache_pool import SLACK_TOKENS
from .streaming.encoder import StreamEncoder
from .streaming.ratios import RatioPlan
from .streaming.state import VideoState

__all__ = [
    "SequencePass",
    "check_labels",
    "kept_states",
    "padded_hidden",
    "padded_logits",
    "padded_states",
    "refuse_tensor_parallel",
    "run_sequences",
    "token_loss",
]


# Rows of a pass. Larger products are not faster per row, and this bounds what a layer computes
# again under gradient checkpointing. One pass of 7,000 rows took 6 % longer on two cores.
_PACK_ROWS = 2048


@dataclass
class SequencePass:
    """One sequence after a training pass.

    Attributes:
        hidden: normed hidden states of all rows of the pass, `(rows, hidden)`.
        states: what `VideoXLDecoder.run` collects, `(rows, hidden)` each, if it was asked for.
        prefix, suffix: the sequence's rows of `hidden`.
        before_suffix: row that predicts the first suffix token, None if there is none.
        vst_counts: VSTs of every step.
        kept: K and V `(2, layers, tokens, kv_heads, head_dim)`, if they were asked for.
    """

    hidden: Tensor
    states: list[Tensor]
    prefix: slice
    suffix: slice
    before_suffix: int | None
    vst_counts: list[int]
    kept: Tensor | None


def run_sequences(
    encoder: StreamEncoder,
    rows: Sequence[TextRow],
    features: Sequence[Tensor | None],
    plans: Sequence[RatioPlan],
    keep: bool,
    hidden_states: bool = False,
) -> list[SequencePass]:
    """Whole sequences through the decoder, packed into passes if the settings say so. Without
    gradients and batch invariant each has a pass of its own.

    Args:
        features: `(tokens, hidden)` of each row's video, None for text alone.
        keep: return what the sequences keep, too.
        hidden_states: return the hidden states of every layer, too.
    """
    settings = encoder.settings
    sequences = [
        _Pieces(encoder, *x) for x in zip(rows, features, [x.copy() for x in plans], strict=True)
    ]
    apart = settings.batch_invariant and not torch.is_grad_enabled()
    packs = [[one] for one in sequences] if apart or not settings.packing else _packs(sequences)
    return [one for pack in packs for one in _run_pack(encoder, pack, keep, hidden_states)]


def _packs(sequences: list[_Pieces]) -> list[list[_Pieces]]:
    """Neighbouring sequences of up to `_PACK_ROWS` rows, or one of more. In a distributed run all
    of them: FSDP needs equally many passes in every process."""
    if dist.is_available() and dist.is_initialized():
        return [sequences]
    packs: list[list[_Pieces]] = []
    rows = 0
    for one in sequences:
        rows += one.rows
        if packs and rows <= _PACK_ROWS:
            packs[-1].append(one)
        else:
            packs.append([one])
            rows = one.rows
    return packs


class _Pieces:
    """Prefix, windows and suffix of one sequence.

    Attributes:
        raw: input rows in order without the VSTs, embeddings for None: `(rows, hidden)`.
        segments: layouts of these rows, and how many tokens are kept before each.
        before_suffix: raw row that predicts the first suffix token.
    """

    def __init__(
        self, encoder: StreamEncoder, row: TextRow, features: Tensor | None, plan: RatioPlan
    ) -> None:
        self.row, self.vst_counts, self.cached = row, [0], 0
        self.segments: list[Segment] = []
        self.features: list[Tensor] = []
        self.raw_rows = 0
        if len(row.prefix):
            self._add(len(row.prefix))
        self.before_suffix = self.raw_rows - 1 if self.raw_rows else None
        if features is not None:
            self._windows(encoder, features.to(encoder.device, encoder.dtype), plan)
        self.suffix_start = self.raw_rows
        self._add(len(row.suffix))
        self.vst_counts.append(0)

    @property
    def rows(self) -> int:
        """With the VSTs."""
        return self.raw_rows + sum(self.vst_counts)

    def _add(self, rows: ChunkLayout | int, dropped: bool = False) -> None:
        self.segments.append(Segment(0, rows, self.cached, dropped))
        if isinstance(rows, int):
            self.raw_rows += rows
            self.cached += 0 if dropped else rows
        else:
            self.raw_rows += rows.chunks * rows.window
            self.cached += rows.chunks * rows.vsts_per_chunk

    def _windows(self, encoder: StreamEncoder, visual: Tensor, plan: RatioPlan) -> None:
        for window, ratio, chunks in _equal_windows(plan, len(visual), encoder.window):
            used, visual = visual.tensor_split([chunks * window])
            if ratio > window:  # there is no VST, and only the last raw row may be read
                self.vst_counts += [0] * chunks
                if len(visual):
                    continue
                self._add(window, dropped=True)
                used = used[-window:]
            else:
                layout = ChunkLayout(window, ratio, chunks)
                self._add(layout)
                self.vst_counts += [layout.vsts_per_chunk] * chunks
            self.features.append(used)
            self.before_suffix = self.raw_rows - 1


def _run_pack(
    encoder: StreamEncoder, sequences: Sequence[_Pieces], keep: bool, hidden_states: bool
) -> list[SequencePass]:
    """Sequences of any shapes in one pass."""
    decoder = encoder.decoder
    segments = [
        dataclasses.replace(segment, sequence=i)
        for i, one in enumerate(sequences)
        for segment in one.segments
    ]
    idle = decoder.training and not any(isinstance(x.rows, ChunkLayout) for x in segments)
    context = PackedContext(segments, decoder.inv_freq(), encoder.settings, keep, idle)
    # One lookup a pass: FSDP gathers the table for each, in all processes alike.
    texts = [text for one in sequences for text in (one.row.prefix, one.row.suffix)]
    embedded = iter(encoder.embed(torch.cat(texts)).split([len(text) for text in texts]))
    parts = [x for one in sequences for x in (next(embedded), *one.features, next(embedded))]
    if idle:
        parts[-1] = parts[-1] + 0 * decoder.vst_embedding().sum()
    if context.layout.vst_rows:
        vst = decoder.vst_embedding().to(encoder.dtype)
        parts.append(vst.expand(context.layout.vst_rows, -1))
    states: list[Tensor] | None = [] if hidden_states else None
    rows = torch.cat([x[None] for x in parts], dim=1)  # no view: compilers make a graph for those
    hidden = decoder.run(rows, context, states=states)
    assert hidden is not None
    passes, start = [], 0
    for i, one in enumerate(sequences):
        kept = None
        if context.kept is not None:
            layers = [context.kept[n] for n in range(len(decoder.layers))]
            both = zip(*([x[context.kept_rows[i]] for x in kv] for kv in layers), strict=True)
            kept = torch.stack([torch.stack(x) for x in both])
        before = None if one.before_suffix is None else start + one.before_suffix
        suffix = slice(start + one.suffix_start, start + one.raw_rows)
        prefix = slice(start, start + len(one.row.prefix))
        own = [x[0] for x in states or ()]
        passes.append(SequencePass(hidden[0], own, prefix, suffix, before, one.vst_counts, kept))
        start += one.raw_rows
    return passes


def _equal_windows(plan: RatioPlan, tokens: int, window: int) -> list[tuple[int, int, int]]:
    """Neighbouring windows of one size and ratio: (window, ratio, how many)."""
    groups: list[tuple[int, int, int]] = []
    for start in range(0, tokens, window):
        size = min(window, tokens - start)
        ratio = plan.next(size)
        if groups and groups[-1][:2] == (size, ratio):
            groups[-1] = (size, ratio, groups[-1][2] + 1)
        else:
            groups.append((size, ratio, 1))
    return groups


# -- what a call returns --------------------------------------------------------------------


def column_rows(one: SequencePass, row: TextRow, every: bool) -> tuple[Tensor, int]:
    """The rows of a pass that belong to neighbouring columns of input_ids, and the first of
    these columns: the suffix, before it with `every` the last raw visual row in the column of
    -200, and the prefix. The row of each column predicts the token of the next one."""
    first = one.suffix.start
    suffix = [*range(first, first + len(row.suffix))]
    rows, start = suffix, row.suffix_start
    if every and row.visual:
        assert one.before_suffix is not None
        prefix = range(one.prefix.start, one.prefix.stop)
        rows, start = [*prefix, one.before_suffix, *suffix], start - len(prefix) - 1
    return torch.tensor(rows, device=one.hidden.device), start


def _in_columns(
    values: list[Tensor], starts: list[int], rows: list[TextRow], columns: int, every: bool
) -> Tensor:
    """Values `(own columns, ...)` of each row, padded with 0 to the columns of the batch."""
    first = 0 if every else min(row.suffix_start if row.visual else 0 for row in rows)
    padded = [
        F.pad(x, (0, 0, start - first, columns - row.suffix_stop))
        for x, start, row in zip(values, starts, rows, strict=True)
    ]
    return torch.stack(padded)


def padded_logits(
    passes: list[SequencePass],
    rows: list[TextRow],
    columns: int,
    lm_head: nn.Module,
    every: bool,
) -> Tensor:
    """Logits `(batch, columns, vocabulary)` in the columns of input_ids: all of them with
    `every` and for text alone, else those from the first suffix of the batch on. 0 for padding."""
    own = [column_rows(one, row, every) for one, row in zip(passes, rows, strict=True)]
    values = [lm_head(one.hidden[x]) for one, (x, _) in zip(passes, own, strict=True)]
    return _in_columns(values, [start for _, start in own], rows, columns, every)


def padded_hidden(passes: list[SequencePass], rows: list[TextRow], columns: int) -> Tensor:
    """Normed hidden states `(batch, columns, hidden)` in the columns of input_ids, 0 for padding.
    That of a column predicts the token of the next one."""
    own = [column_rows(one, row, True) for one, row in zip(passes, rows, strict=True)]
    values = [one.hidden[x] for one, (x, _) in zip(passes, own, strict=True)]
    return _in_columns(values, [start for _, start in own], rows, columns, True)


def padded_states(
    passes: list[SequencePass], rows: list[TextRow], columns: int, every: bool
) -> tuple[Tensor, ...]:
    """Hidden states of every layer `(batch, columns, hidden)` in the columns of the logits."""
    own = [column_rows(one, row, every) for one, row in zip(passes, rows, strict=True)]
    starts = [start for _, start in own]
    layers = zip(*(one.states for one in passes), strict=True)
    return tuple(
        _in_columns(
            [x[y] for x, (y, _) in zip(layer, own, strict=True)], starts, rows, columns, every
        )
        for layer in layers
    )


def token_loss(
    passes: list[SequencePass],
    rows: list[TextRow],
    labels: Tensor,
    lm_head: nn.Module,
    tokens: Tensor | float | None = None,
) -> Tensor:
    """Mean cross entropy over all supervised tokens of the batch.

    Args:
        labels: as input_ids, -100 where nothing is supervised. The label at -200 is ignored.
        tokens: what the sum is divided by instead of the tokens of this batch, for a batch that
            is a part of a larger one.
    """
    hidden, targets = [], []
    for one, row, label in zip(passes, rows, labels, strict=True):
        suffix = label[row.suffix_start : row.suffix_stop]
        first = one.suffix.start
        predicting = torch.arange(first - 1, first - 1 + len(suffix), device=label.device)
        if one.before_suffix is None:  # text alone: nothing predicts its first token
            suffix, predicting = suffix[1:], predicting[1:]
        else:
            predicting[0] = one.before_suffix
        prefix = label[row.prefix_start : row.prefix_start + len(row.prefix)][1:]
        target = torch.cat([prefix, suffix])
        first = one.prefix.start
        before = torch.arange(first, first + len(prefix), device=label.device)
        predicting = torch.cat([before, predicting])
        wanted = target != IGNORE_INDEX
        hidden.append(one.hidden[predicting[wanted]])
        targets.append(target[wanted])
    logits = lm_head(torch.cat(hidden)).float()
    target = torch.cat(targets).to(logits.device)
    if not len(target):  # as transformers: a mean over nothing, but with a graph
        return logits.sum() * 0.0
    if tokens is not None:
        return F.cross_entropy(logits, target.long(), reduction="sum") / tokens
    return F.cross_entropy(logits, target.long())


def kept_states(
    encoder: StreamEncoder, passes: list[SequencePass], plans: list[RatioPlan]
) -> list[VideoState]:
    """The sequences with what a pass with `keep` has kept of them, in a cache."""
    kept = [one.kept for one in passes if one.kept is not None]
    tokens = sum(x.shape[2] + 2 * encoder.settings.page_size for x in kept)
    cache = encoder.cache(tokens + SLACK_TOKENS // 4)
    return [
        VideoState(
            cache.restore(x.to(encoder.dtype)),
            plan.copy(),
            vst_counts=one.vst_counts,
            finished=True,
        )
        for one, x, plan in zip(passes, kept, plans, strict=True)
    ]


# -- refusals -------------------------------------------------------------------------------


def check_labels(labels: Tensor, text: Tensor, vocabulary: int) -> None:
    """`text`: input_ids `(batch, columns)` or inputs_embeds `(batch, columns, hidden)`."""
    if labels.shape != text.shape[:2]:
        got, want = tuple(labels.shape), tuple(text.shape[:2])
        fail("labels", f"shape {got}", f"{want} as input_ids")
    wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocabulary))
    if text.dim() == 2:
        wrong &= text != IMAGE_TOKEN
    if bool(wrong.any()):
        fail("labels", int(labels[wrong][0]), f"0 to {vocabulary - 1}, or {IGNORE_INDEX}")


def refuse_tensor_parallel(model: nn.Module, first_layer: Any) -> None:
    """FSDP gathers each layer's weights around it, but nothing gathers those that tensor
    parallelism has cut in all layers."""
    weight = getattr(first_layer.self_attn.q_proj, "weight", None)
    cut = isinstance(weight, DTensor)
    if cut and not any(isinstance(x, FSDPModule) for x in (model, first_layer)):
        fail("training", "a tensor-parallel model", "inference, or the model in one piece")
