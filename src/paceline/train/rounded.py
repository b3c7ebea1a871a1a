"""An optimizer for parameters that learn in bf16: it works in fp32 on a few of them at a time.

A part of the parameters is copied to fp32, updated there by an optimizer of its own, and rounded back by chance. So any
optimizer serves that treats each parameter by itself, and keeps its states in fp32. What is there in fp32 at once is
``CHUNK`` elements and their gradients, or the largest parameter.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from paceline.models.chance import stream_seed
from paceline.optim.base import Estimating, OptimizerConfig, Owning
from paceline.parallel.full import FullTensors
from paceline.parallel.rounding import round_box

CHUNK = 1 << 20

States = dict[Tensor, dict[str, Tensor]]


class Rounded(torch.optim.Optimizer):
    """The optimizer of ``options`` over named local bf16 parameters; ``full`` knows what they are parts of.

    How a value is rounded follows from ``seed``, the step, the name and the value's position in the full parameter.
    """

    def __init__(
        self, options: OptimizerConfig, parameters: Mapping[str, nn.Parameter], full: FullTensors, seed: int
    ) -> None:
        super().__init__(list(parameters.values()), {})
        self._full, self._seed, self._step = full, seed, 0
        self._chunks = [_Chunk(options, part, full, self.state) for part in _chunks(parameters, full)]
        self.param_groups = [group for chunk in self._chunks for group in chunk.optimizer.param_groups]
        self.owner = {name: rank for chunk in self._chunks for name, rank in chunk.owner.items()}
        """See ``Owning``."""

    def begin(self, step: int) -> None:
        """Say which step the next update belongs to."""
        self._step = step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        for chunk in self._chunks:
            with chunk.in_fp32(self.state) as copies:
                chunk.optimizer.step()
                for name, copy in copies.items():
                    self._round(name, copy.detach(), chunk.parameters[name].detach())

    def estimates_at(self, step: int) -> bool:
        """See ``Estimating``."""
        return any(isinstance(c.optimizer, Estimating) and c.optimizer.estimates_at(step) for c in self._chunks)

    @torch.no_grad()
    def estimate(self, targets: int) -> None:
        """See ``Estimating``."""
        for chunk in self._chunks:
            with chunk.in_fp32(self.state):
                assert isinstance(chunk.optimizer, Estimating)
                chunk.optimizer.estimate(targets)

    def _round(self, name: str, exact: Tensor, kept: Tensor) -> None:
        place, key = self._full.part(name), stream_seed(self._seed, "rounding", self._step, name)
        for block in place.blocks:
            round_box(block.of(exact), block.of(kept), start=block.start, full_shape=place.full_shape, key=key)


class _Chunk:
    """Some parameters, and an optimizer over fp32 copies of them, which have memory only while it works."""

    def __init__(
        self, options: OptimizerConfig, parameters: Mapping[str, nn.Parameter], full: FullTensors, states: States
    ) -> None:
        self.parameters = parameters
        self._copies = {
            name: nn.Parameter(parameter.detach().to(torch.float32)) for name, parameter in parameters.items()
        }
        self.optimizer = options.build(self._copies, full)
        self.owner = dict(self.optimizer.owner) if isinstance(self.optimizer, Owning) else {}
        for name, copy in self._copies.items():
            if copy in self.optimizer.state:  # some begin at once
                states[parameters[name]] = self.optimizer.state[copy]
            copy.untyped_storage().resize_(0)

    @contextmanager
    def in_fp32(self, states: States) -> Iterator[dict[str, nn.Parameter]]:
        """Copies of those that have a gradient, with it and with their ``states``, which are kept by parameter."""
        learning = {name: p for name, p in self.parameters.items() if p.grad is not None}
        copies = {name: self._copies[name] for name in learning}
        for name, parameter in learning.items():
            assert parameter.grad is not None
            copy = copies[name]
            copy.untyped_storage().resize_(copy.nbytes)
            copy.copy_(parameter)
            copy.grad = parameter.grad.to(torch.float32)
            self.optimizer.state[copy] = states[parameter]
        yield copies
        for name, parameter in learning.items():
            copy = copies[name]
            copy.untyped_storage().resize_(0)
            copy.grad = None
            states[parameter] = self.optimizer.state[copy]


def _chunks(parameters: Mapping[str, nn.Parameter], full: FullTensors) -> Iterator[dict[str, nn.Parameter]]:
    """Neighbours of about ``CHUNK`` elements together: the same on all ranks, whose optimizers may exchange tensors."""
    chunk: dict[str, nn.Parameter] = {}
    held = 0
    for name, parameter in parameters.items():
        elements = -(-math.prod(full.shape(name)) // full.ranks)
        if chunk and held + elements > CHUNK:
            yield chunk
            chunk, held = {}, 0
        chunk[name] = parameter
        held += elements
    if chunk:
        yield chunk
