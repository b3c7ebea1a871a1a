"""A folder of results that are made once: whole or not there at all, whatever is killed when.

    <folder>/<key>/                 a finished entry; complete.json lists each of its files with its size
    <folder>/<key>.tmp/             an entry being made, by the process that holds the lock
    <folder>/<key>.lock             locked (flock) by its maker; the system frees it with the process
    <folder>/files.json             hashes of input files, by path, size and time of change

An entry is made in the temporary folder, forced to disk, then renamed, so that its name never shows an unfinished one.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from paceline.data.read import SourceFile
from paceline.errors import DataError

_COMPLETE = "complete.json"
_HASH_BYTES = 16
_SETTLED_NS = (
    2_000_000_000  # a file changed later than this before it was hashed may change again within one clock tick
)


def default_folder(given: str | None) -> Path:
    """``given``, else ``$PACELINE_CACHE``, else ``~/.cache/paceline``."""
    return Path(given or os.environ.get("PACELINE_CACHE") or "~/.cache/paceline").expanduser().absolute()


def entry(folder: Path, key: str, build: Callable[[Path], None], say: Callable[[str], None]) -> Path:
    """The folder of the finished entry ``key``; if there is none, or it is damaged, ``build(empty_folder)`` makes it.

    Any number of processes may ask at once: one builds, the others wait for it. ``DataError`` if it cannot be written.
    """
    final, temporary = folder / key, folder / f"{key}.tmp"
    if _damage(final) is None:
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{key}.lock", say):
            damage = _damage(final)
            if damage is None:
                return final
            if final.exists():
                say(f"cached data {final} is damaged ({damage}); making it again")
                shutil.rmtree(final)
            _remove_dead(folder)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                build(temporary)
                _finish(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        place = error.filename or folder
        raise DataError(
            f"cannot write the cache: {place}: {error.strerror or error}; choose data.cache, or set PACELINE_CACHE"
        ) from error
    return final


def _damage(final: Path) -> str | None:
    """What is wrong with a finished entry, or None."""
    try:
        sizes = json.loads((final / _COMPLETE).read_bytes())
        for name, size in sizes.items():
            there = (final / name).stat().st_size
            if there != size:
                return f"{name} has {there} bytes, expected {size}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except ValueError:
        return f"{_COMPLETE} is not JSON"
    return None


def _finish(temporary: Path, final: Path) -> None:
    """Force every file to disk, then show the entry under its name."""
    paths = sorted(temporary.rglob("*"))
    sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in paths if path.is_file()}
    (temporary / _COMPLETE).write_text(json.dumps(sizes))
    for path in [*paths, temporary / _COMPLETE, temporary]:
        _sync(path)
    temporary.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_dead(folder: Path) -> None:
    """Remove what killed processes left behind: temporary folders whose lock nobody holds."""
    for temporary in folder.glob("*.tmp"):
        with (folder / f"{temporary.stem}.lock").open("a") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[IO[str]]:
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process prepares the same data; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def content_hashes(files: Iterable[SourceFile], folder: Path) -> list[str]:
    """The hash of each file's bytes; a file of known path, size and time of change is not read again."""
    index_path = folder / "files.json"
    known = _index(index_path)
    hashes, changed = [], False
    for file in files:
        if file.path is None:
            hashes.append(hashlib.blake2b(file.text.encode(), digest_size=_HASH_BYTES).hexdigest())
            continue
        stamp, path = stamp_of(file), str(file.path.absolute())
        if known.get(path, [])[:2] == stamp:
            hashes.append(str(known[path][2]))
            continue
        try:
            with file.path.open("rb") as handle:
                digest = hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=_HASH_BYTES)).hexdigest()
        except OSError as error:
            hashes.append(f"cannot be read: {error.strerror}")  # and will be set aside when its turn comes
            continue
        hashes.append(digest)
        known[path] = [*stamp, digest]
        changed = True
    if changed:
        _write_index(index_path, known)
    return hashes


def stamp_of(file: SourceFile) -> list[int]:
    """Size and time of change of a file on disk (empty for one in memory): equal while the file stays the same."""
    if file.path is None:
        return []
    try:
        stat = file.path.stat()
    except OSError as error:
        raise DataError(f"{file.name}: {error.strerror}") from None
    return [stat.st_size, stat.st_mtime_ns]


def _index(path: Path) -> dict[str, list[int | str]]:
    try:
        known = json.loads(path.read_bytes())
        return {name: [int(size), int(changed_ns), str(digest)] for name, (size, changed_ns, digest) in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_index(path: Path, known: dict[str, list[int | str]]) -> None:
    settled = time.time_ns() - _SETTLED_NS
    kept = {name: item for name, item in known.items() if int(item[1]) < settled}
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # the index only saves time
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(kept))
        temporary.rename(path)
