"""An optimizer for parameters that learn in bf16: it works in fp32 on a few of them at a time.

A part of the parameters is copied to fp32, updated there by an optimizer of its own, and rounded back by chance. So any
optimizer serves that treats each parameter by itself, and keeps its states in fp32. What is there in fp32 at once is
``CHUNK`` elements and their gradients, or the largest parameter.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from paceline.checkpoint import TensorState
from paceline.comm.replica import local_part
from paceline.models.chance import stream_seed
from paceline.optim.base import OptimizerConfig
from paceline.parallel.rounding import round_box

CHUNK = 1 << 20


class Rounded(torch.optim.Optimizer):
    """The optimizer of ``options`` over named bf16 parameters; each stands at ``places[name]`` in the full one.

    How a value is rounded follows from ``seed``, the step, the name and the value's position in the full parameter.
    """

    def __init__(
        self,
        options: OptimizerConfig,
        parameters: Mapping[str, nn.Parameter],
        places: Mapping[str, TensorState],
        seed: int,
    ) -> None:
        super().__init__(list(parameters.values()), {})
        self._places, self._seed, self._step = places, seed, 0
        self._chunks = [_Chunk(options, part) for part in _chunks(parameters)]
        self.param_groups = [group for chunk in self._chunks for group in chunk.optimizer.param_groups]

    def begin(self, step: int) -> None:
        """Say which step the next update belongs to."""
        self._step = step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        for chunk in self._chunks:
            chunk.step(self.state, self._round)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let the gradients of the parameters go."""
        for chunk in self._chunks:
            for parameter in chunk.parameters.values():
                parameter.grad = None

    def _round(self, name: str, exact: Tensor, kept: Tensor) -> None:
        place, key = self._places[name], stream_seed(self._seed, "rounding", self._step, name)
        for block in place.blocks:
            round_box(block.of(exact), block.of(kept), start=block.start, full_shape=place.full_shape, key=key)


class _Chunk:
    """Some parameters, and an optimizer over fp32 copies of them, which have memory only while it works."""

    def __init__(self, options: OptimizerConfig, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self._copies = {
            name: nn.Parameter(parameter.detach().to(torch.float32)) for name, parameter in parameters.items()
        }
        self.optimizer = options.build(self._copies)
        for copy in self._copies.values():
            local_part(copy.detach()).untyped_storage().resize_(0)

    def step(self, states: dict[Tensor, dict[str, Tensor]], put: Callable[[str, Tensor, Tensor], None]) -> None:
        """Update and give the new values to ``put``, with where to. ``states`` are by parameter, as a checkpoint's."""
        learning = {name: p for name, p in self.parameters.items() if p.grad is not None}
        for name, parameter in learning.items():
            assert parameter.grad is not None
            copy = self._copies[name]
            local = local_part(copy.detach())
            local.untyped_storage().resize_(local.nbytes)
            copy.copy_(parameter)
            copy.grad = parameter.grad.to(torch.float32)
            self.optimizer.state[copy] = states[parameter]
        self.optimizer.step()
        for name, parameter in learning.items():
            copy = self._copies[name]
            local = local_part(copy.detach())
            put(name, local, local_part(parameter.detach()))
            local.untyped_storage().resize_(0)
            copy.grad = None
            states[parameter] = self.optimizer.state[copy]


def _chunks(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Neighbours of about ``CHUNK`` elements together."""
    chunk: dict[str, nn.Parameter] = {}
    held = 0
    for name, parameter in parameters.items():
        elements = local_part(parameter.detach()).numel()
        if chunk and held + elements > CHUNK:
            yield chunk
            chunk, held = {}, 0
        chunk[name] = parameter
        held += elements
    if chunk:
        yield chunk
