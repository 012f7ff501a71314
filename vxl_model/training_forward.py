"""Loss and logits of sequences whose labels are known: all windows in one pass a layer, and
differentiable. Sequences of one shape go through together.

In training mode every parameter takes part in every pass, be it with factor 0: text alone would
leave VSTs, projector and tower without a gradient, FSDP's processes would wait for each other's,
and an optimizer would count their steps differently by how samples are spread.

Source: Video-XL section 3.4. The first tail token is predicted by the last raw visual row, as
in the published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vxl_kernels import ChunkLayout

from .decoder.context import Segment, TrainingStep
from .errors import fail
from .inputs.arguments import IGNORE_INDEX, IMAGE_TOKEN, TextRow
from .settings import ExecutionSettings
from .streaming.encoder import Encoder
from .streaming.ratios import RatioPlan

__all__ = ["SequencePass", "alike", "check_labels", "loss_of", "train_pass"]


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
    encoder: Encoder,
    rows: Sequence[TextRow],
    features: Sequence[Tensor | None],
    plan: RatioPlan,
    keep: bool,
) -> list[SequencePass]:
    """Prompt, windows of `features (tokens, hidden)` and tail of sequences alike (`alike`), in one
    pass. Without a video `features` are None."""
    core = encoder.core
    parts: list[Tensor] = []
    segments: list[Segment] = []
    cached, sizes = 0, [0]

    def add(hidden: Tensor, layout: ChunkLayout | None) -> None:
        nonlocal cached
        segments.append(Segment(layout, hidden.shape[1], cached))
        parts.append(hidden)
        cached += segments[-1].kept

    def done() -> int:
        return sum(x.shape[1] for x in parts)

    # One lookup a pass: FSDP gathers the table for each, on all processes alike.
    ids = torch.stack([torch.cat([row.prompt, row.tail]) for row in rows])
    prompt, tail = core.embed_tokens(ids).split([len(rows[0].prompt), len(rows[0].tail)], dim=1)
    if prompt.shape[1]:
        add(prompt, None)
    before_tail = done() - 1 if parts else None
    shown = [x for x in features if x is not None]
    if shown:
        visual = torch.stack(shown).to(encoder.device, encoder.dtype)
        for window, ratio, chunks in _groups(plan, visual.shape[1], encoder.window):
            start = done()
            used, visual = visual.tensor_split([chunks * window], dim=1)
            if ratio > window:  # leaves no VST; only the last raw row may have a reader
                if not visual.shape[1]:
                    segments.append(Segment(None, window, cached))
                    parts.append(used)
                    before_tail = start + window - 1
                sizes += [0] * chunks
                continue
            layout = ChunkLayout(window, ratio, chunks, encoder.settings.order)
            add(encoder.chunk_rows(used, layout), layout)
            before_tail = start + int(layout.raw_rows()[-1])
            sizes += [layout.vsts_per_chunk] * chunks
    tail_start = done()
    add(tail, None)
    idle = core.training and not any(s.layout is not None for s in segments)
    if idle:
        parts[-1] = parts[-1] + 0 * core.beacon_embed_tokens.weight.sum()
    step = TrainingStep(segments, len(rows), core.inv_freq(), encoder.settings, keep, idle)
    hidden = core(torch.cat(parts, dim=1), step)
    passes = []
    for i in range(len(rows)):
        kept = None
        if step.kept is not None:
            layers = [[x[i, :cached] for x in step.kept[n]] for n in range(len(core.layers))]
            kept = torch.stack([torch.stack(x) for x in zip(*layers, strict=True)])
        own_tail = slice(tail_start, None)
        passes.append(SequencePass(hidden[i], own_tail, before_tail, [*sizes, 0], kept))
    return passes


def alike(
    rows: Sequence[TextRow],
    features: Sequence[Tensor | None],
    plans: Sequence[RatioPlan],
    settings: ExecutionSettings,
) -> list[list[int]]:
    """Groups of rows that share a pass: prompt, video and tail as long, ratios drawn alike. Each
    row alone among processes, since FSDP wants as many passes everywhere, and without gradients
    where a row is to have the bits that it has alone."""
    apart = settings.batch_invariant and not torch.is_grad_enabled()
    if apart or (dist.is_available() and dist.is_initialized()):
        return [[i] for i in range(len(rows))]
    groups: dict[tuple[int, int | None, int, str], list[int]] = {}
    states = {id(plan): plan.state() for plan in plans}
    for i, (row, video, plan) in enumerate(zip(rows, features, plans, strict=True)):
        visual = None if video is None else len(video)
        shape = (len(row.prompt), visual, len(row.tail), states[id(plan)])
        groups.setdefault(shape, []).append(i)
    return list(groups.values())


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


def check_labels(labels: Tensor, input_ids: Tensor, vocabulary: int) -> None:
    if labels.shape != input_ids.shape:
        fail("labels", f"shape {tuple(labels.shape)}", f"{tuple(input_ids.shape)} as input_ids")
    wrong = (labels != IGNORE_INDEX) & (input_ids != IMAGE_TOKEN)
    wrong &= (labels < 0) | (labels >= vocabulary)
    if bool(wrong.any()):
        fail("labels", int(labels[wrong][0]), f"0 to {vocabulary - 1}, or {IGNORE_INDEX}")
