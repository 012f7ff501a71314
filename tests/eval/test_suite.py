"""The line of a task, from the files that lmms-eval and its model leave. test_lmms.py has both
write them."""

import argparse
import json

import pytest

from vxl_eval.answers import Answers
from vxl_eval.suite import Task
from vxl_eval.suite_run import model_arguments, read_line, table


def write(folder, results, samples, stamp="20260101_000000"):
    """What a run of lmms-eval leaves: results by task, and samples of each."""
    out = folder / "harness" / "model"
    out.mkdir(parents=True, exist_ok=True)
    counts = {name: {"original": len(rows)} for name, rows in samples.items()}
    record = {"results": results, "n-samples": counts}
    (out / f"{stamp}_results.json").write_text(json.dumps(record))
    for name, rows in samples.items():
        lines = [json.dumps({"doc_id": i, "target": "A", **row}) for i, row in enumerate(rows)]
        (out / f"{stamp}_samples_{name}.jsonl").write_text("\n".join(lines) + "\n")


def videomme(*rows):
    return [
        {
            "filtered_resps": answer,
            "videomme_perception_score": {"answer": right, "duration": part, "pred_answer": ""},
        }
        for answer, right, part in rows
    ]


def mvbench(*rows):
    made = []
    for answer, right in rows:
        result = {"gt_answer": right, "pred_answer": answer}
        made.append({"filtered_resps": [answer], "mvbench_accuracy": result})
    return made


def metric(name, value):
    return {"alias": "x", f"{name},none": value, f"{name}_stderr,none": 0.1}


def test_one_task(tmp_path):
    rows = videomme(("A.", "A", "short"), ("B", "A", "short"), ("(C)", "C", "long"))
    score = metric("videomme_perception_score", 200 / 3)
    write(tmp_path, {"videomme": score}, {"videomme": rows})
    answers = Answers(tmp_path / "answers")
    for key in "abc":
        answers.add(key, {"answer": "A", "watch_seconds": 1.5, "answer_seconds": 0.25})
    task = Task("videomme", "Video-MME", kind="videomme", paper=55.5)
    line = read_line(task, tmp_path, "a machine")
    assert line.ours == 200 / 3
    assert line.difference == 200 / 3 - 55.5
    assert (line.samples, line.seconds) == (3, 5.2)
    assert line.parts == {"short": (50.0, 2), "long": (100.0, 1)}
    assert table([line])[-1] == "| Video-MME | 55.5 | 66.7 | +11.2 | 3 | 5 | a machine |"


def test_a_group_is_the_mean_of_its_tasks(tmp_path):
    samples = {
        "mvbench_a": mvbench(("A", "A"), ("(b) x", "B"), ("c", "D"), ("", "A")),
        "mvbench_b": mvbench(("A", "B")),
    }
    results = {"mvbench_a": metric("mvbench_accuracy", 200 / 3)}
    results |= {"mvbench_b": metric("mvbench_accuracy", 0.0), "mvbench": {"alias": "mvbench"}}
    write(tmp_path, results, samples)
    line = read_line(Task("mvbench", "MVBench", kind="mvbench"), tmp_path, "m")
    assert line.ours == 100 / 3
    assert line.difference is None
    assert line.parts == {"mvbench_a": (200 / 3, 3), "mvbench_b": (0.0, 1)}


def test_the_newest_run_counts(tmp_path):
    for stamp, answer, value in (("1", "B", 0.0), ("2", "A", 100.0)):
        score = {"videomme": metric("videomme_perception_score", value)}
        write(tmp_path, score, {"videomme": videomme((answer, "A", "long"))}, stamp)
    line = read_line(Task("videomme", "V", kind="videomme"), tmp_path, "m")
    assert line.ours == 100.0


def test_a_score_that_its_answers_do_not_give_is_refused(tmp_path):
    score = {"videomme": metric("videomme_perception_score", 50.0)}
    write(tmp_path, score, {"videomme": videomme(("A", "A", "long"))})
    with pytest.raises(RuntimeError, match=r"lmms-eval scores 50\.0, its answers give 100\.0"):
        read_line(Task("videomme", "V", kind="videomme"), tmp_path, "m")
    assert read_line(Task("videomme", "V"), tmp_path, "m").ours == 50.0
    with pytest.raises(RuntimeError, match="wrote no"):
        read_line(Task("videomme", "V"), tmp_path / "empty", "m")


def test_arguments_of_the_model(tmp_path):
    options = argparse.Namespace(
        model="owner/name", frames=None, fps=None, dtype=None, on_error="skip", ratio=[2, 4]
    )
    task = Task("t", "T", frames=64, repeat_frames=True, answer_prefix="Best option: (")
    assert model_arguments(task, tmp_path, options) == (
        f"pretrained=owner/name,answers={tmp_path / 'answers'},frames=64,repeat_frames=True,"
        "answer_prefix=Best option: (,on_error=skip,ratio=2:4"
    )
    options.frames, options.fps = 32, 0.5
    given = model_arguments(task, tmp_path, options)
    assert "frames=32,fps=0.5,repeat_frames=False" in given
    with pytest.raises(ValueError, match="answer_prefix"):
        model_arguments(Task("t", "T", answer_prefix="A, "), tmp_path, options)
