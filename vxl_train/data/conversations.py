"""Conversations as token ids and labels."""

from __future__ import annotations

from typing import Any

from vxl_model.inputs.arguments import IGNORE_INDEX, IMAGE_TOKEN, encoded

from .samples import Sample

__all__ = ["conversation_ids"]
SYSTEM = "You are a helpful assistant."


# -- words --------------------------------------------------------------------------------------


def conversation_ids(sample: Sample, tokenizer: Any) -> tuple[list[int], list[int]]:
    """`(input_ids, labels)` of a sample. One id -200 marks the visual part. Labels are -100
    where nothing is supervised.

    Unsupervised text is tokenized in one piece and each answer separately, which yields exactly
    the ids of inference.

    Source: the released model's prompt (`processing.PROMPT`).
    """
    ids: list[int] = []
    labels: list[int] = []
    open_text = ""

    def close(supervised: str = "") -> None:
        nonlocal open_text
        for text, learned in ((open_text, False), (supervised, True)):
            if text:
                new = encoded(tokenizer, text, add_special_tokens=False)
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
