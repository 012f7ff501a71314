"""Evaluation during training: the loss of held-out samples, and the share of right answers.

Both change nothing that is trained: no random number is drawn and no gradient is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vxl_model.inputs.arguments import IGNORE_INDEX

from .data.dataset import TrainingData, collate

__all__ = ["HeldOut", "evaluate", "is_right"]

_MORE_TOKENS = 8  # an answer may be so much longer than the right one


@dataclass(frozen=True)
class HeldOut:
    """What evaluations measure.

    Attributes:
        loss: samples whose loss is measured.
        answers: samples whose first question is answered.
    """

    loss: TrainingData | None = None
    answers: TrainingData | None = None


@torch.no_grad()
def evaluate(trainer: Any, held_out: HeldOut) -> dict[str, float]:
    """`eval_loss`, the mean over all supervised tokens, and `eval_right`, the share of right
    answers, over all processes. Each process takes every n-th sample. `trainer` is a
    `VideoXLTrainer`, whose module imports this one."""
    model = trainer.model
    learning = model.training
    model.eval()
    try:
        metrics: dict[str, float] = {}
        if held_out.loss is not None:
            metrics["eval_loss"] = _mean(trainer, held_out.loss, _loss)
        if held_out.answers is not None:
            metrics["eval_right"] = _mean(trainer, held_out.answers, _right)
        return metrics
    finally:
        model.train(learning)


def _mean(
    trainer: Any,
    data: TrainingData,
    measure: Callable[[Any, dict[str, Any]], tuple[float, int]],
) -> float:
    """Sum over samples by their weights, divided by these. A sample that cannot be decoded has no
    weight."""
    world, rank = trainer.args.world_size, trainer.args.process_index
    total = weight = 0.0
    for start in range(0, len(data), world):  # under FSDP every process makes as many passes
        index = start + rank
        item = data[min(index, len(data) - 1)]
        if item["stop"]:
            raise ValueError(f"evaluation: no sample that can be used; {item['bad'][-1]}")
        value, count = measure(trainer, item)
        if index < len(data) and not item["bad"]:
            total, weight = total + value, weight + count
    sums = torch.tensor([total, weight], dtype=torch.float64, device="cpu")
    if world > 1:
        sums = trainer.accelerator.reduce(sums.to(trainer.args.device), "sum").cpu()
    return (sums[0] / sums[1]).item() if sums[1] else float("nan")


def _loss(trainer: Any, item: dict[str, Any]) -> tuple[float, int]:
    """The summed loss of a sample and its supervised tokens."""
    inputs = _inputs(trainer, item)
    count = int((inputs["labels"] != IGNORE_INDEX).sum())
    with trainer.compute_loss_context_manager():
        loss: Tensor = trainer.model_wrapped(**inputs).loss
    return loss.item() * count, count


def _inputs(trainer: Any, item: dict[str, Any]) -> dict[str, Any]:
    batch = collate([item])
    del batch["bad"], batch["stop"]
    tokens = trainer.tokens
    inputs = trainer._prepare_inputs(batch)
    trainer.tokens = tokens  # the log counts what was trained
    return inputs


def _right(trainer: Any, item: dict[str, Any]) -> tuple[float, int]:
    """Whether the model says a sample's first answer."""
    labels = item["labels"]
    begin = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    rest = (i for i in range(begin, len(labels)) if labels[i] == IGNORE_INDEX)
    end = next(rest, len(labels))
    asked = {**item, "input_ids": item["input_ids"][:begin], "labels": labels[:begin]}
    inputs = _inputs(trainer, asked)
    for name in ("labels", "loss_only"):
        del inputs[name]
    # A row's own ratio is for passes of training. Inference takes one for all rows.
    inputs["ratio"] = inputs["ratio"][0]
    processor = trainer.samples.processor
    with trainer.compute_loss_context_manager():
        ids = trainer.accelerator.unwrap_model(trainer.model).generate(
            **inputs,
            max_new_tokens=end - begin + _MORE_TOKENS,
            do_sample=False,
            eos_token_id=processor.stop_ids,
            pad_token_id=processor.stop_ids[0],
        )
    answer = processor.decode(ids[0, begin:])
    expected = processor.decode(item["input_ids"][begin:end])
    return float(is_right(answer, expected)), 1


def is_right(answer: str, expected: str) -> bool:
    """Whether two texts have the same words, in any case."""

    def words(text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.casefold())

    return words(answer) == words(expected)
