"""Turn a GGUF file (the format of llama.cpp) into a plain Hugging Face model folder that can be trained on.

The weights of most GGUF files are quantised; the folder holds what they stand for, so it is not the original model.
"""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch

from paceline.errors import MissingExtraError, ModelError
from paceline.models.quiet import quiet


def import_gguf(file: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config, tokenizer and de-quantised weights of ``file`` to the new folder ``folder``.

    Raises ``MissingExtraError`` without the ``gguf`` package, and ``ModelError`` if ``folder`` exists, if the file is
    not there, is of a family that transformers cannot read from GGUF, or does not hold every weight of its model.
    """
    if not file.is_file():
        raise ModelError(f"{file} does not exist; expected a GGUF file.")
    if folder.exists():
        raise ModelError(f"{folder} exists already; choose a new folder for the imported model.")
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("reading a GGUF file needs the gguf package: pip install 'paceline[gguf]'.")
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # of an import that was killed
    try:
        with quiet():
            _convert(file, fresh, dtype)
        fresh.rename(folder)
    except ModelError:
        raise
    except Exception as error:  # from the reader, the family's mapping, the tokenizer or the file system
        raise ModelError(f"{file} cannot be imported to {folder}: {' '.join(str(error).split())}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _convert(file: Path, folder: Path, dtype: torch.dtype) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _fill(model, file, dtype)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _fill(model: Any, file: Path, dtype: torch.dtype) -> None:
    """Give a model on the meta device the tensors of ``file``."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model, torch_dtype=dtype)["tensors"]
    needed = set(model.state_dict()) - set(model.all_tied_weights_keys)
    if lacking := sorted(needed - set(tensors)):
        raise ModelError(f"{file} lacks {len(lacking)} weights of its model, among them {lacking[0]}.")
    model.load_state_dict({name: tensors[name] for name in needed}, strict=False, assign=True)
    model.tie_weights()
