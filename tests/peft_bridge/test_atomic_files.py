"""Old or new, and whole: files and folders under errors and under kill -9."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from peft_bridge import folder_replaced_at_once, replace_file
from peft_bridge.files import atomic_files

SIZE = 3_000_000

# Runs alone with the module's file, without importing torch. Says "go" once the first version is written.
CHILD = """
import importlib.util, itertools, pathlib, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
target, way, size = pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
for i in itertools.count():
    data = bytes([65 + i % 26]) * (size + i % 26)
    if way == "file":
        files.replace_file(target, data)
    else:
        with files.folder_replaced_at_once(target / str(i)) as draft:
            for name in ("one", "two"):
                (draft / name).write_bytes(data)
    if i == 0:
        print("go", flush=True)
"""


def killed(target, way, after):
    """Run the child, and kill it `after` seconds from its first version on."""
    command = [sys.executable, "-c", CHILD, atomic_files.__file__, str(target), way, str(SIZE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"go\n"
        time.sleep(after)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL


def assert_whole(data):
    letter = data[0] - 65
    assert data == bytes([data[0]]) * (SIZE + letter)


def delays(seed, count):
    generator = random.Random(seed)
    return [generator.uniform(0, 0.03) for _ in range(count)]


def test_a_file_is_whole_wherever_its_writer_is_killed(tmp_path):
    versions = set()
    for after in delays(0, 12):
        killed(tmp_path / "file", "file", after)
        data = (tmp_path / "file").read_bytes()
        assert_whole(data)
        versions.add(data[:1])
    assert len(versions) > 1  # it was killed at different points


def test_a_folder_is_whole_wherever_its_writer_is_killed(tmp_path):
    for i, after in enumerate(delays(1, 6)):
        target = tmp_path / str(i)
        target.mkdir()
        killed(target, "folder", after)
        folders = [folder for folder in target.iterdir() if not folder.name.startswith(".")]
        assert folders
        for folder in folders:
            assert sorted(p.name for p in folder.iterdir()) == ["one", "two"]
            for file in folder.iterdir():
                assert_whole(file.read_bytes())


# ---------------------------------------------------------------------- replace_file


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "file.bin"
    for data in (b"one", b"", b"three"):
        replace_file(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path, monkeypatch, failing):
    path = tmp_path / "file.bin"
    replace_file(path, b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_open_reader_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.bin"
    replace_file(path, b"old")
    with path.open("rb") as reader:
        replace_file(path, b"new")
        assert reader.read() == b"old"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_is_as_readable_as_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        replace_file(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


# ---------------------------------------------------------------------- folder_replaced_at_once


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "folder"
    with folder_replaced_at_once(path) as draft:
        (draft / "sub").mkdir()
        (draft / "sub" / "file").write_text("text")
        assert not path.exists()
    assert (path / "sub" / "file").read_text() == "text"
    assert [p.name for p in path.parent.iterdir()] == ["folder"]


def test_an_empty_folder_is_replaced(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with folder_replaced_at_once(path) as draft:
        (draft / "file").write_text("text")
    assert [p.name for p in path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_exists_is_not_replaced(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "folder":
        path.mkdir()
        (path / "precious").write_text("data")
    else:
        path.write_text("data")
    with (
        pytest.raises(ValueError, match=r"out' exists and is not empty: choose another"),
        folder_replaced_at_once(path),
    ):
        pytest.fail("the block must not run")
    assert (path / "precious" if kind == "folder" else path).read_text() == "data"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_nothing(tmp_path, error):
    def write():
        with folder_replaced_at_once(tmp_path / "out") as draft:
            (draft / "half").write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o002, 0o775, 0o664), (0o077, 0o700, 0o600)]
)
def test_a_folder_and_its_files_get_what_the_umask_leaves(tmp_path, umask, folder, file):
    before = os.umask(umask)
    try:
        with folder_replaced_at_once(tmp_path / "out") as draft:
            (draft / "private").touch(0o600)
            (draft / "sub").mkdir(0o700)
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("out", "out/sub", "out/private")]
    assert modes == [folder, folder, file]


@pytest.mark.parametrize("way", ["file", "folder"])
def test_what_a_killed_writer_has_left_is_removed_by_the_next_one(tmp_path, way):
    left = []
    with folder_replaced_at_once(tmp_path / "elsewhere" / "out") as draft:
        running = tmp_path / draft.name  # of this process, which runs
    running.mkdir()
    for after in delays(2, 30):
        target = tmp_path / "file" if way == "file" else tmp_path
        killed(target, way, after)
        left = [path for path in tmp_path.glob(".aslora-meft.*") if path != running]
        if left:
            break
        for path in tmp_path.glob("[0-9]*"):
            shutil.rmtree(path)
    assert left, "it was never killed while it wrote"
    replace_file(tmp_path / "next", b"data")
    assert list(tmp_path.glob(".aslora-meft.*")) == [running]


def test_drafts_of_another_machine_are_left_alone(tmp_path):
    strange = tmp_path / f".aslora-meft.00000000.4194304.{'0' * 32}"
    strange.mkdir()
    replace_file(tmp_path / "file", b"data")
    assert strange.exists()
