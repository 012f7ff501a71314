"""The scores of the paper's suites, computed from saved answers.

They equal those of lmms-eval 0.7.3 on the same answers, and add the parts that its log shows only
rounded. Source: the rules of its tasks `videomme`, `mvbench` and `mlvu`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .arguments import fail

__all__ = ["KINDS", "Question", "Score", "choice_letter", "read_samples", "score"]

_EDGES = ",.!?;:'\""
_PHRASES = (
    *(f"{start} is" for start in ("the answer", "answer", "the correct answer", "correct answer")),
    *(f"{start} is" for start in ("the best answer", "best answer", "the correct option")),
    *(f"{start} is" for start in ("correct option", "the best option", "best option")),
    *(f"{start} is" for start in ("the choice", "choice", "the correct choice", "correct choice")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
# How a letter is written, and how much that tells. A later place wins among equals.
_WRITTEN = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_START, _END, _AFTER_PHRASE, _ANYWHERE = 10, 9, 7, 0

_MLVU_TYPES = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")
_MVBENCH_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_MVBENCH_FULL_STOPS = 32  # at most this many are removed from an answer


class Question(NamedTuple):
    """The letter of the right option, and the part of the suite that a question belongs to:
    Video-MME's "short", "medium", "long"; MLVU's type; none in MVBench."""

    right: str
    part: str = ""


@dataclass(frozen=True)
class Score:
    """A score in percent.

    Attributes:
        value: the suite's own number.
        samples: how many answers it counts.
        parts: the percentage of each part, by name, and how many answers it counts.
    """

    value: float
    samples: int
    parts: dict[str, tuple[float, int]] = field(default_factory=dict)


def choice_letter(answer: str, letters: Sequence[str] = "ABCD") -> str:
    """The option that an answer chooses, "" if none."""
    text = answer.strip()
    if not text:
        return ""
    for sign in _EDGES:
        text = text.strip(sign)
    padded, bare = f" {text} ", text.strip()
    found: list[tuple[int, int, str]] = []  # how much it tells, place, letter
    for form, weight in _WRITTEN:
        for letter in letters:
            place = padded.rfind(form.format(letter))
            if place >= 0:
                found.append((weight, place, letter))
    lowered = padded.lower()
    for phrase in _PHRASES:
        begin = lowered.find(phrase)
        for letter in letters if begin >= 0 else ():
            place = padded.find(letter, begin + len(phrase))
            if place >= 0:
                found.append((_AFTER_PHRASE, place, letter))
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((_START, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((_END, len(padded) - 1, letter))
    if not found:
        places = ((_ANYWHERE, padded.rfind(letter), letter) for letter in letters)
        found = [one for one in places if one[1] >= 0]
    return max(found, key=lambda one: one[:2])[2] if found else ""


def _mvbench_choice(answer: str) -> str:
    """What MVBench's rule reads in an answer: a letter from A to E, else the answer's words."""
    begun = re.match(r"([a-e])\.\s*.+$", answer.strip(), re.IGNORECASE)
    if begun:
        return begun.group(1).upper()
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    numbers = re.search(r"\d,\d", text) is not None
    cleaned = text
    for sign in _MVBENCH_SIGNS:
        at_a_space = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if at_a_space or numbers else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=_MVBENCH_FULL_STOPS)
    for edge in "'\")(":
        cleaned = cleaned.strip(edge)
    cleaned = cleaned.strip().lower()
    letter = re.search(r"\b[a-e]\b", cleaned)
    return letter.group().upper() if letter else cleaned


def _percent(right: Sequence[bool]) -> float:
    return 100 * sum(right) / len(right) if right else 0


def _by(names: Iterable[str], right: Sequence[bool]) -> dict[str, tuple[float, int]]:
    groups: dict[str, list[bool]] = {}
    for name, one in zip(names, right, strict=True):
        groups.setdefault(name, []).append(one)
    return {name: (_percent(group), len(group)) for name, group in sorted(groups.items())}


def _videomme(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    right = [choice_letter(a) == q.right for q, a in zip(questions, answers, strict=True)]
    return Score(_percent(right), len(right), _by((q.part for q in questions), right))


def _mvbench(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    right = [
        _mvbench_choice(answer) == _mvbench_choice(question.right)
        for question, answer in zip(questions, answers, strict=True)
        if answer != ""  # which counts neither as right nor as wrong
    ]
    return Score(_percent(right), len(right))


def _mlvu(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    right = [choice_letter(a) == q.right for q, a in zip(questions, answers, strict=True)]
    parts = _by((q.part for q in questions), right)
    known = [parts.get(name, (0.0, 0))[0] for name in _MLVU_TYPES]
    return Score(math.fsum(known) / len(_MLVU_TYPES), len(right), parts)


KINDS: dict[str, Callable[[Sequence[Question], Sequence[str]], Score]] = {
    "videomme": _videomme,
    "mvbench": _mvbench,
    "mlvu": _mlvu,
}


def score(kind: str, questions: Sequence[Question], answers: Sequence[str]) -> Score:
    """The score of answers, one to each question.

    Args:
        kind: "videomme", "mvbench" (one of its 20 tasks) or "mlvu" (its dev part).
    """
    if kind not in KINDS:
        fail("kind", repr(kind), ", ".join(KINDS))
    return KINDS[kind](questions, [answer.strip() for answer in answers])


def read_samples(path: str | os.PathLike[str]) -> tuple[list[Question], list[str]]:
    """Questions and answers of a file that lmms-eval wrote (`--log_samples`) for a task of one of
    the kinds.

    Raises:
        ValueError: it holds something else.
    """
    questions, answers = [], []
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                question, answer = _read_sample(line)
            except ValueError as error:
                fail("samples", f"{os.fspath(path)}:{number}, {error}", "what --log_samples wrote")
            questions.append(question)
            answers.append(answer)
    if not answers:
        fail("samples", f"{os.fspath(path)} without a line", "what --log_samples wrote")
    return questions, answers


def _read_sample(line: str) -> tuple[Question, str]:
    """A question and its answer; raises ValueError, which says what is wrong with the line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("which is not JSON") from None
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}")
    found = [value for value in record.values() if isinstance(value, dict)]
    found = [value for value in found if "pred_answer" in value]
    answer = record.get("filtered_resps")
    answer = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    if not isinstance(answer, str):
        raise ValueError("no answer (filtered_resps)")
    if len(found) != 1:
        raise ValueError(f"{len(found)} results (pred_answer)")
    [about] = found
    right = about.get("answer", about.get("gt_answer"))
    if not isinstance(right, str) or not right.strip():
        raise ValueError("no right answer")
    return Question(right, str(about.get("duration", about.get("task_type", "")))), answer
