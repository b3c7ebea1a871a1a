"""Data prepared in a process of its own, while this one imports what the ranks will need.

Tokenising starts threads, and a process with threads cannot be forked safely; so the launcher leaves it to a child, and
stays free of threads until the ranks have been forked.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paceline.config import Config
from paceline.errors import DataError, WorkerError
from paceline.workers.process import Child, Line, start_method


def prepare_in_child(config: Config, log: Path, *, say: Callable[[str], None], debug: bool) -> None:
    """Fill the cache of tokenised data that the ranks will open, and import their modules meanwhile.

    Raises what the preparation raised, as a ``DataError`` with its message.
    """
    child = Child("preparing the data", _Prepare(config), log, method=start_method(), debug=debug)
    try:
        preload(config)
        while True:
            message = child.line.receive()
            if message["kind"] == "say":
                say(message["text"])
            elif message["kind"] == "error":
                trace = f"\n{message['traceback']}" if message["traceback"] else ""
                where = "" if message["expected"] else f" (log: {log})"
                raise DataError(f"{message['message']}{where}{trace}")
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
        try:
            importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        except ImportError:
            pass  # a family that lives elsewhere: the ranks import it themselves, or say that it is unknown


@dataclass(frozen=True)
class _Prepare:
    config: Config

    def __call__(self, line: Line) -> None:
        from paceline.train.assemble import prepare_data, resolve_model

        source = resolve_model(self.config)
        prepare_data(self.config, source, say=lambda text: line.send("say", text=text))
