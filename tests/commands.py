"""Running the command line in a process of its own, forked from one that has imported everything."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TIMEOUT_S = 90.0
_PRELOAD = ["paceline.recipes.train", "paceline.recipes.explain", "transformers.models.llama.modeling_llama"]


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit status and what it printed."""

    status: int | None
    out: str
    err: str

    def json(self) -> Any:
        """The document on the last line."""
        return json.loads(self.out.splitlines()[-1])


class Command:
    """A started ``paceline`` command."""

    def __init__(self, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._out, self._err = folder / ".out", folder / ".err"
        self._process = context.Process(
            target=_main, args=(folder, arguments, self._out, self._err, {**os.environ, **(environment or {})})
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the launcher."""
        assert self._process.pid
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the launcher."""
        os.kill(self.pid, number)

    def end(self) -> Ended:
        """Wait for the command to end."""
        self._process.join(TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError(f"no end within {TIMEOUT_S:g} s: {self._out.read_text()} {self._err.read_text()}")
        return Ended(self._process.exitcode, self._out.read_text(), self._err.read_text())


def paceline(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a command in ``folder`` to its end."""
    return Command(folder, *arguments, environment=environment).end()


def _main(folder: Path, arguments: tuple[str, ...], out: Path, err: Path, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = ["paceline", *arguments]
    from paceline.cli import main

    with contextlib.suppress(KeyboardInterrupt):
        main()


WORDS = ("ash beech birch cedar elm fir hazel larch lime maple oak pine rowan spruce willow yew").split()


def write_texts(folder: Path, files: int = 3, paragraphs: int = 60) -> None:
    """A little text with something to learn: sentences of a fixed shape."""
    texts = folder / "texts"
    texts.mkdir()
    for f in range(files):
        lines = []
        for p in range(paragraphs):
            a, b, c = (WORDS[(f * 7 + p * k) % len(WORDS)] for k in (1, 3, 5))
            lines.append(f"The {a} stands beside the {b}, and paragraph {p} of file {f} ends with a {c}.\n")
        (texts / f"{f}.txt").write_text("\n".join(lines))


def tiny_config(folder: Path, **sections: Any) -> Path:
    """A config that trains in seconds on ``texts/``, with sections replaced or merged; returns its path."""
    tree: dict[str, Any] = {
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": 400,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
            }
        },
        "data": {"source": "texts/*.txt", "document": "paragraph"},
        "batch": {"sequences": 4, "sequence_tokens": 32},
        "train": {"steps": 6, "output": "run"},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "precision": "fp32",
        "track": {"display": "plain", "tensorboard": False},
    }
    for key, value in sections.items():
        old = tree.get(key)
        tree[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
