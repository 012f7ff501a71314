"""`vxl serve`: what is refused before a model is loaded or a port is opened."""

import re
import sys

import pytest
from helpers.paths import ROOT

from vxl_cli.common import _EXTRAS, Parser, run
from vxl_serve.cli import _settings, add_serve


def parser():
    made = Parser(prog="vxl")
    add_serve(made.add_subparsers())
    return made


@pytest.fixture
def serve(monkeypatch, capsys, tmp_path):
    """Runs `vxl serve` where uvicorn is not installed and returns its complaint."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delenv("VXL_API_KEYS", raising=False)

    def run_it(*more):
        given = ["serve", "--model", "none", "--store", tmp_path / "store", *more]
        assert run(parser(), [str(x) for x in given]) == 2
        assert not (tmp_path / "store").exists()
        return capsys.readouterr().err

    return run_it


def test_the_missing_package_s_extra_is_named(serve):
    assert "uvicorn is not installed; pip install 'vxl[model,video,serve]'" in serve()


def test_every_package_of_an_extra_is_known():
    text = (ROOT / "pyproject.toml").read_text()
    for extra in ("ray", "serve"):
        named = re.search(rf"^{extra} = \[(.*)\]$", text, re.MULTILINE)[1]
        for name in re.findall(r'"([\w-]+)', named):
            assert _EXTRAS[name.replace("-", "_")].endswith(extra)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (("--allow-folder", "/no/such/folder"), "--allow-folder: got /no/such/folder"),
        (("--engine", "vllm"), "--vllm-url"),
        (("--vllm-url", "http://x"), "--vllm-url"),
        (("--api-keys", "/no/such/file"), "No such file"),
    ],
)
def test_arguments_are_checked_before_packages_are_wanted(serve, given, word):
    assert word in serve(*given)


@pytest.mark.parametrize("port", ["-1", "65536", "http", "8000.0", "9" * 5000])
def test_a_port_out_of_range(serve, port):
    assert "expected 0 to 65535" in serve("--port", port)


@pytest.mark.parametrize("keys", ["", ",", " , \n"])
def test_keys_that_are_empty_do_not_open_the_server(serve, monkeypatch, tmp_path, keys):
    monkeypatch.setenv("VXL_API_KEYS", keys)
    assert "VXL_API_KEYS: got" in serve()
    monkeypatch.delenv("VXL_API_KEYS")
    (tmp_path / "keys").write_text(keys.replace(",", "\n"))
    assert "without a key, expected one a line" in serve("--api-keys", tmp_path / "keys")


def test_keys_that_are_no_text(serve, tmp_path):
    (tmp_path / "keys").write_bytes(b"caf\xe9\n")
    assert "keys, which is not UTF-8" in serve("--api-keys", tmp_path / "keys")


def test_keys(monkeypatch, tmp_path):
    def keys(*more):
        return _settings(parser().parse_args(["serve", "--model", "x", *map(str, more)])).keys

    monkeypatch.delenv("VXL_API_KEYS", raising=False)
    assert keys() == ()
    monkeypatch.setenv("VXL_API_KEYS", "a, b,,")
    assert keys() == ("a", "b")
    (tmp_path / "keys").write_text("c\n\nd\n")
    assert keys("--api-keys", tmp_path / "keys") == ("c", "d")


def test_help_tells_every_default(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, default in (
        ("running", "64"),
        ("waiting", "256"),
        ("engine", "vxl"),
        ("disk", "64G"),
    ):
        assert re.search(rf"--{name} [^()]*\(default: {default}\)", text), name
