"""Memory this process uses, now and at its peak."""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def used_bytes(device: torch.device) -> int:
    """Memory allocated on the GPU, or resident in main memory, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * _PAGE_BYTES


def reset_peak(device: torch.device) -> None:
    """Let ``peak_bytes`` begin anew; where the kernel does not allow it, the peak is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most memory allocated on the GPU, or resident in main memory, since ``reset_peak``, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else used_bytes(device)


def give_back() -> None:
    """Give memory that is free inside this process back to the system, so that what is used is seen; glibc only."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Main memory that can still be had: what the kernel says, or less where the process's groups have a limit."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", (proc / "meminfo").read_text(encoding="ascii"), re.MULTILINE)
    assert found, "the kernel says MemAvailable since Linux 3.14"
    return min([int(found[1]) * 1024, *_left_in_groups(proc, groups)])


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Of the process's control group and of those around it, versions 2 and 1; cached files can be let go."""
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in {"", "memory"}:
                continue
            top, limit, used, cached = (
                (groups, "memory.max", "memory.current", "inactive_file")
                if not controllers
                else (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            )
            own = top / path.strip("/")
            for group in (own, *own.parents):
                if group.is_relative_to(top):
                    yield from _left_in(group / limit, group / used, group / "memory.stat", cached)


def _left_in(limit: Path, used: Path, statistics: Path, cached: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # no limit is no file, or the word "max"
        found = re.search(rf"^{cached} (\d+)$", statistics.read_text(encoding="ascii"), re.MULTILINE)
        yield max(0, int(limit.read_text()) - int(used.read_text()) + (int(found[1]) if found else 0))
