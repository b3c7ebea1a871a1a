"""Find the folder of a pretrained model: a local one, or a copy of a repository on the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from paceline.errors import ModelError

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""Files taken from the hub; pickled weights are never read."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def locate(path: str) -> Path:
    """The local folder behind a folder or hub name, downloaded if it is not yet here.

    Raises ``ModelError`` if it is neither, or has no config or no weights as safetensors.
    """
    folder = Path(path).expanduser()
    if folder.exists():
        if not folder.is_dir():
            raise ModelError(
                f"model.path={path!r} is a file; expected a folder with config.json and model.safetensors."
            )
    elif folder.is_absolute() or path.startswith("."):
        raise ModelError(f"model.path={path!r} does not exist; expected a Hugging Face model folder or hub name.")
    else:
        folder = _from_hub(path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.path={path!r} has no config.json; expected a Hugging Face model folder.")
    if not has_weights(folder):
        pickled = ", ".join(sorted(file.name for file in folder.glob("*.bin")))
        found = f" ({pickled} is a pickle, which paceline does not read)" if pickled else ""
        raise ModelError(
            f"model.path={path!r} has no model.safetensors{found}. To train from random values use model.config."
        )
    return folder


def has_weights(folder: Path) -> bool:
    """Whether all weight files that a model folder should have are there, as safetensors."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    shards = set(read_json(index).get("weight_map", {}).values())
    return bool(shards) and all((folder / shard).is_file() for shard in shards)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder also holds its tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; ``ModelError`` if it cannot be read as one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a {type(value).__name__}; expected a JSON object.")
    return value


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
        if (cached / "config.json").is_file() and has_weights(cached):
            return cached
    except (LocalEntryNotFoundError, HFValidationError):
        pass  # not here yet, or no such name can exist: the next call says which
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split("\n", 1)[0].split())
        raise ModelError(
            f"model.path={name!r} is neither a folder nor a model that can be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason})"
        ) from error
