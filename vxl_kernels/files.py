"""Atomic file writes: readers and crashes see the old file or the new one, never a part of one."""

from __future__ import annotations

import errno
import os
import platform
import secrets
import stat
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import BinaryIO

from ._arguments import fail

__all__ = ["atomic_write", "check_target"]

Path = str | os.PathLike[str]

_PREFIX, _SUFFIX = ".vxl-", ".part"
_HOST = f"{zlib.crc32(platform.node().encode()):08x}-"
_DAY = 86400.0  # seconds


def atomic_write(
    path: Path,
    data: str | bytes | Callable[[BinaryIO], object],
    *,
    durable: bool,
    inputs: Iterable[Path] = (),
) -> None:
    """Writes a file under a temporary name in the folder of its target, then renames it.

    - If `path` is a link, its target is replaced and the link stays.
    - The new file gets the mode of the file that it replaces and, if that is allowed, its owner.
    - A device or FIFO is never replaced. Text and bytes are written to it. A function is refused,
      because it may seek.
    - The temporary name is short, so the target may have any legal name.
    - The next write to a folder deletes what killed writers left there. It tells them from living
      writers by the lock that a writer holds on its file.

    Args:
        data: text (written as UTF-8), bytes, or a function that writes to the binary file that
            it is given. That file can seek.
        durable: True returns when the content and the name are on the disk. False does not wait
            for the disk: the old or the new file survives a crash of the process, but a power
            cut may lose both.
        inputs: files and folders that the caller reads. A target that is one of these files, or
            an existing file in one of these folders, is refused.

    Raises:
        ValueError: the target is an input, or a device or FIFO that cannot be written as asked.
        OSError: the file cannot be written. An existing file is unchanged.
    """
    target = check_target(path, inputs=inputs, devices=not callable(data))
    content = data.encode() if isinstance(data, str) else data
    if target is None:
        with open(path, "wb") as file:
            file.write(content)  # type: ignore[arg-type]  # check_target has refused a function
        return
    old = os.stat(target) if os.path.exists(target) else None
    folder = os.path.dirname(target)
    _sweep(folder)
    try:
        part = _open_part(folder, 0o666 if old is None else stat.S_IMODE(old.st_mode))
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from None
    try:
        with part:
            if callable(content):
                content(part)
            else:
                part.write(content)
            part.flush()
            if old is not None:
                with suppress(OSError):
                    os.fchown(part.fileno(), old.st_uid, old.st_gid)
                os.fchmod(part.fileno(), stat.S_IMODE(old.st_mode))
            if durable:
                os.fsync(part.fileno())
            os.replace(part.name, target)  # before the file is closed, which ends its lock
    except BaseException:
        with suppress(OSError):
            os.unlink(part.name)
        raise
    if durable:
        _sync_folder(folder)


def check_target(
    path: Path, *, inputs: Iterable[Path] = (), devices: bool = True, argument: str = "path"
) -> str | None:
    """Refuses a target that `atomic_write` would refuse. Call it before a long computation.

    Args:
        inputs: as in `atomic_write`.
        devices: whether a device or FIFO can be written.
        argument: name of the target in the error.

    Returns:
        The file to write, with links resolved. None for a device or FIFO.

    Raises:
        ValueError, OSError: as `atomic_write`.
    """
    name = os.fsdecode(path)
    target = os.path.realpath(name)
    try:
        old = os.stat(name)
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(target)):
            raise
        return target
    if stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    if not (stat.S_ISREG(old.st_mode) and os.path.exists(target)):
        writable = stat.S_ISCHR(old.st_mode) or stat.S_ISFIFO(old.st_mode)
        if not (devices and writable):
            fail(argument, f"{name!r}, a device, FIFO or socket", "a regular file")
        return None
    for source in inputs:
        if _is_input(name, old, os.fsdecode(source)):
            fail(argument, f"{name!r}, which is an input ({os.fsdecode(source)!r})", "another file")
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
    return target


def _is_input(name: str, status: os.stat_result, source: str) -> bool:
    try:
        found = os.stat(source)
    except (OSError, ValueError):  # not a file, such as a URL
        return False
    if not stat.S_ISDIR(found.st_mode):
        return os.path.samestat(found, status)
    folder = os.path.join(os.path.realpath(source), "")
    place = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
    return place.startswith(folder) or os.path.realpath(name).startswith(folder)


def _open_part(folder: str, mode: int) -> BinaryIO:
    """A new file in `folder`, locked until it is closed."""
    while True:
        name = os.path.join(folder, f"{_PREFIX}{_HOST}{secrets.token_hex(8)}{_SUFFIX}")
        file = open(name, "xb", opener=lambda path, flags: os.open(path, flags, mode))  # noqa: SIM115
        with suppress(OSError):  # a file system without locks: then nobody sweeps either
            _lock(file, wait=True)
        if os.path.lexists(name):
            return file
        file.close()  # another writer swept it before it was locked


def _lock(file: BinaryIO, *, wait: bool) -> None:
    import fcntl  # not on Windows, where the package should still load

    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sweep(folder: str) -> None:
    """Deletes temporary files whose lock is free: their writers are dead.

    The locks of some network file systems do not reach other machines. So a file of another
    machine must also be a day old.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not (entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX)):
                continue
            with suppress(OSError):
                here = entry.name.startswith(_PREFIX + _HOST)
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                if entry.is_file(follow_symlinks=False) and (here or age > _DAY):
                    with open(entry.path, "r+b") as file:
                        _lock(file, wait=False)
                        os.unlink(entry.path)


def _sync_folder(folder: str) -> None:
    """Makes a new name durable, if the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
