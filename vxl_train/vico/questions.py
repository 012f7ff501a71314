"""From captions in order of time to questions about that order."""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .captions import Caption

WORDS = 40  # the longest clue
SAME = 0.6  # captions that share this part of their words may show the same

# Control tokens and placeholders: a tokenizer would read them as such.
_TOKENS = re.compile(r"<\|[^<>]*\|>|</?[A-Za-z_][\w ]{0,30}>")
# In scripts without spaces a letter counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W_]+(?:'[^\W_]+)?")
_COMMON = (
    "a an and are as at be by clip for from has have he her his image in into is it its of on or "
    "picture pictures she show showing shown shows that the their there they this to video was "
    "were which while who with"
)


@dataclass(frozen=True)
class Clue:
    """What is seen only from `start` to `end` (seconds): one clip, or neighbours with the same
    caption. `clips`: their indices."""

    text: str
    start: float
    end: float
    clips: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """One sample: `clues` in the order in which the question presents them."""

    form: str
    question: str
    answer: str
    clues: tuple[Clue, ...]


# -- clues ---------------------------------------------------------------------------------------


def clean(caption: str) -> str:
    """The caption on one line, without control tokens, at most `WORDS` words: up to the last whole
    sentence where there is one."""
    text = " ".join(_TOKENS.sub(" ", caption).split())
    words = text.split(" ")
    if len(words) > WORDS:
        text = " ".join(words[:WORDS])
        whole = re.match(r".*[.!?](?= |$)", text)
        if not whole:
            return f"{text.rstrip(' ,;:.')} ..."
        text = whole[0]
    return text.rstrip(".。 ")


def words(text: str) -> frozenset[str]:
    """The content words, normalised."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return frozenset(_WORD.findall(plain)).difference(_COMMON.split())


def likeness(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard similarity of two sets of words, 0 to 1."""
    return len(a & b) / max(1, len(a | b))


def pick_clues(captions: Sequence[Caption], same: float = SAME) -> tuple[list[Clue], Counter[str]]:
    """The clues that can be put in order, and why the other captions cannot.

    Captions are taken in order of time. One whose clip was damaged, or with fewer than two words
    that say something, is dropped. One that is like an earlier clue's first caption (`likeness` of
    `same` or more) belongs to that clue. A clue whose captions are not neighbours is seen again
    later in the video and has no single place in the order, so it is dropped. Any two remaining
    clues are less alike than `same`.
    """
    dropped: Counter[str] = Counter()
    groups: list[tuple[frozenset[str], list[int]]] = []
    usable: list[Caption] = []
    for caption in sorted(captions, key=lambda c: c.clip.start):
        said = words(clean(caption.text))
        if caption.damaged or len(said) < 2:
            dropped["damaged" if caption.damaged else "empty"] += 1
            continue
        alike = [members for first, members in groups if likeness(first, said) >= same]
        for members in alike:
            members.append(len(usable))
        if not alike:
            groups.append((said, [len(usable)]))
        usable.append(caption)
    clues = []
    for _, members in groups:
        parts = [usable[i] for i in members]
        if members[-1] - members[0] >= len(members):
            dropped["recurring"] += 1
            continue
        dropped["repeated"] += len(members) - 1
        clues.append(
            Clue(
                clean(parts[0].text),
                parts[0].clip.start,
                parts[-1].clip.end,
                tuple(c.clip.index for c in parts),
            )
        )
    return clues, +dropped


# -- questions -----------------------------------------------------------------------------------


@dataclass
class _Asked:
    """A question in the making: `ranks[i]` is the place in time of the clue presented as i-th."""

    draw: random.Random
    texts: list[str]
    ranks: list[int]
    anchor: int = -1  # of `next`: the clue that the question is about
    answer: str = ""
    lines: list[str] = field(default_factory=list)

    def say(self, *phrasings: str) -> None:
        self.lines.append(self.draw.choice(phrasings))

    def in_time(self) -> list[int]:
        return sorted(range(len(self.ranks)), key=self.ranks.__getitem__)


def _numbers(order: Sequence[int]) -> str:
    return ", ".join(f"({i + 1})" for i in order)


def _numbered(asked: _Asked) -> None:
    asked.lines += [f"({i + 1}) {text}" for i, text in enumerate(asked.texts)]


def _lettered(asked: _Asked, options: Sequence[str]) -> None:
    asked.lines += [f"{chr(65 + i)}. {option}" for i, option in enumerate(options)]


def _order(asked: _Asked) -> None:
    asked.say(
        "The scenes below are all in this video, but they have been mixed up. Put them in the "
        "order in which the video shows them.",
        "In which order does the video show these scenes?",
        "Sort these moments of the video by time, the earliest first.",
    )
    _numbered(asked)
    asked.lines.append("Answer with the numbers alone.")
    asked.answer = _numbers(asked.in_time())


def _retell(asked: _Asked) -> None:
    asked.say(
        "All of this is seen in the video at one time or another. Write it down again in the "
        "order of the video.",
        "Here are some moments of the video, shuffled. Retell them from first to last.",
    )
    asked.lines += [f"- {text}" for text in asked.texts]
    told = (asked.texts[i] for i in asked.in_time())
    asked.answer = "\n".join(f"{n}. {text}" for n, text in enumerate(told, start=1))


def _choice(asked: _Asked) -> None:
    asked.say(
        "Which of the orders A to D is the one in which the video shows these scenes?",
        "Four orders of these moments are offered; one is that of the video. Which?",
    )
    _numbered(asked)
    right = tuple(asked.in_time())
    options = [right]
    while len(options) < 4:
        other = tuple(asked.draw.sample(right, len(right)))
        options += [other] if other not in options else []
    asked.draw.shuffle(options)
    _lettered(asked, [_numbers(order) for order in options])
    asked.lines.append("Answer with the letter of the right order.")
    asked.answer = chr(65 + options.index(right))


def _option(asked: _Asked, chosen: int) -> None:
    _lettered(asked, asked.texts)
    asked.lines.append("Answer with the letter and its text.")
    asked.answer = f"{chr(65 + chosen)}. {asked.texts[chosen]}"


def _first(asked: _Asked) -> None:
    asked.say(
        "Which of these comes first in the video?",
        "One of these scenes is shown before all the others here. Which one?",
    )
    _option(asked, asked.in_time()[0])


def _last(asked: _Asked) -> None:
    asked.say(
        "Which of these comes last in the video?",
        "Which of the scenes below is shown only after all the others here?",
    )
    _option(asked, asked.in_time()[-1])


def _next(asked: _Asked) -> None:
    """The clue that the question is about is presented first, before the options."""
    order = asked.in_time()
    place = asked.draw.randrange(len(order) - 1)
    asked.anchor = asked.ranks[order[place]]
    after = asked.ranks[order[place + 1]]
    text = asked.texts.pop(order[place])
    asked.ranks.remove(asked.anchor)
    asked.say(
        f'At some time the video shows this: "{text}". Which of the scenes below is the next '
        "one to come after it?",
        f'Think of the moment "{text}". Of these scenes, which follows it soonest?',
    )
    _option(asked, asked.ranks.index(after))
    asked.texts.insert(0, text)
    asked.ranks.insert(0, asked.anchor)


@dataclass(frozen=True)
class _Form:
    write: Callable[[_Asked], None]
    least: int  # clues


FORMS = {
    "order": _Form(_order, 2),
    "retell": _Form(_retell, 2),
    "choice": _Form(_choice, 3),
    "first": _Form(_first, 2),
    "last": _Form(_last, 2),
    "next": _Form(_next, 3),
}


def ask(clues: Sequence[Clue], name: str, seed: int, samples: int, most: int) -> list[Question]:
    """Up to `samples` different questions on clues given in order of time.

    Forms take turns in a shuffled order; each question draws 2 (3) to `most` of the clues. All
    draws depend only on `seed`, `name` and the words of the clues, so other videos and the folder
    do not change a question."""
    about = json.dumps([seed, name, [clue.text for clue in clues]])
    draw = random.Random(int.from_bytes(hashlib.sha256(about.encode()).digest(), "big"))
    usable = min(len(clues), most)
    forms = [form for form, it in FORMS.items() if it.least <= usable]
    draw.shuffle(forms)
    found: dict[tuple, Question] = {}
    for attempt in range(20 * samples):  # few clues have few questions: stop looking at some time
        if len(found) == samples or not forms:
            break
        form = forms[attempt % len(forms)]
        chosen = draw.sample(range(len(clues)), draw.randint(FORMS[form].least, usable))
        asked = _Asked(draw, [clues[i].text for i in chosen], list(chosen))
        FORMS[form].write(asked)
        question = Question(
            form, "\n".join(asked.lines), asked.answer, tuple(clues[i] for i in asked.ranks)
        )
        found.setdefault((form, asked.anchor, frozenset(chosen)), question)
    return list(found.values())
