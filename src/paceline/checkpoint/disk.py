"""Files and folders that survive a crash: written, synced, then made visible by one rename."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from paceline.checkpoint.manifest import FileRecord
from paceline.errors import CheckpointError

_CHUNK_BYTES = 8 << 20

_REMEDIES = {
    errno.ENOSPC: "free some space, keep fewer checkpoints (checkpoint.keep) or choose another disk (train.output)",
    errno.EDQUOT: "free some of your quota, keep fewer checkpoints (checkpoint.keep) or choose another disk "
    "(train.output)",
    errno.EACCES: "make the folder writable or choose another one (train.output)",
    errno.EPERM: "make the folder writable or choose another one (train.output)",
    errno.EROFS: "the disk is mounted read-only, choose another one (train.output)",
    errno.EIO: "the disk reports a fault, check it or choose another one (train.output)",
}


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write ``pieces`` one after the other, hash them on the way, and sync. ``OSError`` names ``path``."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "wb", buffering=0) as file:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                for at in range(0, len(view), _CHUNK_BYTES):
                    chunk = view[at : at + _CHUNK_BYTES]
                    digest.update(chunk)
                    size += len(chunk)
                    while chunk:
                        chunk = chunk[file.write(chunk) :]
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise
    return FileRecord(bytes=size, sha256=digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Make the names inside ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain(error: OSError) -> str:
    """What went wrong with which path, and what to do about it."""
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    remedy = _REMEDIES.get(error.errno or 0, "choose another folder (train.output)")
    return f"cannot write {error.filename}: {os.strerror(error.errno or 0)} ({name}); {remedy}"


def check_space(folder: Path, needed_bytes: int) -> None:
    """``CheckpointError`` if ``folder``, which need not exist yet, has less than ``needed_bytes`` free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise CheckpointError(
            f"a checkpoint needs {_gib(needed_bytes)}, {_gib(free)} free at {existing}; {_REMEDIES[errno.ENOSPC]}"
        )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**29 else f"{n_bytes / 2**20:.1f} MiB"
