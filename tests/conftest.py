"""The environment every test runs in: one thread per process, no network, a cache of its own."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from paceline.workers.pool import Pool

# Before torch is imported, which reads the first of these once. Processes that tests start inherit all of them.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of tokenised data, shared by the tests of one session and apart from the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def pool() -> Iterator["Pool"]:
    """Four long-lived gloo workers."""
    from paceline.workers.pool import Pool  # imports torch: not before the environment above is set

    with Pool(4) as workers:
        yield workers
