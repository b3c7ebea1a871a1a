"""Cache entries are whole or not there, made once, and mended when damaged; with processes that are really killed."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline.data import cache
from paceline.data.read import SourceFile
from paceline.errors import DataError


def silent(_: str) -> None:
    pass


def builder(calls: list[Path]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        calls.append(folder)
        (folder / "deep").mkdir()
        (folder / "deep" / "data").write_bytes(b"12345")

    return build


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    found = [cache.entry(tmp_path / "new" / "cache", "key", builder(calls), silent) for _ in range(3)]
    assert len(calls) == 1
    assert set(found) == {tmp_path / "new" / "cache" / "key"}
    assert (found[0] / "deep" / "data").read_bytes() == b"12345"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda entry: (entry / "deep" / "data").write_bytes(b"123"), "deep/data has 3 bytes, expected 5"),
        (lambda entry: (entry / "deep" / "data").unlink(), "data is missing"),
        (lambda entry: (entry / "complete.json").unlink(), "complete.json is missing"),
        (lambda entry: (entry / "complete.json").write_text("{"), "complete.json is not JSON"),
    ],
)
def test_a_damaged_entry_is_told_and_made_again(tmp_path: Path, damage: Callable[[Path], object], told: str) -> None:
    calls: list[Path] = []
    said: list[str] = []
    entry = cache.entry(tmp_path, "key", builder(calls), said.append)
    damage(entry)
    cache.entry(tmp_path, "key", builder(calls), said.append)
    assert len(calls) == 2
    assert [told in line for line in said] == [True]
    assert (entry / "deep" / "data").read_bytes() == b"12345"


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise DataError("no")

    with pytest.raises(DataError, match=r"^no$"):
        cache.entry(tmp_path, "key", build, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    def build(_: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(DataError, match=r"cannot write the cache: .*: No space left on device; choose data.cache"):
        cache.entry(tmp_path, "key", build, silent)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"cannot write the cache: .*file/cache: Not a directory"):
        cache.entry(tmp_path / "file" / "cache", "key", builder([]), silent)


BUILD_AND_HANG = """
import sys
from pathlib import Path
from paceline.data import cache

def build(folder):
    (folder / "half").write_text("x")
    print("building", flush=True)
    sys.stdin.read()

cache.entry(Path(sys.argv[1]), sys.argv[2], build, print)
"""


def start(folder: Path, key: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD_AND_HANG, str(folder), key]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    assert process.stdout.readline() == "building\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    with process:
        process.send_signal(signal.SIGKILL)


def test_a_killed_build_is_never_visible_and_the_next_one_mends_it(tmp_path: Path) -> None:
    for process in [start(tmp_path, "key"), start(tmp_path, "other")]:
        kill(process)
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == ["key.tmp", "other.tmp"]
    assert not (tmp_path / "key").exists()
    calls: list[Path] = []
    entry = cache.entry(tmp_path, "key", builder(calls), silent)
    assert (entry / "deep" / "data").exists()
    assert not (entry / "half").exists()
    assert not list(tmp_path.glob("*.tmp")), "what another dead process left is removed too"


def test_the_folder_of_a_living_build_is_left_alone(tmp_path: Path) -> None:
    process = start(tmp_path, "other")
    cache.entry(tmp_path, "key", builder([]), silent)
    assert (tmp_path / "other.tmp" / "half").exists()
    kill(process)


def test_others_wait_for_the_one_that_builds(tmp_path: Path) -> None:
    process = start(tmp_path, "key")
    waits, calls = threading.Event(), []
    found: list[Path] = []
    waiter = threading.Thread(
        target=lambda: found.append(cache.entry(tmp_path, "key", builder(calls), lambda _: waits.set()))
    )
    waiter.start()
    assert waits.wait(30), "the second does not say that it waits"
    with process:
        assert process.stdin
        process.stdin.close()
    waiter.join(30)
    assert found == [tmp_path / "key"]
    assert calls == []
    assert (tmp_path / "key" / "half").exists()


def hashes(path: Path, folder: Path) -> list[str]:
    return cache.content_hashes([SourceFile(str(path), "text", path)], folder)


def age(path: Path, seconds: int) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - seconds * 10**9))


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path: Path) -> None:
    path, folder = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one")
    age(path, 100)
    first = hashes(path, folder)
    stat = path.stat()
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hashes(path, folder) == first, "the index was not used"
    age(path, 1)
    assert hashes(path, folder) != first


def test_a_file_that_changed_a_moment_ago_is_hashed_every_time(tmp_path: Path) -> None:
    path, folder = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one")
    stat = path.stat()
    first = hashes(path, folder)
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hashes(path, folder) != first


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}'])
def test_a_broken_index_costs_only_time(tmp_path: Path, content: str) -> None:
    path, folder = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one")
    expected = hashes(path, folder)
    (folder / "files.json").write_text(content)
    assert hashes(path, folder) == expected


def test_text_in_memory_hashes_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("grüße")
    assert cache.content_hashes([SourceFile("m", "text", text="grüße")], tmp_path) == hashes(
        tmp_path / "a.txt", tmp_path
    )


def test_the_folder_is_the_one_given_or_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PACELINE_CACHE", "/env")
    assert cache.default_folder("~/x") == Path("/home/me/x")
    assert cache.default_folder(None) == Path("/env")
    monkeypatch.delenv("PACELINE_CACHE")
    assert cache.default_folder(None) == Path("/home/me/.cache/paceline")
