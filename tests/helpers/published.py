"""Annotations in the formats of the published sets: good records, and known numbers of bad ones."""

import csv
import json

ASK = {"from": "human", "value": "<image>\nWhat is this?"}
SAY = {"from": "gpt", "value": "A dog in the snow."}
BAD_EVERY = 25  # each kind of damage comes once in this many records


def turns(marker, i):
    asked = {"from": "human", "value": f"{marker}\nWhat is number {i}?"}
    return [asked, {"from": "gpt", "value": f"Number {i} is a dog."}]


def llava(i, key, folder, ending, **more):
    marker = "<video>" if key == "video" else "<image>"
    return {key: f"{folder}{i:06}.{ending}", "conversations": turns(marker, i), **more}


def bunny(i):
    if i % 7 == 3:  # text alone
        return {"id": f"text_{i}", "conversations": turns("", i)}
    return llava(i, "image", "coco/train2017/", "jpg", id=f"{i:012}")


def laion(i):
    # the marker comes after the words
    said = {"from": "gpt", "value": f"Caption {i}"}
    asked = {"from": "human", "value": "Give a caption of the image.\n<image>"}
    return {"id": f"{i:09}", "image": f"{i:09}.jpg", "conversations": [asked, said]}


def sharegpt4o_image(i):
    return llava(i, "image", "", "jpg", id=i, width=640, height=480)


def sharegpt4o_video(i):
    return llava(i, "video", "", "mp4")


def vico(i):
    about = {"form": "first", "seed": 0, "clues": []}
    return llava(i, "video", "", "mp4", id=f"vico-{i}", duration=180.0, vico=about)


def mmdu(i):
    said = [
        {"from": "user", "value": f"Image1: <ImageHere>; Image2: <ImageHere>.\nCompare {i}."},
        {"from": "assistant", "value": f"They differ in {i}."},
        {"from": "user", "value": "And with <ImageHere>?"},
        {"from": "assistant", "value": "It is darker."},
    ]
    return {"id": str(i), "image": [f"mmdu_pics/{i}_{k}.jpg" for k in range(3)],
            "conversations": said}  # fmt: skip


def nextqa(i):
    row = {"video": str(i), "frame_count": 300, "width": 640, "height": 480}
    row |= {"question": f"why did the dog jump {i}", "answer": i % 5, "qid": i, "type": "CW"}
    return row | {f"a{k}": f"reason {k}" for k in range(5)}


def nextqa_open(i):
    row = nextqa(i)
    kept = ("video", "frame_count", "width", "height", "question", "qid", "type")
    return {key: row[key] for key in kept} | {"answer": "to play"}


def cinepile(i):
    choices = [f"Choice {k} of {i}" for k in range(5)]
    return {
        "movie_name": f"Film {i % 9}",
        "year": 1999,
        "genre": "Drama",
        "yt_clip_title": "A clip",
        "yt_clip_link": f"https://www.youtube.com/watch?v=id{i:06}",
        "subtitles": "Hello. Good bye.",
        "question": f"Who leaves in {i}?",
        "choices": choices,
        "answer_key": choices[i % 5],
        "answer_key_position": i % 5,
        "question_category": "CRD",
    }


def _spoiled(record, format):
    """A record of its format that holds a bad sample."""
    if format == "nextqa":
        return {**record, "answer": "9"}
    if format == "nextqa-open":
        return {**record, "question": " "}
    if format == "cinepile":
        return {**record, "answer_key": "nothing of these"}
    return {**record, "conversations": record["conversations"][:1]}


def _emptied(record):
    """The answer is empty."""
    return {**record, "conversations": [record["conversations"][0], {"from": "gpt", "value": ""}]}


# format: how its records are made, the file's ending, its media folder
SETS = {
    "bunny": (bunny, "json"),
    "laion": (laion, "json"),
    "sharegpt4o-image": (sharegpt4o_image, "jsonl"),
    "sharegpt4o-video": (sharegpt4o_video, "jsonl"),
    "vico": (vico, "jsonl"),
    "mmdu": (mmdu, "json"),
    "nextqa": (nextqa, "csv"),
    "nextqa-open": (nextqa_open, "csv"),
    "cinepile": (cinepile, "parquet"),
}


def write_set(folder, format, count=1000):
    """Writes `count` records to `folder`. Returns the settings of the set for `PublishedSet`, and
    how many records of each kind are bad; those with the files that are missing too."""
    make, ending = SETS[format]
    settings = {"format": format.removesuffix("-open"), "name": format, "media": f"{format}/media"}
    path = folder / format / f"annotations.{ending}"
    path.parent.mkdir()
    settings["files"] = (f"{format}/{path.name}",)
    if ending == "csv":
        paths = {str(i): f"11{i % 3}/{i}" for i in range(count)}
        (folder / format / "map.json").write_text(json.dumps(paths))
        settings["paths"] = f"{format}/map.json"
    records, bad = [], {"bad sample": 0}
    for i in range(count):
        record = make(i)
        if i % BAD_EVERY == 1:
            record = _spoiled(record, format)
            bad["bad sample"] += 1
        elif i % BAD_EVERY == 2 and ending.startswith("json"):
            record = _emptied(record)
            bad["empty answer"] = bad.get("empty answer", 0) + 1
        records.append(record)
    if ending == "json":
        path.write_text(json.dumps(records))
    elif ending == "jsonl":
        lines = [json.dumps(record) for record in records]
        for i in range(3, count, BAD_EVERY):
            lines[i] = lines[i][:-9]
        bad["broken line"] = len(range(3, count, BAD_EVERY))
        path.write_text("\n".join(lines) + "\n")
    elif ending == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
    return settings, bad
