"""Write requirements.lock: the newest releases that pyproject.toml allows, with torch held at the version it has there.

    python tools/lock.py

To move torch, change its line in requirements.lock and run this. Resolved against the CPU build of torch; the CUDA
build pins the CUDA libraries it brings by itself.
"""

import json
import subprocess
import tempfile
import tomllib
from pathlib import Path

import bootstrap

HEAD = """\
# Every package of the environment at an exact version. Written by `make lock`; only the line of torch is meant to be
# edited by hand: `make lock` holds torch at that version and takes the newest allowed release of everything else.
"""


def main() -> None:
    """Resolve the ranges for the oldest Python that pyproject.toml admits, and write the lock file."""
    release = bootstrap.locked()["torch"]
    with tempfile.TemporaryDirectory() as folder:
        venv = Path(folder, "venv")
        bootstrap.create(venv)
        bootstrap.cpu_build(venv, "download", f"torch=={release}+cpu", "--dest", folder)
        needed = set(resolve(venv, folder, f"torch=={release}+cpu", str(bootstrap.ROOT)))
        versions = resolve(venv, folder, f"torch=={release}+cpu", f"{bootstrap.ROOT}[dev,docs,gguf,privacy,ray]")
    versions["torch"] = release  # without its build: the lock is for all builds
    runtime = "".join(f"{name}=={versions[name]}\n" for name in sorted(needed))
    development = "".join(f"{name}=={versions[name]}\n" for name in sorted(versions.keys() - needed))
    bootstrap.LOCK.write_text(
        f"{HEAD}\n# what paceline needs to run\n{runtime}\n# what its development needs besides\n{development}"
    )
    bootstrap.say(
        f"{bootstrap.LOCK.name}: {len(needed)} packages to run, {len(versions) - len(needed)} for development"
    )


def resolve(venv: Path, folder: str, *requirements: str) -> dict[str, str]:
    """Name -> version of all that the oldest Python would need for ``requirements``, without paceline itself."""
    oldest = tomllib.loads(bootstrap.PYPROJECT.read_text())["project"]["requires-python"].removeprefix(">=")
    target = ("--python-version", oldest, "--target", f"{folder}/nothing", "--find-links", folder)
    report = ("install", "--dry-run", "-qq", "--report", "-", *bootstrap.WHEELS_ONLY, *target, *requirements)
    done = subprocess.run(bootstrap.pip_command(venv, *report), stdout=subprocess.PIPE)
    if done.returncode != 0:
        bootstrap.stop(f"pip could not resolve {' '.join(requirements)}; its own message stands above")
    found = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    return {item["name"].lower().replace("_", "-"): item["version"] for item in found if item["name"] != "paceline"}


if __name__ == "__main__":
    main()
