"""Train language models on any mix of machines; the way the work is shared never changes what is learned."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "paceline.config",
    "PacelineError": "paceline.errors",
    "StepEvent": "paceline.train.hooks",
    "Trainer": "paceline.recipes.library",
    "read": "paceline.config",
    "run": "paceline.recipes.train",
}

__all__ = ["Config", "PacelineError", "StepEvent", "Trainer", "__version__", "read", "run"]

if TYPE_CHECKING:
    from paceline.config import Config, read
    from paceline.errors import PacelineError
    from paceline.recipes.library import Trainer
    from paceline.recipes.train import run
    from paceline.train.hooks import StepEvent


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import paceline`` costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'paceline' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    globals()[name] = value = getattr(module, name)
    return value
