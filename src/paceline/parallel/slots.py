"""Running some of a model's blocks by the family's own forward pass.

A stage of a pipeline calls the whole model, so that masks, positions and kinds of layers are the family's own. In place
of each list of blocks stands a list of slots for that time. A slot passes a block by, calls it, or ends the pass:

    call      0 .. first-1     first                            .. last-1     last
    slot      passes by        calls its block, with what the   calls         ends the pass, and hands
                               stage before computed                          its arguments on

Calls are numbered, not blocks: a block that a model calls several times (ALBERT) may be called by several stages.

What a stage does not compute is NaN there. Were it ever to reach a loss, the loss would say so.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from paceline.errors import ModelError
from paceline.parallel.blocks import blocks


class Walk(Protocol):
    """What is done with the calls of blocks in one forward pass."""

    last: int
    """The call that ends the pass; one more than the last call for a pass to the end."""

    def call(self, number: int, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do something in place of calling ``block``; what it would return. May raise ``Left``."""
        ...


class Left(Exception):
    """Not an error: a forward pass ends before the call that is the next stage's, with what that stage needs."""

    def __init__(self, tensors: tuple[Any, ...]) -> None:
        super().__init__()
        self.tensors = tensors


class StageOutput(Left):
    """Not an error: how a stage before the last hands on its tensors past a caller who expects logits."""


class Slots:
    """The lists of blocks of one model, which only runs in ``walking``."""

    def __init__(self, model: nn.Module) -> None:
        self._lists: list[tuple[nn.Module, str, nn.ModuleList]] = []
        for path in dict.fromkeys(name.rpartition(".")[0] for name in blocks(model)):
            owner, _, attribute = path.rpartition(".")
            home = model.get_submodule(path)
            assert isinstance(home, nn.ModuleList)
            slots = nn.ModuleList([_Slot(self, f"{path}.{i}") for i in range(len(home))])
            self._lists.append((model.get_submodule(owner), attribute, slots))
        self.order: tuple[str, ...] | None = None
        """Names of the blocks in the order of calls; None until it is known."""
        self._model = model
        self._walk: Walk | None = None
        self._number = 0
        self._left = False
        model.forward = _Forward(self, model.forward)

    @contextmanager
    def walking(self, walk: Walk) -> Iterator[None]:
        """Calls of the model run as ``walk`` says, and raise ``StageOutput`` where it leaves before the end."""
        self._walk = walk
        # The last of the model's hooks: those of FSDP2 have seen the tensors before they are raised past the caller.
        handle = self._model.register_forward_hook(self._hand_on)
        try:
            yield
        finally:
            handle.remove()
            self._walk = None

    def _hand_on(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._left:
            raise StageOutput(output)

    def forward(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One pass: the model's output, or the tensors that the next stage needs."""
        walk = self._walk
        assert walk is not None, "a model that is cut into stages is called in Stages.at"
        self._number, self._left = 0, False
        homes = [owner._modules[attribute] for owner, attribute, _ in self._lists]
        try:
            for (owner, attribute, slots), home in zip(self._lists, homes, strict=True):
                assert isinstance(home, nn.ModuleList)
                for slot, block in zip(slots, home, strict=True):
                    slot._modules["block"] = block
                owner._modules[attribute] = slots
            output = plain(*args, **kwargs)
        except Left as left:
            self._left = True
            return left.tensors
        finally:
            for (owner, attribute, _), home in zip(self._lists, homes, strict=True):
                owner._modules[attribute] = home
        if self.order is not None and (self._number, walk.last) != (len(self.order), len(self.order)):
            raise ModelError(f"the model called {self._number} blocks; expected {min(walk.last, len(self.order))}")
        return output

    def call(self, slot: "_Slot", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The next call of a block."""
        number, self._number = self._number, self._number + 1
        if self.order is not None and self.order[number : number + 1] != (slot.name,):
            raise ModelError(
                f"call {number} of a block is that of {slot.name}; it was another one when stages were cut"
            )
        assert self._walk is not None
        return self._walk.call(number, slot.name, slot.block, args, kwargs)


class _Slot(nn.Module):
    """Stands for a block; what it does not have itself, it has of the block."""

    def __init__(self, slots: Slots, name: str) -> None:
        super().__init__()
        self.__dict__.update(slots=slots, name=name)

    @property
    def block(self) -> nn.Module:
        """What stands in the model's list now. It is a child, for models that ask for the dtype of their parameters."""
        block: nn.Module = self.__dict__["_modules"]["block"]
        return block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The next call."""
        return self.__dict__["slots"].call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class _Forward:
    """The forward of a model in slots."""

    def __init__(self, slots: Slots, plain: Callable[..., Any]) -> None:
        self._slots = slots
        self._plain = plain
        functools.update_wrapper(self, plain)  # who asks for the arguments of forward sees the real ones

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._slots.forward(self._plain, args, kwargs)


class Absent(nn.Module):
    """Stands where a block would that this rank does not hold: its attributes, without its weights."""

    def __init__(self, skeleton: nn.Module) -> None:
        super().__init__()
        self.__dict__["skeleton"] = skeleton

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["skeleton"], name)


@dataclass(frozen=True, eq=False)
class Returned:
    """What a call returned, as far as passing it by needs it."""

    spec: TreeSpec
    leaves: tuple[Any, ...]
    """A value; or, for a tensor, the number of the argument that it is shaped like (a ``_Like``) or its dtype."""

    @classmethod
    def of(cls, output: Any, arguments: Sequence[Any]) -> "Returned":
        """Describe ``output`` of a call with these leaves of its arguments."""
        leaves, spec = tree_flatten(output)
        return cls(spec, tuple(_described(leaf, arguments) for leaf in leaves))

    def unknown(self, arguments: Sequence[Any]) -> Any:
        """The same kind of thing with NaN for every number."""
        like = next(leaf for leaf in arguments if isinstance(leaf, Tensor))
        return tree_unflatten([_unknown(leaf, arguments, like) for leaf in self.leaves], self.spec)


@dataclass(frozen=True)
class _Like:
    argument: int


def _described(leaf: Any, arguments: Sequence[Any]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf if isinstance(leaf, bool | int | float | str) else None
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and (argument.shape, argument.dtype) == (leaf.shape, leaf.dtype):
            return _Like(i)
    return leaf.dtype


def _unknown(leaf: Any, arguments: Sequence[Any], like: Tensor) -> Any:
    if isinstance(leaf, _Like):
        argument = arguments[leaf.argument]
        return torch.full(argument.shape, _nothing(argument.dtype), dtype=argument.dtype, device=like.device)
    return torch.tensor(_nothing(leaf), dtype=leaf, device=like.device) if isinstance(leaf, torch.dtype) else leaf


def unknown(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of NaN (of 0 for integers and truth values) to be read only: it takes the memory of one element."""
    return torch.full((), _nothing(dtype), dtype=dtype, device=device).expand(tuple(shape))


def _nothing(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else 0


@dataclass(eq=False)
class Span:
    """The walk of one stage: calls ``first`` to ``last - 1``."""

    first: int
    last: int
    returned: Sequence[Returned]
    enter: tuple[int, ...] = ()
    """Which leaves of the arguments of call ``first`` are received."""
    leave: tuple[int, ...] | None = ()
    """Which leaves of the arguments of call ``last`` are handed on; None for all."""
    received: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        self._known: list[tuple[Any, Tensor]] = []

    def call(self, number: int, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pass by, call, or leave."""
        leaves, spec = tree_flatten((args, kwargs))
        if number < self.first:
            return self.returned[number].unknown(leaves)
        if number == self.first:
            self._known = [(leaves[i], tensor) for i, tensor in zip(self.enter, self.received, strict=True)]
            for i, tensor in zip(self.enter, self.received, strict=True):
                leaves[i] = tensor
        # A model may hand what a stage received (the encoder's output) to every later block as well.
        leaves = [self._as_known(leaf) for leaf in leaves]
        if number == self.last:
            raise Left(tuple(leaves) if self.leave is None else tuple(leaves[i] for i in self.leave))
        args, kwargs = tree_unflatten(leaves, spec)
        return block(*args, **kwargs)

    def _as_known(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            for unknown_leaf, tensor in self._known:
                if leaf is unknown_leaf:
                    return tensor
        return leaf
