"""Memory this process uses, now and at its peak."""

import os
import re
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
