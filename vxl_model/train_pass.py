"""Loss and logits of sequences whose labels are known: all windows in one pass a layer, and
differentiable.

In training mode every parameter takes part in every pass, be it with factor 0: text alone would
leave VSTs, projector and tower without a gradient, FSDP's processes would wait for each other's,
and an optimizer would count their steps differently by how samples are spread.

Source: Video-XL section 3.4. The first tail token is predicted by the last raw visual row, as
in the published code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vxl_kernels import ChunkLayout

from .encoder import Encoder
from .inputs import IMAGE_TOKEN, TextRow, fail
from .ratios import RatioPlan
from .steps import Segment, TrainingStep

__all__ = ["SequencePass", "check_labels", "loss_of", "train_pass"]

_IGNORED = -100


@dataclass
class SequencePass:
    """One sequence after a training pass.

    Attributes:
        hidden: normed hidden states of all rows, `(rows, hidden)`.
        tail: its tail's rows of `hidden`.
        before_tail: row that predicts the first tail token; None if there is none.
        sizes: VSTs of every step.
        kept: K and V `(2, layers, tokens, kv_heads, head_dim)`, if they were asked for.
        kept_tokens: how many tokens those are.
    """

    hidden: Tensor
    tail: slice
    before_tail: int | None
    sizes: list[int]
    kept: Tensor | None


def train_pass(
    encoder: Encoder, row: TextRow, features: Tensor | None, plan: RatioPlan, keep: bool
) -> SequencePass:
    """Prompt, windows of `features (tokens, hidden)` and tail of one sequence."""
    core = encoder.core
    rows: list[Tensor] = []
    segments: list[Segment] = []
    cached, sizes = 0, [0]

    def add(hidden: Tensor, layout: ChunkLayout | None) -> None:
        nonlocal cached
        segments.append(Segment(layout, hidden.shape[1], cached))
        rows.append(hidden)
        cached += segments[-1].kept

    # One lookup a sequence: FSDP gathers the table for each, on all processes alike.
    prompt, tail = core.embed_tokens(torch.cat([row.prompt, row.tail])[None]).split(
        [len(row.prompt), len(row.tail)], dim=1
    )
    if len(row.prompt):
        add(prompt, None)
    before_tail = sum(x.shape[1] for x in rows) - 1 if rows else None
    if features is not None:
        for window, ratio, chunks in _groups(plan, len(features), encoder.window):
            start = sum(x.shape[1] for x in rows)
            used = features[: chunks * window]
            features = features[chunks * window :]
            if ratio > window:  # leaves no VST; only the last raw row may have a reader
                if not len(features):
                    segments.append(Segment(None, window, cached))
                    rows.append(used.to(encoder.dtype)[None])
                    before_tail = start + window - 1
                sizes += [0] * chunks
                continue
            layout = ChunkLayout(window, ratio, chunks, encoder.settings.order)
            add(encoder.chunk_rows(used, layout), layout)
            before_tail = start + int(layout.raw_rows()[-1])
            sizes += [layout.vsts_per_chunk] * chunks
    tail_start = sum(x.shape[1] for x in rows)
    add(tail, None)
    idle = core.training and not any(s.layout is not None for s in segments)
    if idle:
        rows[-1] = rows[-1] + 0 * core.beacon_embed_tokens.weight.sum()
    step = TrainingStep(segments, core.inv_freq(), encoder.settings, keep, idle)
    hidden = core(torch.cat(rows, dim=1), step)[0]
    kept = None
    if step.kept is not None:
        layers = [step.kept[i] for i in range(len(core.layers))]
        kept = torch.stack([torch.stack(x) for x in zip(*layers, strict=True)])[:, :, :cached]
    return SequencePass(hidden, slice(tail_start, None), before_tail, [*sizes, 0], kept)


def _groups(plan: RatioPlan, tokens: int, window: int) -> list[tuple[int, int, int]]:
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


def loss_of(
    passes: list[SequencePass],
    rows: list[TextRow],
    labels: Tensor,
    lm_head: torch.nn.Module,
    tokens: Tensor | float | None = None,
) -> Tensor:
    """Mean cross entropy over all supervised tokens of the batch.

    Args:
        labels: as input_ids, -100 where nothing is supervised; what stands at -200 is ignored.
        tokens: what the sum is divided by instead of the tokens of this batch, for a batch that
            is a part of a larger one.
    """
    hidden, targets = [], []
    for one, row, label in zip(passes, rows, labels, strict=True):
        tail = label[row.tail_start : row.tail_stop]
        first = one.tail.start
        predicting = torch.arange(first - 1, first - 1 + len(tail), device=label.device)
        if one.before_tail is None:  # text alone: nothing predicts its first token
            tail, predicting = tail[1:], predicting[1:]
        else:
            predicting[0] = one.before_tail
        prompt = label[row.prompt_start : row.prompt_start + len(row.prompt)][1:]
        target = torch.cat([prompt, tail])
        predicting = torch.cat([torch.arange(len(prompt), device=label.device), predicting])
        wanted = target != _IGNORED
        hidden.append(one.hidden[predicting[wanted]])
        targets.append(target[wanted])
    logits = lm_head(torch.cat(hidden)).float()
    target = torch.cat(targets).to(logits.device)
    if not len(target):  # as transformers: a mean over nothing, but with a graph
        return logits.sum() * 0.0
    if tokens is not None:
        return F.cross_entropy(logits, target.long(), reduction="sum") / tokens
    return F.cross_entropy(logits, target.long())


def check_labels(labels: Tensor, input_ids: Tensor, vocabulary: int) -> None:
    if labels.shape != input_ids.shape:
        fail("labels", f"shape {tuple(labels.shape)}", f"{tuple(input_ids.shape)} as input_ids")
    wrong = (labels != _IGNORED) & (input_ids != IMAGE_TOKEN)
    wrong &= (labels < 0) | (labels >= vocabulary)
    if bool(wrong.any()):
        fail("labels", int(labels[wrong][0]), f"0 to {vocabulary - 1}, or {_IGNORED}")
