"""Every code block of the documents runs, page by page.

The Python blocks of a page run in order, in one namespace. Their folder holds stand-ins: the small
checkpoint of the goldens as `sy1998/Video_XL`, a clip as `video.mp4`, pictures as `a.jpg`, `b.jpg`
and in `frames`. The head of the checkpoint is changed so that an answer ends with its first token.
The only change to a block is `device_map="cuda"`, which becomes the CPU on a machine without a GPU.
"""

import contextlib
import doctest
import functools
import io
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.checkpoint import write_checkpoint
from helpers.documents import PAGES, blocks
from helpers.paths import ROOT

from vxl_cli.common import Parser
from vxl_kernels import _ext
from vxl_serve.cli import add_serve

LANGUAGES = {"python", "pycon", "sh", "json", "yaml", "text"}
OUTPUT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def pages_with(*languages):
    return [p for p in PAGES if any(b.language in languages for b in blocks(p))]


def test_every_block_has_a_known_language():
    """So that no block is left out because of its name."""
    unknown = {
        f"{page}:{block.line}: {block.language!r}"
        for page in PAGES
        for block in blocks(page)
        if block.language not in LANGUAGES
    }
    assert not unknown


def end_at_once(path):
    """Gives the two stop tokens opposite rows in the head, so that one of them has the largest
    logit."""
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    head = torch.zeros_like(weights["lm_head.weight"])
    head[-3:] = torch.tensor([[0.0], [1.0], [-1.0]])  # <|im_start|>, then the stop tokens
    save_file(weights | {"lm_head.weight": head}, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Files that the blocks name: a checkpoint, a video, pictures."""
    pytest.importorskip("transformers")
    pytest.importorskip("av")
    image = pytest.importorskip("PIL.Image")
    from helpers.clips import picture, write_clip

    folder = tmp_path_factory.mktemp("stand_ins")
    write_checkpoint(folder / "sy1998" / "Video_XL")
    end_at_once(folder / "sy1998" / "Video_XL" / "model.safetensors")
    write_clip(folder / "video.mp4", count=20, fps=10)
    for name, number in (("a.jpg", 5), ("b.jpg", 9)):
        image.fromarray(picture(number, 120, 80)).save(folder / name)
    (folder / "frames").mkdir()
    for number in range(3):
        image.fromarray(picture(number, 120, 80)).save(folder / "frames" / f"{number}.jpg")
    return folder


@pytest.fixture
def place(stand_ins, tmp_path, monkeypatch):
    """A fresh folder with the stand-ins, as the current one."""
    if _ext.extension is None:
        pytest.skip("no compiled extension")
    shutil.copytree(stand_ins, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- Python -----------------------------------------------------------------------------------


def runnable(text):
    return (
        text if torch.cuda.is_available() else text.replace('device_map="cuda"', 'device_map="cpu"')
    )


@pytest.mark.parametrize("page", pages_with("python", "pycon"), ids=str)
def test_python(page, place):
    namespace = {"__name__": "__main__"}
    if any("import LLM" in block.text for block in blocks(page)):
        pytest.importorskip("vllm", reason="make vllm-check runs this page")
    for block in blocks(page):
        if block.language == "python":
            code = "\n" * (block.line - 1) + runnable(block.text)
            exec(compile(code, str(ROOT / page), "exec"), namespace)
        elif block.language == "pycon":
            examples = doctest.DocTestParser().get_doctest(
                block.text, namespace, str(page), str(page), block.line
            )
            printed = io.StringIO()
            runner = doctest.DocTestRunner(optionflags=OUTPUT)
            result = runner.run(examples, out=printed.write, clear_globs=False)
            namespace.update(examples.globs)
            assert result.attempted
            assert not result.failed, printed.getvalue()


@pytest.mark.parametrize("page", pages_with("json", "yaml"), ids=str)
def test_data(page):
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            pytest.importorskip("yaml").safe_load(block.text)


# -- commands ---------------------------------------------------------------------------------


def commands(text):
    """The commands of a shell block, as lists of words without environment and comments."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words


@functools.cache
def output_of(*command):
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def check_options(command, arguments):
    """A Python command starts, and its help names every option that is used."""
    text = output_of(*command, "--help")
    unknown = [
        word
        for word in arguments
        if re.match(r"--?[a-z]", word) and not re.search(rf"(?<![\w-]){word}\b", text)
    ]
    assert not unknown, f"{' '.join(command)} has no {', '.join(unknown)}"


def vxl(arguments):
    """Runs a command of `vxl` in this process. Returns what it prints."""
    from vxl_cli.main import main

    printed, complaints = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(""))
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
            status = main(arguments)
    assert status == 0, f"vxl {' '.join(arguments)}: {complaints.getvalue()}"
    return printed.getvalue()


def check_make(words):
    makefile = (ROOT / "Makefile").read_text()
    targets = [word for word in words if "=" not in word]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), f"no make target {target}"
    for word in words:
        if word.startswith("ARGS="):
            (script,) = set(
                re.findall(rf"^{targets[0]}:.*\n\t.*python (.+) \$\(ARGS\)", makefile, re.M)
            )
            arguments = shlex.split(word.removeprefix("ARGS="))
            if script.startswith("-m pytest"):
                check_pytest(arguments)
            else:
                check_options([script.split()[0]], arguments)


def check_pytest(words):
    for word in words:
        if "/" in word:
            assert (ROOT / word).exists(), f"no {word}"


def check_pip(words):
    assert words[0] == "install"
    extras = re.search(
        r"^\[project\.optional-dependencies\]\n((?:.+\n)+)",
        (ROOT / "pyproject.toml").read_text(),
        re.M,
    )[1]
    for word in words:
        for extra in re.findall(r"\[(.+)\]", word):
            for name in extra.split(","):
                assert re.search(rf"^{name} =", extras, re.M), f"no extra {name}"


def check(words):
    """Checks one command. AssertionError if it cannot be run as it is written."""
    name, *rest = words
    if name == "make":
        check_make(rest)
    elif name == "pip":
        check_pip(rest)
    elif name == "pytest":
        check_pytest(rest)
    elif words[:2] == ["vxl", "serve"]:  # it would run on
        add_serve((parser := Parser(prog="vxl")).add_subparsers())
        assert parser.parse_args(rest)
    elif words[:2] == ["vxl", "train"]:  # it would train
        check_options(["-m", "vxl_train", "run"], rest[1:])
    elif words[:2] in (["vxl", "mix"], ["vxl", "vico"]):  # they would need data
        check_options(["-m", "vxl_train", rest[0]], rest[1:])
    elif words[:2] == ["vxl", "eval"]:  # it would need a benchmark's data
        parts = [word for word in rest[1:2] if word in ("needle", "memory", "scores")]
        check_options(["-m", "vxl_eval", *parts], rest[1:])
    elif name == "vxl":
        vxl(rest)
    elif name == "lmms-eval" or "lmms_eval" in rest:
        pass  # another package's command, which `make lmms-eval-check` runs
    elif name == "accelerate":
        config = rest[rest.index("--config_file") + 1]
        assert (ROOT / config).is_file(), f"no {config}"
        check(["python", *rest[rest.index("-m") :]])
    elif name == "python" and rest[0] == "-m":
        module, *arguments = rest[1:]
        if module == "vxl_model":
            vxl(arguments)
        elif rest == ["-m", "vxl_kernels", "info"]:
            assert "backends" in output_of(*rest)
        else:
            subcommand = arguments[:1] if module != "pytest" else []
            check_options(["-m", module, *subcommand], arguments)
    elif name == "python":
        script, *arguments = rest
        assert (ROOT / script).is_file(), f"no {script}"
        if "argparse" in (ROOT / script).read_text():
            check_options([script], arguments)
    else:
        assert (ROOT / name).is_file(), f"unknown command {name}"


@pytest.mark.parametrize("page", pages_with("sh"), ids=str)
def test_commands(page, place):
    for block in blocks(page):
        if block.language == "sh":
            for words in commands(block.text):
                check(words)


def transcripts(page):
    return [b for b in blocks(page) if b.language == "text" and b.text.startswith("$ ")]


@pytest.mark.parametrize("page", [p for p in PAGES if transcripts(p)], ids=str)
def test_transcripts(page, place):
    """A block that begins with `$ vxl ...` shows what the command prints. `...` matches any
    text."""
    for block in transcripts(page):
        command, wanted = block.text.split("\n", 1)
        (words,) = commands(command.removeprefix("$ "))
        assert words[0] == "vxl"
        got = vxl(words[1:])
        assert doctest.OutputChecker().check_output(wanted, got, OUTPUT), f"{command}\n{got}"


# -- the checks themselves --------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        "make test ARGS=tests/no_such_folder/test_a.py",
        "make bench ARGS=--no-such-option",
        "pip install '.[no_such_extra]'",
        "python benchmarks/no_such_file.py",
        "python benchmarks/attn.py --no-such-option",
        "python -m vxl_train run --no-such-option",
        "vxl plan --no-such-option",
        "pytest tests/no_such_folder",
        "no-such-command",
    ],
)
def test_a_wrong_command_is_noticed(command):
    (words,) = commands(command)
    with pytest.raises(AssertionError):
        check(words)
