"""Conversations as token ids and labels."""

from __future__ import annotations

from typing import Any

from vxl_model.inputs.arguments import IGNORE_INDEX, IMAGE_TOKEN

from .samples import Sample

__all__ = ["conversation_ids"]
SYSTEM = "You are a helpful assistant."


# -- words --------------------------------------------------------------------------------------


def conversation_ids(sample: Sample, tokenizer: Any) -> tuple[list[int], list[int]]:
    """input_ids and labels of a sample, one -200 where the visual part stands; -100 where nothing
    is supervised.

    What is not supervised is tokenized in one piece from control token to answer, and an answer
    by itself: the ids are those that inference sees and writes.

    Source: the released model's prompt (`processing.PROMPT`).
    """
    ids: list[int] = []
    labels: list[int] = []
    open_text = ""

    def close(supervised: str = "") -> None:
        nonlocal open_text
        for text, learned in ((open_text, False), (supervised, True)):
            if text:
                new = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids.extend(new)
                labels.extend(new if learned else [IGNORE_INDEX] * len(new))
        open_text = ""

    if sample.turns[0][0] != "system":
        open_text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    for i, (role, text) in enumerate(sample.turns):
        open_text += f"<|im_start|>{role}\n"
        if role == "assistant":
            close(f"{text}<|im_end|>")
            open_text = "\n"
            continue
        if i == sample.visual_turn:
            close()
            ids.append(IMAGE_TOKEN)
            labels.append(IGNORE_INDEX)
            open_text = "\n"
        open_text += f"{text}<|im_end|>\n"
    return ids, labels
