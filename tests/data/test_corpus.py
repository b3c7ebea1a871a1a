"""The corpus every machine has."""

import subprocess
import sys
from pathlib import Path

import pytest

from paceline.data.corpus import CORPORA
from paceline.data.read import find


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_is_readable_text_in_an_order_that_stays(name: str) -> None:
    files = find(name)
    assert [file.name for file in files] == [file.name for file in find(name)]
    assert len({file.name for file in files}) == len(files)
    for file in files:
        with file.open() as handle:
            handle.read().decode()


def test_python_docs_is_help_topics_and_library_without_its_tests() -> None:
    names = [file.name.removeprefix("python-docs/") for file in find("python-docs")]
    topics = [name for name in names if name.startswith("topics/")]
    assert topics == sorted(topics) == names[: len(topics)]
    assert "topics/assert" in topics
    library = {name.removeprefix("library/") for name in names[len(topics) :]}
    assert {"ast.py", "json/decoder.py", "asyncio/base_events.py"} <= library
    unwanted = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data"}
    assert not [name for name in library if unwanted & set(Path(name).parts)]


def test_python_docs_is_about_12_mb() -> None:
    n_bytes = 0
    for file in find("python-docs"):
        with file.open() as handle:
            n_bytes += len(handle.read())
    assert 8e6 < n_bytes < 20e6


def test_it_is_found_from_a_virtual_environment(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    program = "from paceline.data.corpus import python_docs; print(sum(1 for _ in python_docs()))"
    done = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "python"), "-c", program],
        env={"PYTHONPATH": ":".join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) == len(find("python-docs"))
