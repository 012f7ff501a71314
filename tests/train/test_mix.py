"""Published data sets into one file of samples: every format, what is bad, and the draw."""

import json
from pathlib import Path

import pytest
from helpers.published import SETS, write_set

from vxl_train.cli import CONFIGS, main
from vxl_train.data.samples import BadSampleError, check_record
from vxl_train.mix.build import PublishedSet, make_mix, published_samples, read_mix
from vxl_train.mix.formats import FORMATS
from vxl_train.mix.records import file_records
from vxl_train.settings import TrainSettings


def skip_without(format):
    if SETS[format][1] == "parquet":
        pytest.importorskip("pyarrow")


@pytest.mark.parametrize("format", SETS)
def test_a_thousand_records_of_each_format(format, tmp_path):
    skip_without(format)
    settings, bad = write_set(tmp_path, format)
    outputs = [tmp_path / name for name in ("one.jsonl", "two.jsonl", "three.jsonl")]
    published = PublishedSet(**settings, count=500)
    for output, seed in zip(outputs, (7, 7, 8), strict=True):
        [summary] = make_mix([published], tmp_path, output, seed=seed, check_files=False).sets
        assert dict(summary.bad) == bad
        assert summary.usable == 1000 - sum(bad.values())
        assert summary.written == 500
    first, again, other = (output.read_bytes() for output in outputs)
    assert first == again
    assert first != other
    lines = [json.loads(line) for line in first.splitlines()]
    assert len({line["id"] for line in lines}) == 500
    for line in lines:  # what training would read
        sample = check_record(line, "place", tmp_path)
        assert sample.turns[-1][0] == "assistant"
        if sample.files:
            assert sample.files[0].startswith(str(tmp_path / settings["media"]))


def test_every_format_has_fixtures():
    assert {name.removesuffix("-open") for name in SETS} == set(FORMATS)


def test_what_the_formats_say(tmp_path):
    def first(format):
        settings, _ = write_set(tmp_path, format, 1)
        return next(published_samples(PublishedSet(**settings), tmp_path, False))

    chosen = first("nextqa")
    assert chosen["id"] == "nextqa-0-0"
    assert chosen["video"] == "nextqa/media/110/0.mp4"
    asked, said = (turn["value"] for turn in chosen["conversations"])
    assert asked.splitlines()[:3] == ["<video>", "Why did the dog jump 0?", "A. reason 0"]
    assert said == "A. reason 0"
    assert first("nextqa-open")["conversations"][1]["value"] == "to play"
    compared = first("mmdu")
    assert len(compared["image"]) == 3
    assert "Image2: [picture 2]." in compared["conversations"][0]["value"]
    assert compared["conversations"][2]["value"] == "And with [picture 3]?"
    assert "vico" not in first("vico")
    assert first("laion")["image"] == "laion/media/000000000.jpg"


def test_cinepile_names_clips_and_checks_its_answer():
    from helpers.published import cinepile

    from vxl_train.mix.formats import Options

    made = FORMATS["cinepile"](cinepile(11), Options())
    assert made["video"] == "Film 2_id000011.mp4"
    asked, said = (turn["value"] for turn in made["conversations"])
    assert asked.startswith("<video>\nThe subtitles are:\nHello. Good bye.\nWho leaves in 11?\nA. ")
    assert said == "B. Choice 1 of 11"
    plain = FORMATS["cinepile"](cinepile(11), Options(subtitles=False))
    assert "subtitles" not in plain["conversations"][0]["value"]
    with pytest.raises(ValueError, match="answer_key"):
        FORMATS["cinepile"]({**cinepile(11), "answer_key_position": 2}, Options())


def test_missing_files_are_bad_samples(tmp_path):
    settings, bad = write_set(tmp_path, "sharegpt4o-image", 50)
    media = tmp_path / settings["media"]
    media.mkdir()
    for i in range(0, 50, 2):
        (media / f"{i:06}.jpg").write_bytes(b"")
    samples = list(published_samples(PublishedSet(**settings), tmp_path))
    missing = [x for x in samples if isinstance(x, BadSampleError) and x.bad.kind == "missing file"]
    good = [x for x in samples if not isinstance(x, BadSampleError)]
    assert len(missing) == len([i for i in range(1, 50, 2) if i % 25 not in (1, 2, 3)])
    assert len(good) + len(missing) + sum(bad.values()) == 50


@pytest.mark.parametrize(
    ("settings", "written"),
    [({}, 20), ({"weight": 2}, 40), ({"weight": 0.5}, 10), ({"count": 27}, 27), ({"count": 0}, 0)],
)
def test_weights_and_counts(tmp_path, settings, written):
    (tmp_path / "a.json").write_text(json.dumps([SETS["laion"][0](i) for i in range(20)]))
    published = PublishedSet("laion", ("a.json",), name="a", **settings)
    [summary] = make_mix([published], tmp_path, tmp_path / "o.jsonl", check_files=False).sets
    assert summary.written == written
    ids = [json.loads(line)["id"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert ids == sorted(ids)  # the order of the file
    counts = {ids.count(x) for x in ids}
    assert not counts or max(counts) - min(counts) <= 1


def test_a_draw_does_not_depend_on_other_sets(tmp_path):
    made = {}
    for name in ("laion", "bunny"):
        settings, _ = write_set(tmp_path, name, 60)
        made[name] = PublishedSet(**settings, weight=0.3)
    make_mix([made["laion"]], tmp_path, tmp_path / "one.jsonl", check_files=False)
    make_mix([*made.values()], tmp_path, tmp_path / "two.jsonl", check_files=False)
    assert (tmp_path / "two.jsonl").read_bytes().startswith((tmp_path / "one.jsonl").read_bytes())


def test_a_list_is_read_as_a_stream(tmp_path, monkeypatch):
    """Chunks of a few characters cut every kind of record somewhere."""
    records = [{"a": [1, "ü]"]}, 12, "x,y", None, [], {"b": {"c": -1.5e3}}, 7]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    for size in (1, 2, 3, 5, 8, 1000):
        monkeypatch.setattr("vxl_train.mix.records._CHUNK", size)
        assert list(file_records(path)) == records
        path.write_text(json.dumps(records)[:-8], encoding="utf-8")
        with pytest.raises(ValueError, match="a damaged list"):
            list(file_records(path))
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")


def test_an_item_nested_too_deeply(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[1, {"a":' + "[" * 100_000 + "]" * 100_000 + "}]")
    with pytest.raises(ValueError, match=r"a\.json: a list with an item nested too deeply"):
        list(file_records(path))


def test_the_command_and_training_read_one_configuration(tmp_path, capsys):
    settings, _ = write_set(tmp_path, "vico", 50)
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"mix": [settings], "learning_rate": 1e-3}))
    output = tmp_path / "o.jsonl"
    asked = ["mix", "--config", config, "--root", tmp_path, "--output", output, "--no-files"]
    assert main(list(map(str, asked))) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        "vico: 44 samples of 44 usable ones; bad: 2 bad sample, 2 broken line, 2 empty answer"
    )
    assert len(output.read_text().splitlines()) == 44
    assert TrainSettings.read(config, "align").arguments["learning_rate"] == 1e-3
    inside = [*asked[:-3], "--output", tmp_path / "vico" / "annotations.jsonl"]
    assert main(list(map(str, inside))) == 2


@pytest.mark.parametrize("name", ["paper-align", "paper-finetune"])
def test_the_papers_configurations(name):
    path = CONFIGS / f"{name}.yaml"
    sets = read_mix(path)
    assert all(not Path(file).is_absolute() for one in sets for file in one.files)
    TrainSettings.read(path, name.removeprefix("paper-"))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (None, "got no mix"),
        ([{"format": "laion"}], "expected format, files"),
        ([{"format": "laion", "files": "a", "wieght": 1}], "wieght"),
        ([{"format": "coco", "files": "a"}], "format: got 'coco'"),
        ([{"format": "laion", "files": "a", "count": -1}], "count: got -1"),
        ([{"format": "laion", "files": "a", "weight": "2"}], "weight: got '2'"),
        ([{"format": "laion", "files": "a"}, {"format": "laion", "files": "b"}], "laion twice"),
        ([{"format": ["laion"], "files": "a"}], r"format: got \['laion'\]"),
        ([{"format": "laion", "files": 5}], "files: got 5"),
        ([{"format": "laion", "files": {"a": 1}}], "files: got {'a': 1}"),
        ([{"format": "laion", "files": ["a", 5]}], r"files: got \('a', 5\)"),
        ([{"format": "laion", "files": []}], "files: got none"),
        ([{"format": "laion", "files": ""}], r"files: got \('',\)"),
        ([{"format": "laion", "files": "a", "media": 5}], "media: got 5"),
        ([{"format": "laion", "files": "a", "media": None}], "media: got None"),
        ([{"format": "nextqa", "files": "a", "paths": ["b"]}], "paths: got"),
        ([{"format": "cinepile", "files": "a", "subtitles": "no"}], "subtitles: got 'no'"),
        ([{"format": "laion", "files": "a", "name": 5}], "name: got 5"),
        ([{"format": "laion", "files": "a", "count": True}], "count: got True"),
        ([{"format": "laion", "files": "a", "count": 1.5}], "count: got 1.5"),
        ([{"format": "laion", "files": "a", "weight": True}], "weight: got True"),
        ([{"format": "laion", "files": "a", "weight": float("nan")}], "weight: got nan"),
        ([{"format": "laion", "files": "a", "weight": 2, "count": 3}], "count: got 3 and a weight"),
    ],
)
def test_what_a_mix_cannot_be(tmp_path, mix, message):
    (tmp_path / "c.json").write_text(json.dumps({"mix": mix}))
    with pytest.raises(ValueError, match=message):
        read_mix(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--seed", "-1"), "--seed: got '-1', expected an integer >= 0"),
        (("--seed", "x"), "--seed: got 'x'"),
        (("--config", "none.yaml"), "--config: got none.yaml, no such file"),
        (("--root", "none"), "--root: got none, no such folder"),
        (("files", "nextqa/none.csv"), "files: got {root}/nextqa/none.csv"),
        (("files", "nextqa/map.json.gz"), "expected .json, .jsonl, .csv, .parquet"),
        (("paths", "nextqa/none.json"), "paths: got {root}/nextqa/none.json"),
        (("paths", "nextqa/annotations.csv"), "paths: {root}/nextqa/annotations.csv"),
        (("paths", "made.jsonl"), "--output: got '{root}/made.jsonl', which is an input (paths)"),
        (("files", "made.jsonl"), "--output: got '{root}/made.jsonl', which is an input (files)"),
    ],
)
def test_what_the_command_refuses(tmp_path, monkeypatch, capsys, changed, message):
    """Before a file of annotations is read, and before one is written."""
    settings, _ = write_set(tmp_path, "nextqa", 3)
    (tmp_path / "nextqa" / "map.json.gz").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    name, value = changed
    if not name.startswith("--"):
        settings[name] = value
    (tmp_path / "mix.json").write_text(json.dumps({"mix": [settings]}))
    given = {"--config": "mix.json", "--root": tmp_path, "--output": tmp_path / "made.jsonl"}
    if name.startswith("--"):
        given[name] = value
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("vxl_train.mix.build.file_records", None)
    assert main(["mix", "--no-files", *(str(x) for pair in given.items() for x in pair)]) == 2
    assert message.format(root=tmp_path) in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_seed_from_python_is_checked(tmp_path):
    settings, _ = write_set(tmp_path, "laion", 3)
    for seed in (-1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="seed: got"):
            make_mix([PublishedSet(**settings)], tmp_path, tmp_path / "o.jsonl", seed=seed)


def test_a_dialogue_without_id_gets_its_place(tmp_path):
    settings, _ = write_set(tmp_path, "mmdu", 2)
    path = tmp_path / settings["files"][0]
    records = [{k: v for k, v in r.items() if k != "id"} for r in json.loads(path.read_text())]
    records[0]["id"] = 0
    path.write_text(json.dumps(records))
    made = published_samples(PublishedSet(**settings), tmp_path, False)
    assert [x["id"] for x in made if isinstance(x, dict)][:1] == ["mmdu-0"]
    records[0].pop("id")
    path.write_text(json.dumps(records))
    made = published_samples(PublishedSet(**settings), tmp_path, False)
    assert next(made)["id"] == "mmdu-mmdu/annotations.json:0"


@pytest.mark.parametrize("target", ["media/000000000.jpg", "annotations.json", "mix.yaml"])
def test_no_output_over_an_input(tmp_path, capsys, target):
    """A picture that the samples show, annotations, and the configuration."""
    settings, _ = write_set(tmp_path, "laion", 3)
    (tmp_path / "mix.yaml").write_text(json.dumps({"mix": [settings]}))
    target = {"annotations.json": settings["files"][0]}.get(target, target)
    if target.startswith("media"):
        target = f"{settings['media']}/000000000.jpg"
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / target).write_bytes(b"a picture")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command = ["mix", "--config", tmp_path / "mix.yaml", "--root", tmp_path, "--no-files"]
    assert main([*map(str, command), "--output", str(tmp_path / target)]) == 2
    assert "which is an input" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
