"""Atomic folders: what stands at the path, and beside it, whatever happens on the way."""

import fcntl
import os

import pytest

from pinclip import io
from pinclip.errors import DataError
from pinclip.io import atomic_directory


def write(path, text):
    with atomic_directory(path) as folder:
        (folder / "file").write_text(text)


@pytest.fixture(params=["exchange", "rename aside"])
def way(request, monkeypatch):
    if request.param == "rename aside":
        monkeypatch.setattr(io, "_exchange", lambda one, other: False)
    return request.param


def test_new_and_replaced(tmp_path, way):
    for text in ("one", "two", "three"):
        write(tmp_path / "deep" / "g", text)
        assert (tmp_path / "deep" / "g" / "file").read_text() == text
        assert os.listdir(tmp_path / "deep") == ["g"]
    assert (tmp_path / "deep" / "g").stat().st_mode & 0o777 == 0o777 & ~io._umask()


def test_an_exception_leaves_the_old_folder(tmp_path, way):
    write(tmp_path / "g", "old")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "g") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert (tmp_path / "g" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["g"]


def test_the_system_exchanges_folders_in_one_step(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, name)
    assert io._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "file").read_text() == "b"
    with pytest.raises(FileNotFoundError):
        io._exchange(tmp_path / "a", tmp_path / "nowhere")


def test_the_folder_that_a_link_names_is_replaced(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


def test_what_a_killed_writer_left_is_removed(tmp_path):
    for name in (".g.writing-abc", ".g.writing-abd.old", ".g.other", ".h.writing-abc"):
        write(tmp_path / name, "left")
    write(tmp_path / "g", "old")
    write(tmp_path / ".g.writing-abc", "left")
    with atomic_directory(tmp_path / "g"):
        assert not (tmp_path / ".g.writing-abc").exists()  # before anything new takes its place on the disk
    assert sorted(os.listdir(tmp_path)) == [".g.other", ".h.writing-abc", "g"]


def test_an_old_folder_that_is_the_only_one_is_kept_until_there_is_a_new_one(tmp_path):
    """Without an exchange, a writer killed between its two renames leaves the old folder aside."""
    write(tmp_path / ".g.writing-abc.old", "old")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "g"):
        raise RuntimeError
    assert os.listdir(tmp_path) == [".g.writing-abc.old"]
    write(tmp_path / "g", "new")
    assert os.listdir(tmp_path) == ["g"]


def test_the_folder_of_a_living_writer_is_spared(tmp_path):
    with atomic_directory(tmp_path / "g") as first:
        (first / "file").write_text("first")
        write(tmp_path / "g", "second")
        assert first.is_dir()
    assert (tmp_path / "g" / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["g"]


def test_a_folder_lost_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    lock = fcntl.flock
    lost = []

    def losing(descriptor, how):
        if how == fcntl.LOCK_EX and not lost:
            lost.extend(tmp_path.iterdir())
            lost[0].rmdir()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", losing)
    write(tmp_path / "g", "new")
    assert len(lost) == 1
    assert os.listdir(tmp_path) == ["g"]


def test_refusals(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "g"):
        with pytest.raises(DataError, match="cannot write"):
            write(path, "new")
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]
