"""The tests of the installed release of transformers, for their mixins.

Run as a command it downloads the release's source distribution from the package index into
`build/`. The distribution holds the common tests but not all that they import. The rest is
replaced by empty classes here.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
import types
import unittest
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "transformers_tests"
HINT = "transformers' own tests are not here: make transformers-tests downloads them"


def folder() -> Path:
    """Where the tests of the installed release are, or would be."""
    release = version("transformers")
    return ROOT / "build" / "transformers-tests" / f"transformers-{release}" / "tests"


def download() -> None:
    """Raises RuntimeError, which says why, where the index does not give the distribution."""
    release, place = version("transformers"), folder().parents[1]
    place.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(place)]
    done = subprocess.run(
        [*command, f"transformers=={release}"], capture_output=True, text=True, check=False
    )
    archives = list(place.glob(f"transformers-{release}.tar.gz"))
    if done.returncode or not archives:
        lines = done.stderr.strip().splitlines() or ["no archive came"]
        raise RuntimeError(f"transformers' own tests cannot be downloaded: {lines[-1]}")
    with tarfile.open(archives[0]) as archive:
        members = [x for x in archive.getmembers() if x.name.split("/")[1:2] == ["tests"]]
        archive.extractall(place, members, filter="data")
    archives[0].unlink()
    (folder() / "__init__.py").touch()  # one of the tests looks for it


def mixins(*modules: str) -> list[types.ModuleType]:
    """Modules of the downloaded tests. Raises ImportError where there are none."""
    if not folder().is_dir():
        raise ImportError(HINT)
    if PACKAGE not in sys.modules:
        _module(PACKAGE).__path__ = [str(folder())]
        for name in ("generation", "exporters", "utils"):
            _module(f"{PACKAGE}.{name}").__path__ = []
        empty = {
            "generation.test_utils": {
                "GenerationTesterMixin": type("GenerationTesterMixin", (), {})
            },
            "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
            "utils.test_configuration_utils": {
                "config_common_kwargs": {"output_hidden_states": True, "dtype": "float16"}
            },
        }
        for name, values in empty.items():
            vars(_module(f"{PACKAGE}.{name}")).update(values)
        vars(_module("fetch_hub_objects_for_ci"))["url_to_local_path"] = _stand_in
    return [importlib.import_module(f"{PACKAGE}.{name}") for name in modules]


def _stand_in(url: str) -> str:
    """A small file in place of a picture or a video that the tests would download."""
    file = folder().parent / "stand-ins" / Path(url).name
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".mp4" and not file.exists():
        from helpers.clips import write_clip

        write_clip(file, count=11)
    elif file.suffix in (".png", ".jpg") and not file.exists():
        from PIL import Image

        Image.new("RGB", (64, 48), (200, 90, 10)).save(file)
    return str(file)


def leave_out(reasons):
    """A decorator of a class, which skips the tests that `reasons` lists. The release that
    constraints.txt names has to have each of them. Other releases may lack some."""
    listed_for = f"transformers=={version('transformers')}"
    strict = listed_for in (ROOT / "constraints.txt").read_text().split()

    def decorated(cls):
        for reason, names in reasons.items():
            for name in names:
                if strict or hasattr(cls, name):
                    assert callable(getattr(cls, name)), name
                    setattr(cls, name, unittest.skip(reason)(lambda self: None))
        return cls

    return decorated


def _module(name: str) -> types.ModuleType:
    made = types.ModuleType(name)
    sys.modules[name] = made
    return made


if __name__ == "__main__":
    if not folder().is_dir():
        try:
            download()
        except RuntimeError as error:
            print(error)
