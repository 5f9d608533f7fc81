"""A file is written whole or not at all."""

import os
import pathlib

import pytest

from vaani_jax.files import write_atomically


def _listing(folder: pathlib.Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a.bin"
    write_atomically(path, b"first, which is longer")
    write_atomically(path, b"\x00second\xff")
    assert path.read_bytes() == b"\x00second\xff"
    assert _listing(tmp_path) == ["a.bin"]


def test_makes_folders(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    write_atomically(path, b"x")
    assert path.read_bytes() == b"x"


def test_is_readable_by_others(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"x")
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, call, error, existing):
    path = tmp_path / "file"
    if existing:
        path.write_bytes(b"old")

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(type(error)) as caught:
            write_atomically(path, b"new")
    assert caught.value is error
    assert _listing(tmp_path) == (["file"] if existing else [])
    assert not existing or path.read_bytes() == b"old"


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen: list[str | tuple[bytes, bytes]] = []
    replace, fsync = os.replace, os.fsync

    def spy_replace(source, target):
        seen.append((path.read_bytes(), pathlib.Path(source).read_bytes()))
        assert pathlib.Path(source).parent == tmp_path  # one file system: a rename
        replace(source, target)

    def spy_fsync(descriptor):
        seen.append("synced")
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    write_atomically(path, b"new")
    assert seen == ["synced", (b"old", b"new")]
    assert path.read_bytes() == b"new"


def test_a_file_in_the_place_of_a_folder_is_an_os_error(tmp_path):
    blocker = tmp_path / "blocker"
    blocker.write_bytes(b"")
    with pytest.raises(OSError, match="blocker"):
        write_atomically(blocker / "file", b"x")
    assert _listing(tmp_path) == ["blocker"]
