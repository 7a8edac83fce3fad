"""Atomic output: a reader sees the old file, the new file, or none; never half of one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pinclip.errors import DataError

_ASIDE = ".old"
_CANNOT_WRITE = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EROFS: "read-only file system",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EISDIR: "it is a folder",
    errno.EFBIG: "file too large",
    errno.ENOENT: "no such folder",
    errno.EEXIST: "something is in the way",
    errno.ENOTEMPTY: "something is in the way",
    errno.ENAMETOOLONG: "the name is too long",
}


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn the operating system's refusal to write into one clear line that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise DataError(f"cannot write {path}: {_CANNOT_WRITE[error.errno]}") from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success fsync it and rename it over `path`.

    On any exception the temporary file is removed and `path` is left as it was.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _sync(temporary)
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty temporary sibling folder; on success it takes the place of `path`.

    A folder already at `path` changes places with the new one in one step (renameat2) and is deleted last,
    so that a crash at any point leaves the old folder or the new one. Where the system cannot exchange, the
    old one is renamed aside first, and a crash just then leaves it under that name. What a killed process
    left beside `path` is removed by the next one that writes the same path.
    """
    given, path = path, Path(os.path.realpath(path))  # what a link names is replaced, not the link
    with writing(given):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        temporary, lock = _locked_temporary(path)
        try:
            yield temporary
            sync_tree(temporary)
            temporary.chmod(0o777 & ~_umask())
            if not path.is_dir():
                os.replace(temporary, path)
            elif not _exchange(temporary, path):
                aside = temporary.with_name(temporary.name + _ASIDE)
                os.replace(path, aside)
                os.replace(temporary, path)
            _sync(path.parent)
            _remove_abandoned(path)
        finally:
            # By now this is the temporary folder, or the old one in its place.
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike) -> object:
    """What the JSON file `path` holds; a DataError that names the file where it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error


def sync_tree(folder: Path) -> None:
    """Flush every file and folder under `folder`, and itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _temporary_prefix(path: Path) -> str:
    return f".{path.name}.writing-"


def _locked_temporary(path: Path) -> tuple[Path, int]:
    """A new temporary folder beside `path`, and a descriptor that holds its lock as long as it is open."""
    while True:
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_temporary_prefix(path)))
        lock = os.open(temporary, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if temporary.is_dir():
            return temporary, lock
        os.close(lock)  # somebody took it for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed while writing `path` left: folders that nobody holds locked."""
    for found in path.parent.glob(glob.escape(_temporary_prefix(path)) + "*"):
        if found.suffix == _ASIDE and not path.is_dir():
            continue  # the crash left nothing else of the old folder
        with contextlib.suppress(OSError):
            lock = os.open(found, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(found, ignore_errors=True)
            finally:
                os.close(lock)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    if rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(other))
