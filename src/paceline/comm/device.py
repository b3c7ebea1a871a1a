"""The device of a rank: which one, what it can do, and how fast it multiplies matrices."""

import ctypes
import os
import platform
import time
from dataclasses import dataclass

import torch

from paceline.comm.ranks import Coordinates
from paceline.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Device:
    """One rank's device and the precision its units are made for."""

    torch_device: torch.device
    backend: str
    """The torch.distributed backend for tensors on this device."""
    name: str
    units: frozenset[str]
    """The dtypes of 16 bits, ``bf16`` and ``fp16``, whose matrices it multiplies in hardware."""
    threads: int


def claim(coordinates: Coordinates) -> Device:
    """Take this rank's device: a GPU of its own where there are any, else a share of the processor's cores.

    Sets the thread count of this process and, on a GPU, the current device.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", coordinates.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return Device(
            torch_device=device,
            backend="nccl",
            name=torch.cuda.get_device_name(device),
            units=units(device),
            threads=torch.get_num_threads(),
        )
    threads = _asked_threads() or max(1, cores() // coordinates.local_ranks)
    torch.set_num_threads(threads)
    _keep_freed_memory()
    return Device(
        torch_device=torch.device("cpu"),
        backend="gloo",
        name=processor_name(),
        units=units(torch.device("cpu")),
        threads=threads,
    )


def _asked_threads() -> int:
    """Of ``OMP_NUM_THREADS``, which may hold a number for each level of nesting; 0 if it says nothing."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked and not (asked.isdecimal() and int(asked)):
        raise PlanError(f"OMP_NUM_THREADS={asked!r}: expected a number of threads, 1 or more; mend or unset it")
    return int(asked or 0)


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one.

    By default it gives large blocks back to the kernel, and every step faults them in again page by page: a sixth of
    the time of a small model's step. Other C libraries have no such switch.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the top of the heap stays


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


_DTYPES_WITH_UNITS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_PROCESSOR_UNITS = {
    "bf16": ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
"""What gives a processor units for a dtype: x86's AVX-512 and AMX, Arm's vectors; names of ``torch.cpu``."""


def units(device: torch.device) -> frozenset[str]:
    """The dtypes of 16 bits whose matrices a device multiplies in hardware: ``bf16``, ``fp16``."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return frozenset({"fp16", "bf16"} if has_bf16 else {"fp16"})
    capabilities = torch.cpu.get_capabilities()
    return frozenset(
        dtype for dtype, keys in _PROCESSOR_UNITS.items() if any(capabilities.get(key, False) for key in keys)
    )


def processor_name() -> str:
    """The processor's name as the kernel gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def matmul_flops_per_s(device: Device, dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.2) -> float:
    """Measured peak of square matrix products on this rank's device, in FLOP/s: the best of repeated tries.

    Matrices of a dtype without units are smaller: a large product can take seconds.
    """
    if _DTYPES_WITH_UNITS.get(dtype, "") not in device.units | {""}:
        size = min(size, 256)
    a_MM = torch.randn(size, size, device=device.torch_device).to(dtype)
    out_MM = a_MM @ a_MM
    best_s = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a_MM, a_MM, out=out_MM)
        if device.torch_device.type == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * size**3 / best_s
