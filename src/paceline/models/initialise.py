"""First values of parameters, as a function of (seed, module name) alone.

Every module draws from a generator of its own, keyed by the seed and the module's full name. So the values do not
depend on the number of ranks, on the order in which modules are visited, or on what else the model holds, and a block
made alone is bit-equal to the same block of the whole model.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paceline.errors import ModelError


def initialise(module: nn.Module, seed: int, *, name: str = "", owner: nn.Module | None = None) -> None:
    """Fill the parameters of ``module`` in place; its tensors are on the CPU. The caller's random state is untouched.

    Inside a model of transformers each submodule follows the family's own rule (``_init_weights`` of the nearest
    ``PreTrainedModel``), which also recomputes buffers such as rotary frequencies. Elsewhere each submodule that has
    ``reset_parameters`` is reset; parameters that stand directly in a module without it keep the values they have.

    ``name`` is the full name of ``module`` in its model and ``owner`` the ``PreTrainedModel`` around it: both are
    needed to make one block alone. A tied parameter takes the value of the module that holds it first.
    """
    _forget_flags(module)
    _draw(module, seed, name, owner)


def initialise_missing(model: nn.Module, seed: int, missing: Iterable[str]) -> None:
    """Fill only what ``missing`` names of a transformers model; other parameters and buffers keep their values."""
    from transformers.initialization import guard_torch_init_functions

    named = model.state_dict(keep_vars=True)
    wanted = {id(named[name]) for name in missing}  # by identity: a tied parameter has several names
    _forget_flags(model)
    for tensor in named.values():
        tensor._is_hf_initialized = id(tensor) not in wanted
    with guard_torch_init_functions():
        _draw(model, seed, "", None)
    _forget_flags(model)


def materialise(model: nn.Module, seed: int) -> None:
    """Give a model of transformers that was built on the meta device its memory (CPU) and its first values.

    Raises ``ModelError`` with the names of parameters and buffers that the family's own code leaves unset.
    """
    model.to_empty(device="cpu")
    _poison(model)
    model.tie_weights()  # type: ignore[operator]  # to_empty gives each name of a tied parameter its own memory
    initialise(model, seed)
    if unset := _poisoned(model):
        raise ModelError(
            f"{type(model).__name__} does not say how to initialise {', '.join(unset)}. "
            f"Start from weights with model.path instead."
        )


def _draw(module: nn.Module, seed: int, name: str, owner: nn.Module | None) -> None:
    pretrained = _pretrained_class()
    parts = list(module.named_modules())
    owners: dict[str, nn.Module | None] = {}
    for path, part in parts:
        around = owners[path.rpartition(".")[0]] if path else owner
        owners[path] = part if isinstance(part, pretrained) else around
    # Reversed: children come before their parents, who may draw a child again (GPT-2 scales c_proj by depth), and the
    # first holder of a tied parameter comes last.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _one_thread():
        for path, part in reversed(parts):
            torch.default_generator.manual_seed(_key(seed, ".".join(filter(None, (name, path)))))
            _fill(part, owners[path])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Factorisations (orthogonal matrices) give other last bits with another number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fill(part: nn.Module, owner: nn.Module | None) -> None:
    if owner is not None:
        owner._init_weights(part)  # type: ignore[operator]
    elif isinstance(part, nn.MultiheadAttention):
        part._reset_parameters()  # torch gives this class no public name for it
    elif callable(reset := getattr(part, "reset_parameters", None)):
        reset()


def _key(seed: int, name: str) -> int:
    """63 bits, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _pretrained_class() -> Any:
    """``PreTrainedModel``, or no class at all if nothing has imported transformers: then no module can be one."""
    module = sys.modules.get("transformers.modeling_utils")
    return module.PreTrainedModel if module else ()


def _forget_flags(module: nn.Module) -> None:
    """Transformers marks tensors it has filled and would silently skip them."""
    for tensor in (*module.parameters(), *module.buffers()):
        if hasattr(tensor, "_is_hf_initialized"):
            del tensor._is_hf_initialized


def _poison(model: nn.Module) -> None:
    """Values that no initialisation gives, so that what is left unset can be told from what was filled."""
    with torch.no_grad():
        for _, tensor in _tensors(model):
            if (mark := _mark(tensor.dtype)) is not None:
                tensor.fill_(mark)


def _poisoned(model: nn.Module) -> list[str]:
    unset = []
    for name, tensor in _tensors(model):
        mark = _mark(tensor.dtype)
        if mark is not None and bool((tensor.isnan() if mark != mark else tensor == mark).any()):
            unset.append(name)
    return unset


def _mark(dtype: torch.dtype) -> float | int | None:
    if dtype.is_floating_point:
        return float("nan")
    return torch.iinfo(dtype).min if dtype in (torch.int8, torch.int16, torch.int32, torch.int64) else None


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
