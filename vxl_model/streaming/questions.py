"""Several questions in one call: rows of a batch, and their answers out of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import fail

__all__ = [
    "first_stops",
    "given",
    "groups_that_go_together",
    "id_rows",
    "is_list_of_questions",
    "padded_rows",
]

# Options that count the columns of a row or look for several ids in a row, so that padding would
# change what they do.
_COUNT_COLUMNS = (
    "bad_words_ids",
    "encoder_no_repeat_ngram_size",
    "min_length",
    "no_repeat_ngram_size",
    "sequence_bias",
)


def is_list_of_questions(question: Any) -> bool:
    """Whether it is a list of texts or of ids, not one question or a tensor of ids."""
    if not isinstance(question, (list, tuple)) or not question:
        return False
    return all(isinstance(x, (str, list, tuple)) or getattr(x, "ndim", 0) for x in question)


def id_rows(questions: Sequence[Any], device: torch.device) -> list[Tensor]:
    rows = [torch.as_tensor(question, device=device) for question in questions]
    for i, row in enumerate(rows):
        if row.dim() != 1 or not len(row) or row.is_floating_point():
            fail(f"question {i}", f"{row.dtype} {tuple(row.shape)}", "ids (tokens,), at least one")
    return rows


def padded_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The rows with padding at the start, and their mask. A row is padded with its first id: what
    looks for the ids of a row, such as a repetition penalty, then finds no other."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row[:1].expand(width - len(row)), row]) for row in rows])
    columns = torch.arange(width, device=ids.device)
    starts = torch.tensor([width - len(row) for row in rows], device=ids.device)
    return ids, (columns >= starts[:, None]).long()


def groups_that_go_together(
    rows: Sequence[Tensor], options: dict[str, Any], config: Any
) -> list[list[int]]:
    """All rows, or with an option that counts columns those of one length."""
    if not any(given(name, options, config) for name in _COUNT_COLUMNS):
        return [list(range(len(rows)))]
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(len(row), []).append(i)
    return list(groups.values())


def first_stops(new: Tensor, stop: Any) -> list[int]:
    """How many of the new ids `(batch, new)` of each row come up to its first id of `stop`, with
    it: all of them where there is none."""
    ids = torch.as_tensor([] if stop is None else stop, device=new.device).reshape(-1)
    found = torch.isin(new, ids)
    return [int(row.nonzero()[0]) + 1 if row.any() else len(row) for row in found]


def given(name: str, options: dict[str, Any], config: Any) -> Any:
    """An option of `generate`: of the call, else of its configuration or of the model's."""
    if options.get(name) is not None:
        return options[name]
    return getattr(options.get("generation_config") or config, name, None)
