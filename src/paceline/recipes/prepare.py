"""Data prepared in a process of its own, while this one imports what the ranks will need.

Tokenising starts threads, and a process with threads cannot be forked safely; so the launcher leaves it to a child, and
stays free of threads until the ranks have been forked.
"""

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from paceline.config import Config
from paceline.errors import WorkerError
from paceline.workers.process import Child, Line, start_method, told_error


def prepare_in_child(config: Config, log: Path, *, say: Callable[[str], None], debug: bool) -> None:
    """Fill the cache of tokenised data that the ranks will open, and import their modules meanwhile.

    Raises what the preparation raised, or what is wrong with the model, before the data has been read.
    """
    child = Child("preparing the data", _Prepare(config), log, method=start_method(), debug=debug)
    try:
        preload(config)
        check_model(config)
        while True:
            message = child.line.receive()
            if message["kind"] == "say":
                say(message["text"])
            elif message["kind"] == "error":
                raise told_error(message, log)
            else:
                break
    except EOFError:
        child.process.join()
        raise WorkerError(f"preparing the data ended early: {child.death()}; log: {log}") from None
    finally:
        child.process.kill()
        child.process.join()


def preload(config: Config) -> None:
    """Import what a rank needs, once, before the fork."""
    importlib.import_module("paceline.train.assemble")
    family = (config.model.config or {}).get("model_type") if config.model else None
    if family:
        with suppress(ImportError):  # a family that lives elsewhere: the ranks import it, or say that it is unknown
            importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def check_model(config: Config) -> None:
    """Describe the model once, without memory, so that a config that does not fit fails in the first seconds."""
    from paceline.train.assemble import check_positions, resolve_model

    source = resolve_model(config)
    if source is not None:
        check_positions(source, config.batch.sequence_tokens)
        source.meta()


@dataclass(frozen=True)
class _Prepare:
    config: Config

    def __call__(self, line: Line) -> None:
        from paceline.train.assemble import prepare_data, resolve_model

        source = resolve_model(self.config)
        prepare_data(self.config, source, say=lambda text: line.send("say", text=text))
