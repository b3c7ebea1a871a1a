"""Memory this rank uses now."""

import os

import torch

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def used_bytes(device: torch.device) -> int:
    """Memory allocated on the GPU, or resident in main memory, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * _PAGE_BYTES
