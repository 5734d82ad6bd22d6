"""Files and folders appear whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from llmpack.checkpoint import atomic
from llmpack.errors import EnvironmentProblem


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "f"
    atomic.write_atomic(path, b"one")
    atomic.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["f"]


def test_a_failure_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def interrupted():
        with atomic.replaced_when_whole(path) as temporary:
            temporary.write_bytes(b"half")
            assert atomic.is_temporary(temporary.name)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_a_file_is_copied(tmp_path):
    (tmp_path / "a").write_bytes(b"data")
    atomic.copy_atomic(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"data"


def test_data_and_name_are_synced_in_that_order(tmp_path, monkeypatch):
    seen = []
    sync = os.fsync

    def watching(descriptor):
        seen.append((Path(f"/proc/self/fd/{descriptor}").resolve(), (tmp_path / "f").exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watching)
    atomic.write_atomic(tmp_path / "f", b"data")
    assert [exists for _, exists in seen] == [False, True]
    assert seen[0][0].suffix == ".tmp"
    assert seen[1][0] == tmp_path.resolve()


def made(folder, text):
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "f").write_text(text)
    (folder / "link").symlink_to("nowhere")
    return folder


@pytest.mark.parametrize("swap", [True, False])
def test_a_folder_is_published_and_replaced(tmp_path, monkeypatch, swap):
    if not swap:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    for text in ("one", "two"):
        atomic.publish_folder(made(tmp_path / ".work", text), tmp_path / "final")
        assert (tmp_path / "final" / "sub" / "f").read_text() == text
        assert names(tmp_path) == ["final"]


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "no room for 1 MiB"), (errno.EROFS, "cannot be written")])
def test_errors_of_the_disk_are_explained(tmp_path, number, said):
    with pytest.raises(EnvironmentProblem, match=said) as problem, atomic.disk_errors(tmp_path, 1 << 20, "2 are kept"):
        raise OSError(number, os.strerror(number))
    assert "2 are kept" in str(problem.value)


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic.disk_errors(tmp_path, 1):
        (tmp_path / "nowhere").read_bytes()


def test_space_is_asked_for_before_writing(tmp_path):
    atomic.require_space(tmp_path, 1)
    with pytest.raises(EnvironmentProblem, match="free some space"):
        atomic.require_space(tmp_path, 1 << 60)
