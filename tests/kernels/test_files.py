"""Atomic writes: what is replaced, what is refused, what a killed writer leaves."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from vxl_kernels import files
from vxl_kernels.files import atomic_write, check_target

LONGEST = 255  # bytes of a name on Linux's file systems
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
no_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")


def mode(path: Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize(
    "data",
    ["é\n", "é\n".encode(), lambda file: file.write("é\n".encode())],
    ids=["text", "bytes", "f"],
)
@pytest.mark.parametrize("durable", [True, False])
def test_text_bytes_and_functions_are_written(tmp_path, data, durable):
    atomic_write(tmp_path / "file", "an older, longer text", durable=durable)
    atomic_write(str(tmp_path / "file"), data, durable=durable)
    assert (tmp_path / "file").read_bytes() == b"\xc3\xa9\n"
    assert os.listdir(tmp_path) == ["file"]


def test_a_function_can_seek(tmp_path):
    def write(file):
        file.write(b"????body")
        file.seek(0)
        file.write(b"head")

    atomic_write(tmp_path / "file", write, durable=False)
    assert (tmp_path / "file").read_bytes() == b"headbody"


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    real, link, dangling = tmp_path / "there" / "real", tmp_path / "link", tmp_path / "dangling"
    real.write_text("old")
    link.symlink_to("there/real")
    dangling.symlink_to("there/new")
    for name in (link, dangling):
        atomic_write(name, "new", durable=False)
        assert name.is_symlink()
        assert name.read_text() == "new"
    assert sorted(os.listdir(tmp_path / "there")) == ["new", "real"]


@pytest.mark.parametrize("wanted", [0o600, 0o640, 0o777])
def test_the_mode_of_a_replaced_file_is_kept(tmp_path, wanted):
    path = tmp_path / "file"
    path.touch()
    path.chmod(wanted)
    seen = []
    atomic_write(path, lambda file: seen.append(mode(file.name)), durable=False)
    assert mode(path) == wanted
    assert seen[0] & ~wanted == 0, "others could read the file while it was written"


@root_only
def test_the_owner_of_a_replaced_file_is_kept(tmp_path):
    path = tmp_path / "file"
    path.touch()
    os.chown(path, 1234, 2345)
    atomic_write(path, "new", durable=False)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)


def test_a_new_file_has_the_mode_of_open(tmp_path):
    (tmp_path / "other").touch()
    atomic_write(tmp_path / "file", "new", durable=False)
    assert mode(tmp_path / "file") == mode(tmp_path / "other")


@root_only
def test_a_device_is_written_through_or_refused(tmp_path):
    null = tmp_path / "null"
    os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    atomic_write(null, "into the void", durable=True)
    with pytest.raises(
        ValueError, match=r"path: got '.*null', a device.*, expected a regular file"
    ):
        atomic_write(null, lambda file: file.write(b"x"), durable=True)
    assert stat.S_ISCHR(os.stat(null).st_mode)
    assert os.listdir(tmp_path) == ["null"]


@root_only
def test_a_disk_is_refused(tmp_path):
    os.mknod(tmp_path / "disk", 0o666 | stat.S_IFBLK, os.makedev(7, 250))
    with pytest.raises(ValueError, match="a device"):
        atomic_write(tmp_path / "disk", "text", durable=False)


def test_a_fifo_is_written_through_or_refused(tmp_path):
    fifo, read = tmp_path / "fifo", []
    os.mkfifo(fifo)
    with pytest.raises(ValueError, match="a regular file"):  # and does not wait for a reader
        atomic_write(fifo, lambda file: file.write(b"x"), durable=True)
    reader = threading.Thread(target=lambda: read.append(fifo.read_text()))
    reader.start()
    atomic_write(fifo, "through the pipe", durable=True)
    reader.join()
    assert read == ["through the pipe"]
    assert stat.S_ISFIFO(os.stat(fifo).st_mode)


def test_standard_output_is_written_through(tmp_path):
    stdout = tmp_path / "stdout"  # a link as /dev/stdout is, which a failure must not replace
    stdout.symlink_to("/proc/self/fd/1")
    code = f"from vxl_kernels.files import *; atomic_write({str(stdout)!r}, 'hi', durable=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "hi"
    assert stdout.is_symlink()


@pytest.mark.parametrize("name", ["m" * LONGEST, "é" * (LONGEST // 2), "m" * 250 + ".vxl"])
def test_a_legal_name_may_have_any_length(tmp_path, name):
    for text in ("old", "new"):
        atomic_write(tmp_path / name, text, durable=True)
    assert (tmp_path / name).read_text() == "new"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("folder", IsADirectoryError),
        ("missing/file", FileNotFoundError),
        ("file/below", NotADirectoryError),
        ("m" * (LONGEST + 1), OSError),
        ("loop", OSError),
        pytest.param("read_only", PermissionError, marks=no_root),
        pytest.param("closed/file", PermissionError, marks=no_root),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_before_the_function_runs(tmp_path, name, error):
    (tmp_path / "folder").mkdir()
    (tmp_path / "closed").mkdir(0o500)
    for file in ("file", "read_only"):
        (tmp_path / file).write_text("old")
    (tmp_path / "read_only").chmod(0o400)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(error) as raised:
        atomic_write(tmp_path / name, pytest.fail, durable=False)
    assert files._PREFIX not in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == ["closed", "file", "folder", "loop", "read_only"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("target", "source"),
    [
        ("video", "video"),
        ("video", "link"),
        ("link", "video"),
        ("hard", "video"),
        ("model/weights", "model"),
        ("model/../model/weights", "model/."),
        ("model/shared", "model"),
        ("model_link/weights", "model"),
    ],
)
def test_an_input_is_refused(tmp_path, monkeypatch, target, source):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    for file in ("video", "blob", "model/weights"):
        Path(file).write_text("precious")
    Path("link").symlink_to("video")
    Path("hard").hardlink_to("video")
    Path("model/shared").symlink_to("../blob")
    Path("model_link").symlink_to("model")
    inputs = ["https://host/video.mp4", "missing", "a\0b", source]
    with pytest.raises(ValueError, match=r"path: got .*, which is an input"):
        atomic_write(target, pytest.fail, durable=False, inputs=inputs)
    with pytest.raises(ValueError, match=r"--save: got .*, which is an input"):
        check_target(target, inputs=inputs, argument="--save")
    assert Path(target).read_text() == "precious"


def test_a_new_file_in_the_folder_of_an_input_is_not_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "models").touch()
    for name in ("model/memory", "models"):
        atomic_write(tmp_path / name, "new", durable=False, inputs=[tmp_path / "model"])
        assert (tmp_path / name).read_text() == "new"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, error):
    (tmp_path / "file").write_text("old")

    def fails(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        atomic_write(tmp_path / "file", fails, durable=True)
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_durable_waits_for_the_content_then_renames_then_waits_for_the_name(tmp_path, monkeypatch):
    path, events = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def kind(handle):
        return "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else os.fstat(handle).st_size

    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(kind(handle)), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("rename"), replace(*a)))
    atomic_write(path, "12345", durable=True)
    assert events == [5, "rename", "folder"]
    events.clear()
    atomic_write(path, "12345", durable=False)
    assert events == ["rename"]


def leftover(folder: Path, host: str, age: float = 0.0) -> Path:
    path = folder / f"{files._PREFIX}{host}0123456789abcdef{files._SUFFIX}"
    path.write_text("half")
    os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    return path


def test_leftovers_of_dead_writers_are_swept(tmp_path):
    dead = leftover(tmp_path, files._HOST)
    old = leftover(tmp_path, "01234567-", age=2 * files._DAY)
    young = leftover(tmp_path, "89abcdef-", age=0.5 * files._DAY)  # it may live on another machine
    (tmp_path / ".vxl-notes").touch()
    (tmp_path / "x.part").touch()
    atomic_write(tmp_path / "file", "new", durable=False)
    assert not dead.exists()
    assert not old.exists()
    assert sorted(os.listdir(tmp_path)) == sorted([".vxl-notes", "file", young.name, "x.part"])


def test_a_living_writer_keeps_its_file(tmp_path):
    def write(file):
        file.write(b"outer")
        atomic_write(tmp_path / "inner", "inner", durable=False)
        assert os.path.exists(file.name)

    atomic_write(tmp_path / "outer", write, durable=False)
    assert (tmp_path / "outer").read_text() == "outer"
    assert sorted(os.listdir(tmp_path)) == ["inner", "outer"]


def test_a_file_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, swept = files._lock, []

    def sweep_first(file, *, wait):
        if wait and not swept:
            os.unlink(file.name)
            swept.append(file.name)
        lock(file, wait=wait)

    monkeypatch.setattr(files, "_lock", sweep_first)
    atomic_write(tmp_path / "file", "new", durable=False)
    assert swept
    assert os.listdir(tmp_path) == ["file"]


def test_many_writers_of_one_file(tmp_path):
    errors = []

    def write(letter):
        try:
            for _ in range(40):
                atomic_write(tmp_path / "file", letter * 100_000, durable=False)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    text = (tmp_path / "file").read_text()
    assert text == text[0] * 100_000
    assert os.listdir(tmp_path) == ["file"]


KILLS = """
    import os, random, signal, sys, time
    from pathlib import Path
    from vxl_kernels.files import atomic_write

    path, leftovers, versions = Path(sys.argv[1], "file"), 0, set()

    def write_forever(first):
        for version in range(first, 1 << 62):
            def pieces(file):
                for _ in range(64):
                    file.write(version.to_bytes(8, "little") * 512)
            atomic_write(path, pieces, durable=version % 2 == 0)

    begin = time.perf_counter()
    for _ in range(5):
        atomic_write(path, (0).to_bytes(8, "little") * 512 * 64, durable=True)
    longest = max(0.02, time.perf_counter() - begin)  # five writes on a machine that is busy
    started, starts = os.pipe()
    random.seed(1)
    for kill in range(200):
        child = os.fork()
        if child == 0:
            os.write(starts, b"!")
            write_forever(kill << 32)
        os.read(started, 1)
        time.sleep(random.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        content = path.read_bytes()
        assert content == content[:8] * 512 * 64, f"kill {kill} left half a file"
        versions.add(content[:8])
        parts = len(os.listdir(path.parent)) - 1
        assert parts <= 1, f"{parts} files of killed writers"
        leftovers += parts
    atomic_write(path, b"last", durable=False)
    assert os.listdir(path.parent) == ["file"]
    print(leftovers, len(versions))
"""


def test_200_kills_lose_nothing_and_leave_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLS), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    leftovers, versions = map(int, done.stdout.split())
    # Otherwise no kill hit a write, and the test has shown nothing.
    assert leftovers >= 20
    assert versions >= 20
