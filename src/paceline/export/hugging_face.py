"""Write a trained model as a Hugging Face folder, which ``from_pretrained`` and most other programs read.

The folder is written under another name beside its place and renamed when it is whole: a reader never sees half of it.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.errors import ModelError
from paceline.export.weights import write_weights
from paceline.models.describe import count
from paceline.models.heads import auto_class
from paceline.models.source import ModelSource

SHARD_BYTES = 5_000_000_000
PROBES = (" a  b\n\n\tc", "x=1234567; y_z(3.14)", "I'LL don't", "na\u00efve \u4e2d\u6587 e\u0301")
"""Texts on which the ways to split differ: spaces, numbers, apostrophes, scripts, unnormalised letters."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    source: ModelSource,
    tokenizer: Path,
    dtype: torch.dtype = torch.float32,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config, weights, tokenizer, generation config and model card to ``folder``, in place of an older export.

    ``tensors`` maps the names of the model's ``state_dict`` to full tensors; one name of a tied parameter is enough. It
    is read one block of the model at a time, so a mapping that fetches a tensor when asked keeps memory small.
    Parameters are stored as ``dtype``, buffers as they are. Raises ``ModelError`` if names or shapes are not those of
    the model, if ``folder`` holds something else, or if it cannot be written.
    """
    _refuse_other_content(folder)
    model = source.meta()
    fresh = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(fresh, ignore_errors=True)  # of an export that was killed
        fresh.mkdir(parents=True)
        _write_configs(fresh, model, source, dtype)
        _copy_tokenizer(tokenizer, fresh)
        write_weights(fresh, model, tensors, dtype, shard_bytes)
        (fresh / "README.md").write_text(_card(folder.name, model, source, dtype), encoding="utf-8")
        _replace(folder, fresh)
    except OSError as error:
        raise ModelError(f"the export cannot be written to {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _refuse_other_content(folder: Path) -> None:
    is_export = folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))
    if folder.exists() and not is_export:
        raise ModelError(f"{folder} exists and is not a model folder. Choose another place for the export.")


def _write_configs(folder: Path, model: Any, source: ModelSource, dtype: torch.dtype) -> None:
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    own = source.folder / "generation_config.json" if source.folder else None
    if own and own.is_file():
        shutil.copyfile(own, folder / own.name)
    elif model.can_generate():
        model.generation_config.save_pretrained(folder)


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    files = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if not files:
        raise ModelError(f"{tokenizer} holds no tokenizer; expected tokenizer.json or a vocabulary file.")
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _replace(folder: Path, fresh: Path) -> None:
    """Put ``fresh`` in the place of ``folder``; two renames, for a file system cannot swap two folders in one."""
    for file in fresh.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        try:
            fresh.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old)
    else:
        fresh.rename(folder)


def _card(name: str, model: Any, source: ModelSource, dtype: torch.dtype) -> str:
    """The model card: what the model is and how to load it."""
    tasks = {"causal": "text-generation", "masked": "fill-mask", "seq2seq": "text2text-generation"}
    auto = auto_class(source.head).__name__
    start = "the weights of another model" if source.folder else "random values"
    return f"""---
library_name: transformers
pipeline_tag: {tasks[source.head]}
tags: [paceline, {source.family}]
---

# {name}

A {source.family} model with a {source.head} head, trained from {start} with paceline.

| | |
|---|---|
| parameters | {count(model):,} |
| vocabulary | {source.vocabulary:,} |
| stored as | {str(dtype).removeprefix("torch.")} |

```python
from transformers import AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {auto}.from_pretrained("{name}")
```
"""


def reads_as_trained(folder: Path) -> bool:
    """Whether ``AutoTokenizer`` splits text as the exported ``tokenizer.json`` does.

    For a few families (qwen2 among them) transformers 5.23 rebuilds the family's own splitting, whatever the file says.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return True
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return all(
        own.encode(text, add_special_tokens=False).ids == loaded(text, add_special_tokens=False).input_ids
        for text in PROBES
    )
