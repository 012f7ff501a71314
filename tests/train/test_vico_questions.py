"""VICO: clues from captions, and questions about their order with the right answers."""

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from helpers.captioner import WORDS
from helpers.vico_samples import check_sample

from vxl_train.vico.captions import Caption, Clip
from vxl_train.vico.questions import FORMS, ask, clean, pick_clues

# -- clues ---------------------------------------------------------------------------------------


def captions(*texts, damaged=()):
    return [
        Caption(Clip(i, 14.0 * i, 14.0 * i + 14), text, int(i in damaged))
        for i, text in enumerate(texts)
    ]


def test_clues_can_be_told_apart():
    clues, dropped = pick_clues(
        captions(
            "A red fox sleeps under the old bridge.",
            "a red fox  SLEEPS under an old bridge",  # the same again: one clue over both clips
            "",
            "Two women carry a ladder through the rain.",
            "The.",
            "A boat burns.",
            "A dog in a yellow coat barks at a tram.",
            "A boat burns!",  # back after something else: its time is ambiguous
            "A green kettle whistles on a stove.",
            damaged=(8,),
        )
    )
    assert [(clue.text, clue.start, clue.end, clue.clips) for clue in clues] == [
        ("A red fox sleeps under the old bridge", 0.0, 28.0, (0, 1)),
        ("Two women carry a ladder through the rain", 42.0, 56.0, (3,)),
        ("A dog in a yellow coat barks at a tram", 84.0, 98.0, (6,)),
    ]
    assert dropped == {"repeated": 1, "empty": 2, "recurring": 1, "damaged": 1}


def test_clues_do_not_depend_on_the_order_of_captions():
    given = captions(
        *(f"{a} and {b} by {c}" for a, b, c in zip(WORDS, WORDS[1:], WORDS[3:], strict=False))
    )
    want = pick_clues(given)
    assert len(want[0]) > 30
    assert pick_clues(given[::-1]) == want


def test_clues_of_scripts_without_spaces():
    clues, _ = pick_clues(
        captions("一只狐狸在桥下睡觉。", "一只狐狸在桥下睡觉", "两个女人在雨中抬梯子。")
    )
    assert [clue.text for clue in clues] == ["一只狐狸在桥下睡觉", "两个女人在雨中抬梯子"]


def test_captions_are_cleaned():
    assert clean(" A <image> man\n<|im_end|> waves </s>. ") == "A man waves"
    assert clean("x < y and y > z") == "x < y and y > z"
    sentence = "One two three four five six seven eight nine ten."
    assert clean(" ".join([sentence] * 5)) == " ".join([sentence] * 4).rstrip(".")
    assert clean("word " * 50) == "word " * 40 + "..."
    assert clean(f"{sentence} " + "word " * 50) == sentence.rstrip(".")


# -- questions -----------------------------------------------------------------------------------


def clues_of(count):
    texts = [f"{WORDS[i]} {WORDS[i + 1]}" for i in range(count)]
    return pick_clues(captions(*texts))[0]


@pytest.mark.parametrize("count", [2, 3, 4, 12, 30])
def test_questions(count):
    clues = clues_of(count)
    assert len(clues) == count
    forms = set()
    for seed in range(20):
        questions = ask(clues, "v", seed, samples=8, most=26)
        assert len(questions) == 8 or count == 2
        asked = {(q.form, q.question, q.answer) for q in questions}
        assert len(asked) == len(questions)
        forms |= {question.form for question in questions}
        for q in questions:
            assert {clue.text for clue in q.clues} <= {clue.text for clue in clues}
            check_sample(
                {
                    "conversations": [
                        {"from": "human", "value": f"<video>\n{q.question}"},
                        {"from": "gpt", "value": q.answer},
                    ],
                    "vico": {"form": q.form, "clues": [vars(clue) for clue in q.clues]},
                }
            )
    assert forms == {form for form, it in FORMS.items() if it.least <= count}


def test_letters_and_places_are_fair():
    """A model gains nothing by always answering A, or by the order as printed."""
    clues = clues_of(12)
    letters, as_printed = [], []
    for seed in range(300):
        for question in ask(clues, "v", seed, samples=6, most=4):
            if question.form == "choice":
                letters.append(question.answer)
            if question.form == "order":
                as_printed.append(question.answer == "(1), (2), (3), (4)"[: len(question.answer)])
    assert all(0.15 < letters.count(letter) / len(letters) < 0.35 for letter in "ABCD")
    assert np.mean(as_printed) < 0.35


def test_no_questions_about_one_clue():
    assert ask(clues_of(1), "v", 0, 4, 5) == []
