"""Whether a sample of VICO has the right answer."""

import re


def check_sample(sample):
    """Computes the answer again from the question's words and the clues' times."""
    human, gpt = sample["conversations"]
    assert (human["from"], gpt["from"]) == ("human", "gpt")
    assert human["value"].startswith("<video>\n")
    assert human["value"].count("<video>") == 1
    form, clues = sample["vico"]["form"], sample["vico"]["clues"]
    start = {clue["text"]: clue["start"] for clue in clues}
    assert len(start) == len({*start.values()}) == len(clues) >= 2
    _, head, *rest = human["value"].split("\n")
    entries = dict(
        re.match(r"(\(\d+\)|[A-Z]\.|-) (.*)", line).groups()[::-1]
        for line in rest
        if re.match(r"\(\d+\)|[A-Z]\.|- ", line)
    )
    answer = gpt["value"]
    by_time = sorted((text for text in entries if text in start), key=start.__getitem__)
    if form == "next":
        assert list(entries) == [clue["text"] for clue in clues[1:]]
        assert f'"{clues[0]["text"]}"' in head
        later = [text for text in by_time if start[text] > clues[0]["start"]]
        assert answer == f"{entries[later[0]]} {later[0]}"
        return
    presented = [text for text in entries if text in start]
    assert presented == [clue["text"] for clue in clues]
    if form == "retell":
        assert answer == "\n".join(f"{n}. {text}" for n, text in enumerate(by_time, 1))
    elif form in ("first", "last"):
        right = by_time[0 if form == "first" else -1]
        assert answer == f"{entries[right]} {right}"
    else:
        order = ", ".join(entries[text] for text in by_time)
        if form == "order":
            assert answer == order
        else:
            assert form == "choice"
            options = [entry for entry in entries if entry not in start]
            assert len(options) == 4  # a dict: all different
            assert all(sorted(o.split(", ")) == sorted(order.split(", ")) for o in options)
            assert entries[order] == f"{answer}."
