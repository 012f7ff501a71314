"""A folder with small clips and tasks of lmms-eval in the shapes of the paper's suites.

The functions are those of lmms-eval's own tasks. They find their files under HF_HOME.
"""

import json
import shutil

from helpers.checkpoint import write_checkpoint
from helpers.clips import picture, write_clip

UTILS = """
from lmms_eval.tasks.mlvu import utils as mlvu
from lmms_eval.tasks.mvbench import utils as mvbench
from lmms_eval.tasks.videomme import utils as videomme

videomme_visual = videomme.videomme_doc_to_visual
videomme_text = videomme.videomme_doc_to_text
videomme_subtitles = videomme.videomme_doc_to_text_subtitle
videomme_results = videomme.videomme_process_results
videomme_score = videomme.videomme_aggregate_results
mvbench_visual = mvbench.mvbench_doc_to_visual
mvbench_pictures = mvbench.mvbench_frames_doc_to_visual
mvbench_text = mvbench.mvbench_doc_to_text
mvbench_results = mvbench.mvbench_process_results
mvbench_score = mvbench.mvbench_aggregate_results
mlvu_visual = mlvu.mlvu_doc_to_visual_dev
mlvu_text = mlvu.mlvu_doc_to_text
mlvu_results = mlvu.mlvu_process_results
mlvu_score = mlvu.mlvu_aggregate_results_dev


def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None,
           previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    done = round_idx == 3
    visual = mlvu_visual(doc) if round_idx == 1 else []
    return visual, f"You said {previous_output[-1][:4]!r}. Sure?", done, previous_output, round_idx


def rounds_results(doc, results):
    return {"rounds": float(len(results[0]))}
"""
GREEDY = """\
test_split: test
generation_kwargs: {max_new_tokens: 6, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}
"""
KIND = """\
doc_to_visual: !function utils.{kind}_visual
doc_to_text: !function utils.{kind}_text
doc_to_target: answer
process_results: !function utils.{kind}_results
output_type: generate_until
metric_list:
  - {{metric: {metric}, aggregation: !function utils.{kind}_score, higher_is_better: true}}
"""
VIDEOMME = KIND.format(kind="videomme", metric="videomme_perception_score")
MVBENCH = KIND.format(kind="mvbench", metric="mvbench_accuracy")
MLVU = KIND.format(kind="mlvu", metric="mlvu_percetion_score")
ROUNDS = """\
output_type: generate_until_multi_round
doc_to_visual: !function utils.mlvu_visual
doc_to_text: !function utils.rounds
doc_to_target: answer
process_results: !function utils.rounds_results
metric_list:
  - {metric: rounds, aggregation: mean, higher_is_better: true}
"""
CHOICE = """\
output_type: multiple_choice
doc_to_visual: !function utils.mlvu_visual
doc_to_text: question
doc_to_choice: [A, B, "C and D"]
doc_to_target: 1
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
OPTIONS = ["A. A dog.", "B. A bus.", "C. Rain.", "D. Nothing."]
SUBTITLES = """\
1
00:00:00,000 --> 00:00:02,000
<font color="white" size=".72c">A dog barks.</font>

2
00:00:02,000 --> 00:00:04,000
<font color="white" size=".72c">It rains.</font>
"""
GENERATED = (
    "local_videomme",
    "local_videomme_w_subtitle",
    "local_mvbench_video",
    "local_mvbench_folder",
    "local_mvbench_pictures",
    "local_mlvu",
)
ALL = (*GENERATED, "local_choice", "local_rounds")


def make_place(folder):
    """Fills `folder` with `model`, `tasks` and the files that the tasks show (HF_HOME)."""
    from PIL import Image

    write_checkpoint(folder / "model")
    home, tasks = folder / "home", folder / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS)
    videos = home / "videomme" / "data"
    videos.mkdir(parents=True)
    for i, name in enumerate(("one", "two", "three")):
        write_clip(videos / f"{name}.mp4", count=30 + 10 * i, fps=10, shows=range(7 * i, 99))
    subtitles = home / "videomme" / "subtitle"
    subtitles.mkdir()
    (subtitles / "one.srt").write_text(SUBTITLES)
    mlvu = home / "mlvu"
    mlvu.mkdir()
    shutil.copy(videos / "one.mp4", mlvu / "one.mp4")
    shutil.copy(videos / "three.mp4", mlvu / "three.mp4")
    clips = home / "mvbench_video" / "ssv2_video_mp4"
    clips.mkdir(parents=True)
    shutil.copy(videos / "two.mp4", clips / "two.mp4")
    for name in ("left", "right"):
        frames = home / "mvbench_video" / "tvqa" / "video_fps3_hq_segment" / name
        frames.mkdir(parents=True)
        for i in range(5):
            shown = picture(i + 40 * (name == "right"), 96, 64)
            Image.fromarray(shown).save(frames / f"{i:05}.jpg")
    _write_tasks(tasks)
    return folder


def _write_tasks(tasks):
    about = {"domain": "Knowledge", "sub_category": "Law", "task_type": "OCR Problems"}
    questions = [
        {
            "question_id": f"{video}-{i}",
            "videoID": video,
            "duration": ("short", "medium", "long")[i],
            "question": question,
            "options": OPTIONS,
            "answer": "ABCD"[i],
            **about,
        }
        # The questions of a video are not next to each other.
        for i, question in enumerate(("What happens?", "What comes last?", "Which colour?"))
        for video in ("one", "two", "three")
    ]
    default = "lmms_eval_specific_kwargs: {{default: {{{}}}}}\n".format
    _task(
        tasks, "local_videomme", VIDEOMME + default('post_prompt: "The best answer is:"'), questions
    )
    text = VIDEOMME.replace("videomme_text", "videomme_subtitles") + default("frame_num: 8")
    _task(tasks, "local_videomme_w_subtitle", text, questions)
    words = ["left", "up", "down", "right"]

    def moves(video, kind):
        return [
            {
                "video": video,
                "question": f"Which way, {kind} {i}?",
                "candidates": words,
                "answer": x,
            }
            for i, x in enumerate(words[:2])
        ]

    for name, videos, sub_task in (
        ("local_mvbench_video", ["two.mp4"], "action_antonym"),
        ("local_mvbench_folder", ["left", "right"], "episodic_reasoning"),
        ("local_mvbench_pictures", ["left", "right"], "episodic_reasoning"),
    ):
        text = MVBENCH + default(f'sub_task: {sub_task}, post_prompt: "Only give the best option."')
        if name == "local_mvbench_pictures":
            text = text.replace("mvbench_visual", "mvbench_pictures")
        _task(tasks, name, text, [row for video in videos for row in moves(video, name[-6:])])
    prompt = 'post_prompt: "\\nOnly give the best option.\\nBest option: ("'
    rows = [
        {"video_name": video, "question": f"{kind}: (A) a (B) b", "answer": "A", "task_type": kind}
        for video in ("one.mp4", "three.mp4")
        for kind in ("count", "ego", "order")
    ]
    _task(tasks, "local_mlvu", MLVU + default(prompt), rows)
    _task(tasks, "local_choice", CHOICE, rows[:2])
    _task(tasks, "local_rounds", ROUNDS, rows[-2:])


def _task(tasks, name, text, rows):
    data = tasks / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    (tasks / f"{name}.yaml").write_text(head + GREEDY + text)
