"""One rank's view of its replica: parameters that learn, their gradients, and how a step is finished."""

from collections.abc import Callable

import torch

from paceline.comm.replica import Finish, Shard, Vote, local_part
from paceline.optim.base import OptimizerConfig
from paceline.parallel.precision import Masters


class ModuleReplica:
    """A replica whose module is whole on this rank."""

    def __init__(self, masters: Masters, optimizer: OptimizerConfig, clip_norm: float | None) -> None:
        self.shards = [Shard(name, parameter) for name, parameter in masters.parameters.items()]
        self.optimizer = optimizer.build(masters.parameters)
        self._peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._masters = masters
        self._clip_norm = clip_norm
        self._by_name = {shard.name: shard for shard in self.shards}
        self._listener: Callable[[Shard], None] | None = None
        self._untold: set[str] = set()
        self._last = False
        masters.on_gradient(self._gradient_added)

    def on_gradient_ready(self, fn: Callable[[Shard], None]) -> None:
        """Call ``fn`` once per shard, in the last backward pass of the coming step or at its end."""
        self._listener = fn
        self._untold = set(self._by_name)

    def expect(self, last: bool) -> None:
        """Say whether the next backward pass is the last of the step."""
        self._last = last

    def end_backward(self) -> None:
        """Tell the listener of the shards that the last backward pass did not touch: they are final too."""
        for shard in self.shards:
            self._tell(shard.name)
        self._last = False

    def set_rate_factor(self, factor: float) -> None:
        """Set each group's rate to its peak times ``factor``."""
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * factor

    @torch.no_grad()
    def finish(self, vote: Vote) -> Finish:
        """Norm, clip, step if the vote says so, clear the gradients."""
        gradients = [gradient for shard in self.shards if (gradient := shard.gradient) is not None]
        norm = global_norm(gradients)
        stepped = vote(torch.isfinite(norm).item() is True)
        if stepped:
            if self._clip_norm is not None and norm > self._clip_norm:
                torch._foreach_mul_(gradients, self._clip_norm / float(norm))
            self.optimizer.step()
            self._masters.refresh()
        self.optimizer.zero_grad(set_to_none=True)
        return Finish(stepped=stepped, gradient_norm=float(norm))

    def refresh(self) -> None:
        """Bring the computing copy up to date after the masters were set from outside."""
        self._masters.refresh()

    def _gradient_added(self, name: str) -> None:
        if self._last:
            self._tell(name)

    def _tell(self, name: str) -> None:
        if self._listener is not None and name in self._untold:
            self._untold.remove(name)
            self._listener(self._by_name[name])


def global_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all tensors, summed in fp64: fp64 scalar on the CPU."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    norms = torch._foreach_norm([local_part(gradient) for gradient in gradients])
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms).double()).cpu()
    return norm
