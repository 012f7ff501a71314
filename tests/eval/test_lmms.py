"""lmms-eval itself on local tasks in the shapes of the paper's suites. `make lmms-eval-check`.

Every answer is compared with a loop over `ask`, for one process, for two, and for a run that was
killed. Our scores are compared with those of lmms-eval.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("lmms_eval")

import torch
from helpers.decoders import CACHE
from helpers.lmms_tasks import ALL, GENERATED, make_place
from helpers.paths import ROOT

from vxl_eval.answers import read_answers
from vxl_eval.scores import KINDS, Question, choice_letter, score
from vxl_model import VideoXLForConditionalGeneration

FRAMES, RATIO, WORDS = 4, 4, 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("lmms"))


@pytest.fixture(scope="module")
def model(place):
    return VideoXLForConditionalGeneration.from_pretrained(place / "model").eval()


def command(place, output, *, processes=1, tasks=ALL):
    arguments = f"pretrained={place}/model,frames={FRAMES},ratio={RATIO},answers={output}/answers"
    start = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    start += ["-m", "lmms_eval"]
    asked = [sys.executable, "-m", *(start if processes > 1 else start[-1:])]
    asked += ["--model", "vxl", "--model_args", arguments, "--tasks", ",".join(tasks)]
    asked += ["--include_path", place / "tasks", "--output_path", output / "out", "--log_samples"]
    return [str(part) for part in [*asked, "--device", "cpu", "--batch_size", 1]]


def environment(place):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    more = {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    more["ACCELERATE_USE_CPU"] = "true"  # else two processes do not know each other
    return {**os.environ, **more, "PYTHONPATH": path}


def run(asked, place):
    done = subprocess.run(
        asked, env=environment(place), cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def samples(output):
    """What lmms-eval wrote, by task and document."""
    found = {}
    for file in output.rglob("*_samples_*.jsonl"):
        # No `splitlines`: the model says any sign, and JSON leaves some line ends as they are.
        records = [json.loads(line) for line in file.read_text().split("\n") if line]
        found[file.stem.partition("_samples_")[2]] = {r["doc_id"]: r for r in records}
    return found


def documents(place, task):
    return [json.loads(line) for line in (place / "tasks" / f"{task}.jsonl").open()]


@pytest.fixture(scope="module")
def one(place, tmp_path_factory):
    """A run of one process."""
    output = tmp_path_factory.mktemp("one")
    run(command(place, output), place)
    return output


def shown(place, task, document):
    """What a task shows, found without lmms-eval."""
    home = place / "home"
    if "videomme" in task:
        return home / "videomme" / "data" / f"{document['videoID']}.mp4"
    if task == "local_mvbench_video":
        return home / "mvbench_video" / "ssv2_video_mp4" / document["video"]
    if "mvbench" in task:
        return home / "mvbench_video" / "tvqa" / "video_fps3_hq_segment" / document["video"]
    return home / "mlvu" / document["video_name"]


def watch(model, place, task, document):
    source = shown(place, task, document)
    if task == "local_mvbench_pictures":  # the pictures in the order that the task has them in
        from PIL import Image

        source = [Image.open(source / name).convert("RGB") for name in os.listdir(source)]
    return model.watch(source, frames=FRAMES, ratio=RATIO)


def test_answers_are_those_of_a_loop_over_ask(model, place, one):
    found, different = samples(one), set()
    assert set(found) == set(ALL)
    for task in GENERATED:
        asked = documents(place, task)
        assert sorted(found[task]) == list(range(len(asked)))
        for doc_id, record in found[task].items():
            memory = watch(model, place, task, asked[doc_id])
            answer = memory.ask(record["input"], WORDS, do_sample=False)
            assert record["filtered_resps"] == answer, (task, doc_id)
            different.add(answer)
    assert len(different) > 8


def test_subtitles_and_prompts_arrive(one):
    found = samples(one)
    with_words = [r["input"] for r in found["local_videomme_w_subtitle"].values()]
    assert sum("A dog barks." in text for text in with_words) == 3
    assert sum("No subtitles available" in text for text in with_words) == 6
    assert found["local_mlvu"][0]["input"].endswith("Best option: (")


def test_a_video_is_watched_once(one):
    """The task asks about its three videos in turns; two tasks show the same ones."""
    records = read_answers(one / "answers")
    watched = {}
    for record in records:
        watched[record["task"]] = watched.get(record["task"], 0) + record["watched"]
    assert watched["local_videomme"] + watched["local_videomme_w_subtitle"] == 3
    assert watched["local_mlvu"] == 2
    assert watched["local_mvbench_folder"] == 2
    assert watched["local_choice"] == 1
    assert watched["local_mvbench_pictures"] == 4  # pictures in memory have no name


def test_several_rounds(model, place, one):
    """The second round shows the video again, the third nothing."""
    for doc_id, record in samples(one)["local_rounds"].items():
        document = documents(place, "local_rounds")[doc_id]
        memory = watch(model, place, "local_rounds", document)
        said = [memory.ask(document["question"], WORDS, do_sample=False)]
        blind = model.watch(visual_features=[], ratio=RATIO)
        for seen in (memory, blind):
            asked = f"You said {said[-1][:4]!r}. Sure?"
            said.append(seen.ask(asked, WORDS, do_sample=False))
        assert record["filtered_resps"] == said


def test_likelihoods_are_those_of_a_dense_decoder(model, place, one):
    """transformers' Qwen2 over the same keys and values, to 1e-5."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    plain = Qwen2ForCausalLM(Qwen2Config.from_dict(model.config.to_dict())).eval()
    weights = model.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    for doc_id, record in samples(one)["local_choice"].items():
        document = documents(place, "local_choice")[doc_id]
        memory = watch(model, place, "local_choice", document)
        asked = model.processor.suffix_ids(document["question"])[0]
        for choice, (given, greedy) in zip(
            ("A", "B", "C and D"), record["filtered_resps"], strict=True
        ):
            said = model.processor.text_ids(f" {choice}")[0]
            with torch.no_grad():
                ids = torch.cat((asked, said))
                chances = (
                    plain(input_ids=ids[None], **{CACHE: memory.to_cache()})
                    .logits[0, -len(said) - 1 : -1]
                    .log_softmax(-1)
                )
            wanted = chances.gather(1, said[:, None]).sum().item()
            # lmms-eval writes what is neither text nor a list as text.
            assert float(given) == pytest.approx(wanted, rel=1e-5)
            assert str(greedy) == str(bool((chances.argmax(-1) == said).all()))


def test_a_process_leaves_its_group():
    from vxl_eval import lmms_model

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    lmms_model._leave_group()
    assert not torch.distributed.is_initialized()
    lmms_model._leave_group()


def test_two_processes_give_the_same(place, one, tmp_path):
    run(command(place, tmp_path, processes=2), place)
    theirs, ours = samples(one), samples(tmp_path)
    for task in ALL:
        for doc_id, record in theirs[task].items():
            assert ours[task][doc_id]["filtered_resps"] == record["filtered_resps"]
    files = sorted((tmp_path / "answers").iterdir())
    assert [len(file.read_text().splitlines()) > 5 for file in files] == [True, True]
    shared = [r for r in read_answers(tmp_path / "answers") if "videomme" in r["task"]]
    assert len(shared) == 18
    assert sum(r["watched"] for r in shared) == 3  # still once, by one of the two


def test_a_killed_run_goes_on(place, one, tmp_path):
    asked = command(place, tmp_path, tasks=GENERATED)
    process = subprocess.Popen(asked, env=environment(place), cwd=place, stderr=subprocess.DEVNULL)
    answers = tmp_path / "answers" / "answers-0.jsonl"
    deadline = time.monotonic() + 300
    while not answers.exists() or answers.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = answers.read_bytes()
    kept = before.count(b"\n")
    total = sum(len(samples(one)[task]) for task in GENERATED)
    assert 5 <= kept < total
    answers.write_bytes(before + b'{"key": "torn')
    run(asked, place)
    assert answers.read_bytes().startswith(before)
    assert len(read_answers(tmp_path / "answers")) == total
    assert answers.read_bytes().count(b"\n") == total + 1  # nothing twice, and the torn line
    theirs, ours = samples(one), samples(tmp_path)
    for task in GENERATED:
        for doc_id, record in theirs[task].items():
            assert ours[task][doc_id]["filtered_resps"] == record["filtered_resps"]


def test_the_suite(place, tmp_path):
    """The table of a suite of local tasks, and a second run that asks nothing again."""
    tasks = [
        {"task": "local_videomme", "name": "Local", "kind": "videomme", "paper": 50.0},
        {"task": "local_mlvu", "kind": "mlvu"},
    ]
    suite = {"source": "none", "tasks": [{**t, "include": str(place / "tasks")} for t in tasks]}
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    asked = [sys.executable, "-m", "vxl_eval", "--model", place / "model", "--frames", FRAMES]
    asked += ["--suite", tmp_path / "suite.yaml", "--output", tmp_path / "out", "--device", "cpu"]
    asked = list(map(str, asked))
    done = run([*asked, "--ratio", str(RATIO), "--tasks", "local_mlvu"], place)
    assert "local_mlvu: " in done.stderr.partition("lmms_eval")[0]  # what it needs, beforehand
    first = (tmp_path / "out" / "local_mlvu" / "answers" / "answers-0.jsonl").read_bytes()
    done = run([*asked, "--ratio", str(RATIO)], place)
    assert (tmp_path / "out" / "local_mlvu" / "answers" / "answers-0.jsonl").read_bytes() == first
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    lines = {line["task"]: line for line in report["lines"]}
    assert [line["samples"] for line in lines.values()] == [9, 6]
    local = lines["local_videomme"]
    assert local["difference"] == local["ours"] - 50.0
    assert set(local["parts"]) == {"short", "medium", "long"}
    assert local["seconds"] > 0
    assert lines["local_mlvu"]["difference"] is None
    table = (tmp_path / "out" / "report.md").read_text()
    assert table == done.stdout
    assert f"| Local | 50.0 | {local['ours']:.1f} |" in table
    assert (tmp_path / "out" / "report.png").stat().st_size > 1000


def test_a_killed_suite_goes_on(place, tmp_path):
    """The same command again asks only what was not answered, and writes the report."""
    task = {"task": "local_videomme", "kind": "videomme", "include": str(place / "tasks")}
    (tmp_path / "suite.yaml").write_text(json.dumps({"source": "none", "tasks": [task]}))
    asked = [sys.executable, "-m", "vxl_eval", "--model", place / "model", "--frames", FRAMES]
    asked += ["--suite", tmp_path / "suite.yaml", "--output", tmp_path / "out", "--device", "cpu"]
    asked = list(map(str, asked))
    answers = tmp_path / "out" / "local_videomme" / "answers" / "answers-0.jsonl"
    process = subprocess.Popen(
        asked,
        env=environment(place),
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not answers.exists() or answers.read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the command and the lmms-eval that it started
        process.wait()
    before = answers.read_bytes()
    assert 3 <= before.count(b"\n") < 9
    assert not (tmp_path / "out" / "report.json").exists()
    run(asked, place)
    assert answers.read_bytes().startswith(before)
    assert len(read_answers(answers.parent)) == 9
    [line] = json.loads((tmp_path / "out" / "report.json").read_text())["lines"]
    assert line["samples"] == 9


# -- scores --------------------------------------------------------------------------------------

PIECES = (
    *("A", "B", "C", "D", "E", "(A)", "(b)", "B.", "C:", "D)", "A.", "b", "e.", "D. ", "CAB"),
    *(
        "the answer is",
        "best option is",
        "I choose",
        "答案是",
        "Answer",
        "Because",
        "none",
        "A dog.",
    ),
    *("\n", " ", ",", "1,000", "3.5", ".", "!", "'", '"', "?", "-", "@", "_", "(", ")"),
    *("a", "dog", "A dog.", "x/y"),
)


def random_answers(count):
    generator = random.Random(0)
    for _ in range(count):
        pieces = generator.choices(PIECES, k=generator.randrange(7))
        yield generator.choice(("", " ")).join(pieces)


def test_choices_are_read_as_lmms_eval_reads_them():
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mvbench.utils import mcq_acc

    from vxl_eval.scores import _mvbench_choice

    chosen = set()
    for answer in random_answers(20000):
        letter = choice_letter(answer)
        assert letter == extract_mcq_answer(answer, list("ABCD")), repr(answer)
        chosen.add(letter)
        for right in "ABCDE":
            assert (_mvbench_choice(answer) == right) == bool(mcq_acc(right, answer)), repr(answer)
    assert chosen == {"", *"ABCD"}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_lmms_eval(kind):
    from lmms_eval.tasks.mlvu import utils as mlvu
    from lmms_eval.tasks.mvbench import utils as mvbench
    from lmms_eval.tasks.videomme import utils as videomme

    theirs = {
        "videomme": (videomme.videomme_process_results, videomme.videomme_aggregate_results),
        "mvbench": (mvbench.mvbench_process_results, mvbench.mvbench_aggregate_results),
        "mlvu": (mlvu.mlvu_process_results, mlvu.mlvu_aggregate_results_dev),
    }
    process, aggregate = theirs[kind]
    generator = random.Random(1)
    documents, questions = [], []
    types = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA")  # one has no question
    for i in range(700):
        document = {"question_id": i, "videoID": i, "question": "?", "answer": "ABCD"[i % 4]}
        document |= {"domain": "Knowledge", "sub_category": "Law"}
        document |= {"duration": generator.choice(("short", "medium", "long"))}
        if kind == "mvbench":
            document |= {"candidates": ["x", "y", "z", "w"], "answer": "xyzw"[i % 4]}
        document["task_type"] = generator.choice(types) if kind == "mlvu" else "OCR Problems"
        documents.append(document)
        part = document["task_type"] if kind == "mlvu" else document["duration"]
        questions.append(Question("ABCD"[i % 4], part))
    answers = list(random_answers(700))
    results = [process(d, [a.strip()]) for d, a in zip(documents, answers, strict=True)]
    [name] = results[0]
    wanted = aggregate([result[name] for result in results])
    ours = score(kind, questions, answers)
    # Theirs adds seven numbers in the order of a set, which differs from process to process.
    assert ours.value == (pytest.approx(wanted, rel=4e-16) if kind == "mlvu" else wanted)
    assert 0 < ours.value < 100
