"""Make a virtual environment from requirements.lock, or leave it alone if it is already right.

    python tools/bootstrap.py .venv                    all that the lock pins, and paceline in editable form
    python tools/bootstrap.py .venv-newest --newest    the newest releases that pyproject.toml allows
    python tools/bootstrap.py build/venv --wheel FILE  a built wheel and what it asks for, at the locked versions

The locked environment is remade when the lock file, the Python version or the build of torch is not that of its stamp.
Standard library only, for it runs before anything is installed. Wheels only, so that no compiler is needed.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
PYPROJECT = ROOT / "pyproject.toml"
STAMP = "paceline-stamp.json"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_BUILD_MB = 192  # torch 2.13.0+cpu for Linux on x86-64; the default build, with its CUDA libraries, is some 3,000
WHEELS_ONLY = ("--only-binary", ":all:")


def main() -> None:
    """Read the command line and bring one environment up to date."""
    parser = argparse.ArgumentParser(description="Make a virtual environment, or leave it alone if it is right.")
    parser.add_argument("venv", type=Path)
    parser.add_argument("--torch", choices=("auto", "cpu", "default"), default="auto", help="which build of torch")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--newest", action="store_true", help="newest allowed releases instead of the locked ones")
    kind.add_argument("--wheel", type=Path, help="this wheel of paceline instead of the source tree")
    options = parser.parse_args()
    build = choose_build(options.torch)
    with LOCK.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two `make` started together make one environment, not two halves
        if options.newest:
            make_newest(options.venv, build)
        elif options.wheel:
            make_from_wheel(options.venv, build, options.wheel)
        else:
            make_locked(options.venv, build)


def choose_build(asked: str) -> str:
    """``cpu``, or ``default`` for what pip takes by itself, which on Linux is a CUDA build."""
    if asked != "auto":
        return asked
    nvidia = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    return "default" if nvidia or sys.platform != "linux" else "cpu"


def make_locked(venv: Path, build: str) -> None:
    """Every locked package and the source tree; only the latter again if only pyproject.toml has changed."""
    environment = [str(venv.resolve()), python_minor(), build, digest(LOCK)]
    stamp = {"environment": environment, "project": digest(PYPROJECT)}
    found = read_stamp(venv)
    if found == stamp:
        return
    if found.get("environment") != environment:
        create(venv)
        install_torch(venv, build)
        say(f"installing the {len(locked())} packages of {LOCK.name}")
        started = time.monotonic()
        pip(venv, "install", "-qq", *WHEELS_ONLY, "-r", str(LOCK))
        say(f"installed in {time.monotonic() - started:.0f} s")
    pip(venv, "install", "-qq", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    (venv / STAMP).write_text(json.dumps(stamp))  # last: an environment cut off half-way has no stamp


def make_newest(venv: Path, build: str) -> None:
    """The source tree and the newest releases of all it asks for; always made afresh, for they change by the day."""
    create(venv)
    pip(venv, "install", "-qq", *WHEELS_ONLY, "--upgrade", "setuptools")  # to build the source tree without isolation
    if build == "cpu":
        project = tomllib.loads(PYPROJECT.read_text())["project"]
        cpu_build(venv, "install", next(wanted for wanted in project["dependencies"] if wanted.startswith("torch>")))
    say("installing the newest releases that pyproject.toml allows")
    pip(venv, "install", "-qq", "--prefer-binary", "--no-build-isolation", "-e", f"{ROOT}[dev,docs,gguf,privacy,ray]")
    pip(venv, "freeze", "--exclude-editable")


def make_from_wheel(venv: Path, build: str, wheel: Path) -> None:
    """A built wheel and what its own metadata asks for, nothing else, at the locked versions."""
    create(venv)
    install_torch(venv, build)
    pip(venv, "install", "-qq", *WHEELS_ONLY, "-c", str(LOCK), str(wheel))


def create(venv: Path) -> None:
    """An environment at ``venv`` that holds pip and nothing else."""
    if importlib.util.find_spec("ensurepip") is None:
        stop(
            f"{interpreter()} cannot make a virtual environment: its module ensurepip is missing. "
            f"On Debian and Ubuntu: apt-get install python{python_minor()}-venv"
        )
    say(f"making {venv} with Python {platform.python_version()}")
    run([interpreter(), "-m", "venv", "--clear", str(venv)], "could not make the environment")


def install_torch(venv: Path, build: str) -> None:
    """The locked CPU build, if the CPU build is the one to take; pip brings the default one with the other packages."""
    release = locked()["torch"]
    if build == "default":
        say(f"torch {release}: what pip's own sources give (about 3 GB to download if that is a CUDA build)")
    else:
        cpu_build(venv, "install", f"torch=={release}+cpu")


def cpu_build(venv: Path, verb: str, wanted: str, *options: str) -> None:
    """Let pip ``install`` or ``download`` a CPU build of torch, from its own sources or from CPU_INDEX."""
    arguments = ("--no-deps", *WHEELS_ONLY, wanted)
    exact = "==" in wanted  # a range would be met by a build for other devices, too
    own = pip_command(venv, "install", "--dry-run", "-qq", *arguments)
    if exact and subprocess.run(own, capture_output=True).returncode == 0:
        environment, origin = {}, "pip's own sources"
    else:
        # Both variables: an extra index in the user's pip settings may hold a newer build that is not for CPUs.
        environment, origin = {"PIP_INDEX_URL": CPU_INDEX, "PIP_EXTRA_INDEX_URL": CPU_INDEX}, CPU_INDEX
    say(f"{wanted}: the CPU build ({CPU_BUILD_MB} MB) from {origin}")
    if subprocess.run(pip_command(venv, verb, *options, *arguments), env=os.environ | environment).returncode != 0:
        stop(
            f"no CPU build of {wanted} for Python {platform.python_version()} from pip's own sources or {CPU_INDEX}. "
            "Check the network, name another Python (make PYTHON=python3.12), put the wheel into a folder that "
            "PIP_FIND_LINKS names, or take the default build (make TORCH=default)"
        )


def locked() -> dict[str, str]:
    """Name -> version of each package in the lock."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(), flags=re.MULTILINE))


def python_minor() -> str:
    """Such as 3.11: environments of one minor version are alike, whichever of a machine's Pythons made them."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def interpreter() -> str:
    """The Python to make environments with: the installed one, even if this one runs inside an environment."""
    return os.path.realpath(sys.executable)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_stamp(venv: Path) -> dict[str, object]:
    """What the environment was made from; empty if it is missing or unfinished, or if its Python is gone."""
    if not (venv / "bin" / "python").exists():
        return {}
    try:
        stamp: dict[str, object] = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp


def pip_command(venv: Path, *arguments: str) -> list[str]:
    """The environment's own pip as a command."""
    return [str(venv / "bin" / "python"), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]


def pip(venv: Path, *arguments: str) -> None:
    """Run the environment's own pip; end the program if it fails."""
    run(pip_command(venv, *arguments), "pip could not install what is needed; its own message stands above")


def run(command: list[str], failure: str) -> None:
    """Run a command; end the program with ``failure`` if the command fails."""
    if subprocess.run(command).returncode != 0:
        stop(failure)


def say(message: str) -> None:
    """One line of progress."""
    print(f"bootstrap: {message}", flush=True)


def stop(message: str) -> NoReturn:
    """End the program with one line of explanation."""
    sys.exit(f"bootstrap: error: {message}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("bootstrap: interrupted; the next run makes the environment afresh")
