"""The command in a process of its own: its output, and what it imports."""

import os
import subprocess
import sys

import pytest
from helpers.commands import ASK, QUESTION
from helpers.paths import ROOT

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from vxl_kernels import _ext

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(_ext.extension is None, reason="no compiled extension"),
]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_nothing_heavy_for_help_and_wrong_names(place):
    """`vxl --help` and a wrong file name need neither torch nor transformers, and `python -m` of a
    package neither."""
    code = (
        "import atexit, runpy, sys; "
        "heavy = {'torch', 'transformers', 'numpy', 'av', 'PIL'}; "
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
    )
    (place / "heavy").mkdir()
    (place / "heavy" / "sitecustomize.py").write_text(code)
    heavy = os.pathsep.join([str(place / "heavy"), environment()["PYTHONPATH"]])
    wrong = ("--model", "model", "--video", "none.mp4")
    for module, arguments, status in (
        ("vxl_cli", ("--help",), 0),
        ("vxl_cli", ("ask", "--help"), 0),
        ("vxl_cli", ("ask", *wrong, "Q"), 2),
        ("vxl_cli", ("chat", *wrong), 2),
        ("vxl_cli", ("watch", *wrong, "--save", "m.vxl"), 2),
        ("vxl_cli", ("watch", "--model", "m", "--videos", "none.mp4", "--save", "m"), 2),
        ("vxl_model", ("--help",), 0),
        ("vxl_model", ("ask", *wrong, "Q"), 2),
        ("vxl_eval", ("--help",), 0),
        ("vxl_eval", ("needle", "--model", "model", "--haystack", "none.mp4"), 2),
        ("vxl_eval", ("memory", "--model", "./none.mp4", "--frames", "4"), 2),
        ("vxl_eval", ("--model", "model", "--suite", "none.mp4.yaml"), 2),
        ("vxl_eval", ("scores", "--kind", "mlvu", "none.mp4"), 2),
        ("vxl_train", ("mix", "--help"), 0),
        ("vxl_train", ("mix", "--config", "none.mp4", "--root", ".", "--output", "o"), 2),
        ("vxl_train", ("vico", "--videos", "none.mp4", "--captioner", "c", "--output", "o"), 2),
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=place,
            env={**environment(), "PYTHONPATH": heavy},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, (module, arguments, done.stderr)
        assert done.stderr.splitlines()[-1] == "[]", (module, arguments)
        assert status == 0 or "none.mp4" in done.stderr


def test_as_a_process(place):
    """The module runs, streams to stdout, and prints nothing else there or on stderr."""
    command = [sys.executable, "-m", "vxl_model", *ASK, "--video", "clip.mp4", QUESTION]
    done = subprocess.run(
        command, cwd=place, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
