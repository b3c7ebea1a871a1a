"""Kernels of ours in C++, compiled for this processor when they are first used, and kept."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import torch

from paceline.data.cache import default_folder, entry
from paceline.errors import PlanError

HEADERS = Path(__file__).parent
"""Where those of our own are, which kernels may include."""
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-std=c++20", "-shared", "-fPIC")
LIBRARY = "kernel.so"


def require_compiler(what: str) -> str:
    """The C++ compiler that torch would take; ``PlanError`` if it, or Python's headers, which torch needs, are missing.

    ``what`` needs it: a setting, as the user writes it.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise PlanError(
            f"{what} needs a C++ compiler, and there is no {compiler}. Install one, set CXX, or leave it out"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise PlanError(
            f"{what} needs the headers of Python, and there is no {headers}/Python.h. Install them (python3-dev or the "
            "like), or leave it out"
        )
    return compiler


@cache
def library(source: Path, what: str) -> ctypes.CDLL:
    """The shared library of a C++ file that includes torch's headers; ``PlanError`` if it cannot be compiled."""
    compiler = require_compiler(what)
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    identity = hashlib.blake2b(digest_size=12)
    headers = [header.read_bytes() for header in sorted(HEADERS.glob("*.h"))]
    for part in (
        source.read_bytes(),
        *headers,
        version,
        torch.__version__.encode(),
        " ".join(FLAGS).encode(),
        _processor(),
    ):
        identity.update(part)

    def compile_into(folder: Path) -> None:
        torch_folder = Path(torch.__file__).parent
        command = [compiler, *FLAGS, f"-I{HEADERS}", f"-I{torch_folder / 'include'}", str(source)]
        command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(folder / LIBRARY)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise PlanError(f"{what}: {compiler} cannot compile {source.name}: {first}")

    kept = entry(default_folder(None), f"{source.stem}-{identity.hexdigest()}", compile_into, say=lambda _: None)
    return ctypes.CDLL(str(kept / LIBRARY))


def _processor() -> bytes:
    """What ``-march=native`` goes by: a folder of kernels may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()
