"""Loss and logits of sequences whose labels are known: all windows in one pass a layer, and
differentiable. Sequences of one shape go through together.

In training mode every parameter takes part in every pass, some with factor 0. Text alone would
otherwise leave VSTs, projector and tower without a gradient: FSDP's processes would wait for each
other's, and an optimizer would count its steps differently depending on where samples land.

Source: Video-XL section 3.4. The first suffix token is predicted by the last raw visual row, as
in the published code.
"""

from __future__ import annotations

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

from .decoder.context import Segment, TrainingContext
from .errors import fail
from .inputs.arguments import IGNORE_INDEX, IMAGE_TOKEN, TextRow
from .settings import ExecutionSettings
from .streaming.cache_pool import SLACK_TOKENS
from .streaming.encoder import StreamEncoder
from .streaming.ratios import RatioPlan
from .streaming.state import VideoState

__all__ = [
    "SequencePass",
    "check_labels",
    "group_by_shape",
    "kept_states",
    "padded_logits",
    "padded_states",
    "refuse_tensor_parallel",
    "run_groups",
    "token_loss",
]


@dataclass
class SequencePass:
    """One sequence after a training pass.

    Attributes:
        hidden: normed hidden states of all rows, `(rows, hidden)`.
        states: what `VideoXLModel.run` collects, `(rows, hidden)` each, if it was asked for.
        suffix: its suffix's rows of `hidden`.
        before_suffix: row that predicts the first suffix token, None if there is none.
        vst_counts: VSTs of every step.
        kept: K and V `(2, layers, tokens, kv_heads, head_dim)`, if they were asked for.
    """

    hidden: Tensor
    states: list[Tensor]
    suffix: slice
    before_suffix: int | None
    vst_counts: list[int]
    kept: Tensor | None


def run_groups(
    encoder: StreamEncoder,
    rows: Sequence[TextRow],
    features: Sequence[Tensor | None],
    plans: Sequence[RatioPlan],
    keep: bool,
    hidden_states: bool = False,
) -> list[SequencePass]:
    """All rows through the decoder, those of one shape together, in the order of `rows`.

    Args:
        features: `(tokens, hidden)` of each row's video, None for text alone.
        keep: return what the sequences keep, too.
        hidden_states: return the hidden states of every layer, too.
    """
    by_row: dict[int, SequencePass] = {}
    for members in group_by_shape(rows, features, plans, encoder.settings):
        texts, visual = [rows[i] for i in members], [features[i] for i in members]
        plan = plans[members[0]].copy()
        passes = _run_group(encoder, texts, visual, plan, keep, hidden_states)
        by_row.update(zip(members, passes, strict=True))
    return [by_row[i] for i in range(len(rows))]


def group_by_shape(
    rows: Sequence[TextRow],
    features: Sequence[Tensor | None],
    plans: Sequence[RatioPlan],
    settings: ExecutionSettings,
) -> list[list[int]]:
    """Groups of rows that share a pass: those with prefixes, videos and suffixes of one length
    and the same draws of ratios.

    In a distributed run each row has a pass of its own, since FSDP needs equally many passes in
    every process. So it has without gradients if the settings are batch invariant."""
    apart = settings.batch_invariant and not torch.is_grad_enabled()
    if apart or (dist.is_available() and dist.is_initialized()):
        return [[i] for i in range(len(rows))]
    groups: dict[tuple[int, int | None, int, str], list[int]] = {}
    states = {id(plan): plan.state() for plan in plans}
    for i, (row, video, plan) in enumerate(zip(rows, features, plans, strict=True)):
        visual = None if video is None else len(video)
        shape = (len(row.prefix), visual, len(row.suffix), states[id(plan)])
        groups.setdefault(shape, []).append(i)
    return list(groups.values())


def _run_group(
    encoder: StreamEncoder,
    rows: Sequence[TextRow],
    features: Sequence[Tensor | None],
    plan: RatioPlan,
    keep: bool,
    hidden_states: bool,
) -> list[SequencePass]:
    """Prefix, windows and suffix of sequences of one shape in one pass."""
    decoder = encoder.decoder
    parts: list[Tensor] = []
    segments: list[Segment] = []
    cached, vst_counts = 0, [0]

    def add(hidden: Tensor, layout: ChunkLayout | None) -> None:
        nonlocal cached
        segments.append(Segment(layout, hidden.shape[1], cached))
        parts.append(hidden)
        cached += segments[-1].kept

    def done() -> int:
        return sum(x.shape[1] for x in parts)

    # One lookup a pass: FSDP gathers the table for each, in all processes alike.
    text = torch.stack([torch.cat([row.prefix, row.suffix]) for row in rows])
    lengths = [len(rows[0].prefix), len(rows[0].suffix)]
    prefix, suffix = encoder.embed(text).split(lengths, dim=1)
    if prefix.shape[1]:
        add(prefix, None)
    before_suffix = done() - 1 if parts else None
    shown = [x for x in features if x is not None]
    if shown:
        visual = torch.stack(shown).to(encoder.device, encoder.dtype)
        for window, ratio, chunks in _equal_windows(plan, visual.shape[1], encoder.window):
            start = done()
            used, visual = visual.tensor_split([chunks * window], dim=1)
            if ratio > window:  # there is no VST, and only the last raw row may be read
                if not visual.shape[1]:
                    segments.append(Segment(None, window, cached))
                    parts.append(used)
                    before_suffix = start + window - 1
                vst_counts += [0] * chunks
                continue
            layout = ChunkLayout(window, ratio, chunks, encoder.settings.order)
            add(encoder.chunk_rows(used, layout), layout)
            before_suffix = start + int(layout.raw_rows()[-1])
            vst_counts += [layout.vsts_per_chunk] * chunks
    suffix_rows = slice(done(), None)
    add(suffix, None)
    idle = decoder.training and not any(s.layout is not None for s in segments)
    if idle:
        parts[-1] = parts[-1] + 0 * decoder.vst_embedding().sum()
    inv_freq = decoder.inv_freq()
    context = TrainingContext(segments, len(rows), inv_freq, encoder.settings, keep, idle)
    states: list[Tensor] | None = [] if hidden_states else None
    hidden = decoder.run(torch.cat(parts, dim=1), context, states=states)
    assert hidden is not None
    passes = []
    for i in range(len(rows)):
        kept = None
        if context.kept is not None:
            layers = [[x[i, :cached] for x in context.kept[n]] for n in range(len(decoder.layers))]
            kept = torch.stack([torch.stack(x) for x in zip(*layers, strict=True)])
        own = [x[i] for x in states or ()]
        counts = [*vst_counts, 0]
        passes.append(SequencePass(hidden[i], own, suffix_rows, before_suffix, counts, kept))
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
        prefix = len(row.prefix)
        rows, start = [*range(prefix), one.before_suffix, *suffix], start - prefix - 1
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
        predicting = torch.cat([torch.arange(len(prefix), device=label.device), predicting])
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
    if cut and not isinstance(model, FSDPModule):
        fail("training", "a tensor-parallel model", "inference, or the model in one piece")
