"""Read the weights of a pretrained model from its folder, and refuse what does not fit.

Weights that stay in the dtype in which they are stored are not read but mapped: a page of the file is read when it is
looked at, is shared by all processes of the machine, and copied when it is written to (the file is never). So a rank
that cuts its own part out of a mapped model never holds more than that part. Families whose tensors are stored in
another form (experts one by one) get new ones, as transformers makes them.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import nn

from paceline.errors import ModelError
from paceline.models.heads import Head, auto_class
from paceline.models.initialise import initialise_missing
from paceline.models.quiet import quiet

log = logging.getLogger(__name__)


STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load(
    folder: Path, head: Head, config: Any, *, seed: int, attention: str | None, as_stored: bool = False
) -> nn.Module:
    """The model of ``folder`` with its weights as fp32 on the CPU, whatever precision they are stored in.

    ``as_stored`` leaves parameters in the dtype of the folder's tensors where they all have one; buffers are fp32. A
    head that the folder does not hold (a base model) is filled by (seed, name), and a warning says so. Raises
    ``ModelError`` if the body is not complete, if the folder holds layers the model does not have, if shapes differ, or
    if a file is damaged.
    """
    stored = stored_dtype(folder) if as_stored else None
    with quiet(), _in_dtype(stored):
        try:
            model, report = auto_class(head).from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation=attention,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
        except Exception as error:  # from file system, safetensors, or the family's own conversion
            raise ModelError(f"the weights in {folder} cannot be read: {' '.join(str(error).split())}") from error
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise ModelError(
            f"{folder}: {len(report['mismatched_keys'])} tensors have another shape than config.json asks for, "
            f"{name}: {list(stored)} in the file, {list(wanted)} in the model."
        )
    _refuse_broken_tie(model, folder)
    missing = sorted(report["missing_keys"] - set(model.all_tied_weights_keys))
    unexpected = sorted(report["unexpected_keys"])
    if missing or unexpected:
        _judge(model, folder, missing, unexpected)
        initialise_missing(model, seed, missing)
    return model.train()  # type: ignore[no-any-return]


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of all floating-point tensors in a folder's safetensors files; None where they have several."""
    found = set()
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except Exception:  # a damaged file, of which ``load`` tells
            return None
    dtypes = [STORED[name] for name in found if name in STORED]
    return dtypes[0] if len(dtypes) == 1 else None


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


@contextmanager
def _in_dtype(stored: torch.dtype | None) -> Iterator[None]:
    """Transformers loads parameters, and only these, in this dtype. Its own option would also round what a family
    computes itself (embedding scales, tables of positions)."""
    if stored is None:
        yield
        return
    from transformers import PreTrainedModel

    def plan(model: nn.Module, _: torch.dtype) -> dict[str, torch.dtype]:
        return {f"^{re.escape(name)}$": stored for name, p in model.named_parameters() if p.is_floating_point()}

    with mock.patch.object(PreTrainedModel, "_get_dtype_plan", plan):
        yield


def _judge(model: Any, folder: Path, missing: list[str], unexpected: list[str]) -> None:
    """A head more or less is normal; anything else means that folder and model are not the same."""
    body = _body_names(model)
    parts = {name.partition(".")[0] for name in body}
    prefix = f"{model.base_model_prefix}."

    def inner(name: str) -> str:
        return name.removeprefix(prefix)

    lacking = [name for name in missing if inner(name) in body]
    strange = [name for name in unexpected if inner(name) not in body and inner(name).partition(".")[0] in parts]
    problems = []
    if lacking:
        problems.append(f"lacks {_listed(lacking)}")
    if strange:
        problems.append(f"holds {_listed(strange)}, which the model does not have")
    if problems:
        raise ModelError(f"{folder} {' and '.join(problems)}. Its config.json and its weights are not of one model.")
    if missing:
        log.warning("%s has no %s: initialised from the seed.", folder, _listed(missing))
    if unexpected:
        log.warning("%s also holds %s, which this head does not use.", folder, _listed(unexpected))


def _body_names(model: Any) -> set[str]:
    """Names of the tensors below the head, as the family's model without a head has them."""
    from transformers import AutoModel

    with torch.device("meta"):
        return set(AutoModel.from_config(model.config).state_dict())


def _refuse_broken_tie(model: Any, folder: Path) -> None:
    """Transformers unties weights that should be one but are stored as two that differ."""
    declared = model.get_expanded_tied_weights_keys(all_submodels=True)
    if broken := sorted(set(declared) - set(model.all_tied_weights_keys)):
        raise ModelError(
            f"{folder}: config.json ties {broken[0]} to {declared[broken[0]]}, but the file holds two that differ. "
            f"Set tie_word_embeddings to false in config.json."
        )


def _listed(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
